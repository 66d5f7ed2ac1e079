"""The search for ticks: a beam over the positions of all ranks, from tick to tick.

From given positions of the ranks, running more groups in a tick of the same length is never worse, so a move is its
length alone, and the only lengths worth trying are those at which some rank completes a group. The rest of the way is
bounded from below by the longest path that remains in the asynchronous dependency graph. Some schedules lose time at
first and gain it back in every period of their steady state. A beam ordered by that bound drops such beginnings, so
where it does poorly it is repeated with more weight on the remaining path than on the time already spent.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxpipe.runtime.graph import GroupGraph, Reach, longest_paths, make_reach

_WIDTH = 256  # positions kept from one tick to the next
_RUN = 8  # groups of one rank in one tick at most
_SATISFIED = 0.01  # no further search once the makespan is this close to the asynchronous one
_GREED = (1.2, 2.0, 4.0)  # weights of the remaining path in further searches


def search(graph: GroupGraph) -> list[np.ndarray]:
    """Ways to the end, each the positions ``int[ticks + 1, ranks]`` after each tick; the last is one group a tick.

    The schedule is packed from its beginning and, as a lockstep packing read backwards packs the reversed schedule,
    from its end; where that is not as short as the longest path of all, then with other weights.

    Raises:
      ValueError: groups wait for each other in a cycle.
    """
    reach, tails = make_reach(graph), _tails(graph)
    shortest = tails[:, 0].max()
    paths = [_search_beam(reach, tails, 1.0)]
    if reach.durations(paths[0]).sum() > (1 + 1e-9) * shortest:
        mirrored = graph.reversed()
        paths.append(graph.lengths - _search_beam(make_reach(mirrored), _tails(mirrored), 1.0)[::-1])
    for greed in _GREED:
        if min(reach.durations(path).sum() for path in paths) > (1 + _SATISFIED) * shortest:
            paths.append(_search_beam(reach, tails, greed))
    return [*paths, one_each(reach)]


def one_each(reach: Reach) -> np.ndarray:
    """The positions ``int[ticks + 1, ranks]`` if every rank runs one group a tick wherever it can.

    Raises:
      ValueError: ranks wait for each other.
    """
    lengths, limit = reach.lengths.tolist(), reach.limit.tolist()
    rules = [list(zip(row, rows, strict=True)) for row, rows in zip(reach.neighbours.tolist(), limit, strict=True)]
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


def _tails(graph: GroupGraph) -> np.ndarray:
    """``float[ranks, N+1]``: the longest path from the start of group n to the end of everything."""
    tails, paths = np.zeros((len(graph.lengths), int(graph.lengths.max(initial=0)) + 1)), longest_paths(graph)
    for rank, (offset, length) in enumerate(zip(graph.offsets, graph.lengths, strict=True)):
        tails[rank, :length] = paths[offset : offset + length]
    return tails


@dataclasses.dataclass(frozen=True, eq=False)
class _Space:
    """What a beam search moves in. A place stands for a rank and how many of its groups are finished, as one number.

    Attributes:
      reach: how far ranks may get.
      start, end: ``int[ranks]``, each rank's first and last place.
      elapsed: ``float[places]``, what the rank has computed there.
      remaining: ``float[places]``, the longest path from there to the end of everything.
      hashes: ``int[ranks]``, random numbers; their sum over all finished groups is a position's digest.
      tolerance: times that differ by less are equal.
    """

    reach: Reach
    start: np.ndarray
    end: np.ndarray
    elapsed: np.ndarray
    remaining: np.ndarray
    hashes: np.ndarray
    tolerance: float


class _Beam(NamedTuple):
    """Positions of all ranks after a tick.

    Attributes:
      places: ``int[n, ranks]``.
      time: ``float[n]``, the sum of the ticks so far.
      digest: ``int[n]``, equal for equal places alone.
      parent: ``int[n]``, the position in the beam before.
    """

    places: np.ndarray
    time: np.ndarray
    digest: np.ndarray
    parent: np.ndarray


def _make_space(reach: Reach, tails: np.ndarray) -> _Space:
    ranks, width = reach.elapsed.shape
    start = np.arange(ranks) * width
    return _Space(
        reach=reach,
        start=start,
        end=start + reach.lengths,
        elapsed=reach.elapsed.reshape(-1),
        remaining=tails.reshape(-1),
        hashes=np.random.default_rng(0).integers(1, 2**61, ranks),
        tolerance=1e-9 * float(reach.elapsed.max()),
    )


def _search_beam(reach: Reach, tails: np.ndarray, greed: float) -> np.ndarray:
    """Beam search: the positions ``int[ticks + 1, ranks]`` of the best way found to the end.

    The beam keeps the positions of least time plus ``greed`` times remaining path.
    """
    space, nothing = _make_space(reach, tails), np.zeros(1, np.int64)
    beam = _Beam(space.start[None], np.zeros(1), nothing, nothing)
    beams = [beam]
    makespan, ticks, parent = np.inf, 1, 0  # of the best way to the end; the parent is in the beam before its last tick
    while len(beam.places) and reach.lengths.any():
        after = _advance(space, beam)
        remaining = space.remaining.take(after.places).max(1)
        finished = (after.places == space.end).all(1) & (after.time < makespan - space.tolerance)
        for last in np.flatnonzero(finished):
            makespan, ticks, parent = after.time[last], len(beams), after.parent[last]
        beam = _select(space, after, remaining, makespan, greed)
        beams.append(beam)
    path = [space.end]
    for beam in reversed(beams[1:ticks]):
        path.append(beam.places[parent])
        parent = beam.parent[parent]
    return np.array([space.start, *reversed(path)]) - space.start


def _advance(space: _Space, beam: _Beam) -> _Beam:
    """All positions after one more tick, each of them once."""
    spent = _spent(space, beam.places)
    parent, length, digest = _moves(space, beam, spent)
    time = beam.time[parent] + length
    earliest = np.argsort(time, kind="stable")  # of equal positions the earliest stays
    digest, index = np.unique(digest[earliest], return_index=True)
    chosen = earliest[index]
    parent, time, longest = parent[chosen], time[chosen], length[chosen, None] + space.tolerance
    places = beam.places[parent]
    for cost in spent:
        places += cost[parent] <= longest
    return _Beam(places, time, digest, parent)


def _spent(space: _Space, places: np.ndarray) -> list[np.ndarray]:
    """What the next one, two, ... groups of each rank take, ``float[n, ranks]`` each; inf where a rank must wait."""
    furthest = space.reach.available((places - space.start).T).T + space.start
    begun = space.elapsed.take(places)
    return [
        np.where(places + run <= furthest, space.elapsed.take(np.minimum(places + run, furthest)) - begun, np.inf)
        for run in range(1, 1 + min(_RUN, int((furthest - places).max())))
    ]


def _moves(space: _Space, beam: _Beam, spent: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position in the beam, length of the tick, digest after it) of all moves."""
    ends = np.stack(spent, -1).reshape(len(beam.places), -1)
    order = np.argsort(ends, axis=1, kind="stable")
    lengths = np.take_along_axis(ends, order, 1)
    # Groups that end at the same time are one move: it is as long as the first, and all up to the last have run.
    longer = lengths[:, 1:] > lengths[:, :-1] + space.tolerance
    edge = np.ones((len(lengths), 1), bool)
    parent, first = np.nonzero(np.hstack([edge, longer]) & np.isfinite(lengths))
    last = np.nonzero(np.hstack([longer, edge]) & np.isfinite(lengths))[1]
    digest = beam.digest[parent] + np.cumsum(space.hashes.take(order // len(spent)), axis=1)[parent, last]
    return parent, lengths[parent, first], digest


def _select(space: _Space, beam: _Beam, remaining: np.ndarray, makespan: float, greed: float) -> _Beam:
    """The best of the positions that may still end before ``makespan``; of equal ones those that have done most."""
    promising = np.flatnonzero(beam.time + remaining < makespan - space.tolerance)
    score = beam.time[promising] + greed * remaining[promising]
    score = np.round(score / (100 * space.tolerance)) if space.tolerance else score
    done = space.elapsed.take(beam.places[promising]).sum(1)
    kept = promising[np.lexsort((-done, score))][:_WIDTH]
    return _Beam(*(column[kept] for column in beam))
