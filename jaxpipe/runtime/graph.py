"""The groups of a schedule as a graph: what each costs, and which need messages of which.

A packing is found and checked on a `Reach`: how far each rank may get once the others are at given positions. A
position of a rank is the number of groups of its order that it has finished.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jaxpipe.runtime.actions import Actions, B, F, Groups, I, W
from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.simulator import Costs


@dataclasses.dataclass(frozen=True, eq=False)
class GroupGraph(Groups):
    """Groups and the messages between them.

    Attributes:
      lengths: see `Groups`.
      cost: ``float[groups]``.
      needs: ``int[edges]``, the group that needs something that another makes; ``makes``: the other.
    """

    cost: np.ndarray
    needs: np.ndarray
    makes: np.ndarray

    def reversed(self) -> GroupGraph:
        """The graph read backwards, each rank's order too."""
        mirror = (2 * self.offsets + self.lengths - 1)[self.rank] - np.arange(len(self.rank))
        return GroupGraph(self.lengths, self.cost[mirror], mirror[self.makes], mirror[self.needs])


def make_graph(actions: Actions, costs: Costs, shared_ends: bool) -> GroupGraph:
    """The messages that the groups of a schedule need.

    Of the groups of the same rank, those that the rank's order already puts first are left out, unless a shared
    head lies between. One that the order puts last stays: such a schedule cannot run.
    """
    kind, stage, microbatch, last = actions.kind, actions.stage, actions.microbatch, actions.num_stages - 1
    forward, backward = kind == F, (kind == B) | (kind == I)
    sources = [
        (forward & (stage > 0), F, -1),
        (backward, F, 0),
        (backward & (stage < last), B, 1),
        (backward & (stage < last), I, 1),
        (kind == W, I, 0),
    ]
    needs, makes = [], []
    for applies, source, step in sources:
        (index,) = np.nonzero(applies)
        found = actions.where[source, stage[index] + step, microbatch[index]]
        needs.append(index[found >= 0])
        makes.append(found[found >= 0])
    action, source = np.concatenate(needs), np.concatenate(makes)
    needing, making = actions.group[action], actions.group[source]
    head_between = shared_ends & (stage[action] == last) & backward[action] & (making < needing)
    kept = (actions.rank[needing] != actions.rank[making]) | (making > needing) | head_between
    return GroupGraph(actions.lengths, _costs(actions, costs), needing[kept], making[kept])


def _costs(actions: Actions, costs: Costs) -> np.ndarray:
    """``float[groups]``."""
    kinds = np.zeros(actions.lengths.sum(), np.int64)  # digits: 1 + kind of each action of the group
    np.add.at(kinds, actions.group, (actions.kind + 1) * 5**actions.place)
    named = [(), *((kind,) for kind in Kind)]
    table = [[*first, *second] for second in named for first in named]
    return np.array([costs.group(tuple(group)) for group in table])[kinds]


def longest_paths(graph: GroupGraph) -> np.ndarray:
    """``float[groups]``: the longest path from the start of each group to the end of everything.

    Raises:
      ValueError: groups wait for each other in a cycle.
    """
    groups = np.arange(len(graph.cost))
    follows = np.setdiff1d(groups, graph.offsets[graph.lengths > 0])
    needs, makes = np.append(graph.needs, follows), np.append(graph.makes, follows - 1)
    order = np.argsort(needs, kind="stable")
    makes, begins = makes[order].tolist(), np.searchsorted(needs[order], np.arange(len(groups) + 1)).tolist()
    waiting = np.bincount(np.asarray(makes, np.int64), minlength=len(groups))
    ready, waiting = np.flatnonzero(waiting == 0).tolist(), waiting.tolist()
    cost, paths = graph.cost.tolist(), [0.0] * len(groups)
    done = 0
    while ready:
        group = ready.pop()
        done += 1
        paths[group] = path = paths[group] + cost[group]
        for before in makes[begins[group] : begins[group + 1]]:
            if path > paths[before]:
                paths[before] = path
            waiting[before] -= 1
            if not waiting[before]:
                ready.append(before)
    if done < len(groups):
        raise ValueError("the schedule cannot run: ranks wait for each other; jaxpipe.schedule.check shows where")
    return np.array(paths)


@dataclasses.dataclass(frozen=True, eq=False)
class Reach:
    """How far ranks may get. N is the number of groups of the longest rank, K the most ranks that one depends on."""

    lengths: np.ndarray  # int[ranks]: groups of each rank
    elapsed: np.ndarray  # float[ranks, N+1]: cost of the first n groups
    neighbours: np.ndarray  # int[ranks, K]: ranks that a rank depends on, itself perhaps
    limit: np.ndarray  # int[ranks, K, N+1]: groups that a rank may finish once the neighbour has finished n

    def available(self, positions: np.ndarray) -> np.ndarray:
        """How far each rank may get within one tick: ``int[ranks, n]`` from and to."""
        ranks = np.arange(len(self.lengths))[:, None]
        limits = (self.limit[ranks, k, positions[others]] for k, others in enumerate(self.neighbours.T))
        return functools.reduce(np.minimum, limits)

    def durations(self, path: np.ndarray) -> np.ndarray:
        """``float[ticks]``: the longest time of a rank in each tick, of positions ``int[ticks + 1, ranks]``."""
        return np.diff(self.elapsed[np.arange(len(self.lengths)), path], axis=0).max(-1, initial=0.0)

    def allows(self, path: np.ndarray) -> bool:
        """Whether ranks may run from the beginning to the end so: positions ``int[ticks + 1, ranks]``."""
        forward = (path[1:] >= path[:-1]).all() and (path[1:] != path[:-1]).any(-1).all()
        ends = (path[0] == 0).all() and (path[-1] == self.lengths).all()
        return bool(forward and ends and (self.available(path[:-1].T) >= path[1:].T).all())


def make_reach(graph: GroupGraph) -> Reach:
    """How far ranks may get, by the messages that a graph's groups need."""
    ranks, longest = len(graph.lengths), int(graph.lengths.max(initial=0))
    elapsed = np.zeros((ranks, longest + 1))
    for rank, (offset, length) in enumerate(zip(graph.offsets, graph.lengths, strict=True)):
        elapsed[rank, 1 : length + 1] = np.cumsum(graph.cost[offset : offset + length])
    pairs = np.unique(graph.rank[graph.needs] * ranks + graph.rank[graph.makes])
    sources = [pairs[pairs // ranks == rank] % ranks for rank in range(ranks)]
    width = max(1, *map(len, sources))
    neighbours = np.repeat(np.arange(ranks)[:, None], width, 1)
    column = np.zeros((ranks, ranks), np.int64)
    for rank, others in enumerate(sources):
        neighbours[rank, : len(others)] = others
        column[rank, others] = np.arange(len(others))
    need = np.zeros((ranks, width, longest), np.int64)
    rank, source = graph.rank[graph.needs], graph.rank[graph.makes]
    place = (rank, column[rank, source], graph.needs - graph.offsets[rank])
    np.maximum.at(need, place, graph.makes - graph.offsets[source] + 1)
    limit = np.broadcast_to(graph.lengths[:, None, None], (ranks, width, longest + 1)).copy()
    for rank, others in enumerate(sources):
        for slot in range(len(others)):
            row = np.maximum.accumulate(need[rank, slot, : graph.lengths[rank]])
            limit[rank, slot] = np.searchsorted(row, np.arange(longest + 1), side="right")
    return Reach(graph.lengths, elapsed, neighbours, limit)
