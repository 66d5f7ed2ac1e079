"""All schedules side by side, for one model on the same ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from jaxpipe.schedule.registry import BUILDERS, build
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, simulate

CLOSE = 0.05
"""A schedule this much slower than the fastest still counts as fast when memory decides."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """One schedule's figures.

    Attributes:
      name: the schedule.
      reason: why it does not exist for these numbers, or None; the figures are then 0.
      chunks: stages' parameters on a rank, 2 for interleaved, ZB-V and both DualPipes.
      makespan: in units of the costs given for a rank's whole share of the model.
      bubble: longest idle time of a rank.
      stash: most activations stashed on a rank, in microbatches of a rank's whole share of the model.
      copies: parameters on a rank, relative to its share of the model.
      messages: activations and gradients that a rank sends for a microbatch, on average over the ranks.
    """

    name: str
    reason: str | None = None
    chunks: int = 0
    makespan: float = 0.0
    bubble: float = 0.0
    stash: float = 0.0
    copies: int = 0
    messages: float = 0.0


def compare(num_ranks: int, num_microbatches: int, costs: Costs) -> tuple[Figures, ...]:
    """Simulates every schedule; ``costs`` are those of a rank's whole share of the model.

    A schedule with two stages a rank cuts that share in two, so each costs half; DualPipe's two are whole copies.

    >>> [row.bubble for row in compare(8, 20, Costs()) if row.name in ("1f1b", "dualpipe", "dualpipev")]
    [21.0, 6.0, 7.0]
    """
    return tuple(_row(name, num_ranks, num_microbatches, costs) for name in BUILDERS)


def table(rows: Sequence[Figures]) -> str:
    """The rows as a Markdown table, and which schedule to pick."""
    lines = [
        "| schedule | makespan | bubble | bubble % | peak stash | parameter copies | messages | stages a rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.reason is None:
            share = 100 * row.bubble / row.makespan if row.makespan else 0.0
            times = f"{row.makespan:g} | {row.bubble:g} | {share:.1f}"
            lines.append(f"| {row.name} | {times} | {row.stash:g} | {row.copies} | {row.messages:.4g} | {row.chunks} |")
        else:
            lines.append(f"| {row.name} | {row.reason} | | | | | | |")
    return "\n".join([*lines, "", pick(rows)])


def pick(rows: Sequence[Figures]) -> str:
    """Which schedule to pick, in words.

    >>> pick([Figures("gpipe", makespan=10, stash=4, copies=1), Figures("1f1b", makespan=10, stash=2, copies=1)])
    'Fastest: 1f1b (10). None within 5% of it needs less memory.'
    """
    possible = [row for row in rows if row.reason is None]
    if not possible:
        return "No schedule exists for these numbers."
    fastest = min(possible, key=lambda row: (row.makespan, row.copies, row.stash))
    near = [row for row in possible if row.makespan <= (1 + CLOSE) * fastest.makespan]
    smallest = min(near, key=lambda row: (row.copies, row.stash, row.makespan))
    text = f"Fastest: {fastest.name} ({fastest.makespan:g})."
    if smallest == fastest:
        text += f" None within {CLOSE:.0%} of it needs less memory."
    else:
        text += (
            f" Least memory within {CLOSE:.0%} of it: {smallest.name} ({smallest.makespan:g}, peak stash "
            f"{smallest.stash:g} instead of {fastest.stash:g}, parameter copies {smallest.copies} instead of "
            f"{fastest.copies})."
        )
    return text


def _row(name: str, num_ranks: int, num_microbatches: int, costs: Costs) -> Figures:
    try:
        schedule = build(name, num_ranks, num_microbatches)
    except ValueError as error:
        return Figures(name, reason=str(error))
    chunks = schedule.num_stages // num_ranks
    timeline = simulate(schedule, _scaled(costs, 1 / chunks))
    return Figures(
        name=name,
        chunks=len(schedule.rank_stages[0]),
        makespan=timeline.makespan,
        bubble=max(timeline.bubble),
        stash=max(timeline.peak_live) / chunks,
        copies=len(schedule.routes),
        messages=_messages(schedule) / (num_ranks * num_microbatches),
    )


def _messages(schedule: Schedule) -> int:
    """Activations and gradients that cross between ranks in a step."""
    routes = (schedule.routes[schedule.direction(m)] for m in range(schedule.num_microbatches))
    return sum(2 * (here != there) for route in routes for here, there in itertools.pairwise(route))


def _scaled(costs: Costs, factor: float) -> Costs:
    """Costs of a part of the model; a transfer between ranks takes as long as before."""
    return dataclasses.replace(
        costs,
        forward=costs.forward * factor,
        backward_input=costs.backward_input * factor,
        weight=costs.weight * factor,
        backward=None if costs.backward is None else costs.backward * factor,
        overlapped=None if costs.overlapped is None else costs.overlapped * factor,
    )
