"""The candidates of a choice: measured, timed, planned, and compared."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpipe import inputs
from jaxpipe.api import Pipeline
from jaxpipe.params import Params, dtype_of
from jaxpipe.planning import candidates
from jaxpipe.planning.candidates import Candidate
from jaxpipe.planning.chips import CHIPS, Chip
from jaxpipe.planning.measuring import measure_costs, of_first_process
from jaxpipe.planning.memory import Memory
from jaxpipe.planning.planner import GIGA, plan
from jaxpipe.planning.timing import longest, seconds_of_shared_ends
from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.bound import lower_bound
from jaxpipe.schedule.improving import improve
from jaxpipe.schedule.registry import build
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts

_PATIENCE = 15.0
"""Seconds after which two sizes of microbatches have to do for a number of stages."""

Make = Callable[[Schedule], Any]
"""Makes the pipeline of a schedule and its parameters: `jaxpipe.choose_pipeline` says what it returns."""


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
      live: most stashes of a rank.
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
    live: int = 0
    memory: Memory | None = None

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.ticks + self.once

    def row(self, reason: str) -> Candidate:
        """A row of the table."""
        schedule, seconds = self.schedule, self.seconds
        bubble = 1 - (self.busy + self.once) / seconds if seconds else 0.0
        figures = seconds, self.simulated + self.once, bubble, self.memory, schedule
        return Candidate(schedule.name, schedule.num_microbatches, reason, *figures)


@dataclasses.dataclass(eq=False)
class CandidateSearch:
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
        for schedule in (schedule for alike in built.values() for schedule in alike):
            counts.setdefault(schedule.num_stages, set()).add(schedule.num_microbatches)
        for alike in built.values():
            self._add_alike(alike, sorted(counts[alike[0].num_stages]))

    def _add_alike(self, schedules: Sequence[Schedule], counts: Sequence[int]) -> None:
        """Adds schedules that cut the model alike; ``counts`` are those of all with as many stages, to be measured."""
        stages = schedules[0].num_stages
        try:
            given = self.make(schedules[0])
        except ValueError as error:
            for schedule in schedules:
                self._refuse(schedule.name, schedule.num_microbatches, error)
            return
        base, made = self._base(given)
        rows = {(leaf.shape or (0,))[0] for leaf in jax.tree.leaves(base.params.stages)}
        wrong = f"it has {stages} stages, and params has rows for {sorted(rows)}" if rows != {stages} else ""
        errors = {count: wrong or self._why_not(base.pipeline, count) for count in counts}
        fitting = [count for count in counts if not errors[count]]
        if stages not in self._measured and fitting:
            self._measured[stages] = self._measure_sizes(base.pipeline, made, fitting)
        for schedule in schedules:
            count = schedule.num_microbatches
            if errors[count]:
                self._refuse(schedule.name, count, errors[count])
            elif 1 / count > self._measured[stages][0][-1]:
                self._refuse(schedule.name, count, f"one of {count} microbatches is too large for a device")
            else:
                self.entries.append(_Entry(schedule, base, candidates.between(*self._measured[stages], 1 / count)))

    def _refuse(self, name: str, count: int, why: object) -> None:
        self.refused.append(Candidate(name, count, str(why).partition("\n")[0]))

    def _why_not(self, pipeline: Pipeline, count: int) -> str:
        """What is wrong with so many microbatches of the batch."""
        padded = pipeline.options.example_mask is not None
        try:
            inputs.check_batch(self.batch, count, pipeline.axes, pipeline.batch_spec, padded=padded)
        except ValueError as error:
            return str(error)
        return ""

    def _base(self, made: Any) -> tuple[_Base, Any]:
        """(what stands for schedules that cut the model alike, its parameters or what makes them)."""
        pipeline, params, optimizer = _parts(made, self.optimizer)
        shapes = jax.tree.map(_shape, jax.eval_shape(params) if callable(params) else params)
        return _Base(pipeline, shapes, optimizer), params

    def _measure_sizes(
        self, pipeline: Pipeline, params: Any, counts: Sequence[int]
    ) -> tuple[list[float], list[StageCosts]]:
        """(sizes of microbatches as shares of the batch, ascending, and their costs): the ends, and one in the middle.

        The one in the middle is left out where the ends have taken long; so are those for which memory runs out.
        """
        begin, found = time.monotonic(), {}
        for count in _spread(counts):
            (spent,) = of_first_process([time.monotonic() - begin])
            if len(found) == 2 and spent > _PATIENCE:
                break
            try:
                found[count] = self._measure(pipeline, params, count)
            except jax.errors.JaxRuntimeError as error:
                smaller = [other for other in counts if other > count]
                if "RESOURCE_EXHAUSTED" not in str(error) or not smaller:
                    raise
                self.tell(f"one of {count} microbatches is too large")
                return self._measure_sizes(pipeline, params, smaller)
        chosen = sorted(found, reverse=True)
        return [1 / count for count in chosen], [found[count] for count in chosen]

    def _measure(self, pipeline: Pipeline, params: Any, count: int) -> StageCosts:
        """The costs of a pipeline's stages on one of so many microbatches."""
        self.tell(f"measuring one of {pipeline.program.schedule.num_stages} stages on one of {count} microbatches")
        made: Any = params() if callable(params) else params
        found = measure_costs(
            pipeline,
            made,
            self.batch,
            self.rng,
            self.step_inputs,
            num_microbatches=count,
            repeats=self.repeats,
        )
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
        self.entries.sort(key=lambda entry: (entry.seconds, entry.live))

    def _time(self, entry: _Entry) -> None:
        pipeline, ticks = candidates.on_schedule(entry.base.pipeline, entry.schedule, entry.costs)
        ends = seconds_of_shared_ends(pipeline, entry.costs)
        makespan, busy, entry.live = candidates.simulated(pipeline, entry.costs)
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
            costs = candidates.without_shared_ends(group[0].base.pipeline, group[0].costs)
            # What is faster where ranks run freely may not be so in ticks: orders of list scheduling alone stay, too.
            tries = [improve(seeds, costs, moves=count) for count in (0, moves)]
            entries = [_Entry(found, group[0].base, group[0].costs) for found in tries if found not in seeds]
            for entry in entries:
                self._time(entry)
            if entries:
                self.entries.append(min(entries, key=lambda entry: entry.seconds))
        self.entries.sort(key=lambda entry: (entry.seconds, entry.live))
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
        costs, stash = candidates.without_shared_ends(pipeline, best.costs), best.live
        ends = seconds_of_shared_ends(pipeline, best.costs)
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


def _parts(made: Any, optimizer: Any) -> tuple[Pipeline, Any, Any]:
    """(pipeline, parameters, optimizer) of what a `Make` returned; ``optimizer`` where it says none."""
    if not isinstance(made, tuple):
        made = getattr(made, "pipeline", made), getattr(made, "params", None)
    pipeline, params, *others = made
    if not isinstance(pipeline, Pipeline) or not (isinstance(params, Params) or callable(params)) or len(others) > 1:
        raise ValueError(
            f"make(schedule) returned {made!r:.80}: return (pipeline, params), as jaxpipe.value_and_grad and "
            "jaxpipe.Params make them, or what jaxpipe.flax.from_nnx returns"
        )
    return pipeline, params, others[0] if others else optimizer


def _spread(counts: Iterable[int]) -> list[int]:
    """Some of these numbers of microbatches: the most, the fewest, and one in the middle.

    >>> _spread([2, 4, 8, 16, 32]), _spread([4])
    ([32, 2, 8], [4])
    """
    counts = sorted(counts)
    return list(dict.fromkeys([counts[-1], counts[0], counts[len(counts) // 2]]))


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf))


def _layout(schedule: Schedule) -> Any:
    """What schedules have in common that cut the model alike and store its parameters alike."""
    return schedule.num_stages, schedule.storage_order
