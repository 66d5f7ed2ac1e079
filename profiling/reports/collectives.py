"""The sections of a report about collectives: their bandwidths, and which devices are late."""

from __future__ import annotations

from collections.abc import Sequence

from profiling.metrics import CollectiveRow
from profiling.reports.section import Findings
from profiling.table import Column, Table, Value, duration


def collectives(found: Findings) -> Table:
    """Collectives by kind, group and size; empty if the profiler says nothing about them."""
    rows = found.measured.collectives
    caption = (
        "Sizes and bandwidths are defined as in NCCL's tests (doc/PERFORMANCE.md). Times are those of the kernels and "
        "include their waits for late ranks, so bandwidths are lower bounds. Hidden: share of the time in which the "
        "device also computes."
    )
    if len(found.measured.devices) > 1:
        caption += " Calls and times are added up over the devices."
    if any(row.matched for row in rows):
        caption += (
            " Least: by the time on the rank where a collective was shortest and waited least, if several ranks of a "
            "group are in the trace; this is the better estimate."
        )

    def cells(row: CollectiveRow) -> tuple[Value, ...]:
        megabytes = None if row.bytes is None else row.bytes / 1e6
        return (
            row.kind, row.group.label, row.group.size, row.size_class or "unknown", row.count, megabytes, row.time,
            row.time / row.count, row.algorithm_bandwidth, row.bus_bandwidth,
            row.least_time / row.matched if row.matched else None, row.least_bus_bandwidth, row.hidden,
        )  # fmt: skip

    return Table(
        "collectives",
        "Collectives",
        caption,
        (
            Column("collective"), Column("group"), Column("ranks", "n"), Column("size"), Column("calls", "n"),
            Column("MB", "x"), Column("total", "us"), Column("mean", "us"), Column("algorithm GB/s", "x"),
            Column("bus GB/s", "x"), Column("least mean", "us"), Column("least bus GB/s", "x"),
            Column("hidden", "%", is_share=True),
        ),
        tuple(map(cells, rows)),
    )  # fmt: skip


def skew_of_devices(found: Findings) -> Sequence[Table]:
    """How late each device is; nothing if no collective is common to several devices."""
    skew = found.measured.skew
    if skew is None:
        return ()
    seen = f"Seen in {skew.matched:,} collectives that several devices have in common"
    if skew.start_spread is None:
        caption = f"{seen}. Their clocks differ, so starts cannot be compared; the notes say by how much."
    else:
        late = (
            f"Device {skew.straggler} joins latest."
            if skew.straggler is not None
            else f"No device is late by more than the {duration(skew.resolution)} that starts can be told apart by."
        )
        starts, ends = (
            f"{duration(mean)} apart on average and {duration(most)} at most"
            for mean, most in ((skew.start_spread, skew.max_start_spread), (skew.end_spread, skew.max_end_spread))
        )
        caption = f"{seen}: starts lie {starts}, ends {ends}. {late}"
    caption += " The others wait for the device that waits least in transfers, whatever the clocks."
    table = Table(
        "skew",
        "Stragglers",
        caption,
        (
            Column("device", "n"), Column("joins late by", "us"), Column("is last", "%", is_share=True),
            Column("waits in barriers", "us"), Column("waits in transfers", "us"),
        ),
        tuple((row.device, row.lateness, row.last, row.wait, row.peer_wait) for row in skew.devices),
    )  # fmt: skip
    return (table,)


def skew_of_groups(found: Findings) -> Table:
    """How late devices are in each process group; empty if there are fewer than two groups."""
    groups = found.measured.skew.groups if found.measured.skew else ()
    return Table(
        "skew-groups",
        "Stragglers by process group",
        "Apart: mean and maximum time from the first device's start, or end, to the last one's. Told apart by: how "
        "far ends lie apart of collectives that end together. Starts are left out if the clocks differ.",
        (
            Column("group"), Column("ranks", "n"), Column("devices here", "n"), Column("collectives", "n"),
            Column("starts apart", "us"), Column("at most", "us"), Column("ends apart", "us"),
            Column("told apart by", "us"), Column("joins latest"), Column("clocks"),
        ),
        tuple(
            (
                of.group.label, of.group.size, len(of.devices), of.matched, of.start_spread, of.max_start_spread,
                of.end_spread, of.resolution, "-" if of.straggler is None else f"device {of.straggler}",
                "agree" if of.clocks_agree else "differ",
            )
            for of in groups
            if len(groups) > 1
        ),
    )  # fmt: skip
