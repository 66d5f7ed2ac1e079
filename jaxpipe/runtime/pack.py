"""Packs a schedule into lockstep ticks: which groups of actions each rank runs between communications.

Messages move only between ticks, and a tick lasts as long as its slowest rank. One group a tick loses time
whenever the groups of a tick differ in cost; here a tick may hold several consecutive groups of a rank while
another rank runs one long group. The order of every rank is kept, so a packing needs no more stash than the
schedule does.

The search is a beam over ticks. From given positions of the ranks, running more groups in a tick of the same
length is never worse, so a move is its length alone, and the only lengths worth trying are those at which some
rank completes a group. The rest of the way is bounded from below by the longest path that remains in the
asynchronous dependency graph. Some schedules lose time at first to gain it in every period of their steady state;
a beam ordered by that bound drops such beginnings, so where it does poorly it is repeated with the remaining path
weighted more than the time already spent.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from jaxpipe.schedule.action import Group, Kind
from jaxpipe.schedule.dependencies import inputs
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulate import Costs

_WIDTH = 256  # positions kept from one tick to the next
_RUN = 8  # groups of one rank in one tick at most
_SATISFIED = 0.01  # no further search once the makespan is this close to the asynchronous one
_GREED = (1.2, 2.0, 4.0)  # weights of the remaining path in further searches


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which groups each rank runs in each lockstep tick.

    Attributes:
      progress: ``[ticks][ranks]``, how many groups of its order each rank has finished after each tick.
      makespan: the sum over ticks of the longest time that a rank computes in it, in units of the costs;
        communication between ticks is not counted.
    """

    progress: tuple[tuple[int, ...], ...]
    makespan: float

    @property
    def num_ticks(self) -> int:
        """Ticks, each followed by communication."""
        return len(self.progress)


def pack(schedule: Schedule, costs: Costs, *, shared_ends: bool = False) -> Packing:
    """Packs a schedule into ticks so that waiting for the slowest rank costs as little as possible.

    Among packings of equal makespan, those of fewer ticks are preferred. The schedule is packed from its
    beginning and, as a lockstep packing read backwards packs the reversed schedule, from its end.

    Args:
      schedule: what every rank does, in which order.
      costs: the time that each kind of group takes.
      shared_ends: the head runs between ticks, on all ranks: no tick holds both the last stage's forward of a
        microbatch and its backward. The time of the ends themselves is the same in every packing.

    Returns:
      The best packing found, never worse than ``pack_naive``.

    Raises:
      ValueError: the schedule cannot run: ranks wait for each other in a cycle.
    """
    predecessors, group_costs = _predecessors(schedule, shared_ends), _group_costs(schedule, costs)
    forward = _table(predecessors, group_costs)
    backward = _table(_reverse(predecessors), [row[::-1] for row in group_costs])
    packings = [_packing(forward, path) for path in (_one_each(forward), _search(forward, 1.0))]
    from_end = [forward.lengths - position for position in _search(backward, 1.0)][::-1]
    packings.append(_packing(forward, [*from_end, forward.lengths][1:]))
    for greed in _GREED:
        best = min(packing.makespan for packing in packings)
        if best > (1 + _SATISFIED) * forward.tail[:, 0].max():
            packings.append(_packing(forward, _search(forward, greed)))
    best = min(packing.makespan for packing in packings)
    return min((p for p in packings if p.makespan <= best * (1 + 1e-9)), key=lambda p: p.num_ticks)


def pack_naive(schedule: Schedule, costs: Costs, *, shared_ends: bool = False) -> Packing:
    """Packs a schedule with at most one group a rank a tick, each as early as its inputs allow.

    Arguments are those of `pack`.

    Raises:
      ValueError: the schedule cannot run: ranks wait for each other in a cycle.
    """
    table = _table(_predecessors(schedule, shared_ends), _group_costs(schedule, costs))
    return _packing(table, _one_each(table))


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    """What the search reads. N is the number of groups of the longest rank, K the most ranks that one depends on."""

    lengths: np.ndarray  # int[ranks]: groups of each rank
    elapsed: np.ndarray  # float[ranks, N+1]: cost of the first n groups
    tail: np.ndarray  # float[ranks, N+1]: longest path from the start of group n to the end of everything
    neighbours: np.ndarray  # int[ranks, K]: ranks that a rank depends on, itself perhaps
    limit: np.ndarray  # int[ranks, K, N+1]: groups that a rank may finish once the neighbour has finished n

    def available(self, positions: np.ndarray) -> np.ndarray:
        """How far each rank may get within one tick: ``int[n, ranks]`` from and to."""
        ranks = np.arange(len(self.lengths))[:, None]
        return self.limit[ranks, np.arange(self.neighbours.shape[1]), positions[:, self.neighbours]].min(-1)


_Predecessors = list[list[set[tuple[int, int]]]]  # [ranks][groups] of (rank, group)


def _predecessors(schedule: Schedule, shared_ends: bool) -> _Predecessors:
    """The groups that must have run before the tick of each group: those whose messages it needs.

    Of the groups of the same rank, those that the rank's order already puts first are left out, unless a shared
    head lies between. One that the order puts last stays: such a schedule cannot run.
    """
    where = {a: (r, i) for r, row in enumerate(schedule.ranks) for i, group in enumerate(row) for a in group}

    def needed(group: Group, place: tuple[int, int]) -> set[tuple[int, int]]:
        found = set()
        for action in group:
            head = shared_ends and action.stage == schedule.num_stages - 1 and action.kind in (Kind.B, Kind.I)
            for source in itertools.chain.from_iterable(inputs(schedule, action)):
                rank, index = where.get(source, place)
                if rank != place[0] or index > place[1] or (head and index < place[1]):
                    found.add((rank, index))
        return found

    return [[needed(group, (r, i)) for i, group in enumerate(row)] for r, row in enumerate(schedule.ranks)]


def _group_costs(schedule: Schedule, costs: Costs) -> list[list[float]]:
    return [[costs.group(tuple(action.kind for action in group)) for group in row] for row in schedule.ranks]


def _reverse(predecessors: _Predecessors) -> _Predecessors:
    """The predecessors in the schedule read backwards."""
    reverse: _Predecessors = [[set() for _ in row] for row in predecessors]
    for r, row in enumerate(predecessors):
        for i, needs in enumerate(row):
            for q, k in needs:
                reverse[q][len(predecessors[q]) - 1 - k].add((r, len(row) - 1 - i))
    return reverse


def _tails(predecessors: _Predecessors, group_costs: list[list[float]]) -> list[list[float]]:
    """``[ranks][groups + 1]``: the longest path from the start of each group to the end of everything."""
    before = [
        [needs | ({(r, i - 1)} if i else set()) for i, needs in enumerate(row)] for r, row in enumerate(predecessors)
    ]
    waiting = [[0] * len(row) for row in before]
    for q, k in itertools.chain.from_iterable(itertools.chain.from_iterable(before)):
        waiting[q][k] += 1
    tails = [[0.0] * (len(row) + 1) for row in before]
    ready = [(r, i) for r, row in enumerate(waiting) for i, count in enumerate(row) if count == 0]
    done = 0
    while ready:
        r, i = ready.pop()
        done += 1
        tails[r][i] += group_costs[r][i]
        for q, k in before[r][i]:
            tails[q][k] = max(tails[q][k], tails[r][i])
            waiting[q][k] -= 1
            if waiting[q][k] == 0:
                ready.append((q, k))
    if done < sum(map(len, before)):
        raise ValueError("the schedule cannot run: ranks wait for each other; jaxpipe.schedule.check shows where")
    return tails


def _table(predecessors: _Predecessors, group_costs: list[list[float]]) -> _Table:
    ranks, lengths = len(predecessors), np.array([len(row) for row in predecessors])
    longest = int(lengths.max(initial=0))
    elapsed, tail = np.zeros((ranks, longest + 1)), np.zeros((ranks, longest + 1))
    for r, row in enumerate(_tails(predecessors, group_costs)):
        elapsed[r, 1 : len(row)] = np.cumsum(group_costs[r])
        tail[r, : len(row)] = row
    needs: list[dict[int, np.ndarray]] = [{} for _ in range(ranks)]
    for r, row in enumerate(predecessors):
        for i, (q, k) in ((i, edge) for i, edges in enumerate(row) for edge in edges):
            need = needs[r].setdefault(q, np.zeros(len(row), np.int64))
            need[i] = max(need[i], k + 1)
    width = max(1, *map(len, needs))
    neighbours = np.repeat(np.arange(ranks)[:, None], width, 1)
    limit = np.broadcast_to(lengths[:, None, None], (ranks, width, longest + 1)).copy()
    for r in range(ranks):
        for slot, (q, need) in enumerate(sorted(needs[r].items())):
            neighbours[r, slot] = q
            limit[r, slot] = np.searchsorted(np.maximum.accumulate(need), np.arange(longest + 1), side="right")
    return _Table(lengths, elapsed, tail, neighbours, limit)


def _search(table: _Table, greed: float) -> list[np.ndarray]:
    """Beam search: the positions ``int[ranks]`` after each tick of the best way found to the end.

    The beam keeps the positions of least time plus ``greed`` times remaining path.
    """
    ranks, runs = np.arange(len(table.lengths)), np.arange(1, _RUN + 1)
    tolerance = 1e-9 * float(table.elapsed.max())
    hashes = np.random.default_rng(0).integers(1, 2**61, len(ranks))
    position, time = np.zeros((1, len(ranks)), np.int64), np.zeros(1)
    parents: list[np.ndarray] = []
    visited: list[np.ndarray] = [position]
    best, finish = np.inf, (0, 0, table.lengths)  # makespan; (ticks before the last, parent, last positions)
    while len(position) and table.lengths.any():
        reach = table.available(position)
        run = position[:, :, None] + runs  # [n, ranks, run]
        spent = table.elapsed[ranks[:, None], np.minimum(run, reach[:, :, None])]
        spent = np.where(run <= reach[:, :, None], spent - table.elapsed[ranks, position][:, :, None], np.inf)
        lengths = np.sort(spent.reshape(len(position), -1), axis=1)
        fresh = np.isfinite(lengths)
        fresh[:, 1:] &= lengths[:, 1:] > lengths[:, :-1] + tolerance
        parent, column = np.nonzero(fresh)
        length = lengths[parent, column]
        after = position[parent] + (spent[parent] <= length[:, None, None] + tolerance).sum(-1)
        until = time[parent] + length
        remaining = table.tail[ranks, after].max(-1)
        ended = (after == table.lengths).all(-1)
        if ended.any() and until[ended].min() < best - tolerance:
            last = np.flatnonzero(ended)[until[ended].argmin()]
            best, finish = until[last], (len(visited) - 1, parent[last], after[last])
        open_ = np.flatnonzero((until + remaining < best - tolerance) & ~ended)
        open_ = open_[np.argsort(until[open_], kind="stable")]
        open_ = open_[np.unique(after[open_] @ hashes, return_index=True)[1]]  # the earliest of equal positions
        done = table.elapsed[ranks, after[open_]].sum(-1)
        score = until[open_] + greed * remaining[open_]
        score = np.round(score / (100 * tolerance)) if tolerance else score
        open_ = open_[np.lexsort((-done, score))][:_WIDTH]
        position, time = after[open_], until[open_]
        parents.append(parent[open_])
        visited.append(position)
    tick, index, last = finish
    path = [last]
    while tick > 0:
        path.append(visited[tick][index])
        tick, index = tick - 1, parents[tick - 1][index]
    return path[::-1]


def _one_each(table: _Table) -> list[np.ndarray]:
    """The positions after each tick if every rank runs one group a tick wherever it can."""
    position, path = np.zeros_like(table.lengths), []
    while (position < table.lengths).any():
        position = np.minimum(position + 1, table.available(position[None])[0])
        path.append(position)
    return path


def _packing(table: _Table, path: list[np.ndarray]) -> Packing:
    ranks, position, makespan = np.arange(len(table.lengths)), np.zeros_like(table.lengths), 0.0
    for after in path:
        makespan += float((table.elapsed[ranks, after] - table.elapsed[ranks, position]).max())
        position = after
    return Packing(tuple(tuple(map(int, after)) for after in path), makespan)
