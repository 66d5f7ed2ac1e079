"""Timelines as text and as Perfetto traces."""

from __future__ import annotations

import json
import math

from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.simulator import TimedGroup, Timeline

MAX_COLUMNS = 500


def draw_text(timeline: Timeline) -> str:
    """A grid: a line per rank, time to the right, one column per unit of the shortest event.

    Columns are at least a 500th of the makespan; shorter events may be left out.

    A forward is its microbatch's number, backwards carry their letter; ``7&3B`` is a forward of microbatch 7
    overlapped with the backward of 3. The second stage of a rank (or the second direction) is in brackets.

    >>> from jaxpipe.schedule.builders.gpipe import gpipe
    >>> from jaxpipe.schedule.simulator import simulate
    >>> print(draw_text(simulate(gpipe(2, 2))))
    rank 0  0    1    .    .    .    0B   -    1B   -
    rank 1  .    0    1    0B   -    1B   -    .    .
    0 forward   0B backward   0I input gradient   0W weight gradient   0&1B overlapped   [0] second stage   . idle
    """
    unit = max(shortest(timeline), timeline.makespan / MAX_COLUMNS)
    columns = _column(timeline.makespan, unit)
    width = max((len(_label(timeline, event)) for events in timeline.events for event in events), default=1)
    lines = []
    for rank, events in enumerate(timeline.events):
        cells = ["."] * columns
        for event in events:
            first, last = _column(event.start, unit), _column(event.end, unit)
            cells[first:last] = [_label(timeline, event), *["-"] * (last - first - 1)][: last - first]
        lines.append(f"rank {rank:<2}" + "".join(f" {cell:<{max(width, 4)}}" for cell in cells).rstrip())
    legend = (
        "0 forward   0B backward   0I input gradient   0W weight gradient   0&1B overlapped   [0] second stage   . idle"
    )
    return "\n".join([*lines, legend])


def draw_perfetto(timeline: Timeline) -> str:
    """Chrome trace JSON, which Perfetto opens: a thread per rank, one unit of cost as a millisecond.

    The two actions of an overlapped pair are nested in an event of the pair.

    >>> from jaxpipe.schedule.builders.gpipe import gpipe
    >>> from jaxpipe.schedule.simulator import simulate
    >>> [event["name"] for event in json.loads(draw_perfetto(simulate(gpipe(1, 1))))["traceEvents"]]
    ['process_name', 'thread_name', '0F0', '0B0']
    """
    events: list[dict] = [_metadata("process_name", 0, timeline.schedule.name)]
    for rank, row in enumerate(timeline.events):
        events.append(_metadata("thread_name", rank, f"rank {rank}"))
        for event in row:
            if len(event.group) > 1:
                label = "&".join(map(str, event.group))
                events.append(_complete(label, "overlapped", event.start, event.end, rank, {}))
            share = (event.end - event.start) / len(event.group)
            for i, action in enumerate(event.group):
                start = event.start + i * share
                details = {"stage": action.stage, "microbatch": action.microbatch, "kind": action.kind.value}
                events.append(_complete(str(action), action.kind.value, start, start + share, rank, details))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def is_second(timeline: Timeline, event: TimedGroup, position: int) -> bool:
    """Whether an action of an event belongs to the rank's second stage or second direction."""
    return timeline.schedule.chunk_of(event.group[position]) % 2 == 1


def _label(timeline: Timeline, event: TimedGroup) -> str:
    parts = []
    for i, action in enumerate(event.group):
        text = f"{action.microbatch}{'' if action.kind is Kind.F else action.kind.value}"
        parts.append(f"[{text}]" if is_second(timeline, event, i) else text)
    return "&".join(parts)


def shortest(timeline: Timeline) -> float:
    """Time of the shortest event that takes any; 1 if none does."""
    spans = (event.end - event.start for events in timeline.events for event in events)
    return min((span for span in spans if span > 0), default=1.0)


def _column(time: float, unit: float) -> int:
    """The nearest column; halves go up, so that what lasts a unit always has a column."""
    return math.floor(time / unit + 0.5 + 1e-6)


def _metadata(name: str, thread: int, value: str) -> dict:
    return {"ph": "M", "pid": 0, "tid": thread, "name": name, "args": {"name": value}}


def _complete(name: str, category: str, start: float, end: float, rank: int, details: dict) -> dict:
    timing = {"ts": start * 1000, "dur": (end - start) * 1000}
    return {"ph": "X", "pid": 0, "tid": rank, "name": name, "cat": category, **timing, "args": details}
