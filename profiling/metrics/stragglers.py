"""Measures how far devices drift apart in the collectives of their process groups."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from profiling.event import Event, Trace
from profiling.metrics.calls import SYNCHRONISING, Call, Group, MatchedCollective, calls, has_group, match_calls

CLOCK_TOLERANCE = 2.0
"""Microseconds by which times of one clock may contradict each other. Profilers that write whole microseconds round the
start and the duration down."""

_ONE_SIDED = re.compile(r"permute|broadcast|^(send|recv)", re.IGNORECASE)
"""Names of communication that a rank may end before another begins. NCCL's SendRecv may be an all-to-all."""

_COPY = re.compile(r"memcpy|peer copy", re.IGNORECASE)
"""Names of transfers that one device does by itself."""


@dataclasses.dataclass(frozen=True)
class DeviceSkew:
    """The drift of one device, in microseconds.

    Attributes:
      device: index of the device.
      wait: time in barriers and notifications; 0 if waiting is part of the transfers.
      peer_wait: how much longer its transfers took than on the device where each took least. This is the wait for
        peers within transfers. It is least on the straggler, whatever the clocks.
      lateness: mean time from the first device's start of a collective to this one's; None if the clocks differ.
      last: share of the collectives that the device joined last; None if the clocks differ.
    """

    device: int
    wait: float
    peer_wait: float
    lateness: float | None
    last: float | None


@dataclasses.dataclass(frozen=True)
class GroupSkew:
    """The drift of devices in the collectives of one process group, in microseconds.

    Attributes:
      group: process group; if the profiler names none, all devices are one group without name, ranks and size.
      devices: devices of the group that are in the trace.
      matched: number of collectives compared.
      start_spread, max_start_spread: mean and maximum time from the first device's start to the last one's; None if the
        clocks differ, as are the next two.
      end_spread, max_end_spread: the same for ends.
      resolution: how closely starts can be compared: the median distance between the ends of collectives that
        synchronise, at least `CLOCK_TOLERANCE`. They end together, so this shows how far the clocks agree and how
        evenly the last data arrives.
      impossible: number of collectives that synchronise but ended on one device before another one began them.
      clocks_agree: whether starts can be compared: no collective was impossible. If none of this group synchronises, no
        collective was impossible in another group that has two of these devices.
      offsets: ``{device: how far its clock is ahead}`` of the devices' median, estimated from the ends; empty if the
        clocks agree.
      straggler: the device that joins latest; None if it is not later than the resolution or the clocks differ.
    """

    group: Group
    devices: tuple[int, ...]
    matched: int
    start_spread: float | None
    max_start_spread: float | None
    end_spread: float | None
    max_end_spread: float | None
    resolution: float
    impossible: int
    clocks_agree: bool
    offsets: Mapping[int, float]
    straggler: int | None


@dataclasses.dataclass(frozen=True)
class Skew:
    """The drift of devices in the collectives that several of them have in common, in microseconds.

    Attributes:
      matched: number of collectives compared.
      start_spread, max_start_spread: mean and maximum time from the first device's start to the last one's, over groups
        whose clocks agree; None if there is no such group, as are the next two.
      end_spread, max_end_spread: the same for ends. A large spread without a cause means that the clocks differ.
      resolution: the largest resolution of the groups whose clocks agree, see `GroupSkew`; None if there is none.
      devices: one row for each device.
      groups: one row for each process group.
    """

    matched: int
    start_spread: float | None
    max_start_spread: float | None
    end_spread: float | None
    max_end_spread: float | None
    resolution: float | None
    devices: tuple[DeviceSkew, ...]
    groups: tuple[GroupSkew, ...]

    @property
    def straggler(self) -> int | None:
        """The device that joins its peers latest; None if none is later than the resolution, or the clocks differ."""
        late = [(row.lateness, row.device) for row in self.devices if row.lateness is not None]
        if not late or self.resolution is None:
            return None
        lateness, device = max(late, key=lambda row: row[0])
        return device if lateness > self.resolution else None


def skew(trace: Trace, window: tuple[float, float] | None = None) -> Skew | None:
    """How devices drift apart; None with fewer than two devices, or without a collective that several have in common.

    If the profiler names process groups, `profiling.metrics.calls.match_calls` finds the calls of one collective.
    Otherwise they have the same instruction (or name), phase, layer and microbatch, and the same place among their
    repetitions; every device must repeat them equally often. Calls that contradict each other in time are not compared.

    Args:
      trace: trace of any reader.
      window: start and end in microseconds; only collectives that lie in it on every device count. By default all do.

    >>> def a(device, start):
    ...     return Event(device, "comm", start, 9.0, "all-to-all", group="transfer")
    >>> found = skew(Trace("", "simulated", (a(0, 1.0), a(1, 4.0))))
    >>> found.start_spread, found.straggler, found.devices[0].peer_wait
    (3.0, 1, 3.0)
    """
    return skew_and_notes(trace, window)[0]


def skew_and_notes(
    trace: Trace,
    window: tuple[float, float] | None = None,
    met: tuple[Sequence[MatchedCollective], Sequence[str]] | None = None,
) -> tuple[Skew | None, tuple[str, ...]]:
    """What `skew` returns, with notes on why there is none or what could not be compared.

    Args:
      trace, window: as in `skew`.
      met: what `match_calls` returned for the calls of the trace, if that is known already.
    """
    if len(trace.devices) < 2:
        return None, ()
    if any(map(has_group, trace.events)):
        together, doubts = match_calls(calls(trace.events)) if met is None else met
        notes = [f"stragglers: {doubt}" for doubt in doubts]
        rows = [row for row in together if row.lies_in(window)]
        if not rows and not notes:
            notes = ["stragglers: no two devices of this trace are in one process group with a collective in common"]
    else:
        together, notes = _by_name(trace)
        rows = [row for row in together if row.lies_in(window)]
    if not rows:
        return None, tuple(notes)
    by_group: dict[Group, list[MatchedCollective]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    parts = [_Part(group, members) for group, members in by_group.items()]
    apart = [set(part.devices) for part in parts if part.impossible]
    groups = [
        part.found(part.synchronises or all(len(devices & set(part.devices)) < 2 for devices in apart))
        for part in parts
    ]
    notes += [_clocks(of) for of in groups if of.impossible]
    return _skew(trace, window, parts, groups), tuple(notes)


class _Part:
    """The collectives of one group as arrays ``[collectives, devices]``."""

    def __init__(self, group: Group, members: Sequence[MatchedCollective]) -> None:
        self.group = group
        self.devices = tuple(call.device for call in members[0].calls)
        self.starts = np.array([[call.start for call in row.calls] for row in members])
        self.ends = np.array([[call.end for call in row.calls] for row in members])
        self.times = np.array([[call.time for call in row.calls] for row in members])
        self.moves = np.array([row.calls[0].group_of_time == "transfer" for row in members])
        self.late = self.starts - self.starts.min(axis=1, keepdims=True)
        meets = np.array([row.kind in SYNCHRONISING for row in members])
        early = self.starts.max(axis=1) - self.ends.min(axis=1) > CLOCK_TOLERANCE
        self.synchronises = bool(meets.any())
        self.impossible = int(np.sum(meets & early))
        self.together = self.ends[meets] if self.synchronises else self.ends
        self.spread = np.ptp(self.starts, axis=1), np.ptp(self.ends, axis=1)

    def found(self, clocks_agree: bool) -> GroupSkew:
        agree = clocks_agree and not self.impossible
        resolution = max(float(np.median(np.ptp(self.together, axis=1))), CLOCK_TOLERANCE)
        ahead = np.median(self.together - np.median(self.together, axis=1, keepdims=True), axis=0)
        lateness = self.late.mean(axis=0)
        latest = int(np.argmax(lateness))
        return GroupSkew(
            group=self.group,
            devices=self.devices,
            matched=len(self.starts),
            **_spreads([self.spread] if agree else []),
            resolution=resolution,
            impossible=self.impossible,
            clocks_agree=agree,
            offsets=dict(zip(self.devices, ahead.tolist(), strict=True)) if self.impossible else {},
            straggler=self.devices[latest] if agree and lateness[latest] > resolution else None,
        )


def _spreads(spreads: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | None]:
    parts = list(spreads)
    if not parts:
        return dict.fromkeys(("start_spread", "max_start_spread", "end_spread", "max_end_spread"))
    starts, ends = (np.concatenate(each) for each in zip(*parts, strict=True))
    return {
        "start_spread": float(starts.mean()),
        "max_start_spread": float(starts.max()),
        "end_spread": float(ends.mean()),
        "max_end_spread": float(ends.max()),
    }


def _skew(
    trace: Trace, window: tuple[float, float] | None, parts: Sequence[_Part], groups: Sequence[GroupSkew]
) -> Skew:
    waits: dict[int, float] = {}
    start, end = window or (-np.inf, np.inf)
    for event in trace.events:
        if event.group == "wait" and event.start < end and event.end > start:
            time = min(event.end, end) - max(event.start, start)
            waits[event.device] = waits.get(event.device, 0.0) + time
    peer_waits: dict[int, float] = {}
    late: dict[int, list[np.ndarray]] = {}
    last: dict[int, list[np.ndarray]] = {}
    for part, of in zip(parts, groups, strict=True):
        longer = part.times[part.moves] - part.times[part.moves].min(axis=1, keepdims=True)
        latest = np.where(part.late.any(axis=1), np.argmax(part.starts, axis=1), -1)  # nobody, if all start together
        for i, device in enumerate(part.devices):
            peer_waits[device] = peer_waits.get(device, 0.0) + float(longer[:, i].sum())
            if of.clocks_agree:
                late.setdefault(device, []).append(part.late[:, i])
                last.setdefault(device, []).append(latest == i)
    return Skew(
        matched=sum(of.matched for of in groups),
        **_spreads(part.spread for part, of in zip(parts, groups, strict=True) if of.clocks_agree),
        resolution=max((of.resolution for of in groups if of.clocks_agree), default=None),
        devices=tuple(
            DeviceSkew(
                device=device,
                wait=waits.get(device, 0.0),
                peer_wait=peer_waits[device],
                lateness=float(np.concatenate(late[device]).mean()) if device in late else None,
                last=float(np.concatenate(last[device]).mean()) if device in last else None,
            )
            for device in sorted(peer_waits)
        ),
        groups=tuple(groups),
    )


def _clocks(of: GroupSkew) -> str:
    ahead = max(of.offsets, key=lambda device: of.offsets[device])
    behind = min(of.offsets, key=lambda device: of.offsets[device])
    apart = of.offsets[ahead] - of.offsets[behind]
    return (
        f"stragglers: in group {of.group.label} {of.impossible:,} of {of.matched:,} collectives ended on one device "
        f"before another one began them, so that the clocks differ: device {ahead}'s is ahead of device {behind}'s by "
        f"about {apart:,.0f} us, as estimated from when the collectives end. No straggler is named"
    )


def _by_name(trace: Trace) -> tuple[list[MatchedCollective], list[str]]:
    """The collectives that all devices have in common, by instruction or name; notes say why there are none."""
    devices = trace.devices
    found: dict[Hashable, dict[int, list[Event]]] = {}
    for event in trace.events:
        if event.group in ("transfer", "wait") and not (_COPY.search(event.name) or _COPY.search(event.kind)):
            key = (event.hlo_op or event.name, event.phase, event.layer, event.microbatch)
            found.setdefault(key, {}).setdefault(event.device, []).append(event)
    if not found:
        return [], []
    unequal = [of for of in found.values() if len({len(of.get(device, ())) for device in devices}) > 1]
    # Names of instructions tell collectives apart; names of kernels do only if all devices run the same ones.
    if any(not events[0].hlo_op for of in unequal for events in of.values()) or len(unequal) == len(found):
        example = next(iter(unequal[0].values()))[0]
        counts = ", ".join(f"{len(unequal[0].get(device, ()))} on device {device}" for device in devices[:8])
        return [], [
            "stragglers: the profiler tells no process groups, and the devices do not run the same collectives "
            f"({example.hlo_op or example.name}: {counts}), so that none are compared"
        ]
    everyone = Group("", None, None)
    rows = [
        MatchedCollective(everyone, tuple(_call(event, everyone) for event in events))
        for of in found.values()
        if len({len(of.get(device, ())) for device in devices}) == 1
        for events in zip(*(of[device] for device in devices), strict=True)
    ]
    early = [
        max(call.start for call in row.calls) - min(call.end for call in row.calls) > CLOCK_TOLERANCE
        for row in rows
        if not _ONE_SIDED.search(row.kind)
    ]
    if any(early):
        return [], [
            "stragglers: the profiler tells no process groups, and of the collectives that have the same name and "
            f"order on all devices {sum(early):,} of {len(early):,} ended on one before another one began them: they "
            "are not the same, or the clocks differ, so that none are compared"
        ]
    rows.sort(key=lambda row: row.calls[0].start)
    return rows, []


def _call(event: Event, group: Group) -> Call:
    kind = event.hlo_op or event.name
    return Call(
        device=event.device,
        kind=kind,
        group=group,
        start=event.start,
        end=event.end,
        time=event.duration,
        sent=None,
        received=None,
        sequence=None,
        step=event.step,
        group_of_time=event.group,
    )
