"""A time that no order of a placement can beat, whoever finds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts


def lower_bound(schedule: Schedule, costs: Costs | StageCosts, stash: int | None = None) -> float:
    """The least makespan that any order of the same stages on the same ranks may have: work of a rank plus its ramps.

    What a rank cannot do without, for each stage and microbatch that it runs: F, and B or I and W, whichever is less,
    each at its share of an overlapped pair where a pair is shorter than the two apart; but for those of one microbatch
    at first and of one at last, which find nothing to be paired with. Beside that work,

    * it waits at first: until an input has come down to one of its stages, through the forwards of the stages before;
      or until its first gradient, which has been through all forwards and back: in that time it can do forwards, no
      more than ``stash`` of them;
    * it has a rest at last: from its last input gradient on, the gradient goes back through the stages before, whose
      first ends with a whole backward. In that time the rank can do weight gradients, no more than ``stash`` of them.

    The bound is the most that any rank's work and any choice of its two ramps add up to; and one microbatch's whole
    way. Groups are at least as long as their longest member is in a pair, and messages take `Costs.p2p`.

    Args:
      schedule: gives stages, ranks, routes and microbatches; its order does not count.
      costs: as for `jaxpipe.schedule.simulate`.
      stash: most stashes that a rank may hold at once; None: as many as there are.

    >>> from jaxpipe.schedule.builders.one_f_one_b import one_f_one_b
    >>> lower_bound(one_f_one_b(4, 8), Costs(p2p=0))  # 24 of work, and 3 until the last rank begins
    27.0
    """
    each = _Least(schedule, costs)
    most = stash if stash is not None else schedule.num_microbatches * schedule.num_stages
    bounds = [each.whole_way()]
    for rank in range(schedule.num_ranks):
        chunks = [(r, stage) for r, path in enumerate(schedule.routes) for stage, at in enumerate(path) if at == rank]
        if chunks:
            bounds.append(each.of_rank(chunks, most))
    return max(bounds)


@dataclasses.dataclass(frozen=True)
class _Least:
    """Least times of what a schedule's stages do."""

    schedule: Schedule
    costs: Costs | StageCosts

    def time(self, stage: int, kind: Kind) -> float:
        """Of an action by itself, with the ends that go with it."""
        action = Action(stage, kind, 0)
        return self.costs.group((action,)) if isinstance(self.costs, StageCosts) else self.costs.of(kind)

    def share(self, stage: int) -> float:
        """What a pair takes of both of its halves, at most all."""
        costs = self.costs.stages[stage] if isinstance(self.costs, StageCosts) else self.costs
        return min(1.0, costs.pair_share)

    def ends(self, stage: int, kind: Kind) -> float:
        """Of the ends that go with an action, which nothing overlaps."""
        costs = self.costs.stages[stage].of(kind) if isinstance(self.costs, StageCosts) else self.costs.of(kind)
        return self.time(stage, kind) - costs

    def paired(self, stage: int, kind: Kind) -> float:
        """Of an action in the best pair."""
        ends = self.ends(stage, kind)
        return (self.time(stage, kind) - ends) * self.share(stage) + ends

    def backward(self, stage: int) -> float:
        """Of a whole backward, however it is divided."""
        return min(self.paired(stage, Kind.B), self.time(stage, Kind.I) + self.time(stage, Kind.W))

    def alone(self, stage: int) -> float:
        """Of a backward that is in no pair."""
        return min(self.time(stage, Kind.B), self.time(stage, Kind.I) + self.time(stage, Kind.W))

    def gradient(self, stage: int) -> float:
        """Until a stage's input gradient is there."""
        return min(self.paired(stage, Kind.B), self.time(stage, Kind.I))

    def hop(self, route: int, stage: int) -> float:
        """A message from a stage to the next, either way."""
        path = self.schedule.routes[route]
        return self.costs.p2p * (path[stage] != path[stage + 1])

    def there(self, route: int, stage: int) -> float:
        """From the beginning until a stage has its first input; nothing can be paired yet."""
        return sum(self.time(s, Kind.F) + self.hop(route, s) for s in range(stage))

    def and_back(self, route: int, stage: int) -> float:
        """From the beginning until a stage has its first gradient."""
        last = self.schedule.num_stages - 1
        forward = self.there(route, last) + self.time(last, Kind.F)
        return forward + sum(self.gradient(s) + self.hop(route, s - 1) for s in range(last, stage, -1))

    def rest(self, route: int, stage: int) -> float:
        """From the end of a stage's input gradient to that of the first stage's whole backward."""
        if stage == 0:
            return 0.0
        return (
            sum(self.gradient(s) for s in range(1, stage))
            + self.backward(0)
            + sum(self.hop(route, s) for s in range(stage))
        )

    def whole_way(self) -> float:
        """One microbatch, alone."""
        last = self.schedule.num_stages - 1
        return min(
            self.there(route, last) + self.time(last, Kind.F) + self.gradient(last) + self.rest(route, last)
            if last
            else self.time(0, Kind.F) + self.backward(0)
            for route in range(len(self.schedule.routes))
        )

    def of_rank(self, chunks: Sequence[tuple[int, int]], stash: int) -> float:
        """The bound of the work of a rank that runs these stages of these routes."""
        count = self.schedule.num_microbatches // len(self.schedule.routes)
        forwards = [self.paired(stage, Kind.F) for _, stage in chunks]
        weights = [self.time(stage, Kind.W) for _, stage in chunks]
        work = count * (sum(forwards) + sum(self.backward(stage) for _, stage in chunks))
        stash = min(stash, count * len(chunks))
        # The first gradient is of a microbatch that has been through all of its route's stages here, with nothing to
        # pair those forwards with; as there is no forward left for the backwards of the microbatch that comes last.
        routes = [[stage for at, stage in chunks if at == route] for route in {route for route, _ in chunks}]
        alone = min(sum(self.time(s, Kind.F) - self.paired(s, Kind.F) for s in stages) for stages in routes)
        work += min(sum(self.alone(s) - self.backward(s) for s in stages) for stages in routes)
        begin = max(
            min(self.there(route, stage) for route, stage in chunks) + alone,
            min(self.and_back(route, stage) for route, stage in chunks) - stash * max(forwards),
        )
        end = max(0.0, min(self.rest(route, stage) for route, stage in chunks) - stash * max(weights))
        return begin + work + end
