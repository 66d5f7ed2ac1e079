"""What a run needs and how fast it should be, worked out without devices and without making a parameter.

`jaxpipe.plan` plans the training step of each schedule; here the results stand side by side.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import jaxpipe
from jaxpipe.deepseek import Arrangement, LayerCosts, build_model, stand_in
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.planning.chips import CHIPS, Achieved, Chip, chip
from jaxpipe.planning.mesh import mesh_sizes
from jaxpipe.planning.parts import detail_lines, imbalance
from jaxpipe.planning.rates import PROGRAMS
from jaxpipe.schedule.registry import BUILDERS
from jaxpipe.stage.kernel_flops import FlopsRule, attention_flops
from pretraining import fitting, flags, plan_search, trainer
from pretraining.compiled import Compiled, compile_step, table
from pretraining.layer_costs import PlannedCosts
from pretraining.tables import markdown_head, markdown_row

COLUMNS = (
    "schedule", "masters", "optimizer", "working copy", "gradients", "stash", "in transit", "at work", "total",
    "seconds", "bubble", "MFU", "tokens/s",
)  # fmt: skip
GIGA = 1e9
EVEN = 1.05
"""What the busiest rank has at most, over the mean of all, where ranks have about the same."""


def _attention(products: int) -> FlopsRule:
    return lambda operands, results: attention_flops(*operands[:3], products=products, causal=True)


KERNELS = {stand_in.FORWARD: _attention(2), stand_in.BACKWARD: _attention(5)}
"""FLOPs of attention's kernels."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One schedule.

    Attributes:
      name: of the schedule.
      reason: why there is no such schedule for these sizes, or None; all else is then None.
      memory: of the device that needs most.
      seconds: of a step.
      bubble: the pipeline's idle share of it, on the rank that is idle longest.
      mfu: the model's FLOPs (nothing counted that is computed again) as a share of what the chips could do.
      tokens: per second, of all devices together.
      stages: how many have which layers, as text.
      plan: what all this is of.
      stash: bytes that a stage may keep of a microbatch, or None.
      costs: of layers, by which the stages got them; None: operations.
    """

    name: str
    reason: str | None = None
    memory: jaxpipe.Memory | None = None
    seconds: float = 0.0
    bubble: float = 0.0
    mfu: float = 0.0
    tokens: float = 0.0
    stages: str = ""
    plan: jaxpipe.Plan | None = None
    stash: int | None = None
    costs: LayerCosts | None = None

    @property
    def uncounted(self) -> tuple[tuple[str, float], ...]:
        """Kernels whose FLOPs no rule knows, and how often a device runs them."""
        return () if self.plan is None else self.plan.uncounted


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """What `plan` found; prints as text.

    Attributes:
      config: the model.
      mesh: sizes by axis.
      chip: what it runs on.
      microbatches: of a step.
      microbatch_size: sequences of a microbatch on a device.
      device_parameters: parameters that a device keeps.
      rows: the schedules.
    """

    config: ModelConfig
    mesh: tuple[tuple[str, int], ...]
    chip: Chip
    microbatches: int
    microbatch_size: int
    device_parameters: int
    rows: tuple[Row, ...]

    def _again(self) -> str:
        """What the backward pass computes again, or what it may keep."""
        stashes = {row.name: row.stash for row in self.rows if row.stash is not None}
        if len(set(stashes.values())) > 1:
            each = ", ".join(f"{_short(size / GIGA)} with {name}" for name, size in stashes.items())
            return f"what exceeds so many GB of a microbatch and stage: {each}"
        if stashes:
            return f"what exceeds {_short(max(stashes.values()) / GIGA)} GB of a microbatch and stage"
        return self.config.remat

    def _more_even(self) -> list[str]:
        """What would leave the busiest rank less to do, where it has much more than others."""
        worst = max((imbalance(row.plan) for row in self.rows if row.plan and row.costs is None), default=1.0)
        if worst <= EVEN or len(set(self.config.layer_kinds)) == 1:
            return []
        return ["  stages got their layers by operations: --layer-costs auto gives them by planned time"]

    def __str__(self) -> str:
        config, sizes = self.config, dict(self.mesh)
        devices = math.prod(sizes.values())
        mtp = f", and {config.mtp_parameters / GIGA:.2f} of multi-token prediction" if config.mtp else ""
        tokens = self.microbatches * self.microbatch_size * config.sequence * devices // sizes["pp"]
        there = [(row.name, row.plan, row.tokens / devices) for row in self.rows if row.plan is not None]
        ranked = ", ".join(f"{name} {each:,.0f}" for name, _, each in there)
        uneven = ", ".join(f"{name} {imbalance(found):.3f}" for name, found, _ in there)
        lines = [
            f"{devices} {self.chip.name}, mesh {sizes}; {self.microbatches} microbatches of {self.microbatch_size} "
            f"sequences a device, {config.sequence} tokens each: {tokens:,} tokens a step",
            *([] if not ranked else [f"tokens/s a device: {ranked}"]),
            *([] if not uneven else [f"the rank with most work, over the mean of all: {uneven}"]),
            *self._more_even(),
            f"parameters, in billions: {config.total / GIGA:.2f} in all, {config.active / GIGA:.2f} active{mtp}; "
            f"{self.device_parameters / GIGA:.2f} on a device",
            f"layers: {_counted(config.layer_kinds)}",
            *(f"stages of {row.name}: {row.stages}{_by(row.costs)}" for row in self.rows if row.memory),
            f"computed again in the backward pass: {self._again()}; moments in {config.moments}; {_arithmetic(config)}",
            "",
            "Memory of the device that needs most, in GB; time of a step",
            "",
            markdown_head(COLUMNS),
        ]
        for row in self.rows:
            if row.memory is None:
                lines.append(markdown_row([row.name, row.reason, *[""] * (len(COLUMNS) - 2)]))
                continue
            m = row.memory
            parts = (m.masters, m.optimizer, m.working, m.gradients, m.stash, m.in_flight, m.transient, m.total)
            sizes = [_short(part / GIGA) for part in parts]
            sizes[-1] += "" if m.total <= self.chip.memory else " (too much)"
            measures = _short(row.seconds), f"{row.bubble:.1%}", f"{row.mfu:.1%}", f"{row.tokens:,.0f}"
            lines.append(markdown_row([row.name, *sizes, *measures]))
        lines += [f"{row.name}: {line}" for row in self.rows if row.plan is not None for line in row.plan.host_lines()]
        missing = {name for row in self.rows for name, _ in row.uncounted}
        lines += [f"not counted: {name}" for name in sorted(missing)]
        for row in self.rows:
            lines += fitting.lines(row.name, row.plan, self.config) if row.plan is not None else []
        return "\n".join(lines)

    def details(self) -> str:
        """Where the time of each schedule goes, and what was assumed."""
        blocks = [[f"## {row.name}", "", *detail_lines(row.plan)] for row in self.rows if row.plan is not None]
        return "\n".join(line for block in blocks for line in [*block, ""])


def plan(
    config: ModelConfig,
    mesh: Mapping[str, int],
    *,
    schedules: Sequence[str] = tuple(BUILDERS),
    microbatches: int | None = None,
    microbatch_size: int = 1,
    deferred: int | None = None,
    chip: Chip = CHIPS["H800"],
    achieved: Achieved = PROGRAMS,
    dtype: Any = jnp.bfloat16,
    grad_dtype: Any = jnp.float32,
    devices_per_node: int = 8,
    cpu: bool = False,
    stash: int | str | None = None,
    offload: int = 0,
    by_time: bool = False,
) -> PlannedRun:
    """Parameters, memory and time of a training run.

    Args:
      config: the model.
      mesh: sizes of the axes "pp", "ep" and "dp" in the order of the devices, the last varies fastest.
      schedules: by name.
      microbatches: of a step; default: four for each pipeline rank.
      microbatch_size: sequences of a microbatch on one device.
      deferred: most weight gradients that a rank puts off at once; None: as many as each schedule does.
      chip: what it runs on.
      achieved: which share of the chip's best programs reach.
      dtype: of activations and products.
      grad_dtype: of sums of gradients.
      devices_per_node: devices with fast links to each other.
      cpu: memory as on CPU devices; otherwise as on GPUs, with attention that keeps no scores.
      stash: bytes that a stage may keep of a microbatch; "auto": as many as fit the chip, of each schedule; None: as
        ``config.remat`` says.
      offload: bytes of a microbatch and stage that go to the host's memory.
      by_time: whether stages get layers by what each kind takes, as it is planned, in place of ``config.costs``.

    Raises:
      ValueError: a mesh without "pp", axes of other names, sizes that do not divide.
    """
    sizes = {**mesh, "ep": mesh.get("ep", 1)}
    if not {"pp", "ep"} <= set(sizes) <= set(flags.AXES) or min(sizes.values()) < 1:
        raise ValueError(
            f"mesh {dict(mesh)}: give the size of axis pp, of ep where experts are sharded, and of dp where there are "
            "several such groups"
        )
    shards = math.prod(size for name, size in sizes.items() if name != "pp")
    config = config.over_devices(sizes["ep"])
    microbatches = 4 * sizes["pp"] if microbatches is None else microbatches
    timed = PlannedCosts(config, sizes, microbatch_size, chip, achieved, devices_per_node)
    rows, held = [], 0
    for name in schedules:
        try:
            schedule = flags.built_schedule(name, sizes["pp"], microbatches, deferred)
            if len(config.layer_kinds) < schedule.num_stages:
                layers = len(config.layer_kinds)
                raise ValueError(f"{layers} layers for {schedule.num_stages} stages: use fewer stages or more layers")
            divided = timed.applied(schedule) if by_time else config
            model = build_model(divided, schedule, 0, axis="ep", dtype=dtype, abstract=True, **_core(cpu))
        except ValueError as error:
            rows.append(Row(name, str(error)))
            continue
        abstract = abstract_mesh(sizes, None if cpu else chip)
        # What keeps the moments depends on nothing but the model: any number of steps gives the same state.
        optimizer = trainer.make_optimizer(trainer.TrainConfig(steps=1), model)
        state = trainer.abstract_state(model, optimizer, abstract)
        batch = trainer.abstract_batch(config, microbatches * shards * microbatch_size)
        options = dict(
            optimizer=state.opt_state,
            achieved=achieved,
            devices_per_node=devices_per_node,
            kernels=KERNELS,
            cpu=cpu,
        )
        own = stash if isinstance(stash, int) else None
        pipeline = trainer.pipelined(model, schedule, abstract, grad_dtype=grad_dtype, stash=own, offload=offload)
        try:
            if stash == flags.AUTO_STASH:
                own, _, found = jaxpipe.fit_stash(pipeline, state.params, batch, chip, **options)
            else:
                found = jaxpipe.plan(pipeline, state.params, batch, chip, **options)
        except ValueError as error:
            if stash is None:
                raise
            rows.append(Row(name, str(error)))
            continue
        held = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(state.params))
        tokens = microbatches * microbatch_size * config.sequence * shards / found.seconds
        measures = found.memory, found.seconds, found.bubble, found.mfu
        stages = _stages(model.arrangement)
        rows.append(Row(name, None, *measures, tokens, stages, found, own, divided.layer_costs))
    return PlannedRun(config, tuple(sizes.items()), chip, microbatches, microbatch_size, held, tuple(rows))


def abstract_mesh(sizes: Mapping[str, int], chip: Chip | None = None) -> AbstractMesh:
    """A mesh without devices; of a chip, if one is given, whose kernels are traced then, and counted as such.

    XLA's form of products in FP8 multiplies in float32, and says nothing of their time or memory on a GPU.
    """
    device = None if chip is None else AbstractDevice(f"NVIDIA {chip.name}", chip.sms, "cuda")
    axes = tuple(sizes.values()), tuple(sizes)
    return AbstractMesh(*axes, axis_types=(AxisType.Auto,) * len(sizes), abstract_device=device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; `run` takes what they parse to."""
    flags.add_sizes(parser, "dsv3-671b")
    parser.add_argument(
        "--mesh",
        default="pp=16,ep=64",
        help="sizes of the axes pp, ep and dp, as in pp=16,dp=2,ep=64; "
        "devices are numbered in this order, the last axis fastest",
    )
    parser.add_argument("--schedules", nargs="+", default=list(BUILDERS), metavar="NAME", help="default: all")
    parser.add_argument("--microbatches", type=int, help="of a step; default: four for each pipeline rank")
    parser.add_argument("--microbatch-size", type=int, default=1, help="sequences of a microbatch on a device")
    parser.add_argument("--chip", default="H800", help=", ".join(CHIPS))
    found = parser.add_argument_group("search")
    found.add_argument(
        "--search", action="store_true", help="the ten fastest ways to train on --gpus devices that fit; of "
        "--schedules, --microbatches, --precision, --remat and --ends those that are given"
    )  # fmt: skip
    found.add_argument("--gpus", type=int, help="devices in all; what pp times ep leaves of them is dp")
    found.add_argument("--search-pp", type=int, nargs="+", default=[8, 16, 32], metavar="RANKS", help="of pipelines")
    found.add_argument("--search-ep", type=int, nargs="+", default=[64], metavar="DEVICES", help="of the experts' axis")
    found.add_argument("--most-microbatches", type=int, default=128, help="of a step")
    found.add_argument("--memory", type=float, metavar="GB", help="of a device that may be taken; default: 95%% of it")
    parser.add_argument("--details", action="store_true", help="where the time goes, by part; and what is assumed")
    parser.add_argument("--compile", action="store_true", help="compile the step too: what XLA allocates and hides; no "
                        'GPU is needed but pip install "jax[cuda13]", minutes a schedule, and JAX_PLATFORMS=cpu '
                        "where there is none")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Prints the plan.

    Raises:
      ValueError: arguments that do not fit.
    """
    if args.search:
        print(_search(args))
        return
    try:
        sizes = mesh_sizes(args.mesh)
    except ValueError as error:
        raise ValueError(f"--mesh {error}") from None
    found = plan(
        flags.sized_config(args, max(sizes.get("ep", 1), 1), auto_costs=True),
        sizes,
        schedules=args.schedules,
        microbatches=args.microbatches,
        microbatch_size=args.microbatch_size,
        deferred=args.deferred,
        chip=chip(args.chip),
        grad_dtype=jnp.dtype(args.grad_dtype),
        devices_per_node=args.devices_per_node,
        stash=args.stash,
        offload=args.offload,
        by_time=args.layer_costs == flags.AUTO_COSTS,
    )
    print(found)
    if args.details:
        print(f"\n{found.details()}")
    if args.compile:
        print("\nAs compiled, in GB; what is hidden, and the step, are estimates from XLA's order of operations\n")
        for line in table(_compile(found, sizes, args), found.chip):
            print(line, flush=True)


def _search(args: argparse.Namespace) -> plan_search.SearchResult:
    """The search that the arguments ask for.

    Raises:
      ValueError: no number of devices; arguments that do not fit.
    """
    if args.gpus is None or args.gpus < 1:
        raise ValueError(f"--search with --gpus {args.gpus}: say on how many devices, as in --search --gpus 2048")
    if args.offload:
        raise ValueError("--search --offload: a search keeps all on the devices; plan what it finds with --offload")
    given: dict[str, Any] = {"precisions": args.precision and (args.precision,), "remats": args.remat and (args.remat,)}
    given["ends"] = args.ends and (args.ends,)
    if args.schedules != list(BUILDERS):
        given["schedules"] = tuple(args.schedules)
    space = plan_search.Space(
        args.gpus,
        tuple(args.search_pp),
        tuple(args.search_ep),
        counts=args.microbatches and (args.microbatches,),
        most_microbatches=args.most_microbatches,
        microbatch_size=args.microbatch_size,
        **{name: value for name, value in given.items() if value is not None},
    )
    config = flags.sized_config(args, 1)
    return plan_search.search(
        dataclasses.replace(config, redundant=0),
        space,
        chip(args.chip),
        memory=args.memory and args.memory * GIGA,
        devices_per_node=args.devices_per_node,
    )


def _compile(
    found: PlannedRun, sizes: Mapping[str, int], args: argparse.Namespace
) -> Iterator[tuple[str, int, Compiled]]:
    """Each schedule that there is, with its planned bytes, compiled when asked for."""
    for row in found.rows:
        if row.memory is None:
            continue
        schedule = flags.built_schedule(row.name, sizes["pp"], found.microbatches, args.deferred)
        sized = sizes, args.microbatch_size, found.chip
        how: dict[str, Any] = dict(grad_dtype=jnp.dtype(args.grad_dtype), devices_per_node=args.devices_per_node)
        config = dataclasses.replace(found.config, layer_costs=row.costs)
        how["offload"] = args.offload
        yield row.name, row.memory.total, compile_step(config, schedule, *sized, stash=row.stash, **how)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `plan` alone."""
    parser = argparse.ArgumentParser(prog="plan", description="Parameters, memory and time of a training run.")
    add_arguments(parser)
    run(parser.parse_args(arguments))


def _core(cpu: bool) -> dict[str, Any]:
    return {} if cpu else {"core": stand_in.attention}


def _stages(arrangement: Arrangement) -> str:
    """How many stages have which layers."""
    return ", ".join(f"{count} of {_counted(row)}" for row, count in collections.Counter(arrangement.rows).items())


def _by(costs: LayerCosts | None) -> str:
    """What stages got their layers by, as the flag that does the same."""
    return "" if costs is None else f"; by --layer-costs {costs}"


def _arithmetic(config: ModelConfig) -> str:
    """What Linears and experts multiply."""
    return "products in FP8" if config.precision == "fp8" else f"experts' recipe {config.moe.recipe.name}"


def _counted(kinds: Iterable[str]) -> str:
    """Layers by kind, in their order."""
    return " + ".join(f"{count} {kind}" for kind, count in collections.Counter(kinds).items())


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


if __name__ == "__main__":
    main()
