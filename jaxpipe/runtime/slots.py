"""Offline allocation of buffer slots: colouring of interval graphs."""

from __future__ import annotations

import numpy as np


def colour(group: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, int]:
    """The slot of each half-open interval ``[start, end)``, with as few slots as possible in each group.

    Intervals of a group that share a slot do not overlap; one may start at the moment at which the other ends.
    The number of slots that a group uses is the largest number of its intervals alive at one moment, which is optimal.

    Args:
      group: ``int[intervals]``; each group has slots of its own.
      start, end: ``int[intervals]``, in any order.

    Returns:
      ``int[intervals]``, the lowest free slot being taken first, and how many the neediest group uses.

    Raises:
      ValueError: an interval ends before it starts, or is empty.

    >>> starts, ends = np.array([0, 1, 2, 4]), np.array([4, 2, 6, 5])
    >>> colour(np.zeros(4, int), starts, ends)[0].tolist()
    [0, 1, 1, 0]
    """
    for i in np.flatnonzero(end <= start)[:1]:
        raise ValueError(f"the interval [{start[i]}, {end[i]}) is empty; a slot must be written before it is last read")
    order = np.lexsort((end, start, group))
    moment = (group * (1 + end.max(initial=0)) + np.stack([start, end])) * 2 + [[1], [0]]  # ends before starts
    events = np.argsort(moment[:, order].reshape(-1), kind="stable")
    free, taken, count = -1, [0] * len(order), len(order)  # one bit for each slot; there are as many as it takes
    for event in events.tolist():
        if event < count:
            taken[event] = lowest = free & -free
            free ^= lowest
        else:
            free |= taken[event - count]
    slots = np.empty_like(order)
    slots[order] = [bit.bit_length() - 1 for bit in taken]
    return slots, int(slots.max(initial=-1)) + 1
