"""Bounds figures that could be wrong because no rule knows some kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from profiling.classify.classifier import is_unclassified
from profiling.event import Event
from profiling.metrics.intervals import Spans, difference, intersection, length, spans_of, union

MATTERS = 0.02
"""The share of the time, or the change of a ratio, from which on bounds are shown."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Figures with all unknown kernels counted as compute, and with all of them counted as transfers.

    Attributes:
      share: share of the events' time in kernels that no rule knows.
      window: time looked at on all devices together, in microseconds.
      overlap: overlap ratio of transfers, the smaller first; None, for no communication, comes first.
      exposed: exposed communication with waits, in microseconds.
      compute: time with compute as a share of the window.
    """

    share: float
    window: float
    overlap: tuple[float | None, float | None]
    exposed: tuple[float, float]
    compute: tuple[float, float]

    @property
    def matter(self) -> bool:
        """Whether unknown kernels take more than 2% of the time, or could move a ratio by more than 2 points."""
        low, high = self.overlap
        moves = [self.compute[1] - self.compute[0], (self.exposed[1] - self.exposed[0]) / self.window]
        if high is not None:
            moves.append(high - (low or 0.0))
        return max(self.share, *moves) > MATTERS


def bounds(devices: Iterable[Sequence[Event]], window: tuple[float, float]) -> Bounds | None:
    """The figures if all unknown kernels compute, and if all communicate; None if all kernels are known.

    Args:
      devices: classified events of each device.
      window: start and end of the time looked at on all devices.

    >>> known = [Event(0, "7", 0.0, 8.0, "a", kind="GEMM", group="compute")]
    >>> known += [Event(0, "9", 5.0, 9.0, "b", kind="all-reduce", group="transfer")]
    >>> other = Event(0, "9", 9.0, 10.0, "mystery", kind="other kernel", group="compute")
    >>> found = bounds([[*known, other]], (0.0, 10.0))
    >>> found.overlap, found.exposed, found.compute
    ((0.6, 0.75), (1.0, 2.0), (0.8, 0.9))
    >>> bounds([known], (0.0, 10.0)) is None
    True
    """
    counted = [[event for event in events if event.group != "control"] for events in devices]
    unknown = sum(event.duration for events in counted for event in events if is_unclassified(event))
    if not unknown:
        return None
    total = sum(event.duration for events in counted for event in events)
    frame = np.array([window])
    as_compute, as_transfer = [], []
    for events in counted:
        other = _within(frame, (event for event in events if is_unclassified(event)))
        known = [event for event in events if not is_unclassified(event)]
        transfer, wait, compute = (
            _within(frame, (event for event in known if event.group == group))
            for group in ("transfer", "wait", "compute")
        )
        as_compute.append(_times(transfer, wait, np.concatenate([compute, other])))
        as_transfer.append(_times(np.concatenate([transfer, other]), wait, compute))
    whole = (window[1] - window[0]) * len(as_compute)
    readings = [tuple(map(sum, zip(*reading, strict=True))) for reading in (as_compute, as_transfer)]
    ratios = [overlapped / moved if moved else None for moved, overlapped, _, _ in readings]
    low, high = sorted(ratios, key=lambda ratio: -1.0 if ratio is None else ratio)
    exposed = sorted(reading[2] for reading in readings)
    computed = sorted(reading[3] / whole if whole else 0.0 for reading in readings)
    return Bounds(unknown / total, whole, (low, high), (exposed[0], exposed[1]), (computed[0], computed[1]))


def _within(frame: Spans, events: Iterable[Event]) -> Spans:
    return intersection(spans_of(events), frame)


def _times(transfer: Spans, wait: Spans, compute: Spans) -> tuple[float, float, float, float]:
    """Microseconds of transfers, transfers beside compute, transfers and waits without compute, and compute."""
    compute = union(compute)
    communication = np.concatenate([transfer, wait])
    return (
        length(transfer),
        length(intersection(transfer, compute)),
        length(difference(communication, compute)),
        length(compute),
    )
