"""When each message between ranks moves, and on which channel: a permutation of ranks that carries one from each."""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from jaxpipe.runtime.instructions import Values

Permutation = tuple[tuple[int, int], ...]
"""(source, destination) pairs of ranks; each rank at most once on either side."""


@dataclasses.dataclass(frozen=True, eq=False)
class Messages:
    """The messages between ranks, as columns, and the channels that they move on.

    Attributes:
      channels: the permutation of each; two may be the same.
      value: ``int[messages]``, which value it is.
      tick: ``int[messages]``, the tick after which it moves.
      channel: ``int[messages]``.
    """

    channels: tuple[Permutation, ...]
    value: np.ndarray
    tick: np.ndarray
    channel: np.ndarray

    @property
    def num_permutes(self) -> int:
        """How often some channel carries something."""
        return len(np.unique(self.tick * (len(self.channels) + 1) + self.channel))


def route(values: Values, num_ranks: int) -> Messages:
    """Channels, and what moves on them after each tick, by the permutations that need fewer messages in all.

    Shifts of the ring suit schedules whose ranks all send one way at a time. Exchanges between neighbours suit
    DualPipe: in its steady state even ranks send both messages of a tick up while odd ranks send both down.
    """
    (value,) = np.nonzero(values.source != values.target)
    # The most urgent first; what is equally urgent in the order of the program.
    value = value[np.lexsort((values.writer[value], values.deadline[value]))]
    pair = values.source[value] * num_ranks + values.target[value]
    edges = [divmod(int(edge), num_ranks) for edge in np.unique(pair)]
    options = [
        _route(values, value, pair, num_ranks, permutations) for permutations in (shifts(edges), exchanges(edges))
    ]
    return min(options, key=lambda messages: messages.num_permutes)


def shifts(edges: list[tuple[int, int]]) -> list[Permutation]:
    """Groups edges by how far they go: all steps to higher ranks, all steps to lower ranks, the wrap-arounds.

    >>> shifts([(0, 1), (1, 0), (1, 2), (2, 1)])
    [((0, 1), (1, 2)), ((1, 0), (2, 1))]
    """
    distances = sorted({target - source for source, target in edges}, key=lambda d: (abs(d), -d))
    return [tuple(edge for edge in edges if edge[1] - edge[0] == distance) for distance in distances]


def exchanges(edges: list[tuple[int, int]]) -> list[Permutation]:
    """Groups edges so that in a group each rank has one partner, to which it sends and from which it receives.

    >>> exchanges([(0, 1), (1, 0), (1, 2), (2, 1)])
    [((0, 1), (1, 0)), ((1, 2), (2, 1))]
    """
    groups: list[dict[int, int]] = []
    for low, high in sorted({(min(edge), max(edge)) for edge in edges}):
        group = next((g for g in groups if low not in g and high not in g), None)
        if group is None:
            groups.append(group := {})
        group[low], group[high] = high, low
    return [tuple(edge for edge in edges if group.get(edge[0]) == edge[1]) for group in groups]


def _route(
    values: Values, value: np.ndarray, pair: np.ndarray, num_ranks: int, permutations: list[Permutation]
) -> Messages:
    """Decides when each message moves: earliest deadline first, on one channel of its permutation if one is enough.

    With one message after each tick, some might be late. A rank then sends several after one tick, and the permutation
    gets as many channels as that takes.
    """
    channels: list[Permutation] = []
    tick, channel = np.empty_like(value), np.empty_like(value)
    for permutation in permutations:
        (mine,) = np.nonzero(np.isin(pair, [source * num_ranks + target for source, target in permutation]))
        moved = value[mine]
        tick[mine], lane = _lanes(values.release[moved], values.deadline[moved], values.source[moved])
        channel[mine] = len(channels) + lane
        channels += [permutation] * (int(lane.max()) + 1)
    return Messages(tuple(channels), value, tick, channel)


def _lanes(release: np.ndarray, deadline: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tick, lane) of each message of a permutation; the most urgent come first.

    A rank that has a single message after a tick sends it at once, in lane 0. What follows a tick after which some
    rank has more than one, until none waits, is played tick by tick.
    """
    tick, lane = release.copy(), np.zeros_like(release)
    order = np.argsort(release, kind="stable")
    times = release[order]
    together = np.sort(release * (source.max(initial=0) + 1) + source)
    crowded = np.unique(together[:-1][together[1:] == together[:-1]] // (source.max(initial=0) + 1)).tolist()
    begins = np.searchsorted(times, np.arange(times.max(initial=-1) + 2)).tolist()
    messages, sources, deadlines = order.tolist(), source.tolist(), deadline.tolist()
    waiting: dict[int, list[int]] = {rank: [] for rank in set(sources)}
    now = -1
    for begin in crowded:
        if begin < now:
            continue
        now = begin
        while now == begin or any(waiting.values()):
            for message in messages[begins[now] : begins[now + 1]] if now + 1 < len(begins) else ():
                heapq.heappush(waiting[sources[message]], message)
            queues = [queue for queue in waiting.values() if queue]
            crowds = [[deadlines[message] for message in queue] for queue in queues if len(queue) > 1]
            for number in range(max((_urgent(crowd, now) for crowd in crowds), default=1)):
                for queue in queues:
                    if queue:
                        message = heapq.heappop(queue)
                        tick[message], lane[message] = now, number
            now += 1
    return tick, lane


def _urgent(deadlines: list[int], tick: int) -> int:
    """How many must leave after this tick if one may leave after each later tick; at least one."""
    late = (place - (deadline - 1 - tick) for place, deadline in enumerate(sorted(deadlines), start=1))
    return max(1, *late)
