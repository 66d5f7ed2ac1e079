"""The sections of a report that compare a prediction with the measured trace."""

from __future__ import annotations

from profiling.predict import TaskRow
from profiling.reports.section import Findings
from profiling.table import Column, Table, Value

TASKS = 100
"""The number of tasks that a report lists."""


def bubbles(found: Findings) -> Table:
    """The bubble of each rank, measured and simulated; empty if the trace has no ranks."""
    expected = found.expected
    beside = {bubble.rank: bubble.compute_bubble for bubble in expected.summary.bubbles} if expected else {}
    return Table(
        "bubbles",
        "Bubble per rank",
        "Share of the common window in which a rank does not compute, measured and simulated.",
        (
            Column("rank", "n"), Column("bubble", "%", is_share=True), Column("simulated", "%"),
            Column("difference", "%"), Column("device idle", "%"),
        ),
        tuple(
            (
                bubble.rank, bubble.compute_bubble, beside.get(bubble.rank),
                bubble.compute_bubble - beside[bubble.rank] if bubble.rank in beside else None, bubble.device_idle,
            )
            for bubble in found.measured.summary.bubbles
        ),
    )  # fmt: skip


def predicted_phases(found: Findings) -> Table:
    """Predicted and measured times of each phase; empty without a prediction."""
    phases: dict[str, list[TaskRow]] = {}
    for task in found.comparison.tasks if found.comparison else ():
        phases.setdefault(task.phase, []).append(task)

    def cells(phase: str, tasks: list[TaskRow]) -> tuple[Value, ...]:
        measured = sum(task.measured_duration for task in tasks)
        predicted = sum(task.predicted_duration for task in tasks)
        start_error = sum(abs(task.start_error) for task in tasks) / len(tasks)
        return phase, len(tasks), measured, predicted, predicted / measured - 1 if measured else None, start_error

    return Table(
        "predicted-phases",
        "Predicted and measured, by phase",
        "Tasks of both traces. A task is what a device does for one phase, layer and microbatch without a break.",
        (
            Column("phase"), Column("tasks", "n"), Column("measured", "us"), Column("predicted", "us"),
            Column("error", "%"), Column("starts off by", "us"),
        ),
        tuple(cells(*item) for item in phases.items()),
    )  # fmt: skip


def predicted_tasks(found: Findings) -> Table:
    """The tasks whose starts differ most; empty without a prediction."""
    matched = found.comparison.tasks if found.comparison else ()
    tasks = sorted(matched, key=lambda task: -abs(task.start_error))[:TASKS]
    return Table(
        "predicted-tasks",
        "Predicted and measured, by task",
        "Errors are predicted less measured. Starts count from the start of each trace. The largest errors come first.",
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


def predicted_order(found: Findings) -> Table:
    """The order of tasks on each device; empty without a prediction."""
    return Table(
        "predicted-order",
        "Predicted and measured, by device",
        "Inversions: pairs of tasks on one predicted lane that ran in the other order.",
        (
            Column("device", "n"), Column("rank", "n"), Column("bubble", "%"), Column("predicted bubble", "%"),
            Column("inversions", "n"), Column("of pairs", "n"),
        ),
        tuple(
            (row.device, row.rank, row.measured_bubble, row.predicted_bubble, row.inversions, row.pairs)
            for row in (found.comparison.devices if found.comparison else ())
        ),
    )  # fmt: skip
