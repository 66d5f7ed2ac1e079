"""Compares a measured trace before a change with one after it: which times changed, and by how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from profiling.event import Trace
from profiling.metrics import DEFINITIONS, Measurement, Metrics, TimeRow, measure
from profiling.predict.text import aligned


@dataclasses.dataclass(frozen=True)
class Change:
    """A time before and after, in microseconds a device."""

    name: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """After less before."""
        return self.after - self.before

    @property
    def relative(self) -> float | None:
        """The change as a share of the time before; None if that is 0."""
        return self.change / self.before if self.before else None


@dataclasses.dataclass(frozen=True)
class Changes:
    """The changes between two traces; times are means over the devices, in microseconds.

    Attributes:
      before, after: titles of the traces.
      totals: makespan, compute, idle, and communication and exposed communication by each definition.
      kinds, phases: sums of durations, the largest change first.
    """

    before: str
    after: str
    totals: tuple[Change, ...]
    kinds: tuple[Change, ...]
    phases: tuple[Change, ...]

    def table(self, most: int = 20) -> str:
        """The changes as text, the totals and the largest changes by kind and phase."""
        lines = [f"before {self.before!r}, after {self.after!r}; us a device"]
        for title, rows in (("total", self.totals), ("kind", self.kinds[:most]), ("phase", self.phases[:most])):
            cells = [
                (
                    row.name or "(none)",
                    f"{row.before:,.0f}",
                    f"{row.after:,.0f}",
                    f"{row.change:+,.0f}",
                    "" if row.relative is None else f"{row.relative:+.1%}",
                )
                for row in rows
            ]
            lines += ["", *aligned((title, "before", "after", "change", ""), cells)]
        return "\n".join(lines)


def changes(before: Trace, after: Trace) -> Changes:
    """Finds what became faster and slower between two measured traces.

    Raises:
      ValueError: a trace has no events.

    >>> from profiling.event import Event
    >>> def trace(end):
    ...     return Trace("", "kineto", (Event(0, "7", 0.0, end, "a", kind="GEMM", group="compute", phase="F"),))
    >>> changes(trace(4.0), trace(3.0)).kinds
    (Change(name='GEMM', before=4.0, after=3.0),)
    """
    one, other = measure(before), measure(after)
    totals = [_totals(one), _totals(other)]
    return Changes(
        before=before.title,
        after=after.title,
        totals=tuple(Change(name, totals[0][name], totals[1][name]) for name in totals[0]),
        kinds=_changes(one, other, lambda metrics: metrics.kinds),
        phases=_changes(one, other, lambda metrics: metrics.phases),
    )


def _totals(measurement: Measurement) -> dict[str, float]:
    devices = len(measurement.devices)
    total = measurement.summary.breakdown
    times = {"makespan": measurement.makespan, "compute": total.compute / devices, "idle": total.idle / devices}
    for definition in DEFINITIONS:
        weighed = measurement.summary.overlaps[definition]
        times[f"communication ({definition})"] = weighed.communication / devices
        times[f"exposed ({definition})"] = weighed.exposed / devices
    return times


def _changes(
    one: Measurement, other: Measurement, rows: Callable[[Metrics], tuple[TimeRow, ...]]
) -> tuple[Change, ...]:
    times: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for measurement, into in zip((one, other), times, strict=True):
        for metrics in measurement.devices:
            for row in rows(metrics):
                into[row.name] = into.get(row.name, 0.0) + row.total / len(measurement.devices)
    names = dict.fromkeys((*times[0], *times[1]))
    found = [Change(name, times[0].get(name, 0.0), times[1].get(name, 0.0)) for name in names]
    return tuple(sorted(found, key=lambda row: -abs(row.change)))
