"""The tables of a report, each from the metrics that it shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from profiling.classify.classifier import unclassified_names
from profiling.event import GROUPS, Trace
from profiling.hlo.hiding import Overlap as Schedule
from profiling.metrics import DEFINITIONS, Measurement, Metrics, Overlap, TimeRow
from profiling.metrics.exposure import exposed_segments
from profiling.predict import Comparison, TaskRow
from profiling.reports.collectives import collectives_table, skew_tables
from profiling.reports.kernels import kernels
from profiling.reports.steps import steps_table
from profiling.table import Column, Table, Value
from profiling.write.tracks import lane_label

NAMES = {"transfer": "A transfers", "transfer+wait": "B transfers and waits", "lanes": "C communication lanes"}
"""The definitions of `profiling.metrics.DEFINITIONS` for people."""

SEGMENTS = 20
"""How many of the longest exposed stretches a report lists."""


TASKS = 100
"""How many tasks a report lists, those furthest off the prediction."""
ACTIONS = frozenset(("F", "B", "I", "W", "FB"))
"""What a schedule's actions are called."""
MOST_PHASES = 12
"""How many phases the table of layers has columns for."""


def report_tables(
    trace: Trace,
    measured: Measurement,
    expected: Measurement | None = None,
    comparison: Comparison | None = None,
    schedule: Schedule | None = None,
) -> tuple[Table, ...]:
    """Every table that has something to show.

    Args:
      trace, measured: the trace and its metrics.
      expected, comparison: metrics of the prediction, and how it compares.
      schedule: communication of the compiled program.
    """
    tables = [
        _overlap(measured),
        kernels(trace),
        _times("kinds", "Time by kind", "What the events do.", [metrics.kinds for metrics in measured.devices]),
        collectives_table(measured),
        steps_table(measured),
        _segments(trace),
        _bubbles(measured, expected),
        _predicted_phases(comparison),
        _predicted_tasks(comparison),
        _predicted_order(comparison),
        _phases(measured),
        _actions(measured),
        _layers(measured),
        _devices(measured),
        _lanes(measured),
        *skew_tables(measured),
        _sensitivity(measured),
        *_schedule(schedule),
        _unclassified(trace),
        _metadata(trace),
    ]
    return tuple(table for table in tables if table.rows)


def _overlap(measured: Measurement) -> Table:
    def row(name: str, of: Overlap) -> tuple[Value, ...]:
        steady = measured.summary.steady.get(name)
        return (
            NAMES[name], of.communication, of.overlapped, of.ratio, of.exposed, of.exposed_share,
            of.compute_under_communication, None if of.efficiency is None else of.speedup, of.ideal_speedup,
            of.efficiency,
            steady.ratio if steady else None, steady.exposed if steady else None,
        )  # fmt: skip

    overlaps = measured.summary.overlaps
    return Table(
        "overlap",
        "Communication and what hides it",
        "By what counts as communication. No speed-up where the window is longer than both one after the other.",
        (
            Column("communication"), Column("time", "us"), Column("overlapped", "us"), Column("overlap ratio", "%"),
            Column("exposed", "us"), Column("of window", "%"), Column("of compute under it", "%"),
            Column("speed-up", "x"), Column("ideal", "x"), Column("efficiency", "%"), Column("steady ratio", "%"),
            Column("steady exposed", "us"),
        ),
        tuple(row(name, of) for name, of in overlaps.items() if any(each.communication for each in overlaps.values())),
    )  # fmt: skip


def _sensitivity(measured: Measurement) -> Table:
    """Ratios of the sums over devices."""
    by_gap: dict[float, list[Value]] = {}
    for name in DEFINITIONS:
        for same_gap in zip(*(metrics.sensitivity[name] for metrics in measured.devices), strict=True):
            communication = sum(of.communication for of in same_gap)
            exposed = sum(of.exposed for of in same_gap)
            ratio = 1 - exposed / communication if communication else None
            by_gap.setdefault(same_gap[0].merge_gap, []).extend([ratio, exposed])
    return Table(
        "gaps",
        "Sensitivity to launch gaps",
        "The same if gaps in compute up to so long counted as compute.",
        (
            Column("gap", "us"),
            *(
                Column(f"{NAMES[name][0]} {what}", unit)
                for name in DEFINITIONS
                for what, unit in (("ratio", "%"), ("exposed", "us"))
            ),
        ),
        tuple((gap, *cells) for gap, cells in by_gap.items() if any(cell is not None for cell in cells[::2])),
    )


def _devices(measured: Measurement) -> Table:
    """Left out for one device, of which the figures tell the same."""

    def row(metrics: Metrics) -> tuple[Value, ...]:
        of, whole = metrics.overlaps, metrics.breakdown
        return (
            metrics.device, metrics.rank, whole.compute / whole.window if whole.window else None, whole.device_idle,
            of["transfer"].ratio, of["transfer+wait"].ratio, of["transfer+wait"].exposed, whole.longest_gap,
        )  # fmt: skip

    return Table(
        "devices",
        "Devices",
        "Shares of the common window.",
        (
            Column("device", "n"), Column("rank", "n"), Column("compute", "%", is_share=True), Column("idle", "%"),
            Column("overlap ratio", "%"), Column("with waits", "%"), Column("exposed with waits", "us"),
            Column("longest gap", "us"),
        ),
        tuple(map(row, measured.devices)) if len(measured.devices) > 1 else (),
    )  # fmt: skip


def _bubbles(measured: Measurement, expected: Measurement | None) -> Table:
    beside = {bubble.rank: bubble.compute_bubble for bubble in expected.summary.bubbles} if expected else {}
    return Table(
        "bubbles",
        "Bubble per rank",
        "Share of the common window in which a rank does not compute, beside the simulated one.",
        (
            Column("rank", "n"), Column("bubble", "%", is_share=True), Column("simulated", "%"),
            Column("difference", "%"), Column("device idle", "%"),
        ),
        tuple(
            (
                bubble.rank, bubble.compute_bubble, beside.get(bubble.rank),
                bubble.compute_bubble - beside[bubble.rank] if bubble.rank in beside else None, bubble.device_idle,
            )
            for bubble in measured.summary.bubbles
        ),
    )  # fmt: skip


def _predicted_phases(comparison: Comparison | None) -> Table:
    phases: dict[str, list[TaskRow]] = {}
    for task in comparison.tasks if comparison else ():
        phases.setdefault(task.phase, []).append(task)

    def cells(phase: str, tasks: list[TaskRow]) -> tuple[Value, ...]:
        measured = sum(task.measured_duration for task in tasks)
        predicted = sum(task.predicted_duration for task in tasks)
        start_error = sum(abs(task.start_error) for task in tasks) / len(tasks)
        return phase, len(tasks), measured, predicted, predicted / measured - 1 if measured else None, start_error

    return Table(
        "predicted-phases",
        "Predicted and measured, by phase",
        "Tasks that both have: what a device does for one phase, layer and microbatch without a break.",
        (
            Column("phase"), Column("tasks", "n"), Column("measured", "us"), Column("predicted", "us"),
            Column("error", "%"), Column("starts off by", "us"),
        ),
        tuple(cells(*item) for item in phases.items()),
    )  # fmt: skip


def _predicted_tasks(comparison: Comparison | None) -> Table:
    tasks = sorted(comparison.tasks if comparison else (), key=lambda task: -abs(task.start_error))[:TASKS]
    return Table(
        "predicted-tasks",
        "Predicted and measured, by task",
        "Errors are predicted less measured, starts counted from the start of either trace; the furthest off first.",
        (
            Column("device", "n"), Column("phase"), Column("layer", "n"), Column("microbatch", "n"),
            Column("measured start", "us"), Column("start error", "us"), Column("measured time", "us"),
            Column("time error", "us"),
        ),
        tuple(
            (task.device, task.phase, task.layer, task.microbatch, task.measured_start, task.start_error,
             task.measured_duration, task.duration_error)
            for task in tasks
        ),
    )  # fmt: skip


def _predicted_order(comparison: Comparison | None) -> Table:
    return Table(
        "predicted-order",
        "Predicted and measured, by device",
        "Inversions: pairs of tasks of one predicted lane that ran in the other order.",
        (
            Column("device", "n"), Column("rank", "n"), Column("bubble", "%"), Column("predicted bubble", "%"),
            Column("inversions", "n"), Column("of pairs", "n"),
        ),
        tuple(
            (row.device, row.rank, row.measured_bubble, row.predicted_bubble, row.inversions, row.pairs)
            for row in (comparison.devices if comparison else ())
        ),
    )  # fmt: skip


def _times(name: str, title: str, caption: str, per_device: Sequence[Sequence[TimeRow]]) -> Table:
    """Rows of one name added up over devices, the longest first."""
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


def _phases(measured: Measurement) -> Table:
    """Left out where no event has a phase."""
    phases = [metrics.phases for metrics in measured.devices]
    known = any(row.name for rows in phases for row in rows)
    return _times("phases", "Time by phase", "Parts of the step.", phases if known else [])


def _actions(measured: Measurement) -> Table:
    """Left out where it would only repeat the phases, or where no phase names an action of a schedule."""
    actions = [metrics.actions for metrics in measured.devices]
    names = {row.name for rows in actions for row in rows}
    if not names & ACTIONS or names == {row.name for metrics in measured.devices for row in metrics.phases}:
        actions = []
    return _times("actions", "Time by action", "Forward F, backward B, its halves I and W, pairs FB.", actions)


def _layers(measured: Measurement) -> Table:
    """Busy time of each phase, the mean over devices that have the layer; phases in the order of their first starts."""
    busy: dict[int, dict[str, list[float]]] = {}
    totals: dict[str, float] = {}
    for metrics in measured.devices:
        for layer in metrics.layers:
            for phase in layer.phases:
                busy.setdefault(layer.layer, {}).setdefault(phase.name, []).append(phase.busy)
                totals[phase.name] = totals.get(phase.name, 0.0) + phase.busy
    longest = set(sorted(totals, key=lambda name: -totals[name])[:MOST_PHASES])
    phases = [name for name in totals if name in longest]
    means = {
        layer: [sum(found) / len(found) if (found := of.get(phase)) else None for phase in phases]
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


def _lanes(measured: Measurement) -> Table:
    return Table(
        "lanes",
        "Lanes",
        "Alone: time in which no other lane of the device is busy.",
        (
            Column("device", "n"), Column("lane"), Column("events", "n"), Column("busy", "us"),
            Column("of window", "%", is_share=True), Column("alone", "us"),
        ),
        tuple(
            (metrics.device, lane_label(lane.lane), lane.count, lane.busy,
             lane.busy / measured.makespan if measured.makespan else None, lane.alone)
            for metrics in measured.devices
            for lane in metrics.lanes
        ),
    )  # fmt: skip


def _segments(trace: Trace) -> Table:
    segments = exposed_segments(trace, top=SEGMENTS)
    return Table(
        "exposed-segments",
        "Longest exposed communication",
        "Stretches in which data travels or is waited for and the device does not compute.",
        (
            Column("device", "n"), Column("start", "us"), Column("length", "us"),
            Column("of device's exposed", "%", is_share=True), Column("what waits for what"), Column("on the wire"),
        ),
        tuple(
            (segment.device, segment.start, segment.duration, segment.share, segment.reason, ", ".join(segment.kinds))
            for segment in segments
        ),
        tuple((segment.start, segment.end) for segment in segments),
    )  # fmt: skip


def _schedule(schedule: Schedule | None) -> list[Table]:
    """Under names of their own: kinds are also what events of the trace are of."""
    tables = schedule.tables() if schedule else ()
    return [dataclasses.replace(table, name=f"schedule-{table.name}") for table in tables]


def _unclassified(trace: Trace) -> Table:
    return Table(
        "unclassified",
        "Kernels that no rule knows",
        "They count as compute: say in a file of rules what they are.",
        (Column("name", "name"), Column("time", "us")),
        unclassified_names(trace),
    )


def _metadata(trace: Trace) -> Table:
    return Table(
        "metadata",
        "Where the trace comes from",
        "As its reader noted it.",
        (Column("fact"), Column("value")),
        tuple((name, text) for name, value in trace.metadata.items() if (text := _fact(value))),
    )


def _fact(value: object) -> str:
    """A fact for people: lists and mappings without their brackets, "" where nothing is known."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text}" for name, of in value.items() if (text := _fact(of)))
    if isinstance(value, list | tuple | set):
        return ", ".join(text for of in value if (text := _fact(of)))
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


def _range(values: Sequence[int]) -> str | None:
    if not values:
        return None
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"
