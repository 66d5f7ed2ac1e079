"""What a search for orders works on: the actions of a schedule as integers, timed much faster than `simulate` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts, duration

Code = tuple[int, ...]
"""A group: one action or a forward with a backward, each ``4 * (stage * num_microbatches + microbatch) + kind``."""

Orders = list[list[Code]]
"""The groups of each rank."""

KINDS = (Kind.F, Kind.B, Kind.I, Kind.W)
F, B, I, W = range(4)


class Timing(NamedTuple):
    """When groups run.

    Attributes:
      makespan: end of the last.
      starts: ``[num_ranks][groups]``.
      ends: by value, three for each stage and microbatch: the output of F, the cotangent of B or I, and what I leaves
        to W.
    """

    makespan: float
    starts: list[list[float]]
    ends: list[float]


class Problem:
    """The actions of a placement of stages on ranks, with their times.

    Args:
      schedule: gives ranks, stages, microbatches and routes; its order is one of many.
      costs: times of all stages alike, or of each.
    """

    def __init__(self, schedule: Schedule, costs: Costs | StageCosts) -> None:
        self.schedule, self.costs = schedule, costs
        self.count, self.stages = schedule.num_microbatches, schedule.num_stages
        self.reads: list[tuple[tuple[int, float], ...]] = []
        """By action: the values that it waits for, each with the time of its message."""
        self.writes: list[tuple[int, ...]] = []
        self.rank_of: list[int] = []
        """By stage and microbatch."""
        self._durations: dict[Code, float] = {}
        for stage in range(self.stages):
            for microbatch in range(self.count):
                self._add(stage, microbatch)

    def _add(self, stage: int, microbatch: int) -> None:
        schedule, count = self.schedule, self.count
        cell, rank = stage * count + microbatch, schedule.rank_of(stage, microbatch)

        def latency(other: int) -> float:
            return self.costs.p2p * (schedule.rank_of(other, microbatch) != rank)

        before = ((3 * (cell - count), latency(stage - 1)),) if stage else ()
        after = ((3 * (cell + count) + 1, latency(stage + 1)),) if stage < self.stages - 1 else ()
        backward = ((3 * cell, 0.0), *after)
        self.reads += [before, backward, backward, ((3 * cell + 2, 0.0),)]
        self.writes += [(3 * cell,), (3 * cell + 1,), (3 * cell + 1, 3 * cell + 2), ()]
        self.rank_of.append(rank)

    def action(self, code: int) -> Action:
        """The action of an integer."""
        stage, microbatch = divmod(code // 4, self.count)
        return Action(stage, KINDS[code % 4], microbatch)

    def code(self, group: Group) -> Code:
        """The integers of a group."""
        return tuple(4 * (a.stage * self.count + a.microbatch) + KINDS.index(a.kind) for a in group)

    def duration(self, code: Code) -> float:
        """The time of a group."""
        if code not in self._durations:
            self._durations[code] = duration(self.costs, tuple(map(self.action, code)))
        return self._durations[code]

    def read(self, schedule: Schedule) -> Orders:
        """The order of a schedule with the same routes."""
        return [[self.code(group) for group in groups] for groups in schedule.ranks]

    def write(self, orders: Sequence[Sequence[Code]], name: str) -> Schedule:
        """The schedule of an order."""
        ranks = tuple(tuple(tuple(map(self.action, code)) for code in row) for row in orders)
        given = self.schedule
        return Schedule(name, given.num_stages, given.num_microbatches, ranks, given.routes)

    def time(self, orders: Orders) -> Timing | None:
        """`simulate` of an order; None where ranks wait for each other for ever."""
        ends = [-1.0] * (3 * len(self.rank_of))
        starts: list[list[float]] = [[] for _ in orders]
        clocks = [0.0] * len(orders)
        reads, writes, durations = self.reads, self.writes, self._durations
        progress = True
        while progress:
            progress = False
            for rank, row in enumerate(orders):
                mine, clock = starts[rank], clocks[rank]
                for at in range(len(mine), len(row)):
                    code, start, ready = row[at], clock, True
                    for action in code:
                        for value, latency in reads[action]:
                            end = ends[value]
                            if end < 0:
                                ready = False
                                break
                            if end + latency > start:
                                start = end + latency
                    if not ready:
                        break
                    clock = start + (durations[code] if code in durations else self.duration(code))
                    for action in code:
                        for value in writes[action]:
                            ends[value] = clock
                    mine.append(start)
                    progress = True
                clocks[rank] = clock
        if any(len(mine) < len(row) for mine, row in zip(starts, orders, strict=True)):
            return None
        return Timing(max(clocks), starts, ends)


def peak(row: Sequence[Code]) -> int:
    """Most stashes that a rank holds, each from the start of F to the end of B or W, as `Timeline.peak_live`."""
    live = most = 0
    for code in row:
        if code[0] % 4 == F:
            live += 1
            if live > most:
                most = live
        if code[-1] % 4 in (B, W):
            live -= 1
    return most
