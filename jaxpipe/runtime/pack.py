"""Packs a schedule into lockstep ticks: which groups of actions each rank runs between communications.

Messages move only between ticks, and a tick lasts as long as its slowest rank. One group a tick loses time
whenever the groups of a tick differ in cost; here a tick may hold several consecutive groups of a rank while
another rank runs one long group. The order of every rank is kept, so a packing needs no more stash than the
schedule does.

Most of a long schedule repeats itself, so the search sees a few microbatches for each rank, however many the schedule
has.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxpipe.runtime.actions import Actions, read_actions
from jaxpipe.runtime.graph import Reach, make_graph, make_reach
from jaxpipe.runtime.periods import extend, find_steady
from jaxpipe.runtime.search import one_each, search
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs


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

    Among packings of equal makespan, those of fewer ticks are preferred.

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
    return pack_actions(read_actions(schedule), costs, shared_ends=shared_ends)


def pack_actions(actions: Actions, costs: Costs, *, shared_ends: bool) -> Packing:
    """`pack` of a schedule as columns."""
    graph = make_graph(actions, costs, shared_ends)
    reach = make_reach(graph)
    paths = _repeated(actions, costs, shared_ends, reach) or search(graph)
    packings = [_packing(reach, path) for path in paths]
    best = min(packing.makespan for packing in packings)
    return min((p for p in packings if p.makespan <= best * (1 + 1e-9)), key=lambda p: p.num_ticks)


def _repeated(actions: Actions, costs: Costs, shared_ends: bool, reach: Reach) -> list[np.ndarray]:
    """Ways to the end whose ticks repeat themselves as the schedule does; [] where there are none."""
    steady = find_steady(actions)
    if steady is None:
        return []
    graph = make_graph(steady.actions, costs, shared_ends)
    shorter = make_reach(graph)
    try:
        *paths, naive = (extend(steady, path, shorter.durations(path)) for path in search(graph))
    except ValueError:  # ranks repeat themselves, but not in step: what remains waits for something that was cut
        return []
    fitting = [path for path in paths if path is not None and reach.allows(path)]
    if not fitting:
        return []
    if naive is None or not reach.allows(naive):
        naive = one_each(reach)
    return [*fitting, naive]


def pack_naive(schedule: Schedule, costs: Costs, *, shared_ends: bool = False) -> Packing:
    """Packs a schedule with at most one group a rank a tick, each as early as its inputs allow.

    Arguments are those of `pack`.

    Raises:
      ValueError: the schedule cannot run: ranks wait for each other in a cycle.
    """
    reach = make_reach(make_graph(read_actions(schedule), costs, shared_ends))
    return _packing(reach, one_each(reach))


def _packing(reach: Reach, path: np.ndarray) -> Packing:
    return Packing(tuple(map(tuple, path[1:].tolist())), float(reach.durations(path).sum()))
