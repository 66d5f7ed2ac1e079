"""Where the time of one device goes: by kind, phase, action, layer and lane."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from profiling.event import Event, Trace
from profiling.intervals import difference, length, spans_of, union

K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class TimeRow:
    """What belongs together, and how long it takes in microseconds.

    Attributes:
      name: of the kind, the phase or the action; "" for what has none.
      count: number of events.
      total: sum of their durations.
      busy: time with any of them; less than the total where they run beside each other.
      by_group: the total divided by `profiling.event.GROUPS`, those without time left out.
      blocks: fewest and most thread blocks of a launch, None if unknown.
    """

    name: str
    count: int
    total: float
    busy: float
    by_group: Mapping[str, float]
    blocks: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """The phases of one layer.

    Attributes:
      layer: its index.
      phases: one row per phase in the order of their first starts.
    """

    layer: int
    phases: tuple[TimeRow, ...]


@dataclasses.dataclass(frozen=True)
class LayerSpan:
    """From the first start of a layer to that of the next one, or to the end; the layer's own tail may run later."""

    layer: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class LaneRow:
    """What a lane does, in microseconds.

    Attributes:
      lane: its name.
      count: number of events.
      busy: time with any of them.
      alone: time in which no other lane is busy.
    """

    lane: str
    count: int
    busy: float
    alone: float


def time_by(events: Sequence[Event], key: Callable[[Event], str]) -> tuple[TimeRow, ...]:
    """The time of one device by anything, the longest total first: ``time_by(events, lambda event: event.kind)``.

    >>> events = [Event(0, "7", 0.0, 4.0, "a", kind="GEMM"), Event(0, "23", 2.0, 5.0, "b", kind="GEMM")]
    >>> [(row.name, row.total, row.busy) for row in time_by(events, lambda event: event.kind)]
    [('GEMM', 7.0, 5.0)]
    """
    rows = [_row(name, members) for name, members in _grouped(events, key).items()]
    return tuple(sorted(rows, key=lambda row: -row.total))


def layers(events: Sequence[Event]) -> tuple[LayerRow, ...]:
    """The phases of each layer of one device; empty where no layer is known.

    >>> event = Event(0, "7", 0.0, 4.0, "a", phase="attn(F)", layer=3)
    >>> layers([event])[0].layer, layers([event])[0].phases[0].busy
    (3, 4.0)
    """
    found = _grouped([event for event in events if event.layer is not None], lambda event: event.layer)
    rows = []
    for layer in sorted(layer for layer in found if layer is not None):
        phases = _grouped(sorted(found[layer], key=lambda event: event.start), lambda event: event.phase)
        rows.append(LayerRow(layer, tuple(_row(name, members) for name, members in phases.items())))
    return tuple(rows)


def layer_spans(events: Sequence[Event]) -> tuple[LayerSpan, ...]:
    """When a device goes from layer to layer, in the order of time.

    Empty where it does not pass through them once, one after another: where something of a layer starts when the
    second layer after it has begun already, as on a pipeline with several microbatches.

    >>> events = [Event(0, "7", 4.0 * i, 4.0 * i + 5.0, "a", layer=i) for i in range(3)]
    >>> layer_spans(events)[1]
    LayerSpan(layer=1, start=4.0, end=8.0)
    """
    found = _grouped([event for event in events if event.layer is not None], lambda event: event.layer)
    starts = {layer: [event.start for event in members] for layer, members in found.items() if layer is not None}
    order = sorted(starts, key=lambda layer: min(starts[layer]))
    if any(max(starts[a]) >= min(starts[c]) for a, c in zip(order, order[2:], strict=False)):
        return ()
    edges = [*(min(starts[layer]) for layer in order), max((event.end for event in events), default=0.0)]
    return tuple(LayerSpan(layer, start, end) for layer, start, end in zip(order, edges[:-1], edges[1:], strict=True))


def phase_durations(events: Sequence[Event]) -> tuple[dict[str, float], ...]:
    """``[layers]``: busy microseconds of each phase, what `profiling.replay` predicts a timeline from.

    >>> phase_durations([Event(0, "7", 0.0, 4.0, "a", phase="attn(F)", layer=0)])
    ({'attn(F)': 4.0},)
    """
    return tuple({row.name: row.busy for row in layer.phases} for layer in layers(events))


def lanes(events: Sequence[Event]) -> tuple[LaneRow, ...]:
    """The lanes of one device, the busiest first.

    >>> rows = lanes([Event(0, "7", 0.0, 6.0, "a"), Event(0, "27", 5.0, 8.0, "b")])
    >>> [(row.lane, row.busy, row.alone) for row in rows]
    [('7', 6.0, 5.0), ('27', 3.0, 2.0)]
    """
    found = _grouped(events, lambda event: event.lane)
    spans = {lane: union(spans_of(members)) for lane, members in found.items()}
    rows = []
    for lane, members in found.items():
        others = np.concatenate([np.empty((0, 2)), *(other for name, other in spans.items() if name != lane)])
        rows.append(LaneRow(lane, len(members), length(spans[lane]), length(difference(spans[lane], others))))
    return tuple(sorted(rows, key=lambda row: -row.busy))


def concurrency(events: Sequence[Event]) -> tuple[float, ...]:
    """``[lanes + 1]``: microseconds in which none, one, two ... lanes of one device are busy, first start to last end.

    >>> concurrency([Event(0, "7", 0.0, 6.0, "a"), Event(0, "27", 5.0, 8.0, "b"), Event(0, "7", 9.0, 10.0, "c")])
    (1.0, 8.0, 1.0)
    """
    spans = [union(spans_of(members)) for members in _grouped(events, lambda event: event.lane).values()]
    merged = np.concatenate([np.empty((0, 2)), *spans])
    edges = np.concatenate([merged[:, 0], merged[:, 1]])
    order = np.argsort(edges, kind="stable")
    running = np.cumsum(np.repeat([1, -1], len(merged))[order])
    times = np.zeros(len(spans) + 1)
    np.add.at(times, running[:-1], np.diff(edges[order]))
    return tuple(times.tolist())


def unattributed_share(trace: Trace) -> float:
    """Time of the events without a phase as a share of all events' time; 0 where there is no time at all.

    >>> unattributed_share(Trace("", "kineto", (Event(0, "7", 0.0, 3.0, "a", phase="F"), Event(0, "7", 3.0, 4.0, "b"))))
    0.25
    """
    counted = [event for event in trace.events if event.group != "control"]
    total = sum(event.duration for event in counted)
    return sum(event.duration for event in counted if not event.phase) / total if total else 0.0


def _grouped(events: Sequence[Event], key: Callable[[Event], K]) -> dict[K, list[Event]]:
    found: dict[K, list[Event]] = {}
    for event in events:
        if event.group != "control":
            found.setdefault(key(event), []).append(event)
    return found


def _row(name: str, events: Sequence[Event]) -> TimeRow:
    by_group: dict[str, float] = {}
    for event in events:
        by_group[event.group] = by_group.get(event.group, 0.0) + event.duration
    blocks = [event.blocks for event in events if event.blocks is not None]
    return TimeRow(
        name=name,
        count=len(events),
        total=sum(event.duration for event in events),
        busy=length(spans_of(events)),
        by_group=by_group,
        blocks=(min(blocks), max(blocks)) if blocks else None,
    )
