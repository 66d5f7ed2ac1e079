"""The section of a report on steps."""

from __future__ import annotations

from profiling.metrics import StepRow
from profiling.reports.section import Findings
from profiling.table import Column, Table, Value


def steps(found: Findings) -> Table:
    """One row for each step; empty if there are fewer than two."""
    measured = found.measured
    rows = measured.steps if len(measured.steps) > 1 else ()

    def cells(place: int, row: StepRow) -> tuple[Value, ...]:
        of, parts = row.overlap, row.breakdown
        return (
            f"{row.number}, the first" if place == 0 else str(row.number), row.start, row.end - row.start,
            row.share_of_median, parts.compute, of.communication, of.ratio, of.exposed, parts.idle,
        )  # fmt: skip

    several = ", times added up" if len(measured.devices) > 1 else ""
    return Table(
        "steps",
        "Steps",
        f"A step goes from the first start to the last end of what it launched, over all devices{several}. "
        "Communication includes waits. The first step may be cold and is left out of the others' median.",
        (
            Column("step"), Column("start", "us"), Column("length", "us"), Column("of the others' median", "x"),
            Column("compute", "us"), Column("communication", "us"), Column("overlap ratio", "%"),
            Column("exposed", "us"), Column("idle", "us"),
        ),
        tuple(cells(place, row) for place, row in enumerate(rows)),
        tuple((row.start, row.end) for row in rows),
    )  # fmt: skip
