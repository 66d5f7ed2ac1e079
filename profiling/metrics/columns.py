"""The events of one device as arrays, each made once and shared by all metrics."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from profiling.event import GROUPS, Event, Trace
from profiling.metrics.intervals import Spans, checked

_GROUP = {group: code for code, group in enumerate(GROUPS)}


@dataclasses.dataclass(frozen=True)
class Codes:
    """A field of ``n`` events as numbers.

    Attributes:
      values: what occurs, in the order of its first occurrence.
      index: ``[n]`` int32: for each event the place of its value in `values`.
    """

    values: tuple[Any, ...]
    index: np.ndarray

    def members(self) -> list[np.ndarray]:
        """``[values][count]``: for each value the places of its events, in their order.

        >>> [places.tolist() for places in coded("aba", 3).members()]
        [[0, 2], [1]]
        """
        order = np.argsort(self.index, kind="stable")
        edges = np.searchsorted(self.index[order], np.arange(1, len(self.values)))
        return np.split(order, edges) if self.values else []


def coded(values: Iterable[Any], count: int) -> Codes:
    """Hashable values as numbers; ``count`` is how many there are.

    >>> coded("aba", 3)
    Codes(values=('a', 'b'), index=array([0, 1, 0], dtype=int32))
    """
    found = list(values)
    known = {value: place for place, value in enumerate(dict.fromkeys(found))}
    return Codes(tuple(known), np.fromiter(map(known.__getitem__, found), np.int32, count))


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(Sequence[Event]):
    """A sequence of events that makes an array of a field when a metric first asks for it, and keeps it.

    Every function that takes events takes these. An event costs 16 bytes for its times and at most 4 for each field
    that a metric looks at, instead of a list of Python numbers for each metric.

    Attributes:
      events: events of one device, in any order.

    >>> Columns((Event(0, "7", 0.0, 2.0, "a"), Event(0, "7", 3.0, 4.0, "b"))).durations
    array([2., 1.])
    """

    events: Sequence[Event]

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, index):
        return self.events[index]

    def __iter__(self):
        return iter(self.events)

    @functools.cached_property
    def spans(self) -> Spans:
        """``[n, 2]`` float64: starts and ends in microseconds.

        Raises:
          ValueError: an event ends before it starts, or has a time that is no number.
        """
        spans = np.empty((len(self), 2))
        spans[:, 0] = self._floats("start")
        spans[:, 1] = self._floats("end")
        return checked(spans)

    @property
    def starts(self) -> np.ndarray:
        """``[n]``: of `spans`."""
        return self.spans[:, 0]

    @property
    def ends(self) -> np.ndarray:
        """``[n]``: of `spans`."""
        return self.spans[:, 1]

    @functools.cached_property
    def durations(self) -> np.ndarray:
        """``[n]`` float64: microseconds."""
        return self.ends - self.starts

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """``[n]`` int8: index in `profiling.event.GROUPS`; an unknown group has the length of that list."""
        found = self._coded("group")
        return np.array([_GROUP.get(group, len(GROUPS)) for group in found.values], np.int8)[found.index]

    @functools.cached_property
    def blocks(self) -> np.ndarray:
        """``[n]`` float64: thread blocks, NaN where unknown."""
        return np.array(list(map(operator.attrgetter("blocks"), self.events)), np.float64)  # of None it makes NaN

    @functools.cached_property
    def lanes(self) -> Codes:
        """Of `Event.lane`."""
        return self._coded("lane")

    @functools.cached_property
    def kinds(self) -> Codes:
        """Of `Event.kind`."""
        return self._coded("kind")

    @functools.cached_property
    def phases(self) -> Codes:
        """Of `Event.phase`."""
        return self._coded("phase")

    @functools.cached_property
    def layers(self) -> Codes:
        """Of `Event.layer`."""
        return self._coded("layer")

    @functools.cached_property
    def counted(self) -> Columns:
        """The events whose time counts: all but loops and calls around other events."""
        control = self.groups == _GROUP["control"]
        return self.take(np.flatnonzero(~control)) if control.any() else self

    def take(self, places: np.ndarray) -> Columns:
        """The events at some places."""
        return Columns([self.events[place] for place in places.tolist()])

    def of_groups(self, *groups: str) -> np.ndarray:
        """``[n]`` bool: which events are of one of these groups."""
        return np.isin(self.groups, [_GROUP[group] for group in groups])

    def _floats(self, field: str) -> np.ndarray:
        return np.fromiter(map(operator.attrgetter(field), self.events), np.float64, len(self))

    def _coded(self, field: str) -> Codes:
        return coded(map(operator.attrgetter(field), self.events), len(self))


def columns(events: Sequence[Event]) -> Columns:
    """Events with their arrays; events that have them already are returned unchanged."""
    return events if isinstance(events, Columns) else Columns(events)


def by_device(trace: Trace) -> Mapping[int, Columns]:
    """``{device: its events}`` in the order of the devices; events keep the order of the trace.

    >>> found = by_device(Trace("", "kineto", (Event(1, "7", 0.0, 2.0, "a"), Event(0, "7", 3.0, 4.0, "b"))))
    >>> {device: [event.name for event in events] for device, events in found.items()}
    {0: ['b'], 1: ['a']}
    """
    found: dict[int, list[Event]] = {}
    devices = trace.devices
    if len(devices) == 1:
        return {devices[0]: Columns(trace.events)}
    for event in trace.events:
        of = found.get(event.device)
        if of is None:
            of = found[event.device] = []
        of.append(event)
    return {device: Columns(found[device]) for device in sorted(found)}
