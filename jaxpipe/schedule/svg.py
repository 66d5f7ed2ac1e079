"""Timelines as self-contained SVG, in the manner of DeepSeek's figure of DualPipe."""

from __future__ import annotations

from collections.abc import Iterator

from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulate import Event, Timeline

_COLORS = {Kind.F: (255, 214, 140), Kind.B: (150, 215, 150), Kind.I: (150, 220, 235), Kind.W: (185, 196, 250)}
_NAMES = {Kind.F: "Forward", Kind.B: "Backward", Kind.I: "Backward for input", Kind.W: "Backward for weights"}
_SHADE = 0.76  # brightness of each further chunk of a rank

# Lengths in pixels.
_ROW = 26
_LEFT = 78
_MARGIN = 14
_SHORTEST = 20  # the shortest event
_WIDEST = 6000  # the whole picture, if the shortest event then still shows
_DIGIT = 6.2  # a digit of a microbatch's number
_LEGEND_ENTRY = 165
_LEGEND_WIDTH = 5 * _LEGEND_ENTRY + 60


def draw_svg(timeline: Timeline) -> str:
    """A row for each rank and a cell for each action, its microbatch's number inside and its kind as its colour.

    An overlapped pair is one cell with a black border, split into a forward and a backward half. The rank's second
    stage (DualPipe: the second direction) is a darker shade. Each cell's tooltip has the action and its times, in the
    unit of the costs.

    >>> from jaxpipe.schedule.gpipe import gpipe
    >>> from jaxpipe.schedule.simulate import simulate
    >>> draw_svg(simulate(gpipe(2, 2))).count('class="cell"')
    8
    """
    schedule = timeline.schedule
    scale = _pixels_per_unit(timeline)
    grid_width = timeline.makespan * scale
    width = _LEFT + max(grid_width, _LEGEND_WIDTH) + _MARGIN
    axis = _MARGIN + schedule.num_ranks * _ROW + 12
    height = axis + 30 + 24 * _shades(schedule) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.6g} {height}" width="{width:.6g}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{width:.6g}" height="{height}" fill="white"/>',
        *(part for rank in range(schedule.num_ranks) for part in _rank(timeline, rank, scale)),
        *_pair_borders(timeline, scale),
        *_time_arrow(axis, grid_width),
        *_legend(schedule, axis + 30),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _pixels_per_unit(timeline: Timeline) -> float:
    """Wide enough for the shortest event's number, unless the picture would be too wide."""
    durations = (event.end - event.start for events in timeline.events for event in events)
    shortest = min((duration for duration in durations if duration > 0), default=1.0)
    return min(_SHORTEST / shortest, _WIDEST / max(timeline.makespan, shortest))


def _shades(schedule: Schedule) -> int:
    """Most chunks on one rank."""
    return max(map(len, schedule.rank_stages))


def _color(kind: Kind, chunk: int) -> str:
    return "#" + "".join(f"{round(part * _SHADE**chunk):02x}" for part in _COLORS[kind])


def _rank(timeline: Timeline, rank: int, scale: float) -> Iterator[str]:
    """The name, the idle background and the cells of one rank."""
    top = _MARGIN + rank * _ROW
    yield _text(_LEFT - 8, top + _ROW / 2, f"Device {rank}", anchor="end")
    yield _rect(_LEFT, top, timeline.makespan * scale, "#f4f4f4", "#dddddd")
    for event in timeline.events[rank]:
        yield from _cells(timeline.schedule, event, top, scale)


def _cells(schedule: Schedule, event: Event, top: float, scale: float) -> Iterator[str]:
    """One cell for each action of an event, side by side."""
    left, width = _LEFT + event.start * scale, (event.end - event.start) * scale
    part = width / len(event.group)
    for position, action in enumerate(event.group):
        yield _cell(schedule, event, action, left + position * part, top, part)


def _pair_borders(timeline: Timeline, scale: float) -> Iterator[str]:
    """The borders of all overlapped pairs; drawn last, lest neighbouring cells cover them."""
    for event in (event for events in timeline.events for event in events if len(event.group) > 1):
        left, width = _LEFT + event.start * scale, (event.end - event.start) * scale
        yield _rect(left, _MARGIN + event.rank * _ROW, width, "none", "black", 'stroke-width="1.6"')


def _cell(schedule: Schedule, event: Event, action: Action, left: float, top: float, width: float) -> str:
    fill = _color(action.kind, schedule.chunk_of(action))
    number = str(action.microbatch)
    label = _text(left + width / 2, top + _ROW / 2, number) if len(number) * _DIGIT <= width else ""
    title = f"<title>{action}, {event.start:g} to {event.end:g}</title>"
    return f'<g class="cell">{title}{_rect(left, top, width, fill, "#666666")}{label}</g>'


def _time_arrow(top: float, width: float) -> Iterator[str]:
    end = _LEFT + width
    yield f'<path d="M{_LEFT} {top}H{end:.6g}m-7 -4l7 4l-7 4" fill="none" stroke="black"/>'
    yield _text(_LEFT - 8, top, "Time", anchor="end")


def _legend(schedule: Schedule, top: float) -> Iterator[str]:
    """A line for each chunk with the kinds in use, and on the first line the pair."""
    groups = {tuple(action.kind for action in group) for order in schedule.ranks for group in order}
    kinds = [kind for kind in Kind if any(kind in group for group in groups)]
    for chunk in range(_shades(schedule)):
        middle = top + chunk * 24 + 8
        if _shades(schedule) > 1:
            yield _text(_LEFT - 8, middle, _chunk_name(schedule, chunk), anchor="end")
        for position, kind in enumerate(kinds):
            left = _LEFT + position * _LEGEND_ENTRY
            yield _rect(left, middle - 8, 24, _color(kind, chunk), "#666666", height=16)
            yield _text(left + 30, middle, _NAMES[kind], anchor="start")
    if any(len(group) > 1 for group in groups):
        left = _LEFT + len(kinds) * _LEGEND_ENTRY
        yield _rect(left, top, 12, _color(Kind.F, 0), "#666666", height=16)
        yield _rect(left + 12, top, 12, _color(Kind.B, 0), "#666666", height=16)
        yield _rect(left, top, 24, "none", "black", 'stroke-width="1.6"', height=16)
        yield _text(left + 30, top + 8, "Overlapped forward and backward", anchor="start")


def _chunk_name(schedule: Schedule, chunk: int) -> str:
    return f"Direction {chunk}" if len(schedule.routes) > 1 else f"Chunk {chunk}"


def _rect(left: float, top: float, width: float, fill: str, stroke: str, more: str = "", height: float = _ROW) -> str:
    size = f'x="{left:.6g}" y="{top:.6g}" width="{width:.6g}" height="{height:.6g}"'
    return f'<rect {size} fill="{fill}" stroke="{stroke}" {more}/>'


def _text(x: float, middle: float, text: str, anchor: str = "middle") -> str:
    """Text whose digits are centred on a line; ``dy`` in place of dominant-baseline, which not all viewers know."""
    return f'<text x="{x:.6g}" y="{middle:.6g}" dy="0.36em" text-anchor="{anchor}">{text}</text>'
