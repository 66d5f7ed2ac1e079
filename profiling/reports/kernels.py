"""The section of a report on the kernels with most time."""

from __future__ import annotations

from profiling.event import Trace
from profiling.reports.section import Findings
from profiling.table import Column, Table, written

KERNELS = 30
"""The number of kernels that a report lists."""


def kernels(found: Findings) -> Table:
    """The `KERNELS` with most time; see `kernel_table`."""
    return kernel_table(found.trace)


def kernel_table(trace: Trace, top: int = KERNELS) -> Table:
    """Sums of events of one name and kind over all devices, the longest first.

    Loops, branches and calls are left out, as the operations in them have events of their own.

    >>> from profiling.event import Event
    >>> events = [Event(0, "7", 4.0 * i, 4.0 * i + 3.0, "gemm", kind="GEMM", group="compute") for i in range(3)]
    >>> kernel_table(Trace("", "kineto", tuple(events))).rows
    (('gemm', 9.0, 1.0, 3, 3.0, 3.0, 'GEMM', 'compute'),)
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for event in trace.events:
        if event.group != "control":
            times = found.setdefault((event.name, event.kind, event.group), [0, 0.0, 0.0])
            times[0] += 1
            times[1] += event.duration
            times[2] = max(times[2], event.duration)
    everything = sum(total for _, total, _ in found.values())
    longest = sorted(found.items(), key=lambda item: -item[1][1])
    rest = longest[top:]
    caption = "Sums of durations by name, over all devices, as if events ran one after another."
    if rest:
        share = sum(total for _, (_, total, _) in rest) / everything if everything else 0.0
        caption += f" The {top} longest of {len(longest):,}: the other {len(rest):,} take {written(share, '%')}."
    return Table(
        "kernels",
        "Kernels with most time",
        caption,
        (
            Column("kernel", "" if trace.source == "simulated" else "name"), Column("total", "us"),
            Column("share", "%", is_share=True), Column("events", "n"), Column("mean", "us"), Column("longest", "us"),
            Column("kind"), Column("group"),
        ),
        tuple(
            (name, total, total / everything if everything else None, int(count), total / count, most, kind, group)
            for (name, kind, group), (count, total, most) in longest[:top]
        ),
        events=tuple((name, kind) for (name, kind, _), _ in longest[:top]),
    )  # fmt: skip
