"""`plan`: memory and time of a pipeline, from its traced step and its simulated schedule, without running either."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxpipe import inputs
from jaxpipe._jax import Jaxpr
from jaxpipe.api import Pipeline
from jaxpipe.params import Params
from jaxpipe.planning import chips, timing
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.divided import Divided
from jaxpipe.planning.memory import Memory, body_memory, count_sums
from jaxpipe.planning.mesh import Network
from jaxpipe.planning.rates import PROGRAMS
from jaxpipe.planning.work import Works, works
from jaxpipe.runtime.by_rank import as_dispatched
from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.simulator import Costs, StageCosts, Timeline
from jaxpipe.stage.kernel_flops import FlopsRule
from jaxpipe.trainable import trainable_mask

GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of a pipeline needs and how long it should take; prints as text. Made by `plan`.

    Attributes:
      name: the pipeline's: schedule, ranks and microbatches.
      mesh: (name, size) of its axes.
      chip: what it runs on.
      memory: bytes of a device, by part.
      costs: seconds of one stage on one microbatch, by kind of action, and of a message; where stages differ, those of
        the longest.
      stage_costs: the same of each stage, and of the ends.
      embed, head: seconds of a microbatch's embedding and head, with their gradients.
      once: seconds of what is done once a step: copies of parameters, sums of gradients over devices, the update.
      update: seconds of the update alone; 0 without an optimizer.
      timeline: the schedule with the costs of each stage, and with embedding and head unless all ranks share them.
      seconds: of a step.
      bubble: share of a step in which the rank that is idle longest waits for others.
      flops: of a step on all devices as the model needs them: three times its forward's.
      executed: FLOPs that the devices run, what is computed again included.
      mfu: share of what the chips could do that ``flops`` are.
      uncounted: (kernel, times a step on a device) whose FLOPs no rule knows; their bytes count.
      work: what is done in one run of each action, by kind of stage.
      achieved: the shares of the chip's best that were assumed.
      network: the devices in nodes, and the rates of their links.
      transfers: of each rank, seconds of a step that its link to the host is busy, (to the host, from it), and what of
        both its kernels and collectives do not hide, which is in ``timeline``.
    """

    name: str
    mesh: tuple[tuple[str, int], ...]
    chip: Chip
    memory: Memory
    costs: Costs
    stage_costs: StageCosts
    embed: float
    head: float
    once: float
    update: float
    timeline: Timeline
    seconds: float
    bubble: float
    flops: float
    executed: float
    mfu: float
    uncounted: tuple[tuple[str, float], ...]
    work: Works
    achieved: Achieved
    network: Network
    transfers: tuple[tuple[float, float, float], ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= self.chip.memory

    def __str__(self) -> str:
        memory, ms = self.memory, 1e3
        parts = {
            "parameters": memory.masters,
            "optimizer": memory.optimizer,
            "batch": memory.batch,
            "working copies": memory.working,
            "gradients": memory.gradients,
            "stash": memory.stash,
            "messages": memory.in_flight,
            "at work": memory.transient,
        }
        kinds = {action.kind for rank in self.timeline.schedule.ranks for group in rank for action in group}
        ends = [f"message {self.costs.p2p * ms:.3g}", f"embed {self.embed * ms:.3g}", f"head {self.head * ms:.3g}"]
        stages: dict[Costs, list[int]] = {}
        for stage, costs in enumerate(self.stage_costs.stages):
            stages.setdefault(costs, []).append(stage)
        runs = {numbers[0]: _times(costs, kinds) for costs, numbers in stages.items()}
        if len(stages) == 1:
            one_run = ["  one run: " + ", ".join([*runs[0], *ends])]
        else:
            rows = [f"{stages_text(numbers)}: {', '.join(runs[numbers[0]])}" for numbers in stages.values()]
            one_run = [f"  one run of {row}" for row in rows] + ["  " + ", ".join(ends)]
        devices = math.prod(size for _, size in self.mesh)
        lines = [
            f"{self.name} on {devices} {self.chip.name}, mesh {dict(self.mesh)}",
            f"memory of a device, GB: {memory.total / GIGA:.3g} of {self.chip.memory / GIGA:.3g}"
            + ("" if self.fits else ": TOO MUCH"),
            "  " + ", ".join(f"{name} {size / GIGA:.3g}" for name, size in parts.items()),
            *self.host_lines(),
            f"time of a step, ms: {self.seconds * ms:.4g}, {self.once * ms:.3g} of it once; bubble {self.bubble:.1%}",
            *one_run,
            f"FLOPs of a step: {self.flops:.3g}, executed {self.executed:.3g}; MFU {self.mfu:.1%}",
        ]
        lines += [f"not counted: {name}, {times:.0f} times a step on a device" for name, times in self.uncounted]
        return "\n".join(lines)

    def host_lines(self) -> list[str]:
        """What is in the host's memory, and how long the link to it takes, as text; nothing where nothing is."""
        if not self.memory.host:
            return []
        there, back, exposed = (1e3 * max(each) for each in zip(*self.transfers, strict=True))
        return [
            f"memory of the host for a device, GB: {self.memory.host / GIGA:.3g}; of a step the link is busy for "
            f"{there:.3g} ms to it and {back:.3g} from it, of which {exposed:.3g} are not hidden"
        ]


def plan(
    pipeline: Pipeline,
    params: Params,
    batch: Any,
    chip: Chip | str,
    *,
    optimizer: Any = None,
    rng: Any = None,
    step_inputs: Any = None,
    costs: Costs | StageCosts | None = None,
    achieved: Achieved = PROGRAMS,
    devices_per_node: int = 8,
    kernels: Mapping[str, FlopsRule] | None = None,
    cpu: bool = False,
) -> Plan:
    """Memory and time of a step, before it runs and without devices.

    The step is traced for its mesh, which may be a `jax.sharding.AbstractMesh`, and nothing is made or compiled.
    Times of actions follow from what is traced: of each kernel its matrix products or the bytes that it moves,
    whichever takes longer, and of collectives the bytes on the slowest link. `jaxpipe.schedule.simulate` turns them
    into the step's, each stage's and those of embedding and head on the ranks that run them. Where all ranks run
    embedding and head together, nothing hides them, and they are added.

    A mesh of CPU devices stands for one of chips, so that a program can be planned where it is tested.

    Args:
      pipeline: from `jaxpipe.value_and_grad` or `jaxpipe.forward`.
      params, batch: arrays or shapes (`jax.ShapeDtypeStruct`), as the pipeline is called with.
      chip: a `jaxpipe.Chip`, or the name of a known one: "H100", "H200", "H800", "A100", "B200".
      optimizer: an optax transformation, or its state as arrays or shapes; None: nothing is updated.
      rng: the key that the pipeline is called with, or its shape; None: without one.
      step_inputs: those that the pipeline is called with, or their shapes.
      costs: seconds that were measured, in place of those worked out here: of all stages alike, or of each stage and
        of the ends.
      achieved: which shares of the chip's best its kernels and links reach.
      devices_per_node: devices with fast links to each other; they are numbered in the order of the mesh's axes.
      kernels: FLOPs of kernels, by name, as functions of the shapes of operands and results. Known are products,
        convolutions, cuDNN's attention, grouped products by their shapes, and what has a cost estimate.
      cpu: memory as XLA allocates it on CPUs.

    Returns:
      A `Plan`.

    Raises:
      ValueError: an unknown chip; parameters, batch and pipeline that do not fit together; costs of another number of
        stages.

    >>> import jax, jaxpipe
    >>> from jax.sharding import AbstractMesh, AxisType
    >>> mesh = AbstractMesh((4,), ("pp",), axis_types=(AxisType.Auto,))
    >>> schedule = jaxpipe.schedule.build("1f1b", 4, 16)
    >>> step = jaxpipe.value_and_grad(
    ...     lambda w, x, ctx: jax.numpy.tanh(x @ w), schedule, mesh,
    ...     head=lambda outer, y, data, ctx: (y**2).mean())
    >>> weights = jax.ShapeDtypeStruct((4, 4096, 4096), "bfloat16")
    >>> found = jaxpipe.plan(step, jaxpipe.Params(weights), jax.ShapeDtypeStruct((65536, 4096), "bfloat16"), "H100")
    >>> found.memory.masters == 4096 * 4096 * 2 and found.flops == 3 * 2 * 65536 * 4 * 4096**2
    True
    """
    if not isinstance(pipeline, Pipeline):
        raise ValueError(f"pipeline is {pipeline!r:.80}: pass what jaxpipe.value_and_grad or jaxpipe.forward returned")
    if isinstance(chip, str):
        chip = chips.chip(chip)
    if devices_per_node < 1:
        raise ValueError(f"devices_per_node={devices_per_node}: a node has at least 1")
    params_given = params
    params, batch, step_inputs = jax.tree.map(_shape, (params, batch, step_inputs))
    pipeline = _as_on(pipeline, cpu=cpu)
    closed, result = jax.make_jaxpr(pipeline, return_shape=True)(params, batch, rng, step_inputs)
    (mapped,) = (eqn for eqn in closed.eqns if eqn.primitive.name == "shard_map")
    body, sizes = mapped.params["jaxpr"], dict(pipeline.mesh.shape)
    shardings = _shardings(pipeline, params)
    divided = _divided(pipeline, closed.jaxpr)
    found = works(body, divided, kernels or {}, pipeline.axes.pipeline, pipeline.program, pipeline.model.kind_of)
    # CPUs keep all in one memory.
    sizes_of = (divided.nbytes_anywhere, lambda atom: 0) if cpu else (divided.nbytes, divided.nbytes_on_host)
    memory = dataclasses.replace(
        body_memory(body, *sizes_of, cpu=cpu, **_counts(pipeline, body, result, found)),
        masters=sum(map(_local, jax.tree.leaves(params), shardings)),
        optimizer=_optimizer_bytes(optimizer, params_given, params, jax.tree.leaves(pipeline.grad_shardings(params))),
        batch=sum(_local(leaf, NamedSharding(pipeline.mesh, pipeline.batch_spec)) for leaf in jax.tree.leaves(batch)),
    )
    network = Network.make(sizes, chip, achieved, devices_per_node)
    gathered = _gathered(pipeline, params, shardings) if optimizer is not None else 0
    spent = timing.stage_costs(pipeline, found, costs, chip, achieved, network)
    frozen = _some_frozen(pipeline, params)
    updates = network.seconds("all-gather", pipeline.options.zero1_axes, gathered)
    if optimizer is not None:  # all state is read and written
        updates += 2 * (2 * memory.masters + memory.optimizer) / (chip.hbm * achieved.memory)
    return _plan(pipeline, memory, found, spent, chip, achieved, network, updates=updates, frozen=frozen)


def _plan(
    pipeline: Pipeline,
    memory: Memory,
    found: Works,
    costs: StageCosts,
    chip: Chip,
    achieved: Achieved,
    network: Network,
    *,
    updates: float,
    frozen: bool,
) -> Plan:
    """The plan, of a step's work and the costs of each stage.

    ``updates``: seconds of the optimizer; ``frozen``: whether some floating parameters have no gradient.
    """
    once = found.once.compute(chip, achieved) + found.once.communicate(network) + updates
    timeline = timing.timeline(pipeline, costs)
    runs = timing.count_runs(pipeline, found, timeline)
    total = timeline.makespan + timing.seconds_of_shared_ends(pipeline, costs) + once + achieved.step_us / 1e6
    others = network.size([name for name, _ in network.axes if name != pipeline.axes.pipeline])
    flops, executed = timing.step_flops(pipeline, found, runs, others, frozen=frozen)
    return Plan(
        name=pipeline.__name__,
        mesh=network.axes,
        chip=chip,
        memory=memory,
        costs=timing.longest(costs),
        stage_costs=costs,
        embed=costs.embed + costs.embed_grad,
        head=costs.head,
        once=once,
        update=updates,
        timeline=timeline,
        seconds=total,
        bubble=max(timeline.bubble) / total if total else 0.0,
        flops=flops,
        executed=executed,
        mfu=flops / total / (timing.best_rate(found, chip) * others * len(runs)) if total else 0.0,
        uncounted=timing.uncounted(found, runs),
        work=found,
        achieved=achieved,
        network=network,
        transfers=timing.transfers(found, timeline, chip, achieved, network),
    )


def _times(costs: Costs, kinds: Set[Kind]) -> list[str]:
    """Milliseconds of each of some actions, and of a pair, as text."""
    times = [f"{kind.value} {costs.of(kind) * 1e3:.3g}" for kind in Kind if kind in kinds]
    return times if costs.overlapped is None else [*times, f"F&B {costs.overlapped * 1e3:.3g}"]


def stages_text(stages: Sequence[int]) -> str:
    """Stages in ascending order, in few words.

    >>> stages_text([0, 1, 2, 5]), stages_text([3])
    ('stages 0-2, 5', 'stage 3')
    """
    runs: list[list[int]] = []
    for stage in stages:
        runs[-1:] = [[*runs[-1], stage]] if runs and stage == runs[-1][-1] + 1 else [*runs[-1:], [stage]]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"stage{'s' * (len(stages) > 1)} {', '.join(texts)}"


def _as_on(pipeline: Pipeline, *, cpu: bool) -> Pipeline:
    """The pipeline as a mesh of chips, or of CPUs, has it, each branch once, with the slots of its own dispatcher.

    CPUs run the halves of a pair one after the other.
    """
    on_cpu = isinstance(pipeline.mesh, Mesh) and pipeline.mesh.devices.flat[0].platform == "cpu"
    in_loops = pipeline.dispatch in ("loops", "stretches", "by_rank")
    if in_loops or (pipeline.dispatch == "sequential" and on_cpu and not cpu):
        dispatch = "sequential" if cpu else "loops"
    else:
        return pipeline
    program = as_dispatched(pipeline.program, pipeline.dispatch)
    return dataclasses.replace(
        pipeline, program=program, options=dataclasses.replace(pipeline.options, dispatch=dispatch)
    )


def _shape(leaf: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jnp.result_type(leaf)  # as JAX would hold it
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def _shardings(pipeline: Pipeline, params: Params) -> list[NamedSharding]:
    """Of each leaf of params, as the pipeline's specs say."""
    inputs.check_params(params, pipeline.program.schedule)
    return jax.tree.leaves(pipeline.shardings(params))


def _divided(pipeline: Pipeline, jaxpr: Jaxpr) -> Divided:
    """The division of a traced pipeline's values over the axes that the compiler has."""
    mine = {name: size for name, size in pipeline.mesh.shape.items() if name not in pipeline.axes.names and size > 1}
    if pipeline.program.shared_ends:
        mine[pipeline.axes.pipeline] = 1
    return Divided(jaxpr, mine)


def _counts(pipeline: Pipeline, body: Jaxpr, result: Any, found: Works) -> dict[str, Any]:
    """How many buffers there are of each sort, as `body_memory` asks."""
    counts = dict(unrolled=pipeline.dispatch == "unrolled", messages=len(found.boundary))
    if pipeline.program.forward_only:
        return {**counts, "results": len(jax.tree.leaves(result[0])), "others": 0}
    # Without a head the loss is the sum of auxiliary losses, and no buffer of its own.
    others = len(jax.tree.leaves(result[0])) - (pipeline.model.head is None)
    return {**counts, "results": count_sums(body), "others": others}


def _some_frozen(pipeline: Pipeline, params: Params) -> bool:
    """Whether some floating parameters have no gradient."""
    return not pipeline.program.forward_only and pipeline.trainable_mask(params) != trainable_mask(None, params)


def _gathered(pipeline: Pipeline, params: Params, shardings: Sequence[NamedSharding]) -> int:
    """Bytes of a device's parameters whose updates devices make a part of each, and send each other."""
    if not pipeline.options.zero1_axes:
        return 0
    parts = jax.tree.leaves(pipeline.grad_shardings(params))
    leaves = zip(jax.tree.leaves(params), shardings, parts, strict=True)
    return sum(_local(leaf, sharding) for leaf, sharding, part in leaves if part.spec != sharding.spec)


def _local(leaf: Any, sharding: Any) -> int:
    """Bytes of one device's part."""
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _optimizer_bytes(optimizer: Any, given: Params, params: Params, shardings: list[NamedSharding]) -> int:
    """Bytes of an optimizer's state: where it says, what is like a parameter where its gradient is, the rest whole."""
    if optimizer is None:
        return 0
    state = optimizer
    if callable(getattr(optimizer, "init", None)):
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            state = jax.eval_shape(optimizer.init, jax.tree.map(_shape, given))
    leaves = [tuple(map(str, path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    of = dict(zip(leaves, zip(jax.tree.leaves(params), shardings, strict=True), strict=True))
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = tuple(map(str, path))
        like = next((of[names[i:]] for i in range(len(names)) if names[i:] in of), None)
        sharding = getattr(leaf, "sharding", None)
        if sharding is None and like is not None and like[0].shape == leaf.shape:
            sharding = like[1]
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
