"""Reads planes, lines and events from the bytes of a profile of `jax.profiler`.

`jax.profiler.ProfileData` refuses a file for one byte that is not UTF-8, keeps a second copy of everything, and shows
neither the stats that all events of a name share nor lost events.

Fields, from tsl/profiler/protobuf/xplane.proto: XSpace.planes = 1, errors = 2, warnings = 3; XPlane.name = 2,
lines = 3, event_metadata = 4, stat_metadata = 5, stats = 6; XLine.name = 2, timestamp_ns = 3, events = 4,
display_name = 11; XEvent.metadata_id = 1, offset_ps = 2, duration_ps = 3, stats = 4, num_occurrences = 5;
XStat.metadata_id = 1, double = 2, uint64 = 3, int64 = 4, str = 5, bytes = 6, ref = 7; XEventMetadata.name = 2,
display_name = 4, stats = 5; XStatMetadata.name = 2.
"""

from __future__ import annotations

import collections
import dataclasses
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from profiling.read.wire import fields, integer, messages, varint

Value: TypeAlias = str | int | float | bytes
Doubts: TypeAlias = "collections.Counter[str]"
"""What was left out or repaired, and how often: "events of negative duration were left out"."""

BROKEN = "events whose bytes are damaged were left out"
NEGATIVE = "events of negative duration were left out"
AGGREGATED = "events that stand for several and have no time of their own were left out"
NO_UTF8 = "names hold bytes that are not UTF-8, shown as �"

_MOST_CACHED = 200_000
_SIGN = 1 << 63


class Entry(NamedTuple):
    """An event of a line; times are in picoseconds since the line's timestamp."""

    metadata: int
    offset: int
    duration: int
    stats: dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What all events of one name in a plane share.

    Attributes:
      name: name of the events; on a TPU the whole instruction.
      display_name: a shorter name; "" if there is none.
      stats: stats of all of them.
    """

    name: str
    display_name: str = ""
    stats: Mapping[str, Value] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a plane, such as a stream or a thread.

    Attributes:
      name: name of the row.
      timestamp_ns: origin of the events' offsets.
      count: number of events.
      data: bytes of the row.
    """

    name: str
    timestamp_ns: int
    count: int
    data: memoryview


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """A device, or the host.

    Attributes:
      name: such as "/device:GPU:0" or "/host:CPU".
      lines: rows of the plane.
      stats: stats of the plane, such as the number of SMs.
      metadata: metadata by the number that an event gives.
      stat_names: names of stats by the number that a stat gives.
    """

    name: str
    lines: tuple[Line, ...]
    stats: Mapping[str, Value]
    metadata: Mapping[int, Metadata]
    stat_names: Mapping[int, str]

    def entries(self, line: Line, wanted: Collection[str], doubts: Doubts) -> Iterator[Entry]:
        """The events of one line with the wanted stats; `doubts` counts what is damaged or impossible.

        Raises:
          ValueError: the bytes of the line are damaged outside of its events.
        """
        names = {number: name for number, name in self.stat_names.items() if name in wanted}
        values: dict[bytes, Value | None] = {}
        for number, event in fields(line.data):
            if number != 4 or not isinstance(event, memoryview):
                continue
            try:
                entry = _entry(bytes(event), names, self.stat_names, values, doubts)
            except (ValueError, IndexError, struct.error):
                doubts[BROKEN] += 1
                continue
            if entry is None:
                doubts[AGGREGATED] += 1
            elif entry.duration < 0:
                doubts[NEGATIVE] += 1
            else:
                yield entry


def plane_name(data: memoryview) -> str:
    """The name of a plane; nothing else of it is read."""
    return _text(data, 2, collections.Counter())


def read_plane(data: memoryview, doubts: Doubts) -> Plane:
    """Reads one plane of a profile.

    Args:
      data: bytes of the plane, one of ``messages(space, 1)``.
      doubts: counts what is repaired.

    Raises:
      ValueError: the bytes are no plane or are damaged.
    """
    lines, metadata, stat_entries, stats, name = [], [], [], [], b""
    for number, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 2:
            name = bytes(value)
        elif number == 3:
            lines.append(_line(value, doubts))
        elif number == 4:
            metadata += messages(value, 2)
        elif number == 5:
            stat_entries += messages(value, 2)
        elif number == 6:
            stats.append(bytes(value))
    stat_names = {integer(entry, 1): _text(entry, 2, doubts) for entry in stat_entries}
    return Plane(
        _decoded(name, doubts),
        tuple(lines),
        _stats(stats, stat_names, doubts),
        {integer(entry, 1): _metadata(entry, stat_names, doubts) for entry in metadata},
        stat_names,
    )


def complaints(data: bytes) -> list[str]:
    """Errors and warnings of the profiler itself, lost events among them."""
    return [bytes(found).decode("utf-8", "replace") for number in (2, 3) for found in messages(data, number)]


def _line(data: memoryview, doubts: Doubts) -> Line:
    name = display = b""
    timestamp = count = 0
    for number, value in fields(data):
        if number == 4:
            count += 1
        elif number == 3 and isinstance(value, int):
            timestamp = _signed(value)
        elif isinstance(value, memoryview) and number in (2, 11):
            name, display = (bytes(value), display) if number == 2 else (name, bytes(value))
    return Line(_decoded(name or display, doubts), timestamp, count, data)


def _metadata(data: memoryview, stat_names: Mapping[int, str], doubts: Doubts) -> Metadata:
    found = [bytes(stat) for stat in messages(data, 5)]
    return Metadata(_text(data, 2, doubts), _text(data, 4, doubts), _stats(found, stat_names, doubts))


def _stats(found: list[bytes], stat_names: Mapping[int, str], doubts: Doubts) -> dict[str, Value]:
    values = {}
    for stat in found:
        name = stat_names.get(integer(stat, 1))
        value = _value(stat, stat_names, doubts)
        if name is not None and value is not None:
            values[name] = value
    return values


def _entry(
    data: bytes,
    wanted: Mapping[int, str],
    stat_names: Mapping[int, str],
    values: dict[bytes, Value | None],
    doubts: Doubts,
) -> Entry | None:
    """Decodes one event; None if it stands for several. The innermost loop of a reader calls no `fields`."""
    metadata = offset = duration = 0
    aggregated = False
    stats: dict[str, Value] = {}
    at, end = 0, len(data)
    while at < end:
        key = data[at]
        at += 1
        if key == 0x22:  # a stat
            length = data[at]
            at += 1
            if length > 127:
                length, at = varint(data, at - 1)
            stop = at + length
            if stop > end:
                raise ValueError("a stat ends behind its event")
            if wanted and length:
                if data[at] == 0x08:
                    number, inside = data[at + 1], at + 2
                    if number > 127:
                        number, inside = varint(data, at + 1)
                    if inside > stop:
                        raise ValueError("a stat ends within its number")
                else:
                    number = integer(data[at:stop], 1)
                name = wanted.get(number)
                if name is not None:
                    raw = data[at:stop]
                    if raw in values:
                        value = values[raw]
                    else:
                        value = _value(raw, stat_names, doubts)
                        if len(values) < _MOST_CACHED:
                            values[raw] = value
                    if value is not None:
                        stats[name] = value
            at = stop
        elif key in (0x08, 0x10, 0x18, 0x28):
            value, at = varint(data, at)
            if key == 0x08:
                metadata = value
            elif key == 0x10:
                offset = _signed(value)
            elif key == 0x18:
                duration = _signed(value)
            else:
                aggregated = True
        else:  # a field that this does not know
            kind = key & 7
            if key > 127:
                _, at = varint(data, at - 1)
            if kind == 0:
                _, at = varint(data, at)
            elif kind == 2:
                length, at = varint(data, at)
                at += length
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind}")
    if at != end:
        raise ValueError("the event ends within a field")
    return None if aggregated else Entry(metadata, offset, duration, stats)


def _value(stat: bytes, stat_names: Mapping[int, str], doubts: Doubts) -> Value | None:
    value: Value | None = None
    for number, found in fields(stat):
        if isinstance(found, int):
            if number == 3:
                value = found
            elif number == 4:
                value = _signed(found)
            elif number == 7:
                value = stat_names.get(found)
        elif number == 2 and len(found) == 8:
            value = float(struct.unpack("<d", found)[0])
        elif number == 5:
            value = _decoded(bytes(found), doubts)
        elif number == 6:
            value = bytes(found)
    return value


def _text(data: memoryview, number: int, doubts: Doubts) -> str:
    found = messages(data, number)
    return _decoded(bytes(found[-1]), doubts) if found else ""


def _decoded(data: bytes, doubts: Doubts) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        doubts[NO_UTF8] += 1
        return data.decode("utf-8", "replace")


def _signed(value: int) -> int:
    return value - 2 * _SIGN if value >= _SIGN else value
