"""Offline allocation of buffer slots: colouring of an interval graph."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def colour(intervals: Sequence[tuple[int, int]]) -> list[int]:
    """The slot of each half-open interval ``[start, end)``, with as few slots as possible.

    Intervals that share a slot do not overlap; one may start at the moment at which the other ends.
    The number of slots used is the largest number of intervals alive at one moment, which is optimal.

    Args:
      intervals: (start, end) pairs, in any order.

    Returns:
      ``[len(intervals)]`` slot indices, the lowest free slot being taken first.

    Raises:
      ValueError: an interval ends before it starts, or is empty.

    >>> colour([(0, 4), (1, 2), (2, 6), (4, 5)])
    [0, 1, 1, 0]
    """
    for start, end in intervals:
        if end <= start:
            raise ValueError(f"the interval [{start}, {end}) is empty; a slot must be written before it is last read")
    slots = [0] * len(intervals)
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (end, slot)
    used = 0
    for index in sorted(range(len(intervals)), key=lambda i: intervals[i]):
        start, end = intervals[index]
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, used)
            used += 1
        slots[index] = heapq.heappop(free)
        heapq.heappush(busy, (end, slots[index]))
    return slots
