"""Finds GPU events that cannot have happened when a profile says so. Bit errors and lost times make such events.

A stream runs one event after another, so an event that contains whole later events of its stream has a wrong end. But
kernels of a graph share a stream and a launch and may contain each other. Therefore such an event must also last ten
times as long as everything else goes on. `overrunning` knows the launches, which Kineto's files have; without them,
`overrunning_at_end` looks only at the last events of a device.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from profiling.event import Event
from profiling.read.kineto_values import short

NO_LAUNCH = -(2**63)
"""Stands for the launch of an event that names none."""

_HOUR = 3_600e6
_MOST_AT_END = 16
_FAR = 10.0
"""How many times as long as everything else an event must last to be impossible."""


@dataclasses.dataclass(frozen=True)
class KernelColumns:
    """N GPU events of one file: microseconds, index of lane, launch, thread blocks, "External id"; -1 if unknown."""

    start: np.ndarray
    duration: np.ndarray
    lane: np.ndarray
    correlation: np.ndarray
    blocks: np.ndarray
    external: np.ndarray


def far_away(start: np.ndarray, duration: np.ndarray) -> np.ndarray:
    """Indices of events that lie more than an hour from the largest group, or that lie at 0 while no others do."""
    order = np.argsort(start, kind="stable")
    cuts = np.flatnonzero(np.diff(start[order]) > _HOUR) + 1
    groups = np.split(order, cuts)
    largest = max(groups, key=lambda group: (len(group), duration[group].sum()))
    far = [group for group in groups if group is not largest]
    # CUPTI writes 0 for a time that it could not take.
    unknown = np.flatnonzero((start == 0) & (duration == 0))
    if len(unknown) and len(unknown) < len(start):
        others = np.delete(start, unknown)
        if others.min() > 1e6:
            far.append(np.setdiff1d(unknown, np.concatenate([*far, unknown[:0]])))
    return np.concatenate(far) if far else order[:0]


def overrunning(columns: KernelColumns, kept: np.ndarray) -> np.ndarray:
    """Indices of events whose ends are impossible: whole later events of their own stream lie within them.

    Two events may overlap at the edge, where the second began early. So an event must also contain events of other
    launches and last ten times as long as the time until the first of them, or ten times as long as all else goes on.
    """
    order = kept[np.lexsort((-columns.duration[kept], columns.start[kept], columns.lane[kept]))]
    lane, start = columns.lane[order], columns.start[order]
    end = start + columns.duration[order]
    suspects = np.flatnonzero((lane[1:] == lane[:-1]) & (start[1:] < end[:-1]))
    if not len(suspects):
        return kept[:0]
    last_of_lane = np.searchsorted(lane, lane[suspects], side="right")
    containing = []
    for at, stop in zip(suspects.tolist(), last_of_lane.tolist(), strict=True):
        behind = at + 1 + int(np.searchsorted(start[at + 1 : stop], end[at]))
        inside = np.flatnonzero((end[at + 1 : behind] < end[at]) & (start[at + 1 : behind] > start[at])) + at + 1
        if len(inside):
            containing.append((at, inside))
    others = np.ones(len(order), bool)
    others[[at for at, _ in containing]] = False
    last = end[others].max() if others.any() else -np.inf
    impossible = []
    for at, inside in containing:
        launches = np.unique(columns.correlation[order[np.append(inside, at)]])
        apart = len(launches[launches != NO_LAUNCH]) > 1
        is_far = end[at] - start[at] >= _FAR * (start[inside[0]] - start[at])
        if _outlasts(float(start[at]), float(end[at]), last) or (apart and is_far):
            impossible.append(order[at])
    return np.array(impossible, kept.dtype)


def overrunning_at_end(events: Sequence[Event]) -> list[Event]:
    """The last events of one GPU, as far as their ends are impossible: they contain others of their stream.

    >>> short = [Event(0, "stream 7", float(i), i + 1.0, "k") for i in range(3)]
    >>> [event.name for event in overrunning_at_end([*short, Event(0, "stream 7", 0.5, 1e6, "odd")])]
    ['odd']
    """
    found: list[Event] = []
    latest = heapq.nlargest(_MOST_AT_END + 1, events, key=lambda event: event.end)
    for last, before in itertools.pairwise(latest):
        if not _outlasts(last.start, last.end, before.end) or not any(
            event.lane == last.lane and last.start < event.start and event.end < last.end for event in events
        ):
            break
        found.append(last)
    return found


def _outlasts(start: float, end: float, last: float) -> bool:
    """Whether an event lasts ten times as long as the time from its start to `last`, where all else has ended."""
    return last > start and end - start >= _FAR * (last - start)


def lonely(start: np.ndarray, duration: np.ndarray, names: list[str]) -> list[str]:
    """A note about an event that lasts ten times as long as the rest of the trace, a hang or a wrong end."""
    if len(start) < 2:
        return []
    longest = int(np.argmax(duration))
    rest = np.delete(start, longest)
    window = (rest + np.delete(duration, longest)).max() - rest.min()
    if duration[longest] < _FAR * window or not window:
        return []
    return [
        f"one event, {short(names[longest])}, lasts {duration[longest]:,.1f} us and all others together take "
        f"{window:,.1f} us: it decides every share"
    ]
