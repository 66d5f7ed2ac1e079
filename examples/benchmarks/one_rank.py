"""One device of many runs alone on one GPU, beside the plan: peak memory and time of a training step.

    python examples/benchmarks/one_rank.py [--config dsv3-671b] [--rank 0,8,15] [--ranks 16] [--ep 64]
        [--schedule dualpipev] [--precision bf16] [--deferred 4] [--microbatches 32] [--remat layer]
        [--stash 1.4e9] [--ends apart] [--tiny]

The program is that of the whole mesh, ranks x ep devices, as it is traced for it: tables, slots, branches of all ranks,
sizes of exchanges; with masters, moments, working copies and sums of gradients of one device. Messages between ranks
are dropped, and what arrives is made up; a device gets in an exchange what it sent, so that its experts have as many
rows as all devices would send it; gathers are copies, and sums have nothing of others. Biases of routers stay as they
are. One compiled program serves all ranks.

"planned" is `jaxpipe.plan` of the mesh: memory of a device, and the time that the rank's kernels take, exchanges being
passes over memory (`jaxpipe.planning.rank_time`). "peak" is what the allocator had in use at most in the step;
"compiled" are arguments and temporaries by the compiler. With --dry nothing is run, only traced, planned and lowered.
With --own the program, and so its plan, has the branches of these ranks alone: it compiles faster, and may need less
memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # nothing but the step is on the GPU

import jax
import jax.numpy as jnp
import numpy as np
from record import Recorder, machine, make_parser, medians_ms

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import flags, trainer
from pretraining import plan as planning
from pretraining.layer_costs import PlannedCosts

import jaxpipe
from jaxpipe.deepseek import DeepSeekModel, build_model, stand_in
from jaxpipe.deepseek.model import names
from jaxpipe.planning.chips import chip, chip_of
from jaxpipe.planning.liveness import nbytes
from jaxpipe.planning.one_device import OneDevice, one_device
from jaxpipe.planning.planner import Plan
from jaxpipe.planning.rank_time import rank_seconds
from jaxpipe.runtime.program import Program

GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Alone:
    """A device of the mesh: its model, its program, its optimizer, and the plan of the mesh."""

    model: DeepSeekModel
    device: OneDevice
    optimizer: Any
    plan: Plan
    sequences: int

    @property
    def message(self) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of what travels between stages."""
        config = self.model.config
        return (self.sequences, config.sequence, config.width), self.model.dtype


def set_up(args: argparse.Namespace) -> Alone:
    """Traces and plans; nothing is made.

    Raises:
      ValueError: sizes that do not fit each other.
    """
    config = dataclasses.replace(flags.sized_config(args, args.ep, auto_costs=True), bias_update_speed=0.0)
    microbatches = args.microbatches or 2 * args.ranks
    schedule = flags.built_schedule(args.schedule, args.ranks, microbatches, args.deferred)
    found = chip_of(jax.devices()[0].device_kind) or chip(args.chip)
    sizes = {"pp": args.ranks, "ep": args.ep}
    if args.layer_costs == flags.AUTO_COSTS:
        config = PlannedCosts(config, sizes, args.microbatch_size, found).applied(schedule)
    mesh = planning.abstract_mesh(sizes, found)
    batch = trainer.abstract_batch(config, microbatches * args.ep * args.microbatch_size)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def traced(stash: int | None, **core: Any) -> tuple[DeepSeekModel, Any, Any, jaxpipe.Pipeline]:
        model = build_model(config, schedule, 0, axis="ep", dtype=jnp.dtype(args.dtype), abstract=True, **core)
        optimizer = trainer.make_optimizer(trainer.TrainConfig(steps=100), model)
        state = trainer.abstract_state(model, optimizer, mesh)
        pipeline = trainer.pipelined(model, schedule, mesh, dispatch="loops", stash=stash)
        if args.own:
            pipeline = dataclasses.replace(pipeline, program=branches_of(pipeline.program, args.rank))
        return model, optimizer, state, pipeline

    stash = args.stash if isinstance(args.stash, int) else None
    _, _, state, pipeline = traced(stash, core=stand_in.attention)
    given = dict(optimizer=state.opt_state, rng=key, kernels=planning.KERNELS)
    if args.stash == flags.AUTO_STASH:
        stash, _, plan = jaxpipe.fit_stash(pipeline, state.params, batch, found, **given)
    else:
        plan = jaxpipe.plan(pipeline, state.params, batch, found, **given)
    model, optimizer, state, pipeline = traced(stash)
    device = one_device(pipeline, state.params, batch, key)
    return Alone(model, device, optimizer, plan, args.microbatch_size)


def branches_of(program: Program, ranks: Sequence[int]) -> Program:
    """The program with the branches of some ranks alone; the others idle where they have another one."""
    kept = np.union1d([0], program.branch[:, list(ranks)])
    branch = np.zeros_like(program.branch)
    for new, old in enumerate(kept):
        branch[program.branch == old] = new
    return dataclasses.replace(program, branches=tuple(program.branches[old] for old in kept), branch=branch)


def make_step(alone: Alone) -> Callable[..., Any]:
    """A jitted ``step(state, batch, rng, rank, message) -> (state, metrics)``, as of `trainer.make_step`."""

    def step(state: Any, batch: Any, rng: jax.Array, rank: jax.Array, message: jax.Array) -> Any:
        def received(sent: jax.Array) -> jax.Array:
            return message if (sent.shape, sent.dtype) == (message.shape, message.dtype) else sent

        def value_and_grad(params: Any, batch: Any, rng: jax.Array) -> Any:
            return alone.device({"pp": rank, "ep": 0}, params, batch, rng, received=received)

        # Called as it is, not as a jitted function, which this one becomes.
        return trainer.make_step(value_and_grad, alone.model, alone.optimizer).__wrapped__(state, batch, rng)

    return jax.jit(step, donate_argnums=0)


def abstract_arguments(alone: Alone) -> tuple[Any, ...]:
    """Shapes and dtypes of what a step takes."""
    shape, dtype = alone.message
    rank, message = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(lambda params: _state(alone, params), alone.device.params)
    return state, alone.device.batch, jax.eval_shape(lambda: jax.random.key(0)), rank, message


def _state(alone: Alone, params: Any) -> trainer.TrainState:
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        opt_state = alone.optimizer.init(params)
    return trainer.TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def init_state(alone: Alone, rank: int) -> trainer.TrainState:
    """A state of random numbers, each part of the size that a model begins with; placements are the rank's own."""
    whole = jax.eval_shape(lambda: alone.model.init(0))

    def integers() -> list[jax.Array]:  # all that is computed of the whole model
        made = alone.model.init(0)
        pairs = zip(jax.tree.leaves(made), jax.tree.leaves(alone.device.params), strict=True)
        return [_part(leaf, own.shape, rank) for leaf, own in pairs if not jnp.issubdtype(leaf.dtype, jnp.floating)]

    def make(path: Any, own: jax.ShapeDtypeStruct, given: list[jax.Array]) -> jax.Array:
        name = names(path)[-1]
        if not jnp.issubdtype(own.dtype, jnp.floating):
            return given.pop(0)
        if name == "bias":
            return jnp.zeros(own.shape, own.dtype)
        if name == "scale" or own.ndim < 2:
            return jnp.ones(own.shape, own.dtype)
        key = jax.random.fold_in(jax.random.key(1), sum(map(ord, "/".join(names(path)))))
        return jax.random.normal(key, own.shape, own.dtype) * own.shape[-2] ** -0.5

    assert jax.tree.structure(whole) == jax.tree.structure(alone.device.params)
    given = jax.jit(integers)()
    params = jax.jit(
        lambda given: jax.tree_util.tree_map_with_path(
            lambda path, own, left=list(given): make(path, own, left), alone.device.params
        )
    )(given)
    return jax.jit(lambda params: _state(alone, params), donate_argnums=0)(params)


def _part(leaf: jax.Array, shape: tuple[int, ...], rank: int) -> jax.Array:
    """The rank's rows of a leaf that is divided over ranks alone, or the whole."""
    return leaf if leaf.shape == shape else jax.lax.slice_in_dim(leaf, rank * shape[0], (rank + 1) * shape[0])


def measure(alone: Alone, args: argparse.Namespace, report: Recorder) -> None:
    """Compiles, runs each rank, prints."""
    begin = time.perf_counter()
    lowered = make_step(alone).lower(*abstract_arguments(alone))
    print(f"lowered in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if args.dry:
        report.table([planned_row(alone, rank) for rank in args.rank], labels=3)
        return
    found, begin = chip_of(jax.devices()[0].device_kind), time.perf_counter()
    options: dict[str, Any] = {}
    if found is not None:
        state, *_ = abstract_arguments(alone)
        options = dict(jaxpipe.compiler_options(nbytes(jax.tree.leaves(state)), found.memory))
    step = lowered.compile(compiler_options=options)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    analysis: Any = step.memory_analysis()
    report.table((row(alone, step, analysis, rank, args.repeats) for rank in args.rank), labels=3)


def planned_row(alone: Alone, rank: int) -> dict[str, Any]:
    """What the plan says of a rank."""
    seconds = rank_seconds(alone.device.pipeline, alone.plan, rank)
    schedule, precision = alone.device.pipeline.program.schedule.name, alone.model.config.moe.recipe.name
    labels = {"schedule": schedule, "products": precision, "rank": str(rank)}
    return {**labels, "planned GB": alone.plan.memory.total / GIGA, "planned s": seconds}


def row(alone: Alone, step: Any, analysis: Any, rank: int, repeats: int) -> dict[str, Any]:
    """Runs a rank."""
    shape, dtype = alone.message
    states = [init_state(alone, rank)]
    batch = jax.tree.map(_tokens(alone), alone.device.batch)
    rng, message = jax.random.key(0), jax.jit(lambda: jax.random.normal(jax.random.key(2), shape, dtype))()
    place = jnp.int32(rank)

    def call() -> Any:
        state, metrics = step(states.pop(), batch, rng, place, message)
        states.append(state)
        return metrics

    metrics = jax.block_until_ready(call())
    (ms,) = medians_ms([call], repeats)
    used = jax.devices()[0].memory_stats()
    peak = used["peak_bytes_in_use"] / GIGA if used else float("nan")
    compiled = (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) / GIGA
    planned = planned_row(alone, rank)
    return {
        **planned,
        "peak GB": peak,
        "peak / planned": peak / planned["planned GB"],
        "compiled GB": compiled,
        "compiled / planned": compiled / planned["planned GB"],
        "step s": ms / 1e3,
        "step / planned": ms / 1e3 / planned["planned s"],
        "dropped": int(metrics["dropped"]),
        "finite": str(bool(metrics["finite"])),
    }


def _tokens(alone: Alone) -> Callable[[Any], jax.Array]:
    """Makes a leaf of a batch: any tokens, all of which count."""

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(np.random.default_rng(0).integers(0, alone.model.config.vocab, leaf.shape), leaf.dtype)

    return make


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments; None: as this process was started."""
    parser = make_parser(__doc__)
    flags.add_sizes(parser, "dsv3-671b")
    parser.add_argument("--rank", default="0", help="which of the ranks runs; several as in 0,8,15")
    parser.add_argument("--ranks", type=int, default=16, help="of the pipeline")
    parser.add_argument("--ep", type=int, default=64, help="devices that the experts are spread over")
    parser.add_argument("--schedule", default="dualpipev", help="a name that jaxpipe.schedule.build knows")
    parser.add_argument("--microbatches", type=int, help="of a step; default: twice the ranks")
    parser.add_argument("--microbatch-size", type=int, default=1, help="sequences of a microbatch on a device")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the computation")
    parser.add_argument("--chip", default="H200", help="of the plan, where the device at hand is not known")
    parser.add_argument("--repeats", type=int, default=3, help="steps of which the median counts")
    parser.add_argument("--own", action="store_true", help="leave out what only other ranks run")
    parser.add_argument("--dry", action="store_true", help="trace, plan and lower alone")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.config, args.ranks, args.ep, args.dtype, args.layers = "tiny", 2, 2, "float32", 2
        args.schedule, args.rank = "1f1b", "0,1"
    args.rank = [int(rank) for rank in args.rank.split(",")]
    wrong = [rank for rank in args.rank if not 0 <= rank < args.ranks]
    if wrong:
        parser.error(f"--rank {wrong[0]} of {args.ranks}: they are numbered from 0 to {args.ranks - 1}")
    return args


def main() -> None:
    """Measures."""
    args = parse()
    alone = set_up(args)
    sizes = f"{alone.device.pipeline.__name__} of {dict(alone.device.pipeline.mesh.shape)}"
    report = Recorder.begin(args, machine(), args.config, sizes)
    measure(alone, args, report)
    if not args.own:  # whose other ranks the plan knows nothing of
        print(f"\n{alone.plan}")


if __name__ == "__main__":
    main()
