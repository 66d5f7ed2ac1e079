"""A search for a better order than the builders', for measured costs and a bound of memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from jaxpipe.schedule.bound import lower_bound
from jaxpipe.schedule.checker import check
from jaxpipe.schedule.listing import list_schedule, preferences
from jaxpipe.schedule.problem import B, Code, F, I, Orders, Problem, Timing, W, peak
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts, simulate

_STARTS = 3
"""Orders from which local moves begin."""

_HEAT = 0.002
"""How much worse than the current order a move may be at first, as a share of the makespan; it falls to nothing."""

_REACH = 8
"""How far a group moves in its rank's order at most."""

_EPSILON = 1e-9


def improve(
    seeds: Schedule | Sequence[Schedule],
    costs: Costs | StageCosts,
    *,
    stash: int | None = None,
    moves: int = 2000,
    random_seed: int = 0,
) -> Schedule:
    """The fastest order found for these costs, of the same stages on the same ranks: never slower than the seeds.

    Orders to begin with are the seeds, and those that list scheduling makes under several preferences. Local moves then
    change groups on the critical path of the best ones: a group comes earlier or later on its rank, a backward is
    divided or whole, a forward and a backward run together or apart. `jaxpipe.schedule.simulate` is what is made
    shorter, and `lower_bound` says what nobody can go below; a search ends where it meets that.

    Args:
      seeds: one or several schedules of the same routes and microbatches, such as ``build("zbv", 4, 8)`` and
        ``build("dualpipev", 4, 8)``.
      costs: times of all stages alike, or of each.
      stash: most stashes that a rank may hold at once (`Timeline.peak_live`); None: those of the fastest seed.
      moves: local moves that are tried from each of the orders to begin with.
      random_seed: of the moves; the same arguments give the same schedule.

    Returns:
      A schedule that `jaxpipe.schedule.check` passes, named "improved" and the fastest seed's name, such as
      "improved_zbv"; or that seed itself where nothing faster was found.

    Raises:
      ValueError: seeds of other routes or microbatches than the first; none that keeps to ``stash``.

    Source: list scheduling as in ZB-V's automatic scheduler, arXiv 2401.10241; moves on the critical path as for job
    shops, Nowicki and Smutnicki 1996.

    >>> from jaxpipe.schedule import build
    >>> seed, costs = build("1f1b", 2, 4), Costs(1, 1, 1)
    >>> found = improve(seed, costs, moves=100)
    >>> simulate(seed, costs).makespan, simulate(found, costs).makespan, lower_bound(seed, costs, stash=2)
    (15.0, 13.0, 13.0)
    """
    seeds = [seeds] if isinstance(seeds, Schedule) else list(seeds)
    _check_alike(seeds)
    timelines = {index: simulate(seed, costs) for index, seed in enumerate(seeds)}
    most = {index: max(timeline.peak_live) for index, timeline in timelines.items()}
    if stash is not None:
        timelines = {index: timeline for index, timeline in timelines.items() if most[index] <= stash}
        if not timelines:
            raise ValueError(
                f"stash={stash}: the seeds hold at least {min(most.values())} stashes on a rank; allow as many, or "
                "pass a seed that holds fewer"
            )
    best = min(timelines, key=lambda index: (timelines[index].makespan, most[index]))
    seed, makespan = seeds[best], timelines[best].makespan
    stash = most[best] if stash is None else stash
    problem = Problem(seed, costs)
    enough = lower_bound(seed, costs, stash) * (1 + _EPSILON)
    pairs = any(each.pair_share < 1 for each in (costs.stages if isinstance(costs, StageCosts) else (costs,)))
    starts = [problem.read(seeds[index]) for index in timelines if most[index] <= stash]
    listed = (list_schedule(problem, stash, each) for each in preferences(pairs=pairs))
    starts += [orders for orders in listed if orders is not None and max(map(peak, orders)) <= stash]
    search = _Search(problem, stash, pairs, enough, random.Random(random_seed))
    found = min((search.run(start, moves) for start in _best(problem, starts)), key=lambda result: result[0])
    if found[0] >= makespan * (1 - _EPSILON):
        return seed
    schedule = problem.write(found[1], seed.name if seed.name.startswith("improved") else f"improved_{seed.name}")
    check(schedule)
    return schedule


def _check_alike(seeds: Sequence[Schedule]) -> None:
    if not seeds:
        raise ValueError("improve needs a schedule to begin with: pass one, such as build('zbv', 4, 8)")
    for seed in seeds:
        check(seed)
        if (seed.routes, seed.num_microbatches) != (seeds[0].routes, seeds[0].num_microbatches):
            raise ValueError(
                f"seed {seed!r} has other routes or microbatches than {seeds[0]!r}: improve each by itself, and "
                "simulate which is faster"
            )


def _best(problem: Problem, starts: Sequence[Orders]) -> list[Orders]:
    """The fastest of some orders, each makespan once."""
    found: dict[float, Orders] = {}
    for orders in starts:
        timing = problem.time(orders)
        if timing is not None:
            found.setdefault(timing.makespan, orders)
    return [found[makespan] for makespan in sorted(found)[:_STARTS]]


class _Search:
    """Local moves from an order."""

    def __init__(self, problem: Problem, stash: int, pairs: bool, enough: float, draw: random.Random) -> None:
        self.problem, self.stash, self.pairs, self.enough, self.random = problem, stash, pairs, enough, draw

    def run(self, orders: Orders, moves: int) -> tuple[float, Orders]:
        """(makespan, order) of the best that so many moves find."""
        timing = self.problem.time(orders)
        assert timing is not None
        best = current = timing.makespan
        kept = orders
        critical = list(_critical(self.problem, orders, timing))
        for move in range(moves):
            if best <= self.enough:
                break
            changed = self._change(orders, critical)
            if changed is None:
                continue
            rank, row = changed
            if peak(row) > self.stash:
                continue
            other = [*orders[:rank], row, *orders[rank + 1 :]]
            after = self.problem.time(other)
            if after is None or after.makespan > current * (1 + _HEAT * (1 - move / moves)):
                continue
            orders, current = other, after.makespan
            critical = list(_critical(self.problem, orders, after))
            if current < best * (1 - _EPSILON):
                best, kept = current, orders
        return best, kept

    def _change(self, orders: Orders, critical: Sequence[tuple[int, int]]) -> tuple[int, list[Code]] | None:
        """A rank and its order after a random move of a group, mostly one on the critical path."""
        draw = self.random
        if draw.random() < 0.85:
            rank, at = draw.choice(critical)
        else:
            rank = draw.randrange(len(orders))
            at = draw.randrange(len(orders[rank]))
        row = list(orders[rank])
        code, kind = row[at], row[at][0] % 4
        ways = [self._shift, self._shift]
        if len(code) == 2:
            ways = [self._shift, self._part]
        elif kind == B:
            ways += [self._divide, *([self._join] * self.pairs)]
        elif kind in (I, W):
            ways += [self._whole]
        elif self.pairs:
            ways += [self._join]
        return (rank, row) if draw.choice(ways)(row, at, code) else None

    def _shift(self, row: list[Code], at: int, code: Code) -> bool:
        """Moves a group."""
        to = at + self.random.choice((-1, 1)) * self.random.randint(1, _REACH)
        to = max(0, min(len(row) - 1, to))
        row.insert(to, row.pop(at))
        return to != at

    def _divide(self, row: list[Code], at: int, code: Code) -> bool:
        """B becomes I, and W somewhere behind it."""
        row[at] = (code[0] + I - B,)
        row.insert(self.random.randint(at + 1, len(row)), (code[0] + W - B,))
        return True

    def _whole(self, row: list[Code], at: int, code: Code) -> bool:
        """I and its W become B, in the place of I."""
        cell = code[0] - code[0] % 4
        if (cell + I,) not in row or (cell + W,) not in row:
            return False
        row[row.index((cell + I,))] = (cell + B,)
        row.remove((cell + W,))
        return True

    def _join(self, row: list[Code], at: int, code: Code) -> bool:
        """A forward and a backward near each other become a pair, in the place of either."""
        wanted = B if code[0] % 4 == F else F
        near = range(max(0, at - _REACH), min(len(row), at + _REACH + 1))
        others = [place for place in near if len(row[place]) == 1 and row[place][0] % 4 == wanted]
        if not others:
            return False
        other = self.random.choice(others)
        pair = (code[0], row[other][0]) if wanted == B else (row[other][0], code[0])
        stays, goes = (at, other) if self.random.random() < 0.5 else (other, at)
        row[stays] = pair
        del row[goes]
        return True

    def _part(self, row: list[Code], at: int, code: Code) -> bool:
        """A pair becomes its halves."""
        halves = [(code[0],), (code[1],)]
        row[at : at + 1] = halves if self.random.random() < 0.5 else halves[::-1]
        return True


def _critical(problem: Problem, orders: Orders, timing: Timing) -> Iterator[tuple[int, int]]:
    """(rank, position) of the groups that the makespan is the sum of, waits aside, from the last to the first."""
    places: dict[int, tuple[int, int]] = {}
    for rank, row in enumerate(orders):
        for at, code in enumerate(row):
            for action in code:
                for value in problem.writes[action]:
                    places[value] = rank, at
    ends = [starts[-1] + problem.duration(row[-1]) for row, starts in zip(orders, timing.starts, strict=True)]
    rank = ends.index(max(ends))
    at = len(orders[rank]) - 1
    while True:
        yield rank, at
        start = timing.starts[rank][at]
        if start <= 0:
            return
        before = timing.starts[rank][at - 1] + problem.duration(orders[rank][at - 1]) if at else -1.0
        if before >= start:
            at -= 1
            continue
        waits = [(timing.ends[v] + late, v) for action in orders[rank][at] for v, late in problem.reads[action]]
        rank, at = places[max(waits)[1]]
