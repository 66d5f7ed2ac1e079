"""The sections of a report on communication, devices and lanes. All sections are registered here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from profiling.classify.classifier import unclassified_names
from profiling.metrics import DEFINITIONS, Metrics, Overlap
from profiling.metrics.exposure import exposed_segments
from profiling.reports.collectives import collectives, skew_of_devices, skew_of_groups
from profiling.reports.kernels import kernels
from profiling.reports.prediction import bubbles, predicted_order, predicted_phases, predicted_tasks
from profiling.reports.section import Findings, Section
from profiling.reports.steps import steps
from profiling.reports.times import actions, kinds, layers, phases
from profiling.table import Column, Table, Value
from profiling.write.tracks import lane_label

NAMES = {"transfer": "A transfers", "transfer+wait": "B transfers and waits", "lanes": "C communication lanes"}
"""The names of `profiling.metrics.DEFINITIONS` for people."""

SEGMENTS = 20
"""The number of exposed stretches that a report lists."""


def overlaps(found: Findings) -> Table:
    """What hides communication, by each definition; empty if there is no communication."""
    measured = found.measured

    def row(name: str, of: Overlap) -> tuple[Value, ...]:
        steady = measured.summary.steady.get(name)
        return (
            NAMES[name], of.communication, of.overlapped, of.ratio, of.exposed, of.exposed_share,
            of.compute_under_communication, None if of.efficiency is None else of.speedup, of.ideal_speedup,
            of.efficiency,
            steady.ratio if steady else None, steady.exposed if steady else None,
        )  # fmt: skip

    by_definition = measured.summary.overlaps
    communicates = any(of.communication for of in by_definition.values())
    return Table(
        "overlap",
        "Communication and what hides it",
        "By what counts as communication. No speed-up if the window is longer than both one after the other.",
        (
            Column("communication"), Column("time", "us"), Column("overlapped", "us"), Column("overlap ratio", "%"),
            Column("exposed", "us"), Column("of window", "%"), Column("of compute under it", "%"),
            Column("speed-up", "x"), Column("ideal", "x"), Column("efficiency", "%"), Column("steady ratio", "%"),
            Column("steady exposed", "us"),
        ),
        tuple(row(name, of) for name, of in by_definition.items() if communicates),
    )  # fmt: skip


def sensitivity(found: Findings) -> Table:
    """How gaps that count as compute would change the figures; ratios are those of sums over devices."""
    by_gap: dict[float, list[Value]] = {}
    for name in DEFINITIONS:
        for same_gap in zip(*(metrics.sensitivity[name] for metrics in found.measured.devices), strict=True):
            communication = sum(of.communication for of in same_gap)
            exposed = sum(of.exposed for of in same_gap)
            ratio = 1 - exposed / communication if communication else None
            by_gap.setdefault(same_gap[0].merge_gap, []).extend([ratio, exposed])
    return Table(
        "gaps",
        "Sensitivity to launch gaps",
        "The figures if gaps in compute up to this length counted as compute.",
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


def devices(found: Findings) -> Table:
    """The shares of each device; empty for a single device, as the figures tell the same."""

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
        tuple(map(row, found.measured.devices)) if len(found.measured.devices) > 1 else (),
    )  # fmt: skip


def lanes(found: Findings) -> Table:
    """The busy time of each lane."""
    measured = found.measured
    return Table(
        "lanes",
        "Lanes",
        "Alone: time in which only this lane of the device is busy.",
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


def segments(found: Findings) -> Table:
    """The longest stretches of exposed communication."""
    longest = exposed_segments(found.trace, top=SEGMENTS)
    return Table(
        "exposed-segments",
        "Longest exposed communication",
        "Stretches in which data is moved or waited for and the device does not compute.",
        (
            Column("device", "n"), Column("start", "us"), Column("length", "us"),
            Column("of device's exposed", "%", is_share=True), Column("what waits for what"), Column("on the wire"),
        ),
        tuple(
            (segment.device, segment.start, segment.duration, segment.share, segment.reason, ", ".join(segment.kinds))
            for segment in longest
        ),
        tuple((segment.start, segment.end) for segment in longest),
    )  # fmt: skip


def compiled(found: Findings) -> list[Table]:
    """The tables of the compiled program; "schedule-" before their names tells them from those of the trace."""
    tables = found.compiled.tables() if found.compiled else ()
    return [dataclasses.replace(table, name=f"schedule-{table.name}") for table in tables]


def unclassified(found: Findings) -> Table:
    """The kernels that no rule knows, the longest first."""
    return Table(
        "unclassified",
        "Kernels that no rule knows",
        "They count as compute. A file of rules can say what they are.",
        (Column("name", "name"), Column("time", "us")),
        unclassified_names(found.trace),
    )


def metadata(found: Findings) -> Table:
    """The facts about the trace that its reader noted."""
    return Table(
        "metadata",
        "Where the trace comes from",
        "Facts that the reader noted.",
        (Column("fact"), Column("value")),
        tuple((name, text) for name, value in found.trace.metadata.items() if (text := _fact(value))),
    )


def _fact(value: object) -> str:
    """A fact for people: lists and mappings without their brackets; "" if nothing is known."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text}" for name, of in value.items() if (text := _fact(of)))
    if isinstance(value, list | tuple | set):
        return ", ".join(text for of in value if (text := _fact(of)))
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


SECTIONS: tuple[Section, ...] = (
    overlaps,
    kernels,
    kinds,
    collectives,
    steps,
    segments,
    bubbles,
    predicted_phases,
    predicted_tasks,
    predicted_order,
    phases,
    actions,
    layers,
    devices,
    lanes,
    skew_of_devices,
    skew_of_groups,
    sensitivity,
    compiled,
    unclassified,
    metadata,
)
"""The sections of a report in their order."""


def report_tables(found: Findings, sections: Sequence[Section] = SECTIONS) -> tuple[Table, ...]:
    """Every table that has something to show, in the order of the sections."""
    tables: list[Table] = []
    for section in sections:
        made = section(found)
        tables += [made] if isinstance(made, Table) else made
    return tuple(table for table in tables if table.rows)
