"""The search for ticks: a beam over the positions of all ranks, from tick to tick.

From given positions of the ranks, running more groups in a tick of the same length is never worse, so a move is its
length alone, and the only lengths worth trying are those at which some rank completes a group. The rest of the way is
bounded from below by the longest path that remains in the asynchronous dependency graph. Some schedules lose time at
first to gain it in every period of their steady state; a beam ordered by that bound drops such beginnings, so where it
does poorly it is repeated with the remaining path weighted more than the time already spent.
"""

from __future__ import annotations

import numpy as np

from jaxpipe.runtime.graph import Graph, Table, longest_paths, make_table

_WIDTH = 256  # positions kept from one tick to the next
_RUN = 8  # groups of one rank in one tick at most
_SATISFIED = 0.01  # no further search once the makespan is this close to the asynchronous one
_GREED = (1.2, 2.0, 4.0)  # weights of the remaining path in further searches


def search(graph: Graph) -> list[np.ndarray]:
    """Ways to the end, each the positions ``int[ticks + 1, ranks]`` after each tick; the last is one group a tick.

    The schedule is packed from its beginning and, as a lockstep packing read backwards packs the reversed schedule,
    from its end; where that is not as short as the longest path of all, then with other weights.

    Raises:
      ValueError: groups wait for each other in a cycle.
    """
    table, tails = make_table(graph), _tails(graph)
    shortest = tails[:, 0].max()
    paths = [_beam(table, tails, 1.0)]
    if table.durations(paths[0]).sum() > (1 + 1e-9) * shortest:
        mirrored = graph.reversed()
        paths.append(graph.lengths - _beam(make_table(mirrored), _tails(mirrored), 1.0)[::-1])
    for greed in _GREED:
        if min(table.durations(path).sum() for path in paths) > (1 + _SATISFIED) * shortest:
            paths.append(_beam(table, tails, greed))
    return [*paths, one_each(table)]


def one_each(table: Table) -> np.ndarray:
    """The positions ``int[ticks + 1, ranks]`` if every rank runs one group a tick wherever it can.

    Raises:
      ValueError: ranks wait for each other.
    """
    lengths, limit = table.lengths.tolist(), table.limit.tolist()
    rules = [list(zip(row, rows, strict=True)) for row, rows in zip(table.neighbours.tolist(), limit, strict=True)]
    position = [0] * len(lengths)
    path = [position]
    while position != lengths:
        after = [
            here if any(rows[position[other]] <= here for other, rows in rule) else here + 1
            for here, rule in zip(position, rules, strict=True)
        ]
        if after == position:
            raise ValueError("the schedule cannot run: ranks wait for each other; jaxpipe.schedule.check shows where")
        path.append(position := after)
    return np.array(path)


def _tails(graph: Graph) -> np.ndarray:
    """``float[ranks, N+1]``: the longest path from the start of group n to the end of everything."""
    tails, paths = np.zeros((len(graph.lengths), int(graph.lengths.max(initial=0)) + 1)), longest_paths(graph)
    for rank, (offset, length) in enumerate(zip(graph.offsets, graph.lengths, strict=True)):
        tails[rank, :length] = paths[offset : offset + length]
    return tails


def _beam(table: Table, tails: np.ndarray, greed: float) -> np.ndarray:
    """Beam search: the positions ``int[ticks + 1, ranks]`` of the best way found to the end.

    The beam keeps the positions of least time plus ``greed`` times remaining path.
    """
    ranks, width = table.elapsed.shape
    # A position is its place in the rows of ``elapsed`` and ``tails``, laid end to end.
    origin, elapsed, tails = np.arange(ranks) * width, table.elapsed.reshape(-1), tails.reshape(-1)
    end = origin + table.lengths
    tolerance = 1e-9 * float(elapsed.max())
    keys = np.random.default_rng(0).integers(1, 2**61, ranks)  # the sum of these over all groups tells positions apart
    position, time, key = origin[None], np.zeros(1), np.zeros(1, np.int64)
    parents: list[np.ndarray] = []
    visited: list[np.ndarray] = [position]
    best, finish = np.inf, (0, 0, end)  # makespan; (ticks before the last, parent, last positions)
    while len(position) and table.lengths.any():
        reach, begun = table.available((position - origin).T).T + origin, elapsed.take(position)
        runs = range(1, 1 + min(_RUN, int((reach - position).max())))
        spent = [  # what the first so many groups of each rank take: [n, ranks] for each number
            np.where(position + run <= reach, elapsed.take(np.minimum(position + run, reach)) - begun, np.inf)
            for run in runs
        ]
        ends = np.stack(spent, -1).reshape(len(position), -1)
        order = np.argsort(ends, axis=1, kind="stable")
        lengths = np.take_along_axis(ends, order, 1)
        longer = lengths[:, 1:] > lengths[:, :-1] + tolerance
        edge = np.ones((len(position), 1), bool)
        parent, first = np.nonzero(np.hstack([edge, longer]) & np.isfinite(lengths))
        last = np.nonzero(np.hstack([longer, edge]) & np.isfinite(lengths))[1]
        keys_after = key[parent] + np.cumsum(keys.take(order // len(runs)), axis=1)[parent, last]
        length = lengths[parent, first]
        until = time[parent] + length
        # Of equal positions the earliest.
        earliest = np.argsort(until, kind="stable")
        key, index = np.unique(keys_after[earliest], return_index=True)
        chosen = earliest[index]
        parent, until, length = parent[chosen], until[chosen], length[chosen, None] + tolerance
        after = position[parent]
        for cost in spent:
            after += cost[parent] <= length
        remaining = tails.take(after).max(1)
        for last in np.flatnonzero((after == end).all(1) & (until < best - tolerance)):
            best, finish = until[last], (len(visited) - 1, parent[last], after[last])
        open_ = np.flatnonzero(until + remaining < best - tolerance)
        score = until[open_] + greed * remaining[open_]
        score = np.round(score / (100 * tolerance)) if tolerance else score
        done = elapsed.take(after[open_]).sum(1)
        open_ = open_[np.lexsort((-done, score))][:_WIDTH]
        position, time, key = after[open_], until[open_], key[open_]
        parents.append(parent[open_])
        visited.append(position)
    tick, index, last = finish
    path = [last]
    while tick > 0:
        path.append(visited[tick][index])
        tick, index = tick - 1, parents[tick - 1][index]
    return np.array([origin, *path[::-1]]) - origin
