"""All schedules side by side for one model on the same ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from jaxpipe.schedule.builders import build, builders
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulate import Costs, simulate

_SLACK = 1.05  # how much slower than the fastest the choice for memory may be
_HEADER = (
    "schedule",
    "stages per rank",
    "makespan",
    "bubble",
    "bubble %",
    "peak stash",
    "parameter copies",
    "messages",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one schedule takes.

    Attributes:
      name: the schedule's name.
      stages_per_rank: stages that a rank works on; for DualPipe, one for each direction.
      makespan: time of a step, in the unit of the costs.
      bubble: idle time of the rank that is idle longest, in the same unit.
      peak_stash: most forward results held at once by a rank, in microbatches of a rank's whole share of the model.
      parameter_copies: how often the ranks together hold the model's parameters.
      messages: activations and gradients that a rank sends, on average, for a microbatch.
    """

    name: str
    stages_per_rank: int
    makespan: float
    bubble: float
    peak_stash: float
    parameter_copies: float
    messages: float


@dataclasses.dataclass(frozen=True)
class Impossible:
    """A schedule that does not exist for the numbers, and why."""

    name: str
    reason: str


def compare(num_ranks: int, num_microbatches: int, costs: Costs) -> tuple[Row | Impossible, ...]:
    """Simulates every schedule for one model on the same ranks.

    Args:
      num_ranks: pipeline ranks.
      num_microbatches: microbatches of a step.
      costs: times of a rank's whole share of the model on one microbatch. Schedules with two stages a rank cut the
        model into stages half as large, so each of their actions takes half as long; the latency of a transfer,
        ``costs.p2p``, stays.

    >>> [row.name for row in compare(2, 3, Costs()) if isinstance(row, Impossible)]
    ['zbv', 'dualpipe', 'dualpipev']
    """
    return tuple(_row(name, num_ranks, num_microbatches, costs) for name in builders)


def format_table(rows: Iterable[Row | Impossible]) -> str:
    """The rows as a Markdown table.

    >>> print(format_table([Impossible("zbv", "too few ranks")]).splitlines()[-1])
    | zbv      | too few ranks | | | | | | |
    """
    body = [_cells(row) for row in rows]
    feasible = [cells for cells in body if len(cells) == len(_HEADER)]
    widths = [max(map(len, column)) for column in zip(_HEADER, *feasible, strict=True)]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([_line(_HEADER, widths), rule, *(_line(cells, widths) for cells in body)])


def recommend(rows: Iterable[Row | Impossible]) -> str:
    """Which schedule to pick and why: the fastest, and the one with the smallest stash within 5 % of it.

    Among equals, the one with the smaller stash, then with fewer copies of the parameters, then with fewer messages.

    >>> recommend([Row("gpipe", 1, 10, 2, 4, 1, 1), Row("1f1b", 1, 10, 2, 2, 1, 1)])
    'Pick 1f1b: the fastest (makespan 10), and of those within 5% of it the one that stashes least (2 microbatches).'
    """
    feasible = [row for row in rows if isinstance(row, Row)]
    if not feasible:
        return "No schedule exists for these numbers."
    best = min(row.makespan for row in feasible)
    fastest = min((row for row in feasible if row.makespan <= best * (1 + 1e-9)), key=_memory)
    smallest = min((row for row in feasible if row.makespan <= best * _SLACK), key=_memory)
    choice = f"Pick {fastest.name}: the fastest (makespan {fastest.makespan:.4g}"
    if smallest == fastest:
        return f"{choice}), and of those within 5% of it the one that stashes least ({_stash(fastest)} microbatches)."
    slower = 100 * (smallest.makespan / fastest.makespan - 1)
    return (
        f"{choice}, peak stash {_stash(fastest)} microbatches, parameters {fastest.parameter_copies:g}x). If memory is "
        f"short, {smallest.name}: the smallest stash within 5% of it ({_stash(smallest)} microbatches, parameters "
        f"{smallest.parameter_copies:g}x, makespan {smallest.makespan:.4g}, {slower:.1f}% more)."
    )


def _memory(row: Row) -> tuple[float, float, float, float]:
    return row.peak_stash, row.parameter_copies, row.makespan, row.messages


def _stash(row: Row) -> str:
    return f"{row.peak_stash:.4g}"


def _row(name: str, num_ranks: int, num_microbatches: int, costs: Costs) -> Row | Impossible:
    try:
        schedule = build(name, num_ranks, num_microbatches)
    except ValueError as error:
        return Impossible(name, str(error))
    share = num_ranks / schedule.num_stages
    timeline = simulate(schedule, _scaled(costs, share))
    return Row(
        name,
        max(map(len, schedule.rank_stages)),
        timeline.makespan,
        max(timeline.bubble),
        max(timeline.peak_live) * share,
        sum(map(len, schedule.rank_stages)) / schedule.num_stages,
        _messages(schedule) / (num_ranks * num_microbatches),
    )


def _scaled(costs: Costs, share: float) -> Costs:
    """The times of stages ``share`` as large."""

    def scale(time: float | None) -> float | None:
        return None if time is None else time * share

    return dataclasses.replace(
        costs,
        forward=costs.forward * share,
        backward_input=costs.backward_input * share,
        weight=costs.weight * share,
        backward=scale(costs.backward),
        overlapped=scale(costs.overlapped),
    )


def _messages(schedule: Schedule) -> int:
    """Activations and gradients that cross between ranks in a step."""
    routes = (schedule.routes[schedule.direction(m)] for m in range(schedule.num_microbatches))
    return sum(2 * (here != there) for route in routes for here, there in itertools.pairwise(route))


def _cells(row: Row | Impossible) -> tuple[str, ...]:
    if isinstance(row, Impossible):
        return row.name, row.reason
    percent = 100 * row.bubble / row.makespan if row.makespan else 0.0
    return (
        row.name,
        str(row.stages_per_rank),
        f"{row.makespan:.4g}",
        f"{row.bubble:.4g}",
        f"{percent:.1f}",
        _stash(row),
        f"{row.parameter_copies:g}x",
        f"{row.messages:.4g}",
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of the table; a cell that stands for all others is followed by empty ones."""
    if len(cells) < len(widths):
        return f"| {cells[0]:<{widths[0]}} | {cells[1]} |" + " |" * (len(widths) - len(cells))
    first, *rest = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"
