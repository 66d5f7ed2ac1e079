"""Writes traces in Perfetto's own format: TrackEvent packets, encoded here without any dependency."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import operator
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Sequence

from profiling.event import Event, Trace
from profiling.write.tracks import (
    PhaseLink,
    TrackRow,
    facts,
    flows,
    lane_label,
    panels,
    side_by_side,
)

Packet = tuple[int, bytes]
"""Nanoseconds and the fields of a TrackEvent."""
BEGIN, END, COUNTER = 1, 2, 4
"""TrackEvent.Type."""
FLOW, TERMINATING_FLOW = 47, 48
"""The fields of a TrackEvent that number arrows: those that it begins, those that end at it."""


def write_perfetto(
    path: str | os.PathLike[str],
    traces: Trace | Sequence[Trace],
    *,
    links: Iterable[PhaseLink] = (),
    counted: bool = True,
) -> None:
    """Writes one trace, or several side by side with their first events at the same time.

    Each device is a track with its lanes below; the host's steps are a track of their own. A slice has its group as
    category and the other facts as annotations. Times are in nanoseconds. Names are written once and numbered.

    Args:
      path: path that ends in ".pftrace".
      traces: traces of any reader; several are told apart by their titles.
      links: phases to join by arrows, such as `MOE_LINKS`.
      counted: whether to add counters of exposed communication and of thread blocks in transfers.

    Raises:
      ValueError: the path has another ending, there are no traces, or an event ends before it starts.
      OSError: the file cannot be written.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "step.pftrace"
    >>> write_perfetto(path, Trace("", "simulated", (Event(3, "gpu", 1.0, 2.5, "a kernel"),)))
    >>> b"a kernel" in path.read_bytes()
    True
    """
    links, writer = tuple(links), _PerfettoWriter()
    for trace, offset, prefix in side_by_side(path, traces, (".pftrace",)):
        writer.add(trace, offset, prefix, links, counted)
    with pathlib.Path(path).open("wb") as file:
        file.writelines(writer.packets())


class _PerfettoWriter:
    """Numbers the tracks, flows and interned texts of all traces in a file."""

    def __init__(self) -> None:
        self.header: list[bytes] = []
        self.streams: list[Iterable[Packet]] = []
        self.interned = _Interned()
        self.encoded: dict[tuple, bytes] = {}
        self.track_ids = itertools.count(1)
        self.flow_ids = itertools.count(1)

    def packets(self) -> Iterator[bytes]:
        """All packets in the order of their times; the first one says that nothing was interned before."""
        for i, descriptor in enumerate(self.header):
            yield _packet(_message(60, descriptor), first=not i)
        for time, event in heapq.merge(*self.streams, key=lambda packet: packet[0]):
            yield _packet(_number(8, time) + self.interned.pending() + _message(11, event))

    def add(self, trace: Trace, offset: float, prefix: str, links: tuple[PhaseLink, ...], counted: bool) -> None:
        joined = flows(trace, links, self.flow_ids, FLOW, TERMINATING_FLOW)
        for panel in panels(trace, counted):
            parent = self.track(prefix + panel.label)
            for name, samples in panel.counters.items():
                self.streams.append(_counter(self.track(name, parent, counter=True), samples, offset))
            for row in panel.rows:
                # Tracks of one name under one parent are drawn as one, as high as it needs to be.
                track = self.track(lane_label(row.lane), parent)
                self.streams.append(self.slices(track, row, offset, {} if panel.is_host else joined))

    def track(self, name: str, parent: int = 0, counter: bool = False) -> int:
        track = next(self.track_ids)
        descriptor = _number(1, track) + _text(2, name)
        if parent:
            descriptor += _number(5, parent)
        if counter:
            descriptor += _message(8, b"")
        # Children stand in the order of their ranks, which is the order in which they are made.
        self.header.append(descriptor + _number(11, 3) + _number(12, track))
        return track

    def slices(
        self, track: int, row: TrackRow, offset: float, joined: dict[Event, list[tuple[int, int]]]
    ) -> Iterator[Packet]:
        """Begins and ends of slices, in an order in which each end closes the last begin; events of a row nest."""
        end = _number(9, END) + _number(11, track)
        running: list[int] = []
        for event in row.events:
            start = _nanoseconds(event.start, offset)
            while running and running[-1] <= start:
                yield running.pop(), end
            yield start, self.begin(track, event, joined.get(event, ()) if joined else ())
            running.append(_nanoseconds(event.end, offset))
        while running:
            yield running.pop(), end

    def begin(self, track: int, event: Event, ends: Iterable[tuple[int, int]]) -> bytes:
        key = _what(event)
        if key not in self.encoded:
            self.encoded[key] = self.encode(event)
        body = _BEGIN + _number(11, track) + self.encoded[key]
        return body + b"".join(_tag(field, 1) + struct.pack("<Q", flow) for field, flow in ends)

    def encode(self, event: Event) -> bytes:
        """The fields of an event besides times and flows, which are the same for many events."""
        number = self.interned.number
        body = _number(3, number(1, event.group)) + _number(10, number(2, event.name))
        for name, value in facts(event).items():
            annotation = _number(1, number(3, name))
            annotation += _number(4, value) if isinstance(value, int) else _number(17, number(29, value))
            body += _message(4, annotation)
        return body


class _Interned:
    """Numbers of texts for each field of InternedData.

    A text is pending until the next packet is written. It is numbered when an event that refers to it is encoded, which
    is before that event is written, so readers get every text in time.
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, str], int] = {}
        self.entries: list[bytes] = []

    def number(self, field: int, text: str) -> int:
        key = (field, text)
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers) + 1
            self.entries.append(_message(field, _number(1, self.numbers[key]) + _text(2, text)))
        return self.numbers[key]

    def pending(self) -> bytes:
        entries, self.entries = self.entries, []
        return _message(12, b"".join(entries)) if entries else b""


def _counter(track: int, samples: Iterable[tuple[float, float]], offset: float) -> Iterator[Packet]:
    head = _number(9, COUNTER) + _number(11, track)
    for time, value in samples:
        yield _nanoseconds(time, offset), head + _tag(44, 1) + struct.pack("<d", value)


def _packet(fields: bytes, first: bool = False) -> bytes:
    """A Trace.packet of the only sequence; its first one says that no text was interned before."""
    return _message(1, (_FIRST if first else _LATER) + fields)


def _nanoseconds(time: float, offset: float) -> int:
    return round((time + offset) * 1000)


@functools.cache
def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, body: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; negative numbers as 64 bits of two's complement."""
    if 0 <= value < 128:
        return bytes((value,))
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


_what = operator.attrgetter(
    *(field.name for field in dataclasses.fields(Event) if field.name not in ("device", "lane", "start", "end"))
)
_BEGIN = _number(9, BEGIN)
_FIRST = _number(10, 1) + _number(13, 1)
_LATER = _number(10, 1) + _number(13, 2)
