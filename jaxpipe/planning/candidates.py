"""A schedule with measured costs: how long the program of it takes, and what else decides whether it is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxpipe.api import Pipeline, default_dispatch
from jaxpipe.planning.memory import Memory
from jaxpipe.planning.timing import longest, timeline
from jaxpipe.runtime.lower import lower
from jaxpipe.runtime.pack import Packing, pack
from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts, duration


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One schedule, with times of a step in seconds.

    Attributes:
      name: of the schedule.
      num_microbatches: of a step.
      reason: why it is not chosen; "" for the chosen one.
      seconds: of a step: its ticks, messages, shared ends, and what is done once. None where there is no such schedule.
      simulated: of the schedule alone, if each rank ran as soon as its inputs are there.
      bubble: share of ``seconds`` in which the rank that works least waits; what is done once counts as work.
      memory: bytes of a device, as `jaxpipe.plan` has them; None where they were not asked for.
      schedule: itself.
    """

    name: str
    num_microbatches: int
    reason: str = ""
    seconds: float | None = None
    simulated: float | None = None
    bubble: float | None = None
    memory: Memory | None = None
    schedule: Schedule | None = None


def on_schedule(pipeline: Pipeline, schedule: Schedule, costs: StageCosts) -> tuple[Pipeline, float]:
    """(the pipeline with another order of the same stages, seconds of its ticks and of messages between them).

    Args:
      pipeline: of a schedule with the same stages, and the same order of storage.
      schedule: to run instead.
      costs: of each stage, and of the ends.
    """
    program, ends = pipeline.program, without_shared_ends(pipeline, costs)
    relative = dataclasses.replace(longest(costs), p2p=0.0)
    packing = pack(schedule, relative, shared_ends=program.shared_ends)
    program = lower(
        schedule,
        relative,
        embed_grad=pipeline.model.embed is not None,
        shared_ends=program.shared_ends,
        packing=packing,
        kind_of=pipeline.model.kind_of,
    )
    dispatch = pipeline.dispatch
    if dispatch == default_dispatch(pipeline.program, pipeline.mesh):
        dispatch = default_dispatch(program, pipeline.mesh)
    options = dataclasses.replace(pipeline.options, costs=relative, dispatch=dispatch)
    changed = dataclasses.replace(pipeline, program=program, options=options)
    return changed, lockstep_seconds(schedule, packing, ends)


def lockstep_seconds(schedule: Schedule, packing: Packing, costs: StageCosts | Costs) -> float:
    """Time of ticks, each as long as its slowest rank, and of a message after each one that any is sent after.

    >>> from jaxpipe.schedule.registry import build
    >>> schedule = build("gpipe", 2, 2)
    >>> lockstep_seconds(schedule, pack(schedule, Costs()), Costs(1, 1, 1, p2p=0.25))
    10.0
    """
    times = [[duration(costs, group) for group in groups] for groups in schedule.ranks]
    before, total = (0,) * schedule.num_ranks, 0.0
    for after in packing.progress:
        ran = [slice(*span) for span in zip(before, after, strict=True)]
        total += max(sum(row[span]) for row, span in zip(times, ran, strict=True))
        sends = any(
            _leaves(schedule, action)
            for groups, span in zip(schedule.ranks, ran, strict=True)
            for group in groups[span]
            for action in group
        )
        total += costs.p2p * sends
        before = after
    return total


def simulated(pipeline: Pipeline, costs: StageCosts) -> tuple[float, float, int]:
    """(makespan of the schedule, what the rank that works least works, most stashes) without ends that all share."""
    found = timeline(pipeline, costs)
    return found.makespan, min(found.busy), max(found.peak_live)


def between(sizes: Sequence[float], measured: Sequence[StageCosts], size: float) -> StageCosts:
    """Costs for a size of microbatches, on the straight line between the two that were measured nearest.

    Args:
      sizes: examples of a microbatch, ascending.
      measured: the costs of each.
      size: to find the costs of; no further out than ``sizes``.

    >>> one, two = StageCosts((Costs(1, 2, 3),), head=1), StageCosts((Costs(3, 4, 5),), head=1)
    >>> between([4, 8], [one, two], 6)
    StageCosts(stages=(Costs(forward=2.0, backward_input=3.0, weight=4.0, backward=None, overlapped=None, p2p=0.0),), \
p2p=0.0, embed=0.0, embed_grad=0.0, head=1.0)
    """
    if size in sizes:
        return measured[sizes.index(size)]
    right = next(i for i, other in enumerate(sizes) if other > size)
    share = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])

    def mix(a: Any, b: Any, names: Sequence[str]) -> dict[str, Any]:
        pairs = {name: (getattr(a, name), getattr(b, name)) for name in names}
        return {name: None if None in pair else (1 - share) * pair[0] + share * pair[1] for name, pair in pairs.items()}

    left, after = measured[right - 1], measured[right]
    names = [field.name for field in dataclasses.fields(Costs)]
    stages = tuple(Costs(**mix(a, b, names)) for a, b in zip(left.stages, after.stages, strict=True))
    return StageCosts(stages, **mix(left, after, ("p2p", "embed", "embed_grad", "head")))


def without_shared_ends(pipeline: Pipeline, costs: StageCosts) -> StageCosts:
    """The costs without the ends, where all ranks share them."""
    if not pipeline.program.shared_ends:
        return costs
    return dataclasses.replace(costs, embed=0.0, embed_grad=0.0, head=0.0)


def _leaves(schedule: Schedule, action: tuple[int, Kind, int]) -> bool:
    """Whether what an action makes is sent to another rank."""
    stage, kind, microbatch = action
    other = stage + 1 if kind is Kind.F else stage - 1
    if kind is Kind.W or not 0 <= other < schedule.num_stages:
        return False
    return schedule.rank_of(other, microbatch) != schedule.rank_of(stage, microbatch)
