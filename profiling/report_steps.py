"""The table of a report that has a row for each step."""

from __future__ import annotations

from profiling.metrics import Measurement, StepRow
from profiling.table import Column, Table, Value


def steps_table(measured: Measurement) -> Table:
    """Left out with fewer than two steps."""
    rows = measured.steps if len(measured.steps) > 1 else ()

    def cells(place: int, row: StepRow) -> tuple[Value, ...]:
        of, parts = row.overlap, row.breakdown
        return (
            f"{row.number}, the first" if place == 0 else str(row.number), row.start, row.end - row.start,
            row.share_of_median, parts.compute, of.communication, of.ratio, of.exposed, parts.idle,
        )  # fmt: skip

    several = "; times are added up over the devices" if len(measured.devices) > 1 else ""
    return Table(
        "steps",
        "Steps",
        "From the first start to the last end of what a step launched, on all devices; communication with waits"
        f"{several}. The first one may be cold: the others are compared without it.",
        (
            Column("step"), Column("start", "us"), Column("length", "us"), Column("of the others' median", "x"),
            Column("compute", "us"), Column("communication", "us"), Column("overlap ratio", "%"),
            Column("exposed", "us"), Column("idle", "us"),
        ),
        tuple(cells(place, row) for place, row in enumerate(rows)),
        tuple((row.start, row.end) for row in rows),
    )  # fmt: skip
