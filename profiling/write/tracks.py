"""Arranges traces for viewers: rows in which events nest, arrows between phases, counters, one clock for all traces."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from profiling.event import Event, Trace

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class TrackRow:
    """Events of one lane that fit into one row.

    Attributes:
      device, lane: device and lane of all events.
      index: 0 for the lane's first row; further rows hold events that overlap without nesting.
      events: events in the order of their starts, an outer event before those inside it.
    """

    device: int
    lane: str
    index: int
    events: tuple[Event, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseLink:
    """An arrow between two phases of one microbatch: the target takes what the source made.

    Attributes:
      source, target: phases, as in `Event.phase`.
      layers: number of layers from the source to the target.
    """

    source: str
    target: str
    layers: int = 0


MOE_LINKS = (
    PhaseLink("attn(F)", "dispatch(F)"),
    PhaseLink("dispatch(F)", "mlp(F)"),
    PhaseLink("mlp(F)", "combine(F)"),
    PhaseLink("combine(F)", "attn(F)", 1),
    PhaseLink("combine(B)", "mlp(B)"),
    PhaseLink("mlp(B)", "dispatch(B)"),
    PhaseLink("dispatch(B)", "attn(B)"),
)
"""The way of a microbatch through a mixture-of-experts layer, forward and backward."""


def rows(trace: Trace, nested: bool = True) -> tuple[TrackRow, ...]:
    """Divides the events of each lane over as few rows as their order allows.

    Args:
      trace: any trace.
      nested: whether events inside others share their row, as viewers draw them; else no events of a row overlap.

    Raises:
      ValueError: an event has a time that is not finite, or ends before it starts.

    >>> times = {"a": (0.0, 9.0), "b": (1.0, 2.0), "c": (5.0, 12.0)}
    >>> trace = Trace("", "simulated", tuple(Event(0, "gpu", *span, name) for name, span in times.items()))
    >>> [[event.name for event in row.events] for row in rows(trace)]
    [['a', 'b'], ['c']]
    >>> [[event.name for event in row.events] for row in rows(trace, nested=False)]
    [['a'], ['b', 'c']]
    """
    lanes: dict[tuple[int, str], list[Event]] = {}
    for event in trace.events:
        if not (math.isfinite(event.start) and math.isfinite(event.end) and event.start <= event.end):
            raise ValueError(
                f"{event.name!r} on device {event.device}, lane {event.lane!r} goes from {event.start} to {event.end}"
                " us; times must be finite, and no event may end before it starts"
            )
        lanes.setdefault((event.device, event.lane), []).append(event)
    found = []
    for device, lane in sorted(lanes, key=lambda key: (trace.ranks.get(key[0], key[0]), key[0], _natural(key[1]))):
        placed = _place(lanes[device, lane], nested)
        found += [TrackRow(device, lane, index, tuple(events)) for index, events in enumerate(placed)]
    return tuple(found)


def _place(events: list[Event], nested: bool) -> list[list[Event]]:
    placed: list[list[Event]] = []
    running: list[list[float]] = []  # per row, the ends of the events that are still running, the innermost last
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        index = next((i for i, ends in enumerate(running) if _fits(event, ends, nested)), len(placed))
        if index == len(placed):
            placed.append([])
            running.append([])
        placed[index].append(event)
        running[index].append(event.end)
    return placed


def _fits(event: Event, running: list[float], nested: bool) -> bool:
    while running and running[-1] <= event.start:
        running.pop()
    return not running or (nested and event.end <= running[-1])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts "stream 7" before "stream 23"."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def arrows(trace: Trace, links: Iterable[PhaseLink]) -> tuple[tuple[Event, Event], ...]:
    """Pairs of events that each link joins: the last of the source, and the first of the target after it.

    Both events are of one device and one microbatch, which may be unknown; their layers must be known.

    >>> dispatch = Event(0, "stream 23", 0.0, 2.0, "a2a", phase="dispatch(F)", layer=1)
    >>> mlp = Event(0, "stream 7", 3.0, 4.0, "gemm", phase="mlp(F)", layer=1)
    >>> pairs = arrows(Trace("", "simulated", (dispatch, mlp)), MOE_LINKS)
    >>> [(source.name, target.name) for source, target in pairs]
    [('a2a', 'gemm')]
    """
    phases: dict[tuple[int, str, int | None, int], list[Event]] = {}
    for event in trace.events:
        if event.layer is not None:
            phases.setdefault((event.device, event.phase, event.microbatch, event.layer), []).append(event)
    pairs = []
    for link in links:
        for (device, phase, microbatch, layer), sources in phases.items():
            if phase == link.source:
                targets = phases.get((device, link.target, microbatch, layer + link.layers), [])
                pairs += _adjacent(sources, targets)
    return tuple(sorted(pairs, key=lambda pair: (pair[0].end, pair[1].start)))


def _adjacent(sources: list[Event], targets: list[Event]) -> Iterator[tuple[Event, Event]]:
    """Goes through both in the order of time: a source is pending from its end until a target starts."""
    marks = [(event.end, 0, i) for i, event in enumerate(sources)]
    marks += [(event.start, 1, i) for i, event in enumerate(targets)]
    pending = None
    for _, is_target, i in sorted(marks):
        if not is_target:
            pending = sources[i]
        elif pending is not None:
            yield pending, targets[i]
            pending = None


def counters(trace: Trace) -> dict[int, dict[str, tuple[tuple[float, float], ...]]]:
    """Named step functions of time for each device, as ``(microseconds, value from then on)``; all end at 0.

    "exposed communication" is 1 while data is moved or waited for and nothing is computed. "thread blocks in transfers"
    is left out if the blocks of no transfer are known.

    >>> gemm = Event(0, "stream 7", 0.0, 4.0, "gemm", group="compute")
    >>> dispatch = Event(0, "stream 23", 2.0, 6.0, "dispatch", group="transfer", blocks=20)
    >>> counters(Trace("", "simulated", (gemm, dispatch)))[0]["exposed communication"]
    ((4.0, 1.0), (6.0, 0.0))
    """
    edges: dict[int, list[tuple[float, int, int, int]]] = {device: [] for device in trace.devices}
    for event in trace.events:
        moving = int(event.group in ("transfer", "wait"))
        blocks = (event.blocks or 0) * (event.group == "transfer")
        computing = int(event.group == "compute")
        edges[event.device].append((event.start, moving, computing, blocks))
        edges[event.device].append((event.end, -moving, -computing, -blocks))
    found = {}
    for device, changes in edges.items():
        moving = computing = blocks = 0
        exposed, used = [], []
        for time, more_moving, more_computing, more_blocks in sorted(changes):
            moving, computing, blocks = moving + more_moving, computing + more_computing, blocks + more_blocks
            exposed.append((time, float(moving > 0 and computing == 0)))
            used.append((time, float(blocks)))
        named = {"exposed communication": _changes(exposed)}
        if in_transfers := _changes(used):
            named["thread blocks in transfers"] = in_transfers
        found[device] = named
    return found


def _changes(samples: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The last value of each time, if it differs from the one before; the first is compared with 0."""
    last = dict(samples)
    values = list(last.items())
    before = [0.0, *last.values()]
    return tuple(sample for sample, previous in zip(values, before, strict=False) if sample[1] != previous)


def offsets(traces: Sequence[Trace]) -> tuple[float, ...]:
    """Microseconds to add to each trace's times so that their first events coincide and no time is negative.

    >>> late = Trace("", "kineto", (Event(0, "gpu", 70.0, 80.0, "a"),))
    >>> offsets([late, Trace("", "simulated", (Event(0, "gpu", 0.0, 9.0, "a"),))])
    (0.0, 70.0)
    """
    shifts = [traces[0].window[0] - trace.window[0] for trace in traces]
    first = (
        min((item.start for item in (*trace.events, *trace.steps)), default=0.0) + shift
        for trace, shift in zip(traces, shifts, strict=True)
    )
    earliest = min(0.0, *first) if traces else 0.0
    return tuple(shift - earliest for shift in shifts)


def step_rows(trace: Trace) -> tuple[TrackRow, ...]:
    """The host's steps as rows of events.

    >>> from profiling.event import Step
    >>> [row.events[0].name for row in step_rows(Trace("", "xplane", (), (Step("train", 7, 0.0, 5.0),)))]
    ['train 7']
    """
    events = (
        Event(0, "steps", step.start, step.end, step.name if step.number is None else f"{step.name} {step.number}")
        for step in trace.steps
    )
    return rows(Trace(trace.title, trace.source, tuple(events)))


def facts(event: Event) -> dict[str, str | int]:
    """The known facts of an event besides its name, times and group.

    >>> facts(Event(0, "gpu", 0.0, 1.0, "a", kind="grouped GEMM", layer=0))
    {'kind': 'grouped GEMM', 'layer': 0}
    """
    fields = ("kind", "phase", "layer", "microbatch", "scope", "hlo_op", "blocks")
    return {field: value for field in fields if (value := getattr(event, field)) not in ("", None)}


def row_label(row: TrackRow) -> str:
    """A row's name for people.

    >>> row_label(TrackRow(0, "7", 0, ())), row_label(TrackRow(0, "compute", 1, ()))
    ('stream 7', 'compute (2)')
    """
    lane = lane_label(row.lane)
    return f"{lane} ({row.index + 1})" if row.index else lane


def lane_label(lane: str) -> str:
    """A lane's name for people; a number is a GPU's stream.

    >>> lane_label("7"), lane_label("compute")
    ('stream 7', 'compute')
    """
    return f"stream {lane}" if lane.isdecimal() else lane


def device_label(trace: Trace, device: int) -> str:
    """A device's name for people.

    >>> device_label(Trace("", "simulated", (), ranks={3: 1}), 3)
    'rank 1, device 3'
    """
    return f"rank {trace.ranks[device]}, device {device}" if device in trace.ranks else f"device {device}"


Samples = tuple[tuple[float, float], ...]
"""Points in microseconds, each with the value from then on."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """The rows that a viewer shows under one heading.

    Attributes:
      label: the heading.
      rows: rows from the top down.
      counters: curves beside the rows, by name.
      is_host: whether the rows are the host's steps and not a device's lanes.
    """

    label: str
    rows: tuple[TrackRow, ...]
    counters: Mapping[str, Samples]
    is_host: bool = False


def panels(trace: Trace, counted: bool = True) -> Iterator[Panel]:
    """The panels of a trace: the host's steps if there are any, then each device, with its counters if wanted.

    >>> from profiling.event import Step
    >>> trace = Trace("", "simulated", (Event(3, "gpu", 1.0, 2.5, "a"),), (Step("train", 7, 0.0, 5.0),))
    >>> [(panel.label, [row.lane for row in panel.rows]) for panel in panels(trace)]
    [('host', ['steps']), ('device 3', ['gpu'])]
    """
    values = counters(trace) if counted else {}
    if trace.steps:
        yield Panel("host", step_rows(trace), {}, is_host=True)
    for device, found in itertools.groupby(rows(trace), key=lambda row: row.device):
        yield Panel(device_label(trace, device), tuple(found), values.get(device, {}))


def flows(
    trace: Trace, links: Iterable[PhaseLink], numbers: Iterator[int], begin: T, end: T
) -> dict[Event, list[tuple[T, int]]]:
    """The arrows that begin or end at each event, as ``(begin or end, number of the arrow)``.

    Args:
      trace: trace whose events are joined.
      links: phases to join; see `arrows`.
      numbers: gives each arrow its number.
      begin, end: marks of a file format for the two ends of an arrow.
    """
    found: dict[Event, list[tuple[T, int]]] = {}
    for source, target in arrows(trace, links):
        number = next(numbers)
        found.setdefault(source, []).append((begin, number))
        found.setdefault(target, []).append((end, number))
    return found


def side_by_side(
    path: str | os.PathLike[str], traces: Trace | Sequence[Trace], endings: Sequence[str]
) -> list[tuple[Trace, float, str]]:
    """Each trace of a file with the microseconds to add to its times and the prefix of its labels.

    Args:
      path: path of the file.
      traces: one trace or several.
      endings: endings that the file may have.

    Raises:
      ValueError: there are no traces, or the file has another ending.
    """
    whole = (traces,) if isinstance(traces, Trace) else tuple(traces)
    if not whole:
        raise ValueError("no traces: give at least one")
    if not os.fspath(path).endswith(tuple(endings)):
        raise ValueError(f"{os.fspath(path)!r} must end in {' or '.join(map(repr, endings))}")
    prefixes = [f"{trace.title}: " if len(whole) > 1 else "" for trace in whole]
    return list(zip(whole, offsets(whole), prefixes, strict=True))
