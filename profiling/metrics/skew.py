"""How far devices drift apart, seen where they meet: in their collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import numpy as np

from profiling.event import Event, Trace


@dataclasses.dataclass(frozen=True)
class DeviceSkew:
    """One device among the others, in microseconds.

    Attributes:
      device: its index.
      wait: time of its barriers and notifications, 0 where waiting is part of the transfers.
      peer_wait: by how much its transfers took longer than the same transfer on the device where it took least: the
        wait for peers that cannot be told from moving data.
      lateness: mean time that it joined a collective after the first device did.
      last: share of the collectives that it joined last.
    """

    device: int
    wait: float
    peer_wait: float
    lateness: float
    last: float


@dataclasses.dataclass(frozen=True)
class Skew:
    """What collectives that run on every device show, in microseconds.

    Attributes:
      matched: number of collectives compared.
      start_spread, max_start_spread: mean and maximum time from the first device's start to the last one's.
      end_spread, max_end_spread: the same for ends. Large ones without a cause speak of clocks that differ.
      devices: one row for each.
    """

    matched: int
    start_spread: float
    max_start_spread: float
    end_spread: float
    max_end_spread: float
    devices: tuple[DeviceSkew, ...]

    @property
    def straggler(self) -> int:
        """The device that joins its peers latest."""
        return max(self.devices, key=lambda row: row.lateness).device


def skew(trace: Trace) -> Skew | None:
    """How devices drift apart; None with fewer than two devices, or no transfer or wait that all have in common.

    The same collective on two devices has the same instruction (or name), phase, layer and microbatch, and is the
    same in the order of its repetitions.

    >>> def a(device, start):
    ...     return Event(device, "comm", start, 9.0, "all-to-all", group="transfer")
    >>> found = skew(Trace("", "simulated", (a(0, 1.0), a(1, 4.0))))
    >>> found.start_spread, found.straggler, found.devices[0].peer_wait
    (3.0, 1, 3.0)
    """
    devices = trace.devices
    if len(devices) < 2:
        return None
    met: dict[Hashable, dict[int, Event]] = {}
    seen: dict[Hashable, int] = {}
    for event in trace.events:
        if event.group in ("transfer", "wait"):
            key = (event.hlo_op or event.name, event.phase, event.layer, event.microbatch)
            count = seen[event.device, key] = seen.get((event.device, key), -1) + 1
            met.setdefault((key, count), {})[event.device] = event
    common = [[by_device[device] for device in devices] for by_device in met.values() if len(by_device) == len(devices)]
    if not common:
        return None
    starts = np.array([[event.start for event in row] for row in common])
    ends = np.array([[event.end for event in row] for row in common])
    moves = np.array([row[0].group == "transfer" for row in common])
    late = starts - starts.min(axis=1, keepdims=True)
    longer = (ends - starts) - (ends - starts).min(axis=1, keepdims=True)
    last = np.argmax(starts, axis=1)
    waits = {device: 0.0 for device in devices}
    for event in trace.events:
        if event.group == "wait":
            waits[event.device] += event.duration
    spread = np.ptp(starts, axis=1), np.ptp(ends, axis=1)
    return Skew(
        matched=len(common),
        start_spread=float(spread[0].mean()),
        max_start_spread=float(spread[0].max()),
        end_spread=float(spread[1].mean()),
        max_end_spread=float(spread[1].max()),
        devices=tuple(
            DeviceSkew(
                device=device,
                wait=waits[device],
                peer_wait=float(longer[moves, i].sum()),
                lateness=float(late[:, i].mean()),
                last=float(np.mean(last == i)),
            )
            for i, device in enumerate(devices)
        ),
    )
