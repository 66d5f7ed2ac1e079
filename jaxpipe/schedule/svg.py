"""Timelines as SVG, in the manner of the figures in DeepSeek's and the zero-bubble papers."""

from __future__ import annotations

from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.draw import is_second, shortest
from jaxpipe.schedule.simulator import TimedGroup, Timeline

ROW = 26
LEFT = 76
TOP = 12
SHORTEST = 30
WIDEST = 8000
LEGEND = 690
COLOURS = {
    Kind.F: ("#f7c873", "#f3a64f"),
    Kind.B: ("#8fce8b", "#57a65a"),
    Kind.I: ("#9cc7ee", "#5d9bd6"),
    Kind.W: ("#d9d4e7", "#b3a8d1"),
}
"""Fill of each kind: the rank's first stage or direction, and its second."""
NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}


def draw_svg(timeline: Timeline, unit: float | None = None) -> str:
    """A self-contained SVG: a row per rank, time to the right, microbatch numbers in the cells.

    An overlapped pair is one cell with two halves side by side. The darker shade of a colour is the rank's second
    stage, or microbatches that travel the other way.

    Args:
      timeline: what `simulate` made.
      unit: pixels per unit of cost; by default, the shortest event is 30 pixels wide, or less where the picture would
        become wider than 8000.

    >>> from jaxpipe.schedule.builders.gpipe import gpipe
    >>> from jaxpipe.schedule.simulator import simulate
    >>> draw_svg(simulate(gpipe(2, 2))).count('class="B"')
    4
    """
    if unit is None:
        longest = max(timeline.makespan, shortest(timeline))
        unit = min(SHORTEST / shortest(timeline), WIDEST / longest)
    ranks = timeline.schedule.num_ranks
    width = LEFT + max(timeline.makespan * unit, LEGEND) + 12
    bottom = TOP + ranks * ROW
    height = bottom + 58
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
    ]
    for rank, events in enumerate(timeline.events):
        y = TOP + rank * ROW
        parts.append(f'<text x="{LEFT - 8}" y="{y + 17:g}" text-anchor="end">Device {rank}</text>')
        span = timeline.makespan * unit
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{span:g}" height="{ROW}" fill="#f2f2f2" stroke="#ddd"/>')
        for event in events:
            parts += _event(timeline, event, LEFT + event.start * unit, y, (event.end - event.start) * unit)
    parts += _axis(LEFT, bottom + 12, timeline.makespan * unit)
    schedule = timeline.schedule
    second = "direction" if len(schedule.routes) > 1 else "stage"
    parts += _legend(LEFT, bottom + 34, second if len(schedule.rank_stages[0]) > 1 else None)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _event(timeline: Timeline, event: TimedGroup, x: float, y: float, width: float) -> list[str]:
    share = width / len(event.group)
    parts = []
    for i, action in enumerate(event.group):
        fill = COLOURS[action.kind][is_second(timeline, event, i)]
        left = x + i * share
        parts.append(
            f'<rect class="{action.kind.value}" x="{left:g}" y="{y}" width="{share:g}" height="{ROW}" fill="{fill}" '
            f'stroke="#555" stroke-width="0.6"><title>{action}</title></rect>'
        )
        parts.append(f'<text x="{left + share / 2:g}" y="{y + 17}" text-anchor="middle">{action.microbatch}</text>')
    if len(event.group) > 1:
        parts.append(
            f'<rect class="pair" x="{x:g}" y="{y}" width="{width:g}" height="{ROW}" fill="none" stroke="black" '
            'stroke-width="1.6"/>'
        )
    return parts


def _axis(x: float, y: float, length: float) -> list[str]:
    return [
        f'<line x1="{x:g}" y1="{y:g}" x2="{x + length - 6:g}" y2="{y:g}" stroke="black"/>',
        f'<path d="M {x + length:g} {y:g} l -8 -4 v 8 z"/>',
        f'<text x="{x - 8:g}" y="{y + 4:g}" text-anchor="end">Time</text>',
    ]


def _legend(x: float, y: float, second: str | None) -> list[str]:
    parts = []
    for kind, name in NAMES.items():
        for shade in COLOURS[kind][: 1 + (second is not None)]:
            parts.append(f'<rect x="{x:g}" y="{y - 10:g}" width="14" height="14" fill="{shade}" stroke="#555"/>')
            x += 16
        parts.append(f'<text x="{x + 3:g}" y="{y + 1:g}">{name}</text>')
        x += 24 + 6.2 * len(name)
    parts.append(
        f'<rect x="{x:g}" y="{y - 10:g}" width="20" height="14" fill="none" stroke="black" stroke-width="1.6"/>'
    )
    parts.append(f'<text x="{x + 25:g}" y="{y + 1:g}">overlapped forward and backward</text>')
    if second is not None:
        note = f"lighter: the rank's first {second}; darker: its second"
        parts.append(f'<text x="{LEFT}" y="{y + 19:g}">{note}</text>')
    return parts
