"""Divides the time of one device by kind, phase, action, layer and lane."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from profiling.event import GROUPS, Event, Trace
from profiling.metrics.columns import Codes, Columns, coded, columns
from profiling.metrics.intervals import union
from profiling.read.scopes import action_of


@dataclasses.dataclass(frozen=True)
class TimeRow:
    """Events of one name, and their time in microseconds.

    Attributes:
      name: name of the kind, the phase or the action; "" for events without one.
      count: number of events.
      total: sum of the durations.
      busy: time with any of the events; less than the total if they run beside each other.
      by_group: the total divided by `profiling.event.GROUPS`, without groups that have no time.
      blocks: fewest and most thread blocks of a launch; None if unknown.
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
      layer: index of the layer.
      phases: one row for each phase, in the order of their first starts.
    """

    layer: int
    phases: tuple[TimeRow, ...]


@dataclasses.dataclass(frozen=True)
class LayerSpan:
    """The time from the first start of a layer to that of the next, or to the end; the layer itself may end later."""

    layer: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class LaneRow:
    """The time of one lane, in microseconds.

    Attributes:
      lane: name of the lane.
      count: number of events.
      busy: time with any of the events.
      alone: busy time in which no other lane is busy.
    """

    lane: str
    count: int
    busy: float
    alone: float


def time_by(events: Sequence[Event], key: Callable[[Event], str]) -> tuple[TimeRow, ...]:
    """The time of one device by a key of its events, the longest total first.

    >>> events = [Event(0, "7", 0.0, 4.0, "a", kind="GEMM"), Event(0, "23", 2.0, 5.0, "b", kind="GEMM")]
    >>> [(row.name, row.total, row.busy) for row in time_by(events, lambda event: event.kind)]
    [('GEMM', 7.0, 5.0)]
    """
    of = columns(events).counted
    return _rows(of, coded(map(key, of), len(of)))


def time_by_kind(events: Sequence[Event]) -> tuple[TimeRow, ...]:
    """The time of one device by kind; see `time_by`."""
    of = columns(events).counted
    return _rows(of, of.kinds)


def time_by_phase(events: Sequence[Event]) -> tuple[TimeRow, ...]:
    """The time of one device by phase; see `time_by`."""
    of = columns(events).counted
    return _rows(of, of.phases)


def time_by_action(events: Sequence[Event]) -> tuple[TimeRow, ...]:
    """The time of one device by action, the part of a phase in brackets, or all of it; see `time_by`."""
    of = columns(events).counted
    actions = coded(map(action_of, of.phases.values), len(of.phases.values))
    return _rows(of, Codes(actions.values, actions.index[of.phases.index]))


def layers(events: Sequence[Event]) -> tuple[LayerRow, ...]:
    """The phases of each layer of one device; empty if no layer is known.

    >>> event = Event(0, "7", 0.0, 4.0, "a", phase="attn(F)", layer=3)
    >>> layers([event])[0].layer, layers([event])[0].phases[0].busy
    (3, 4.0)
    """
    of = columns(events).counted
    rows = []
    for layer, places in sorted(_layers(of).items()):
        places = places[np.argsort(of.starts[places], kind="stable")]
        phases = coded(of.phases.index[places].tolist(), len(places))
        found = zip(phases.values, phases.members(), strict=True)
        rows.append(
            LayerRow(layer, tuple(_row(of.phases.values[phase], of, places[members]) for phase, members in found))
        )
    return tuple(rows)


def layer_spans(events: Sequence[Event]) -> tuple[LayerSpan, ...]:
    """When a device goes from layer to layer, in the order of time.

    The result is empty if the device does not pass through its layers once and one after another: an event of a layer
    starts after the second next layer has begun, as on a pipeline with several microbatches.

    >>> events = [Event(0, "7", 4.0 * i, 4.0 * i + 5.0, "a", layer=i) for i in range(3)]
    >>> layer_spans(events)[1]
    LayerSpan(layer=1, start=4.0, end=8.0)
    """
    of = columns(events).counted
    starts = {layer: of.starts[places] for layer, places in _layers(of).items()}
    first = {layer: float(found.min()) for layer, found in starts.items()}
    order = sorted(first, key=lambda layer: first[layer])
    if any(starts[a].max() >= first[c] for a, c in zip(order, order[2:], strict=False)):
        return ()
    edges = [*(first[layer] for layer in order), float(columns(events).ends.max(initial=0.0))]
    return tuple(LayerSpan(layer, start, end) for layer, start, end in zip(order, edges[:-1], edges[1:], strict=True))


def steady_window(events: Sequence[Event]) -> tuple[float, float] | None:
    """The time from the start of the second layer to that of the last; None without evidence of layers.

    Evidence is a pass through at least three layers, one after another. Each must compute, and all must have a phase in
    common. Three counted all-reduces are no layers.

    >>> events = [Event(0, "7", 4.0 * i, 4.0 * i + 4.0, "a", layer=i, group="compute") for i in range(4)]
    >>> steady_window(events)
    (4.0, 12.0)
    >>> steady_window(events[:2]) is None
    True
    """
    of = columns(events).counted
    spans = layer_spans(events)
    if len(spans) < 3:
        return None
    computing = of.of_groups("compute")
    found = _layers(of).values()
    if not all(computing[places].any() for places in found):
        return None
    if not set.intersection(*(set(of.phases.index[places].tolist()) for places in found)):
        return None
    return spans[1].start, spans[-1].start


def phase_durations(events: Sequence[Event]) -> tuple[dict[str, float], ...]:
    """``[layers]``: busy microseconds of each phase, from which `profiling.replay` predicts a timeline.

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
    of = columns(events).counted
    sweep = _sweep(of)
    # If a single lane is busy, the sum of the numbers of busy lanes is its number.
    single = sweep.running == 1
    alone = np.bincount(sweep.lanes[single], weights=sweep.lengths[single], minlength=len(of.lanes.values))
    counts = np.bincount(of.lanes.index, minlength=len(of.lanes.values))
    rows = zip(of.lanes.values, counts.tolist(), sweep.busy, alone.tolist(), strict=True)
    return tuple(sorted((LaneRow(*row) for row in rows), key=lambda row: -row.busy))


def concurrency(events: Sequence[Event]) -> tuple[float, ...]:
    """``[lanes + 1]``: microseconds with none, one, two ... busy lanes, from the first start to the last end.

    >>> concurrency([Event(0, "7", 0.0, 6.0, "a"), Event(0, "27", 5.0, 8.0, "b"), Event(0, "7", 9.0, 10.0, "c")])
    (1.0, 8.0, 1.0)
    """
    of = columns(events).counted
    sweep = _sweep(of)
    return tuple(np.bincount(sweep.running, weights=sweep.lengths, minlength=len(of.lanes.values) + 1).tolist())


def unattributed_share(trace: Trace) -> float:
    """The time of events without a phase, as a share of the time of all events; 0 if there is none.

    >>> unattributed_share(Trace("", "kineto", (Event(0, "7", 0.0, 3.0, "a", phase="F"), Event(0, "7", 3.0, 4.0, "b"))))
    0.25
    """
    total = without = 0.0
    for event in trace.events:
        if event.group != "control":
            time = event.end - event.start
            total += time
            if not event.phase:
                without += time
    return without / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """Stretches between neighbouring edges of the lanes' busy times.

    Attributes:
      lengths: ``[stretches]`` microseconds.
      running: ``[stretches]`` how many lanes are busy.
      lanes: ``[stretches]`` the sum of the numbers of those that are.
      busy: ``[lanes]`` microseconds.
    """

    lengths: np.ndarray
    running: np.ndarray
    lanes: np.ndarray
    busy: list[float]


def _sweep(of: Columns) -> _Sweep:
    spans = [union(of.spans[places]) for places in of.lanes.members()]
    merged = np.concatenate([np.empty((0, 2)), *spans])
    numbers = np.repeat(np.arange(len(spans)), [len(each) for each in spans])
    edges = np.concatenate([merged[:, 0], merged[:, 1]])
    order = np.argsort(edges, kind="stable")
    change = np.repeat(np.array([1, -1]), len(merged))
    return _Sweep(
        lengths=np.diff(edges[order]),
        running=np.cumsum(change[order])[:-1],
        lanes=np.cumsum((change * np.tile(numbers, 2))[order])[:-1],
        busy=[float(np.sum(each[:, 1] - each[:, 0])) for each in spans],
    )


def _layers(of: Columns) -> dict[int, np.ndarray]:
    """``{layer: places of its events}``."""
    found = zip(of.layers.values, of.layers.members(), strict=True)
    return {layer: places for layer, places in found if layer is not None}


def _rows(of: Columns, codes: Codes) -> tuple[TimeRow, ...]:
    rows = [_row(name, of, places) for name, places in zip(codes.values, codes.members(), strict=True)]
    return tuple(sorted(rows, key=lambda row: -row.total))


def _row(name: str, of: Columns, places: np.ndarray) -> TimeRow:
    places = places[np.argsort(of.starts[places], kind="stable")]
    starts, ends, durations = of.starts[places], of.ends[places], of.durations[places]
    groups = of.groups[places]
    counts = np.bincount(groups, minlength=len(GROUPS))
    times = np.bincount(groups, weights=durations, minlength=len(GROUPS))
    blocks = of.blocks[places]
    blocks = blocks[~np.isnan(blocks)]
    # An event adds what reaches beyond all before it, so the sum is never more than the sum of durations.
    reach = np.maximum.accumulate(ends)
    added = durations.copy()
    added[1:] = np.clip(ends[1:] - np.maximum(starts[1:], reach[:-1]), 0.0, durations[1:])
    return TimeRow(
        name=name,
        count=len(places),
        total=float(durations.sum()),
        busy=float(added.sum()),
        by_group={group: float(times[code]) for code, group in enumerate(GROUPS) if counts[code]},
        blocks=(int(blocks.min()), int(blocks.max())) if len(blocks) else None,
    )
