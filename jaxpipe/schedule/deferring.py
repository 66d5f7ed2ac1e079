"""Fewer weight gradients put off at once: what crosses from I to W is kept for each, and may be most of the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.checker import check
from jaxpipe.schedule.dependencies import inputs
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts, duration, simulate

_EPSILON = 1e-9


@dataclasses.dataclass(frozen=True)
class _Policy:
    """What is done about a weight gradient before its place in the schedule.

    Attributes:
      whole: where no slot is free, the backward becomes whole; otherwise the oldest W runs before it.
      gap: the share of a W's time that a rank must be idle for the W to run there; None: Ws run nowhere else.
    """

    whole: bool
    gap: float | None


_POLICIES = tuple(_Policy(whole, gap) for gap in (None, 1.0, 0.5, 0.0) for whole in (False, True))


def bound_deferred(schedule: Schedule, slots: int, costs: Costs | StageCosts = Costs()) -> Schedule:  # noqa: B008
    """The schedule with at most so many weight gradients of a rank between their I and their W.

    For each of them a rank keeps what crosses from I to W, one of the program's cross slots. Where an I would need one
    more, the oldest W runs before it, or the I and its own W become a B; and Ws run where a rank would wait. Some
    simple rules are tried, and the fastest result is returned. The other groups keep their order on each rank, and no W
    runs later than before, so that no pool of residuals grows.

    What it costs is the makespan: the dx of an I that a W is put before comes later. `simulate` shows it.

    Args:
      schedule: as `jaxpipe.schedule.check` accepts it.
      slots: most that a rank puts off at once (`Timeline.peak_pending_weight`); 0: every backward is whole.
      costs: times of all stages alike, or of each, for which the rules are compared.

    Returns:
      A schedule that `jaxpipe.schedule.check` passes, named after the given one and the bound, such as
      "dualpipev_deferred4"; or the given one where it keeps to the bound already.

    Raises:
      ValueError: a negative bound, a schedule that is not sound, costs of another number of stages.

    >>> from jaxpipe.schedule import build
    >>> for slots in (3, 2, 1, 0):
    ...     found = bound_deferred(build("dualpipev", 4, 8), slots)
    ...     print(found.name, simulate(found).makespan, max(simulate(found).peak_pending_weight))
    dualpipev_deferred3 54.0 3
    dualpipev_deferred2 55.0 2
    dualpipev_deferred1 56.0 1
    dualpipev_deferred0 62.0 0
    """
    slots = at_least(schedule.name, "slots", slots, 0)
    check(schedule)
    if max(simulate(schedule, costs).peak_pending_weight) <= slots:
        return schedule
    found = [_Bounding(schedule, slots, costs, policy).run() for policy in _POLICIES]
    spans = [simulate(each, costs).makespan for each in found]
    best = next(each for each, span in zip(found, spans, strict=True) if span <= min(spans) * (1 + _EPSILON))
    check(best)
    return best


class _Bounding:
    """One pass over a schedule as `simulate` makes it, in which Ws are moved by a policy."""

    def __init__(self, schedule: Schedule, slots: int, costs: Costs | StageCosts, policy: _Policy) -> None:
        self.schedule, self.slots, self.costs, self.policy = schedule, slots, costs, policy
        self.ends: dict[Action, float] = {}
        self.ranks = [_Rank(groups) for groups in schedule.ranks]

    def run(self) -> Schedule:
        """The schedule that comes of it."""
        progress = True
        while progress:
            progress = False
            for number, rank in enumerate(self.ranks):
                while rank.next < len(rank.groups) and self._advance(number, rank):
                    progress = True
        ranks = tuple(tuple(rank.order) for rank in self.ranks)
        return dataclasses.replace(self.schedule, name=f"{self.schedule.name}_deferred{self.slots}", ranks=ranks)

    def _advance(self, number: int, rank: _Rank) -> bool:
        """Runs a rank's next group and what has to run before it; False while an input is not there."""
        group = rank.groups[rank.next]
        if group[0] in rank.done:
            rank.next += 1
            return True
        arrival = self._arrival(number, group)
        if arrival is None:
            return False
        if self.policy.gap is not None:
            for weight in list(rank.pending):
                needed = self.policy.gap * duration(self.costs, (weight,))
                if arrival - rank.clock < max(needed - _EPSILON, _EPSILON):
                    break
                self._append(rank, (weight,))
        deferred = next((action for action in group if action.kind is Kind.I), None)
        if deferred is not None and len(rank.pending) >= self.slots:
            if self.policy.whole or not self.slots:
                group = tuple(a._replace(kind=Kind.B) if a is deferred else a for a in group)
                rank.done.add(deferred._replace(kind=Kind.W))
            else:
                self._append(rank, (rank.pending[0],))
        rank.clock = max(rank.clock, arrival)
        self._append(rank, group)
        rank.next += 1
        return True

    def _append(self, rank: _Rank, group: Group) -> None:
        rank.append(group)
        rank.clock += duration(self.costs, group)
        self.ends.update((action, rank.clock) for action in group)

    def _arrival(self, number: int, group: Group) -> float | None:
        """When all that a group needs from elsewhere is there; None while something has not run."""
        latest = 0.0
        for options in self._needs(group):
            ran = next((option for option in options if option in self.ends), None)
            if ran is None:
                return None
            away = self.schedule.rank_of(ran.stage, ran.microbatch) != number
            latest = max(latest, self.ends[ran] + self.costs.p2p * away)
        return latest

    def _needs(self, group: Group) -> Iterator[tuple[Action, ...]]:
        for action in group:
            for options in inputs(self.schedule, action):
                if not any(option in group for option in options):
                    yield options


class _Rank:
    """What a rank has run.

    Attributes:
      groups: as they are given.
      next: the place of the first of them that has not run.
      order: what has run.
      clock: when the last of it ended.
      pending: Ws that could run, in the order that they were given in.
      done: Ws that ran or are part of a B.
    """

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self.groups, self.next, self.clock = groups, 0, 0.0
        self.order: list[Group] = []
        self.pending: list[Action] = []
        self.done: set[Action] = set()
        self._places = {group[0]: place for place, group in enumerate(groups) if group[0].kind is Kind.W}

    def append(self, group: Group) -> None:
        """Notes that a group has run."""
        self.order.append(group)
        for action in group:
            if action.kind is Kind.W:
                self.pending.remove(action)
                self.done.add(action)
            elif action.kind is Kind.I:
                self.pending.append(action._replace(kind=Kind.W))
                self.pending.sort(key=self._places.__getitem__)
