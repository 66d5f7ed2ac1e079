"""`choose`: the fastest schedule that fits, from times measured on the model's own stage."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxpipe.api import Pipeline, value_and_grad
from jaxpipe.params import Params
from jaxpipe.planning import candidates
from jaxpipe.planning.candidates import Candidate
from jaxpipe.planning.chips import CHIPS, Chip, chip_of
from jaxpipe.planning.measuring import measure_costs
from jaxpipe.planning.memory import Memory
from jaxpipe.planning.planner import GIGA, plan
from jaxpipe.planning.timing import longest
from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.bound import lower_bound
from jaxpipe.schedule.improving import improve
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.registry import BUILDERS, build
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts, simulate

_MEASURED = 3
"""Sizes of microbatches that are measured; those in between are interpolated."""

Make = Callable[[Schedule], Any]
"""Makes the pipeline of a schedule and its parameters: `choose_pipeline` says what it returns."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduleChoice:
    """The schedule that `choose` found, and what it was compared with; prints as a table.

    Attributes:
      schedule: the chosen one.
      pipeline: the model on it, packed for the measured costs.
      costs: relative times to pack for, as ``costs`` of `jaxpipe.value_and_grad`.
      stage_costs: measured seconds of each stage and of the ends, of the chosen size of microbatches.
      seconds: that a step should take.
      memory: bytes of a device, as planned.
      budget: bytes that a device may use; infinite where nobody knows.
      rows: every schedule and number of microbatches, the fastest first, then those that do not exist.
      bound: seconds that no order of the chosen stages on the same ranks and with the same stashes can go below,
        `jaxpipe.schedule.lower_bound`, without what is done once a step.
    """

    schedule: Schedule
    pipeline: Pipeline
    costs: Costs
    stage_costs: StageCosts
    seconds: float
    memory: Memory
    budget: float
    rows: tuple[Candidate, ...]
    bound: float

    def __str__(self) -> str:
        columns = ("schedule", "microbatches", "step ms", "simulated ms", "bubble %", "memory GB", "")
        lines = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|" + "---|" * len(columns)]
        for row in self.rows:
            times = (
                ["", "", ""]
                if row.seconds is None or row.simulated is None or row.bubble is None
                else [f"{row.seconds * 1e3:.4g}", f"{row.simulated * 1e3:.4g}", f"{row.bubble * 100:.1f}"]
            )
            memory = "" if row.memory is None else f"{row.memory.total / GIGA:.3g}"
            cells = [row.name, str(row.num_microbatches), *times, memory, row.reason or "chosen"]
            lines.append(f"| {' | '.join(cells)} |")
        name = f"{self.schedule.name} with {self.schedule.num_microbatches} microbatches"
        budget = "" if math.isinf(self.budget) else f" of {self.budget / GIGA:.3g}"
        lines += [
            "",
            f"Chosen: {name}, {self.seconds * 1e3:.4g} ms a step, {self.memory.total / GIGA:.3g} GB{budget} a device; "
            f"no order of these stages takes less than {self.bound * 1e3:.4g} ms.",
        ]
        return "\n".join(lines)


def choose(
    stage: Callable[..., Any],
    params: Params | Callable[[Schedule], Params],
    batch: Any,
    mesh: Mesh,
    *,
    schedules: Sequence[str] = tuple(BUILDERS),
    microbatches: int | Sequence[int] | None = None,
    memory: float | None = None,
    optimizer: Any = None,
    rng: Any = None,
    step_inputs: Any = None,
    moves: int = 0,
    repeats: int = 5,
    progress: bool = True,
    **options: Any,
) -> ScheduleChoice:
    """The fastest schedule and number of microbatches that fit in memory, for this model on these devices.

    Forward, input gradient, weight gradient, whole backward, an overlapped pair, embedding, head and a message are
    measured on the devices, for up to three sizes of microbatches; other sizes are interpolated. Every schedule is then
    packed into ticks with these times, as `jaxpipe.value_and_grad` packs it, and what is done once a step is added.
    Memory is that of `jaxpipe.plan`, worked out for schedules in the order of their speed until one fits, and for all
    with its number of microbatches. The search takes seconds beside the compilation of some ten programs for each
    number of stages and size.

    Args:
      stage: the stage function of `jaxpipe.value_and_grad`.
      params: arrays or shapes, in rows for a number of stages: schedules with another number are then left out. Or a
        function of the schedule that returns them, where ``stage`` takes stages of more or fewer layers.
      batch: of a step, arrays or shapes. Of shapes all but floats are taken as zeros, which is nothing that a router
        should be measured with.
      mesh: of devices.
      schedules: names that `jaxpipe.schedule.build` knows.
      microbatches: of a step: a number, several, or None for all that divide the batch.
      memory: bytes of a device that a step may take; None: all that the device has for JAX.
      optimizer: an optax transformation, or its state as arrays or shapes, which counts as memory.
      rng, step_inputs: as the step is called with.
      moves: local moves of the search for a better order than the builders', see `jaxpipe.schedule.improve`; 0: none.
      repeats: measurements of which the median counts.
      progress: whether standard error hears what is being done.
      **options: further arguments of `jaxpipe.value_and_grad`: ``embed``, ``head``, ``data_axes`` and so on.

    Returns:
      A `ScheduleChoice`. Of several processes all choose the same, from the measurements of the first.

    Raises:
      ValueError: nothing fits, with the least memory that does; no schedule exists for these numbers; arguments that do
        not fit together.

    >>> import jax, jax.numpy as jnp, jaxpipe
    >>> def stage(w, x, ctx):
    ...     return jnp.tanh(x @ w)
    >>> params = jaxpipe.Params(jnp.ones((2, 8, 8)))
    >>> choice = jaxpipe.choose(
    ...     stage, params, jnp.ones((16, 8)), jaxpipe.make_mesh(pp=2), schedules=["gpipe", "1f1b"], microbatches=4,
    ...     head=lambda outer, y, data, ctx: (y**2).mean(), repeats=1, progress=False)
    >>> (loss, aux), grads = jax.jit(choice.pipeline)(params, jnp.ones((16, 8)))
    >>> choice.schedule.name in ("gpipe", "1f1b") and len(choice.rows) == 2
    True
    """

    def make(schedule: Schedule) -> tuple[Pipeline, Params]:
        return value_and_grad(stage, schedule, mesh, **options), params(schedule) if callable(params) else params

    return choose_pipeline(
        make, batch, mesh, axis=options.get("axis", "pp"),
        schedules=schedules, microbatches=microbatches, memory=memory, optimizer=optimizer, rng=rng,
        step_inputs=step_inputs, moves=moves, repeats=repeats, progress=progress,
    )  # fmt: skip


def choose_pipeline(
    make: Make,
    batch: Any,
    mesh: Mesh,
    *,
    axis: str = "pp",
    schedules: Sequence[str] = tuple(BUILDERS),
    microbatches: int | Sequence[int] | None = None,
    memory: float | None = None,
    optimizer: Any = None,
    rng: Any = None,
    step_inputs: Any = None,
    moves: int = 0,
    repeats: int = 5,
    progress: bool = True,
) -> ScheduleChoice:
    """`choose` for a model that is made for a schedule: of `jaxpipe.flax.from_nnx`, say.

    Args:
      make: ``make(schedule)`` returns a `jaxpipe.flax.PipelinedModel`; or (pipeline, params), params being parameters,
        their shapes, or a function without arguments that makes them when they are needed; or (pipeline, params,
        optimizer). It is called once for each way in which schedules cut a model and store its parameters: for
        one stage a rank, for a V, for "interleaved". What it makes is held for one of them at a time.
      batch: as for `choose`, and so is all else.
      mesh: of devices, the one of the pipelines.
      axis: of the pipeline.
      schedules, microbatches, memory, optimizer, rng, step_inputs, moves, repeats, progress: as for `choose`.

    Raises:
      ValueError: as `choose`.

    >>> import jaxpipe, jaxpipe.flax
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> class Model(nnx.Module):
    ...     def __init__(self):
    ...         self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(4)])
    ...     def __call__(self, x):
    ...         for layer in self.layers:
    ...             x = layer(x)
    ...         return x
    >>> def make(schedule):
    ...     loss = lambda model, x: (model(x) ** 2).mean()
    ...     return jaxpipe.flax.from_nnx(Model, schedule, mesh, blocks="layers", loss=loss)
    >>> mesh = jaxpipe.make_mesh(pp=2)
    >>> choice = jaxpipe.choose_pipeline(
    ...     make, jnp.ones((8, 8)), mesh, schedules=["1f1b", "zbv"], microbatches=4, repeats=1, progress=False)
    >>> sorted(row.name for row in choice.rows)
    ['1f1b', 'zbv']
    """
    ranks = _ranks(mesh, axis)
    unknown = [name for name in schedules if name not in BUILDERS]
    if unknown or not schedules:
        raise ValueError(f"schedules={list(schedules)}: choose from {', '.join(BUILDERS)}")
    tell = _tell if progress else lambda _: None
    counts = _microbatches(microbatches, batch)
    search = _Search(make, batch, optimizer, rng, step_inputs, repeats, _budget(mesh, memory), _chip(mesh), tell)
    search.add([(name, count) for name in schedules for count in counts], ranks)
    if not search.entries:
        told = "; ".join(f"{row.name} with {row.num_microbatches}: {row.reason}" for row in search.refused[:3])
        raise ValueError(f"no schedule exists for {ranks} ranks and microbatches {counts}: {told}")
    search.rank()
    best = search.first_that_fits()
    if moves:
        best = search.improve(best, at_least("choose", "moves", moves, 0))
    return search.choice(best)


class _Base(NamedTuple):
    """A pipeline, for all schedules with the same stages in the same order of storage.

    Attributes:
      pipeline: of one of them.
      params: shapes.
      optimizer: of them, if it counts as memory.
    """

    pipeline: Pipeline
    params: Params
    optimizer: Any


@dataclasses.dataclass(eq=False)
class _Entry:
    """A candidate while it is looked at.

    Attributes:
      schedule: its schedule.
      base: what stands for all schedules that cut the model alike.
      costs: measured, of its size of microbatches.
      pipeline: the base with this schedule.
      ticks, simulated, busy: seconds; see `Candidate`.
      once: seconds of what is done once a step.
      memory: planned.
    """

    schedule: Schedule
    base: _Base
    costs: StageCosts
    pipeline: Pipeline | None = None
    ticks: float = 0.0
    simulated: float = 0.0
    busy: float = 0.0
    once: float = 0.0
    memory: Memory | None = None

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.ticks + self.once

    def row(self, reason: str) -> Candidate:
        """A row of the table."""
        schedule, seconds = self.schedule, self.seconds
        bubble = 1 - self.busy / seconds if seconds else 0.0
        figures = seconds, self.simulated + self.once, bubble, self.memory, schedule
        return Candidate(schedule.name, schedule.num_microbatches, reason, *figures)


@dataclasses.dataclass(eq=False)
class _Search:
    """The candidates of a choice, and what is known of them so far.

    Attributes:
      make, batch, optimizer, rng, step_inputs, repeats: see `choose_pipeline`.
      budget: bytes of a device.
      chip: of the mesh; None: unknown.
      tell: tells of progress.
      entries: candidates, after `rank` the fastest first.
      refused: schedules that do not exist or do not fit the model.
    """

    make: Make
    batch: Any
    optimizer: Any
    rng: Any
    step_inputs: Any
    repeats: int
    budget: float
    chip: Chip | None
    tell: Callable[[str], None]
    entries: list[_Entry] = dataclasses.field(default_factory=list)
    refused: list[Candidate] = dataclasses.field(default_factory=list)
    _measured: dict[int, tuple[list[float], list[StageCosts]]] = dataclasses.field(default_factory=dict)
    _once: dict[Any, float] = dataclasses.field(default_factory=dict)

    def add(self, wanted: Sequence[tuple[str, int]], ranks: int) -> None:
        """Makes entries of schedules by name and number of microbatches, with their costs."""
        built: dict[Any, list[Schedule]] = {}
        for name, count in wanted:
            try:
                schedule = build(name, ranks, count)
            except ValueError as error:
                self._refuse(name, count, error)
            else:
                built.setdefault(_layout(schedule), []).append(schedule)
        counts: dict[int, set[int]] = {}
        for schedule in (schedule for schedules in built.values() for schedule in schedules):
            counts.setdefault(schedule.num_stages, set()).add(schedule.num_microbatches)
        for schedules in built.values():
            try:
                base = self._base(schedules[0], _spread(counts[schedules[0].num_stages]))
            except ValueError as error:
                for schedule in schedules:
                    self._refuse(schedule.name, schedule.num_microbatches, error)
                continue
            for schedule in schedules:
                sizes, costs = self._measured[schedule.num_stages]
                size = min(max(1 / schedule.num_microbatches, sizes[0]), sizes[-1])
                self.entries.append(_Entry(schedule, base, candidates.between(sizes, costs, size)))

    def _refuse(self, name: str, count: int, error: ValueError) -> None:
        self.refused.append(Candidate(name, count, str(error).partition("\n")[0]))

    def _base(self, schedule: Schedule, counts: Sequence[int]) -> _Base:
        """What stands for schedules that cut the model as this one does.

        Unless they are known, the costs of its stages are measured, for some numbers of microbatches.
        """
        stages = schedule.num_stages
        pipeline, params, optimizer = _parts(self.make(schedule), self.optimizer)
        shapes = jax.tree.map(_shape, jax.eval_shape(params) if callable(params) else params)
        rows = {leaf.shape[0] for leaf in jax.tree.leaves(shapes.stages)}
        if rows != {stages}:
            raise ValueError(f"it has {stages} stages, and the parameters are stacked for {sorted(rows)}")
        if stages not in self._measured:
            made = params() if callable(params) else params
            costs = [self._measure(pipeline, made, count) for count in counts]
            self._measured[stages] = [1 / count for count in counts], costs
        return _Base(pipeline, shapes, optimizer)

    def _measure(self, pipeline: Pipeline, params: Any, count: int) -> StageCosts:
        """The costs of a pipeline's stages on one of so many microbatches."""
        self.tell(f"measuring one of {pipeline.program.schedule.num_stages} stages on one of {count} microbatches")
        options = dict(repeats=self.repeats, num_microbatches=count)
        found = measure_costs(pipeline, params, self.batch, self.rng, self.step_inputs, **options)
        found = _of_first_process(found)
        each = longest(found)
        pair = "" if each.overlapped is None else f", F&B {each.overlapped * 1e3:.3g}"
        self.tell(
            f"F {each.forward * 1e3:.3g}, I {each.backward_input * 1e3:.3g}, W {each.weight * 1e3:.3g}, "
            f"B {each.of(Kind.B) * 1e3:.3g}{pair}, message {found.p2p * 1e3:.3g} ms"
        )
        return found

    def rank(self) -> None:
        """Times each entry; the fastest is the first, of equals that with the fewest stashes."""
        self.tell(f"packing {len(self.entries)} schedules")
        for entry in self.entries:
            self._time(entry)
        self.entries.sort(key=lambda entry: (entry.seconds, max(_live(entry.schedule))))

    def _time(self, entry: _Entry) -> None:
        pipeline, ticks = candidates.on_schedule(entry.base.pipeline, entry.schedule, entry.costs)
        ends = candidates.seconds_of_ends(pipeline, entry.costs, entry.schedule.num_microbatches)
        makespan, busy = candidates.simulated(pipeline, entry.costs)
        entry.pipeline, entry.ticks, entry.simulated, entry.busy = pipeline, ticks + ends, makespan + ends, busy + ends
        key = _layout(entry.schedule), len(entry.schedule.rank_stages[0])
        if self.chip is not None and key not in self._once:
            self.plan(entry)
            self._once[key] = entry.once
        entry.once = self._once.get(key, 0.0)

    def plan(self, entry: _Entry) -> Memory:
        """The memory of an entry, and what it does once a step."""
        if entry.memory is None:
            pipeline = entry.pipeline
            assert pipeline is not None
            self.tell(f"planning {pipeline.__name__}")
            cpu = self.chip is None
            found = plan(
                pipeline, entry.base.params, self.batch, self.chip or CHIPS["H100"], optimizer=entry.base.optimizer,
                rng=self.rng, step_inputs=self.step_inputs, costs=entry.costs, cpu=cpu,
            )  # fmt: skip
            entry.memory, entry.once = found.memory, 0.0 if cpu else found.once
        return entry.memory

    def first_that_fits(self) -> _Entry:
        """The fastest entry that fits.

        Raises:
          ValueError: none does.
        """
        for entry in self.entries:
            if self.plan(entry).total <= self.budget:
                return entry
        least = min(self.entries, key=lambda entry: self.plan(entry).total)
        name, count = least.schedule.name, least.schedule.num_microbatches
        raise ValueError(
            f"no schedule fits in {self.budget / GIGA:.4g} GB of a device: the least is {name} with {count} "
            f"microbatches, {self.plan(least).total / GIGA:.4g} GB; allow as much with memory=, or make microbatches "
            "smaller, compute more again (jax.checkpoint), or take more ranks"
        )

    def improve(self, best: _Entry, moves: int) -> _Entry:
        """The best entry, or one with an improved order that is faster and fits."""
        count = best.schedule.num_microbatches
        groups: dict[Any, list[_Entry]] = {}
        for entry in self.entries:
            if entry.schedule.num_microbatches == count and self.plan(entry).total <= self.budget:
                groups.setdefault(entry.schedule.routes, []).append(entry)
        for group in groups.values():
            seeds = [entry.schedule for entry in group]
            self.tell(f"improving {', '.join(seed.name for seed in seeds)}")
            found = improve(seeds, candidates.without_shared_ends(group[0].base.pipeline, group[0].costs), moves=moves)
            if found in seeds:
                continue
            entry = _Entry(found, group[0].base, group[0].costs)
            self._time(entry)
            self.entries.append(entry)
        self.entries.sort(key=lambda entry: (entry.seconds, max(_live(entry.schedule))))
        return self.first_that_fits()

    def choice(self, best: _Entry) -> ScheduleChoice:
        """The result."""
        rows = []
        for entry in self.entries:
            if entry.schedule.num_microbatches == best.schedule.num_microbatches:
                self.plan(entry)
            rows.append(entry.row("" if entry is best else self._reason(entry, best)))
        pipeline, memory = best.pipeline, best.memory
        assert pipeline is not None and memory is not None
        costs, stash = candidates.without_shared_ends(pipeline, best.costs), max(_live(best.schedule))
        ends = candidates.seconds_of_ends(pipeline, best.costs, best.schedule.num_microbatches)
        return ScheduleChoice(
            schedule=best.schedule,
            pipeline=pipeline,
            costs=pipeline.options.costs,
            stage_costs=best.costs,
            seconds=best.seconds,
            memory=memory,
            budget=self.budget,
            rows=(*rows, *self.refused),
            bound=lower_bound(best.schedule, costs, stash) + ends,
        )

    def _reason(self, entry: _Entry, best: _Entry) -> str:
        if entry.memory is not None and entry.memory.total > self.budget:
            return f"needs {entry.memory.total / GIGA:.3g} GB of {self.budget / GIGA:.3g}"
        slower = entry.seconds / best.seconds - 1 if best.seconds else 0.0
        return f"{slower:.1%} slower" if slower > 0 else "as fast, and stashes more"


def _ranks(mesh: Any, axis: str) -> int:
    """Pipeline ranks of a mesh."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh is {mesh!r:.80}: times are measured, so give a mesh of devices, as jaxpipe.make_mesh does"
        )
    if axis not in mesh.shape:
        raise ValueError(f"axis={axis!r} is none of the mesh's axes {dict(mesh.shape)}: name that of the pipeline")
    return mesh.shape[axis]


def _microbatches(given: int | Sequence[int] | None, batch: Any) -> list[int]:
    """The numbers of microbatches to look at."""
    if given is None:
        sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.shape(leaf)}
        size = math.gcd(*sizes)
        found = [count for count in range(1, size + 1) if size % count == 0]
    else:
        found = sorted(
            {at_least("choose", "microbatches", count, 1) for count in np.atleast_1d(np.asarray(given)).tolist()}
        )
    if not found:
        raise ValueError(
            f"microbatches={given!r} of a batch of {jax.tree.map(np.shape, batch)}: give a positive number"
        )
    return found


def _chip(mesh: Mesh) -> Chip | None:
    return chip_of(mesh.devices.flat[0].device_kind)


def _budget(mesh: Mesh, given: float | None) -> float:
    """Bytes of a device that a step may take."""
    if given is not None:
        if not given > 0:
            raise ValueError(f"memory={given!r}: bytes of a device, more than 0; None: all that it has")
        return float(given)
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
    known = [float(limit) for limit in limits if limit]
    chip = _chip(mesh)
    return min(known) if known else chip.memory if chip is not None else math.inf


def _parts(made: Any, optimizer: Any) -> tuple[Pipeline, Any, Any]:
    """(pipeline, parameters, optimizer) of what a `Make` returned; ``optimizer`` where it says none."""
    if not isinstance(made, tuple):
        made = getattr(made, "pipeline", made), getattr(made, "params", None)
    pipeline, params, *others = made
    if not isinstance(pipeline, Pipeline) or not (isinstance(params, Params) or callable(params)) or len(others) > 1:
        raise TypeError(
            f"make(schedule) returned {made!r:.80}: return (pipeline, params), as jaxpipe.value_and_grad and "
            "jaxpipe.Params make them, or what jaxpipe.flax.from_nnx returns"
        )
    return pipeline, params, others[0] if others else optimizer


def _spread(counts: Iterable[int]) -> list[int]:
    """Some of these numbers of microbatches, the most first: the ends, and one in the middle of their sizes."""
    counts = sorted(counts, reverse=True)
    if len(counts) <= _MEASURED:
        return counts
    return [counts[round(i * (len(counts) - 1) / (_MEASURED - 1))] for i in range(_MEASURED)]


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)


def _layout(schedule: Schedule) -> Any:
    """What schedules have in common that cut the model alike and store its parameters alike."""
    return schedule.num_stages, schedule.storage_order


@functools.cache
def _live(schedule: Schedule) -> tuple[int, ...]:
    """Most stashes of each rank."""
    return simulate(schedule).peak_live


def _of_first_process(costs: StageCosts) -> StageCosts:
    """The measurements of the first of several processes, so that all choose the same."""
    if jax.process_count() == 1:
        return costs
    leaves, structure = jax.tree.flatten(dataclasses.asdict(costs))
    values = multihost_utils.broadcast_one_to_all(np.asarray(leaves, np.float64))
    whole = jax.tree.unflatten(structure, [float(value) for value in values])
    return StageCosts(**{**whole, "stages": tuple(Costs(**each) for each in whole["stages"])})


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(f"jaxpipe.choose: {text}", file=sys.stderr, flush=True)
