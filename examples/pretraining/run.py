"""A run put together: model, data, loop, checkpoints and reports, from the command line's arguments."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import Placement, initial_placement, most_fetched
from jaxpipe.deepseek import DeepSeekModel, ModelConfig, build_model
from jaxpipe.deepseek.hf_config import to_hf_config
from jaxpipe.deepseek.hf_load import load_params
from jaxpipe.planning import fitting
from jaxpipe.planning.chips import chip_of
from pretraining import auto, data, flags, hosts, loop, progress, trainer
from pretraining import corpus as corpora
from pretraining.checkpoint import Checkpoints, Restored
from pretraining.layer_costs import PlannedCosts
from pretraining.layout import Layout, describe
from pretraining.load_report import Evenness
from pretraining.observe import Observer, Throughput
from pretraining.profile_steps import profiler, write_report

TRAINED = 60
"""Steps from which on a checked run must have learned more than how often each token occurs."""


class BadInput(Exception):
    """What was asked for is not possible; found before the first step, or in the data."""


class CheckFailed(RuntimeError):
    """The run does not do what it should."""


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """All that a run needs.

    Attributes:
      config: of the model.
      schedule, mesh, model, pipeline: what runs.
      optimizer, train_config: how it learns.
      corpus: what it learns from.
      batch: sequences of a step.
      sharding: of a batch.
    """

    config: ModelConfig
    schedule: jaxpipe.schedule.Schedule
    mesh: Mesh
    model: DeepSeekModel
    pipeline: jaxpipe.Pipeline
    train_config: trainer.TrainConfig
    optimizer: Any
    corpus: data.Corpus
    batch: int
    sharding: NamedSharding

    @property
    def shards(self) -> int:
        """Devices that a microbatch is sharded over."""
        return self.mesh.size // self.mesh.shape["pp"]


def set_up(args: argparse.Namespace) -> Setup:
    """Everything before the first array.

    Raises:
      ValueError: arguments that do not fit each other, the devices, or the data.
    """
    config = with_fetched(flags.sized_config(args, args.mesh.get("ep", 1), auto_costs=True), args)
    ranks = args.mesh["pp"]
    build = lambda: flags.built_schedule(args.schedule, ranks, args.microbatches or 2 * ranks, args.deferred)  # noqa: E731
    schedule = None if args.schedule == auto.AUTO else build()
    if schedule is None and args.stash == flags.AUTO_STASH:
        raise ValueError("--schedule auto --stash auto: name a schedule, or give the bytes of the stash")
    mesh = jaxpipe.make_mesh(**args.mesh)
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise ValueError(
            f"--mesh {dict(mesh.shape)} has {mesh.size} devices, the {jax.process_count()} processes have "
            f"{jax.device_count()}: all must be used"
        )
    costs = planned_costs(config, args, mesh) if args.layer_costs == flags.AUTO_COSTS else None
    axis = "ep" if "ep" in mesh.shape else None

    def make_model(schedule: jaxpipe.schedule.Schedule) -> DeepSeekModel:
        divided = config if costs is None else costs.applied(schedule)
        return build_model(divided, schedule, args.seed, axis=axis, dtype=jnp.dtype(args.dtype), abstract=True)

    reader = corpora.reader_of_training(args, config.vocab)
    corpus = corpora.open_corpus(args, reader, args.weights, config.vocab, config.sequence)
    train_config = trainer.TrainConfig(
        args.steps,
        args.learning_rate,
        args.warmup,
        weight_decay=args.weight_decay,
        optimizer=args.optimizer,
        rates=args.rates,
        decay=args.decay,
    )
    axes = tuple(name for name in mesh.axis_names if name != "pp")
    sharding = NamedSharding(mesh, P(axes))
    if schedule is None:
        args.out = _out(args)

        def first(sequences: int) -> Any:
            return data.global_batch(corpus.train, args.seed, 0, sequences, config.sequence, sharding)

        auto.settle(args, mesh, make_model, train_config, first)
        schedule = build()
    model = make_model(schedule)
    shards = mesh.size // ranks
    if args.microbatch_size % shards:
        raise ValueError(
            f"--microbatch-size {args.microbatch_size} does not divide over the {shards} devices of a rank: take a "
            f"multiple of {shards}"
        )
    batch = schedule.num_microbatches * args.microbatch_size
    # Fails now, rather than after compilation, if sequences or tokens do not fit.
    data.make_batch(corpus.train, args.seed, 0, batch, config.sequence)
    optimizer = trainer.make_optimizer(train_config, model)
    pipeline = trainer.pipelined(
        model,
        schedule,
        mesh,
        grad_dtype=jnp.dtype(args.grad_dtype),
        stash=None if args.stash == flags.AUTO_STASH else args.stash,
        offload=args.offload,
    )
    if args.stash == flags.AUTO_STASH:
        pipeline = _fitting(pipeline, model, optimizer, trainer.abstract_batch(config, batch))
    return Setup(
        model.config,
        schedule,
        mesh,
        model,
        pipeline,
        train_config,
        optimizer,
        corpus,
        batch,
        sharding,
    )


def with_fetched(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """The configuration whose devices get from each other as many experts as ``--fetched`` says."""
    devices = args.mesh.get("ep", 1)
    fetched = None if args.fetched == "all" else args.fetched
    if fetched == flags.AUTO_FETCHED:
        masters, fetched = config.moe.masters or config.experts, None
        if args.rebalance_every and config.redundant and devices > 1:
            start = initial_placement(1, config.experts, trainer.rebalance_config(config, devices))
            twice = 2 * most_fetched(start.phy2log, masters, devices)
            fetched = twice if 2 * twice <= masters // devices else None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, fetched=fetched))


def planned_costs(config: ModelConfig, args: argparse.Namespace, mesh: Mesh) -> PlannedCosts:
    """What layers cost on the devices at hand, as ``plan`` plans them.

    Raises:
      ValueError: devices whose rates nobody knows.
    """
    kind = mesh.devices.flat[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        raise ValueError(f"--layer-costs auto: what {kind} can do is not known here; give the costs that plan prints")
    sizes = dict(mesh.shape)
    size = max(1, args.microbatch_size * sizes["pp"] // mesh.size)
    return PlannedCosts(config, sizes, size, chip, devices_per_node=args.devices_per_node)


def _fitting(pipeline: jaxpipe.Pipeline, model: DeepSeekModel, optimizer: Any, batch: Any) -> jaxpipe.Pipeline:
    """The pipeline with as many bytes of a microbatch and stage as its devices have memory for.

    Raises:
      ValueError: devices whose memory nobody knows.
    """
    mesh: Any = pipeline.mesh
    device = mesh.devices.flat[0]
    chip, stats = chip_of(device.device_kind), device.memory_stats() or {}
    if chip is None or "bytes_limit" not in stats:
        raise ValueError(f"--stash auto: how much memory {device.device_kind} has is not known here; give bytes")
    state = trainer.abstract_state(model, optimizer, mesh)
    found = jaxpipe.fit_stash(
        pipeline,
        state.params,
        batch,
        chip,
        memory=fitting.SHARE * stats["bytes_limit"],
        optimizer=state.opt_state,
    )
    _say(f"stash: {found.stash:,} bytes of a microbatch and stage, {found.plan.memory.total:,} of a device in all")
    return found.pipeline


def train(args: argparse.Namespace) -> None:
    """Trains, from the beginning or a checkpoint.

    Raises:
      BadInput: the arguments or the data cannot be used.
      CheckFailed: the run is not equal to the plain program, or has learned nothing.
      RuntimeError, OSError: of `loop.train` and `Checkpoints.restore`.
    """
    try:
        setup = set_up(args)
        loop_config = loop.LoopConfig(args.steps, args.save_every, max(1, args.eval_every), args.max_skipped)
        rebalancer = None
        if args.rebalance_every and setup.config.redundant and setup.mesh.shape.get("ep", 1) > 1:
            rebalancer = make_rebalancer(args, setup)
        out = _out(args)
        if args.weights is None:
            state = trainer.init_state(setup.model, setup.optimizer, setup.mesh)
        else:
            state = trainer.abstract_state(setup.model, setup.optimizer, setup.mesh)
        layout = Layout(setup.model.to_layers, setup.model.from_layers, setup.mesh, describe(state))
        checkpoints = Checkpoints(out / "checkpoints", layout, args.keep)
        facts = _facts(args, setup)
        restored = _restore(args, out, layout, checkpoints, facts)
        if restored is not None:
            state = restored.state
            if rebalancer is not None and "balance" in restored.facts:
                rebalancer.load_state_dict(restored.facts["balance"])
        elif args.weights is not None:
            state = _begin_with(args.weights, setup)
        if restored is None and rebalancer is not None and setup.config.moe.fetched is not None:
            near = initial_placement(setup.config.routed_layers, setup.config.experts, rebalancer.config)
            state = state._replace(params=setup.model.with_placements(state.params, near))
    except ValueError as error:
        raise BadInput(str(error)) from error
    start = int(state.step)
    # The steps take the state over: what the check begins with is kept.
    initial = jax.tree.map(np.array, state) if args.check and start == 0 and jax.process_count() == 1 else None
    throughput = Throughput(setup.batch * setup.config.sequence, setup.config.flops_per_token, _peak(setup, args))
    with Observer(out if hosts.is_first() else None, args.steps, start, throughput) as observer:
        observer.note(_describe(args, setup, out, restored))
        program = loop.TrainFunctions(
            trainer.make_step(setup.pipeline, setup.model, setup.optimizer, setup.mesh),
            batches_of(setup.corpus.train, args.seed, setup),
            jax.random.key(args.seed),
            _evaluation(args, setup) if args.eval_every else None,
            balance_of(setup),
            profiler(out / "profile", setup.mesh, start, args.profile),
        )
        result = loop.train(
            loop_config,
            program,
            state,
            observer,
            checkpoints=checkpoints,
            facts=facts,
            rebalancer=rebalancer,
            stop=hosts.stop_signal(start),
        )
    checkpoints.close()
    if result.interrupted:
        return
    if args.profile and len(result.losses) >= args.profile + 2:
        written = write_report(out / "profile", setup.mesh, setup.pipeline, args.profile)
        if written is not None:
            _say("profile of {1}: {0}".format(*written))
    if initial is not None:
        check(args, setup, initial, result.losses)


def check(args: argparse.Namespace, setup: Setup, initial: trainer.TrainState, losses: list[float]) -> None:
    """Compares the first steps with a run without a pipeline, and the last with the tokens' frequencies.

    Args:
      args: of the run.
      setup: of the run.
      initial: the state that the run began with, on the host.
      losses: of all its steps.

    Raises:
      CheckFailed: they differ; or the loss is not below the entropy, if there were `TRAINED` steps.
    """
    steps = min(args.check, len(losses))
    model = setup.model.on_one_device()
    plain = trainer.plain_value_and_grad(model, parts=setup.schedule.num_microbatches * setup.shards)
    step = trainer.make_step(plain, model, setup.optimizer)
    state, rng, expected = jax.device_put(initial, jax.devices()[0]), jax.random.key(args.seed), []
    for index in range(steps):
        batch = data.make_batch(setup.corpus.train, args.seed, index, setup.batch, setup.config.sequence)
        state, metrics = step(state, batch, rng)
        expected.append(float(metrics["loss"]))
    _say("with a pipeline    " + " ".join(f"{loss:.6f}" for loss in losses[:steps]))
    _say("without a pipeline " + " ".join(f"{loss:.6f}" for loss in expected))
    exact = args.dtype == args.grad_dtype == "float32" and setup.config.precision == "bf16"
    tolerance = 1e-4 if exact else 2e-2
    if not np.allclose(losses[:steps], expected, rtol=tolerance):
        raise CheckFailed(f"the first {steps} losses differ from those without a pipeline by more than {tolerance:.0e}")
    entropy, final = data.unigram_entropy(setup.corpus.train), float(np.mean(losses[-5:]))
    if len(losses) >= TRAINED:
        if not final < entropy:
            raise CheckFailed(f"after {len(losses)} steps the loss {final:.3f} is not below the entropy {entropy:.3f}")
        _say(f"final loss {final:.3f} < unigram entropy {entropy:.3f}")


def _restore(
    args: argparse.Namespace, out: pathlib.Path, layout: Layout, checkpoints: Checkpoints, facts: dict[str, Any]
) -> Restored | None:
    """The checkpoint to begin with; None: begin anew."""
    if args.resume == "never":
        if steps := checkpoints.steps():
            raise ValueError(
                f"--resume never, and {out} holds checkpoints of steps {steps}: choose another --out, or remove them"
            )
        return None
    restored = checkpoints.restore()
    if restored is None and args.resume != "auto":
        folder = pathlib.Path(args.resume)
        folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        other = Checkpoints(folder, layout, read_only=True)
        restored = other.restore()
        if restored is None:
            raise ValueError(f"--resume {args.resume}: there is no checkpoint in {folder}")
        other.close()
    if restored is None:
        return None
    if restored.facts["data"] != facts["data"]:
        raise ValueError(
            f"the checkpoint of step {restored.step} was trained on {restored.facts['data']}, this run is to read "
            f"{facts['data']}: then its place in the data means nothing. Give the same options, or another --out"
        )
    if (told := restored.facts.get("lora")) != facts["lora"]:
        raise ValueError(
            f"the checkpoint of step {restored.step} has adapters of {told}, this run {facts['lora']}: then they mean "
            "something else. Give the same --lora options; or export the run, and begin with the folder (--from)"
        )
    return restored


def _begin_with(folder: pathlib.Path, setup: Setup) -> trainer.TrainState:
    """The state before the first step, with the weights of a Hugging Face folder."""
    shown = progress.amount(f"reading {folder}") if hosts.is_first() else None
    params = load_params(folder, setup.model, setup.mesh, progress=shown)
    return trainer.state_from(params, setup.model, setup.optimizer, setup.mesh)


def _hugging_face(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """What an export needs: the model as config.json says it, or why it cannot, and the folder that it began with."""
    found: dict[str, Any] = {"folder": None if args.weights is None else str(args.weights.absolute())}
    try:
        return found | {"config": to_hf_config(setup.config)}
    except ValueError as error:
        return found | {"refused": str(error)}


def _facts(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """What a checkpoint says of its run; what is under "data" must not change."""
    return {
        "data": {
            "seed": args.seed,
            "batch": setup.batch,
            "sequence": setup.config.sequence,
            "tokens": setup.corpus.train.total,
            **({"document_mask": True} if args.document_mask else {}),
        },
        "rng": jax.random.key_data(jax.random.key(args.seed)),
        "config": args.config or (flags.DEFAULT if args.weights is None else str(args.weights)),
        "reader": corpora.reader_fact(args, setup.config.vocab),
        "hugging_face": _hugging_face(args, setup),
        "lora": lora_fact(setup.config),
        "dense_layers": setup.config.dense_layers,
        "layers": setup.config.layers,
        "layer_costs": None if setup.config.layer_costs is None else str(setup.config.layer_costs),
        "stages": list(setup.model.arrangement.counts),
        "schedule": args.schedule,
        "mesh": dict(setup.mesh.shape),
    }


def lora_fact(config: ModelConfig) -> dict[str, Any] | None:
    """The model's adapters as JSON; None where it has none."""
    lora = config.lora
    return None if lora is None else {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}


def batches_of(part: data.Batches, seed: int, setup: Setup) -> Callable[[int], Any]:
    """The batch of each step, on the devices."""

    def batch(step: int) -> Any:
        try:
            return data.global_batch(part, seed, step, setup.batch, setup.config.sequence, setup.sharding)
        except (ValueError, OSError) as error:
            raise BadInput(f"data of step {step + 1}: {error}") from error

    return batch


def _evaluation(args: argparse.Namespace, setup: Setup) -> Callable[[Any], float]:
    evaluate = trainer.make_evaluate(setup.model, setup.schedule, setup.mesh)
    batch = batches_of(setup.corpus.held_out, args.seed, setup)

    def run(state: Any) -> float:
        return float(np.mean([float(evaluate(state.params, batch(index))) for index in range(args.eval_batches)]))

    return run


def make_rebalancer(args: argparse.Namespace, setup: Setup) -> trainer.Rebalancer:
    """Live load balancing as the flags ask for it, with what a token and a byte cost here.

    Raises:
      ValueError: several processes, whose times differ, should decide by times.
    """
    must_pay = args.rebalance_if == "pays"
    if must_pay and jax.process_count() > 1:
        raise ValueError("--rebalance-if pays with several processes: their times differ, take better")
    config, chip = setup.config, chip_of(setup.mesh.devices.flat[0].device_kind)
    tokens = setup.batch * config.sequence
    choice = 18.0 * config.moe.width * config.moe.hidden  # FLOPs of three products, forward and twice backward
    return trainer.Rebalancer(
        setup.model,
        setup.mesh.shape["ep"],
        ranks=setup.mesh.shape["pp"],
        interval=args.rebalance_every,
        must_pay=must_pay,
        token_share=choice * setup.mesh.size / (tokens * config.flops_per_token),
        bytes_per_second=copied_per_second() if chip is None else chip.interconnect,
    )


def copied_per_second(size: int = 2**24) -> float:
    """Bytes that this machine copies in a second: what devices without a link of their own hand over."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    best = math.inf
    for _ in range(3):
        begun = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - begun)
    return size / best


def balance_of(setup: Setup) -> Callable[[Any], Evenness]:
    """What `pretraining.loop.TrainFunctions` calls ``balance``."""
    devices = setup.mesh.shape.get("ep", 1)

    def of(given: Any) -> Evenness:
        placement = given if isinstance(given, Placement) else setup.model.placements(given.params)
        if placement is None:
            slots = np.tile(np.arange(setup.config.experts, dtype=np.int32), (setup.config.routed_layers, 1))
            host = Placement.from_phy2log(slots, setup.config.experts)
        elif jax.process_count() > 1 and placement is not given:
            host = Placement(*(multihost_utils.process_allgather(array, tiled=True) for array in placement))
        else:
            host = Placement(*map(np.asarray, placement))
        return Evenness(host, devices)

    return of


def _peak(setup: Setup, args: argparse.Namespace) -> float | None:
    chip = chip_of(setup.mesh.devices.flat[0].device_kind)
    unit = "fp8" if setup.config.precision == "fp8" else "bf16" if args.dtype == "bfloat16" else "tf32"
    return chip.flops(unit) * setup.mesh.size if chip else None


def _out(args: argparse.Namespace) -> pathlib.Path:
    if args.out is not None:
        return args.out
    if jax.process_count() > 1:
        raise ValueError("several processes need one --out, on a file system that all share")
    return pathlib.Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")


def _describe(args: argparse.Namespace, setup: Setup, out: pathlib.Path, restored: Restored | None) -> str:
    total, train = setup.config.total, setup.corpus.train
    begins = "from the beginning" if args.weights is None else f"beginning with the weights of {args.weights}"
    begins = begins if restored is None else f"continuing after step {restored.step}"
    name = args.config or args.weights or flags.DEFAULT
    return (
        f"{name} with {args.schedule} on {dict(setup.mesh.shape)} {jax.devices()[0].platform} devices of "
        f"{jax.process_count()} processes: {setup.schedule.num_stages} stages, {setup.schedule.num_microbatches} "
        f"microbatches, {total / 1e6:.1f}M parameters{_adapters(setup)}, "
        f"{setup.batch * setup.config.sequence} tokens a step\n"
        f"{len(train) / 1e6:.1f}M tokens in {setup.corpus.source}, unigram entropy "
        f"{data.unigram_entropy(train):.3f} nats\n"
        f"{begins}; {out}/ gets metrics, checkpoints and reports"
    )


def _adapters(setup: Setup) -> str:
    """How many parameters adapters have, where these alone are trained."""
    lora = setup.config.lora
    if lora is None:
        return ""
    pairs = zip(*map(jax.tree.leaves, (setup.model.params, setup.model.trained)), strict=True)
    count = sum(math.prod(leaf.shape) for leaf, trained in pairs if trained)
    return f" frozen, {count / 1e6:.3g}M of adapters of rank {lora.rank} trained"


def _say(text: str) -> None:
    if hosts.is_first():
        print(text)
