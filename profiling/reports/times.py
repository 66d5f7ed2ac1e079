"""The sections of a report that divide the time of events by kind, phase, action and layer."""

from __future__ import annotations

from collections.abc import Sequence

from profiling.event import GROUPS
from profiling.metrics import TimeRow
from profiling.reports.section import Findings
from profiling.table import Column, Table, Value

ACTIONS = frozenset(("F", "B", "I", "W", "FB"))
"""What a schedule's actions are called."""

MOST_PHASES = 12
"""The most phases that the table of layers has columns for."""


def kinds(found: Findings) -> Table:
    """Time by what events do."""
    return _times("kinds", "Time by kind", "What the events do.", [of.kinds for of in found.measured.devices])


def _times(name: str, title: str, caption: str, per_device: Sequence[Sequence[TimeRow]]) -> Table:
    """A table of rows by name, added up over devices, the longest first."""
    pooled: dict[str, list[TimeRow]] = {}
    for rows in per_device:
        for row in rows:
            pooled.setdefault(row.name, []).append(row)
    everything = sum(row.total for rows in pooled.values() for row in rows)

    def cells(name: str, rows: list[TimeRow]) -> tuple[Value, ...]:
        count, total = sum(row.count for row in rows), sum(row.total for row in rows)
        blocks = [bound for row in rows if row.blocks for bound in row.blocks]
        groups = [group for group in GROUPS if any(group in row.by_group for row in rows)]
        return (
            name, ", ".join(groups), count, total, total / everything if everything else None,
            sum(row.busy for row in rows), total / count, _range(blocks),
        )  # fmt: skip

    return Table(
        name,
        title,
        caption,
        (
            Column(title.removeprefix("Time by ")), Column("group"), Column("events", "n"), Column("total", "us"),
            Column("share", "%", is_share=True), Column("busy", "us"), Column("mean", "us"),
            Column("blocks", "range"),
        ),
        tuple(sorted((cells(name, rows) for name, rows in pooled.items()), key=lambda row: -float(row[3] or 0))),
    )  # fmt: skip


def phases(found: Findings) -> Table:
    """Time by phase; empty if no event has a phase."""
    rows_of = [metrics.phases for metrics in found.measured.devices]
    known = any(row.name for rows in rows_of for row in rows)
    return _times("phases", "Time by phase", "Parts of the step.", rows_of if known else [])


def actions(found: Findings) -> Table:
    """Time by action; empty if it would only repeat the phases, or if no phase names an action of a schedule."""
    rows_of = [metrics.actions for metrics in found.measured.devices]
    names = {row.name for rows in rows_of for row in rows}
    if not names & ACTIONS or names == {row.name for metrics in found.measured.devices for row in metrics.phases}:
        rows_of = []
    return _times("actions", "Time by action", "Forward F, backward B, its halves I and W, pairs FB.", rows_of)


def layers(found: Findings) -> Table:
    """Busy time of each layer by phase, the mean over devices that have the layer."""
    busy: dict[int, dict[str, list[float]]] = {}
    totals: dict[str, float] = {}
    for metrics in found.measured.devices:
        for layer in metrics.layers:
            for phase in layer.phases:
                busy.setdefault(layer.layer, {}).setdefault(phase.name, []).append(phase.busy)
                totals[phase.name] = totals.get(phase.name, 0.0) + phase.busy
    longest = set(sorted(totals, key=lambda name: -totals[name])[:MOST_PHASES])
    phases = [name for name in totals if name in longest]
    means = {
        layer: [sum(times) / len(times) if (times := of.get(phase)) else None for phase in phases]
        for layer, of in sorted(busy.items())
    }
    rows: list[tuple[Value, ...]] = [(str(layer), *cells) for layer, cells in means.items()]
    if len(rows) > 1:
        columns = [[cell for cell in column if cell is not None] for column in zip(*means.values(), strict=True)]
        rows.append(("mean", *(sum(column) / len(column) for column in columns)))
    return Table(
        "layers",
        "Busy time by layer and phase",
        "The mean over devices.",
        (Column("layer"), *(Column(phase or "(none)", "us") for phase in phases)),
        tuple(rows),
    )


def _range(values: Sequence[int]) -> str | None:
    if not values:
        return None
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"
