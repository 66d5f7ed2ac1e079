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
    """Ways to the end, none better than all others: each the positions ``int[ticks + 1, ranks]`` after each tick.

    The schedule is packed from its beginning and, as a lockstep packing read backwards packs the reversed schedule,
    from its end.

    Raises:
      ValueError: groups wait for each other in a cycle.
    """
    forward, backward = make_table(graph), make_table(graph.reversed())
    tails = _tails(graph)
    paths = [_beam(forward, tails, 1.0)]
    paths.append(graph.lengths - _beam(backward, _tails(graph.reversed()), 1.0)[::-1])
    for greed in _GREED:
        if min(forward.durations(path).sum() for path in paths) > (1 + _SATISFIED) * tails[:, 0].max():
            paths.append(_beam(forward, tails, greed))
    return paths


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
    ranks = np.arange(len(table.lengths))
    tolerance = 1e-9 * float(table.elapsed.max())
    hashes = np.random.default_rng(0).integers(1, 2**61, len(ranks))
    position, time = np.zeros((1, len(ranks)), np.int64), np.zeros(1)
    parents: list[np.ndarray] = []
    visited: list[np.ndarray] = [position]
    best, finish = np.inf, (0, 0, table.lengths)  # makespan; (ticks before the last, parent, last positions)
    while len(position) and table.lengths.any():
        reach = table.available(position)
        runs = np.arange(1, 1 + min(_RUN, int((reach - position).max())))
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
        remaining = tails[ranks, after].max(-1)
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
    return np.array([np.zeros_like(last), *path[::-1]])
