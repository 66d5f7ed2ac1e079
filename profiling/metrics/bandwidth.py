"""Bandwidth of collectives, by NCCL's own definitions: https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from profiling.event import Trace
from profiling.metrics.calls import Call, Group, MatchedCollective, calls, match_calls
from profiling.metrics.columns import Columns, by_device
from profiling.metrics.intervals import covered, union

CLASSES = ((1 << 16, "up to 64 KiB"), (1 << 20, "64 KiB-1 MiB"), (1 << 24, "1-16 MiB"), (1 << 28, "16-256 MiB"))
"""Upper bounds in bytes of the classes of message sizes, and their names; beyond is "over 256 MiB"."""


@dataclasses.dataclass(frozen=True)
class CollectiveRow:
    """Collectives of one kind, process group and class of sizes; over several devices calls and times are added up.

    Attributes:
      kind: "all-reduce" and so on.
      group: the process group.
      size_class: one of `CLASSES` by name; "" where sizes are unknown.
      count: number of calls, one on each device where a collective runs on several.
      bytes: sum of the calls' sizes, see `profiling.metrics.calls.Call.bytes`; None where unknown.
      time: microseconds of the calls' kernels, waits for peers within them included.
      hidden: share of the time with a call in which its device computes as well.
      matched: number of collectives that several devices of the group show.
      matched_bytes, least_time: of these, bytes and time each counted once, on the device where it was shortest. The
        rank that joins last waits for nobody, so that this is nearer to the time that moving the data takes.
    """

    kind: str
    group: Group
    size_class: str
    count: int
    bytes: int | None
    time: float
    hidden: float | None
    matched: int
    matched_bytes: int | None
    least_time: float

    @property
    def algorithm_bandwidth(self) -> float | None:
        """Bytes by time in GB/s (1e9 bytes a second); None where either is unknown."""
        return _bandwidth(self.bytes, self.time)

    @property
    def bus_bandwidth(self) -> float | None:
        """GB/s that each rank's link carries, whatever the number of ranks; None where that is unknown or one.

        >>> row = CollectiveRow("all-reduce", Group("", None, 4), "", 1, 8000, 2.0, None, 0, None, 0.0)
        >>> row.algorithm_bandwidth, row.bus_bandwidth
        (4.0, 6.0)
        """
        return _scaled(self.algorithm_bandwidth, bus_factor(self.kind, self.group.size))

    @property
    def least_algorithm_bandwidth(self) -> float | None:
        """Of the matched collectives, by the least time over the devices; None where fewer than two show one."""
        return _bandwidth(self.matched_bytes, self.least_time)

    @property
    def least_bus_bandwidth(self) -> float | None:
        """The same on the bus."""
        return _scaled(self.least_algorithm_bandwidth, bus_factor(self.kind, self.group.size))


def bus_factor(kind: str, ranks: int | None) -> float | None:
    """Bus bandwidth by algorithm bandwidth; None where the kind has none, or it depends on an unknown number of ranks.

    An all-reduce of S bytes moves 2 (n-1)/n S over each rank's link, one that gathers, scatters or exchanges (n-1)/n S;
    broadcast, reduce, send and receive move S. A group of one moves nothing: None.

    >>> bus_factor("all-reduce", 4), bus_factor("all-gather", 4), bus_factor("broadcast", 4), bus_factor("barrier", 4)
    (1.5, 0.75, 1.0, None)
    """
    if ranks == 1:
        return None
    if kind in ("broadcast", "reduce") or kind.startswith(("send", "receive")):
        return 1.0
    if ranks is None:
        return None
    share = (ranks - 1) / ranks
    halves = ("all-gather", "reduce-scatter", "all-to-all", "gather", "scatter")
    return 2 * share if kind == "all-reduce" else share if kind in halves else None


def collectives(trace: Trace, window: tuple[float, float] | None = None) -> tuple[CollectiveRow, ...]:
    """What the profiler says of the trace's collectives; empty where it says nothing.

    Args:
      trace: from any reader that fills `Event.collective`.
      window: start and end in microseconds; only calls that lie in it as a whole count. By default all.

    Returns:
      Rows by kind and group, those with most time first, each by size.

    >>> from profiling.event import Collective, Event
    >>> of = Collective("all-gather", "tp", (0, 1), 2, sent=4000, received=8000)
    >>> row, = collectives(Trace("", "kineto", (Event(0, "20", 0.0, 2.0, "nccl", group="transfer", collective=of),)))
    >>> row.count, row.bytes, row.algorithm_bandwidth, row.bus_bandwidth
    (1, 8000, 4.0, 2.0)
    """
    found = calls(trace.events)
    return rows(found, match_calls(found)[0], by_device(trace), window) if found else ()


def rows(
    found: Sequence[Call],
    together: Sequence[MatchedCollective],
    devices: Mapping[int, Columns],
    window: tuple[float, float] | None = None,
) -> tuple[CollectiveRow, ...]:
    """The same from calls, those of them that belong together, and the events of each device."""
    concerned = {call.device for call in found}
    compute = {
        device: union(events.spans[events.of_groups("compute")])
        for device, events in devices.items()
        if device in concerned
    }
    members: dict[tuple[str, Group, str], list[Call]] = {}
    for call in found:
        if window is None or (window[0] <= call.start and call.end <= window[1]):
            members.setdefault((call.kind, call.group, size_class(call.bytes)), []).append(call)
    matched: dict[tuple[str, Group, str], list[MatchedCollective]] = {}
    for meeting in together:
        if meeting.lies_in(window):
            key = meeting.kind, meeting.group, size_class(meeting.calls[0].bytes)
            matched.setdefault(key, []).append(meeting)
    made = [_row(*key, of, matched.get(key, []), compute) for key, of in members.items()]
    totals: dict[tuple[str, Group], float] = {}
    for row in made:
        totals[row.kind, row.group] = totals.get((row.kind, row.group), 0.0) + row.time
    order = ["", *(name for _, name in CLASSES)]
    places = {name: place for place, name in enumerate(order)}
    made.sort(key=lambda row: (-totals[row.kind, row.group], row.kind, places.get(row.size_class, len(order))))
    return tuple(made)


def size_class(size: int | None) -> str:
    """The class that a message of so many bytes is of.

    >>> size_class(65536), size_class(65537), size_class(1 << 30), size_class(None)
    ('up to 64 KiB', '64 KiB-1 MiB', 'over 256 MiB', '')
    """
    if size is None:
        return ""
    return next((name for bound, name in CLASSES if size <= bound), "over 256 MiB")


def _row(
    kind: str,
    group: Group,
    name: str,
    members: Sequence[Call],
    matched: Sequence[MatchedCollective],
    compute: Mapping[int, np.ndarray],
) -> CollectiveRow:
    by: dict[int, list[tuple[float, float]]] = {}
    for call in members:
        by.setdefault(call.device, []).append((call.start, call.end))
    communicating = beside = 0.0
    for device, spans in by.items():
        busy = union(np.array(spans))
        communicating += float(np.sum(busy[:, 1] - busy[:, 0]))
        beside += float(np.sum(covered(compute[device], busy)))
    sizes = [call.bytes for call in members]
    common = [meeting.calls[0].bytes for meeting in matched]
    return CollectiveRow(
        kind=kind,
        group=group,
        size_class=name,
        count=len(members),
        bytes=sum(size for size in sizes if size is not None) if name else None,
        time=sum(call.time for call in members),
        hidden=min(beside / communicating, 1.0) if communicating else None,
        matched=len(matched),
        matched_bytes=sum(size for size in common if size is not None) if matched and name else None,
        least_time=sum(min(call.time for call in meeting.calls) for meeting in matched),
    )


def _bandwidth(size: int | None, time: float) -> float | None:
    return None if size is None or not time else size / time / 1e3


def _scaled(bandwidth: float | None, factor: float | None) -> float | None:
    return None if bandwidth is None or factor is None else bandwidth * factor
