"""Measures how much communication computation hides, and how the time of one device divides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from profiling.event import Event
from profiling.metrics.columns import Columns, columns
from profiling.metrics.intervals import Spans, difference, intersection, length, union, within

DEFINITIONS = ("transfer", "transfer+wait", "lanes")
"""What counts as communication. "transfer": what moves data. "transfer+wait": also barriers and notifications. "lanes":
everything on the lanes that mostly communicate, casts and layouts included, against everything on the others."""


@dataclasses.dataclass(frozen=True)
class Sides:
    """The times of communication and of compute on one device.

    Attributes:
      window: start and end of the time looked at.
      communication, compute: ``[n, 2]`` disjoint intervals within it.
    """

    window: tuple[float, float]
    communication: Spans
    compute: Spans

    def exposed(self, merge_gap_us: float = 0.0) -> Spans:
        """``[n, 2]``: when the device communicates and does not compute; gaps up to this long count as compute."""
        return difference(self.communication, union(self.compute, merge_gap_us))


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How much communication is hidden behind computation, in microseconds; times of several devices are added up.

    Attributes:
      definition: what counts as communication, one of `DEFINITIONS`.
      merge_gap: gaps in compute up to this long count as compute, such as those between kernels of one queue.
      window: time looked at.
      communication, compute: time with any communication, with any compute.
      overlapped: time with both, after gaps were merged.

    >>> Overlap("transfer", 0.0, window=10.0, communication=4.0, compute=8.0, overlapped=3.0).ratio
    0.75
    """

    definition: str
    merge_gap: float
    window: float
    communication: float
    compute: float
    overlapped: float

    @property
    def exposed(self) -> float:
        """Communication without compute beside it."""
        return self.communication - self.overlapped

    @property
    def ratio(self) -> float | None:
        """Share of the communication that is hidden; None without communication."""
        return self.overlapped / self.communication if self.communication else None

    @property
    def exposed_share(self) -> float | None:
        """Exposed communication as a share of the window; None without communication."""
        return self.exposed / self.window if self.communication else None

    @property
    def compute_under_communication(self) -> float | None:
        """Share of compute that runs beside communication; None without compute or without communication."""
        return self.overlapped / self.compute if self.compute and self.communication else None

    @property
    def serial(self) -> float:
        """How long communication and compute would take one after the other."""
        return self.communication + self.compute

    @property
    def speedup(self) -> float | None:
        """The time of both one after the other, divided by the window; None without communication."""
        return self.serial / self.window if self.communication else None

    @property
    def ideal_speedup(self) -> float | None:
        """The speed-up if the shorter side were hidden entirely; None without communication."""
        return self.serial / max(self.communication, self.compute) if self.communication else None

    @property
    def efficiency(self) -> float | None:
        """Share of the possible gain that was reached: 1 is as fast as the longer side alone, 0 as one after the other.

        None if one side is missing, or if the window is longer than both one after the other: then idle time or other
        work decides how long the window is.
        """
        gain = min(self.communication, self.compute)
        had = self.serial - self.window
        return had / gain if gain and had >= 0 else None

    @classmethod
    def added(cls, parts: Sequence[Overlap]) -> Overlap:
        """Several devices together: times added up, so that ratios weigh them by their time.

        Raises:
          ValueError: there are no parts, or they have different definitions.
        """
        same = {(part.definition, part.merge_gap) for part in parts}
        if len(same) != 1:
            raise ValueError(f"overlaps of definitions and gaps {sorted(same)}: only those of one can be added up")
        return cls(
            definition=parts[0].definition,
            merge_gap=parts[0].merge_gap,
            window=sum(part.window for part in parts),
            communication=sum(part.communication for part in parts),
            compute=sum(part.compute for part in parts),
            overlapped=sum(part.overlapped for part in parts),
        )


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """How the time of a device divides, in microseconds.

    Attributes:
      window: time looked at.
      compute: time with compute, with or without communication.
      noncompute: time with something else and no compute.
      idle: time with nothing.
      gaps: number of stretches of idle time that are not empty.
      longest_gap: the longest of them.
    """

    window: float
    compute: float
    noncompute: float
    idle: float
    gaps: int
    longest_gap: float

    @property
    def compute_bubble(self) -> float | None:
        """Share of the window without compute; None without a window."""
        return 1 - self.compute / self.window if self.window else None

    @property
    def device_idle(self) -> float | None:
        """Share of the window in which the device does nothing at all; None without a window."""
        return self.idle / self.window if self.window else None

    @classmethod
    def added(cls, parts: Sequence[Breakdown]) -> Breakdown:
        """Several devices together: times added up, and the longest gap of any."""
        return cls(
            window=sum(part.window for part in parts),
            compute=sum(part.compute for part in parts),
            noncompute=sum(part.noncompute for part in parts),
            idle=sum(part.idle for part in parts),
            gaps=sum(part.gaps for part in parts),
            longest_gap=max((part.longest_gap for part in parts), default=0.0),
        )


def communication_lanes(events: Sequence[Event]) -> tuple[str, ...]:
    """The lanes that transfer or wait more than half of the time that they are busy.

    >>> communication_lanes([Event(0, "7", 0, 9, "gemm", group="compute"), Event(0, "27", 0, 9, "a", group="wait")])
    ('27',)
    """
    of = columns(events)
    communicates = of.of_groups("transfer", "wait")
    count = len(of.lanes.values)

    def times(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(of.lanes.index[chosen], weights=of.durations[chosen], minlength=count)

    chosen = 2 * times(communicates) > times(~of.of_groups("control"))
    return tuple(sorted(lane for lane, is_chosen in zip(of.lanes.values, chosen, strict=True) if is_chosen))


def members(events: Sequence[Event], definition: str = "transfer") -> tuple[list[Event], list[Event]]:
    """The events of one device that count as communication, and those that count as compute.

    Raises:
      ValueError: the definition is unknown.
    """
    of = columns(events)
    communication, compute = chosen(of, definition)
    return list(of.take(np.flatnonzero(communication))), list(of.take(np.flatnonzero(compute)))


def chosen(of: Columns, definition: str = "transfer") -> tuple[np.ndarray, np.ndarray]:
    """``[n]`` bool twice: which events of one device count as communication, and which as compute; see `members`."""
    if definition not in DEFINITIONS:
        raise ValueError(f"definition {definition!r}: choose one of {', '.join(DEFINITIONS)}")
    if definition == "lanes":
        lanes = communication_lanes(of)
        on_them = np.array([lane in lanes for lane in of.lanes.values], bool)[of.lanes.index]
        counted = ~of.of_groups("control")
        return counted & on_them, counted & ~on_them
    return of.of_groups(*definition.split("+")), of.of_groups("compute")


def sides(events: Sequence[Event], definition: str = "transfer", window: tuple[float, float] | None = None) -> Sides:
    """When one device communicates and when it computes.

    Args:
      events: classified events of one device.
      definition: one of `DEFINITIONS`.
      window: start and end to look at; by default from the first start to the last end.

    Raises:
      ValueError: the definition is unknown.
    """
    of = columns(events)
    communication, compute = chosen(of, definition)
    window = _window(of, window)
    return Sides(window, within(of.spans[communication], *window), within(of.spans[compute], *window))


def overlap(
    events: Sequence[Event],
    definition: str = "transfer",
    merge_gap_us: float = 0.0,
    window: tuple[float, float] | None = None,
) -> Overlap:
    """How much communication of one device is hidden; the arguments are those of `sides`.

    >>> gemm = Event(0, "7", 0.0, 8.0, "gemm", group="compute")
    >>> overlap([gemm, Event(0, "27", 5.0, 9.0, "dispatch", group="transfer")]).exposed
    1.0
    >>> overlap([gemm]).ratio is None
    True
    """
    return overlap_of(sides(events, definition, window), definition, merge_gap_us)


def overlap_of(of: Sides, definition: str, merge_gap_us: float = 0.0) -> Overlap:
    """How much communication is hidden, from the times of both sides."""
    communication, compute = length(of.communication), length(of.compute)
    overlapped = length(intersection(of.communication, union(of.compute, merge_gap_us)))
    return Overlap(definition, merge_gap_us, of.window[1] - of.window[0], communication, compute, overlapped)


def breakdown(events: Sequence[Event], window: tuple[float, float] | None = None) -> Breakdown:
    """How the time of one device divides.

    Args:
      events: classified events of one device.
      window: start and end; by default from the first start to the last end.

    >>> events = [Event(0, "7", 0.0, 6.0, "gemm", group="compute"), Event(0, "27", 5.0, 8.0, "a", group="transfer")]
    >>> breakdown(events, window=(0.0, 10.0))
    Breakdown(window=10.0, compute=6.0, noncompute=2.0, idle=2.0, gaps=1, longest_gap=2.0)
    """
    of = columns(events)
    window = _window(of, window)
    busy = within(of.spans[~of.of_groups("control")], *window)
    return breakdown_of(busy, within(of.spans[of.of_groups("compute")], *window), window)


def breakdown_of(busy: Spans, compute: Spans, window: tuple[float, float]) -> Breakdown:
    """How the time divides, from the times in which the device is busy and computes, both within the window."""
    idle = difference(np.array([window]), busy)
    lengths = idle[:, 1] - idle[:, 0]
    computing = length(compute)
    return Breakdown(
        window=window[1] - window[0],
        compute=computing,
        noncompute=length(busy) - computing,
        idle=length(idle),
        gaps=len(idle),
        longest_gap=float(lengths.max(initial=0.0)),
    )


def _window(of: Columns, window: tuple[float, float] | None) -> tuple[float, float]:
    if window is not None:
        return window
    return (float(of.starts.min()), float(of.ends.max())) if len(of) else (0.0, 0.0)
