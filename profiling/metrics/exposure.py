"""Finds the longest stretches of exposed communication, what was transferred, and which computation waited for it."""

from __future__ import annotations

import dataclasses

import numpy as np

from profiling.event import Event, Trace
from profiling.metrics import Columns, by_device, chosen, sides


@dataclasses.dataclass(frozen=True)
class ExposedSegment:
    """A stretch in which a device communicates and does not compute.

    Attributes:
      device: index of the device.
      start, end: start and end of the stretch, in microseconds.
      share: share of all exposed communication on the device.
      communication: the event that takes most of the stretch.
      phases, kinds: phases and kinds of all communication in the stretch, in the order of their starts.
      next_compute: the computation that starts next on the device; None if nothing follows.
    """

    device: int
    start: float
    end: float
    share: float
    communication: Event
    phases: tuple[str, ...]
    kinds: tuple[str, ...]
    next_compute: Event | None

    @property
    def duration(self) -> float:
        """Microseconds from start to end."""
        return self.end - self.start

    @property
    def stalled(self) -> bool:
        """Whether the next computation presumably had to wait for this communication.

        If so, it starts after the communication has ended, within a time shorter than the stretch. A computation that
        starts while the communication still runs waited for something else, such as a launch by the host.
        """
        following = self.next_compute
        return (
            following is not None
            and self.communication.end <= following.start
            and following.start - self.end < self.duration
        )

    @property
    def reason(self) -> str:
        """Says what waits for what.

        >>> dispatch = Event(0, "27", 0.0, 4.0, "a", phase="dispatch(B)", layer=3, group="transfer")
        >>> attention = Event(0, "7", 4.0, 9.0, "b", phase="attn(B)", layer=3, group="compute")
        >>> ExposedSegment(0, 2.0, 4.0, 1.0, dispatch, ("dispatch(B)",), (), attention).reason
        'attn(B) of layer 3 waits for dispatch(B) of layer 3'
        """
        communication = _label(self.communication)
        if self.next_compute is None:
            return f"nothing follows {communication}"
        if self.stalled:
            return f"{_label(self.next_compute)} waits for {communication}"
        return f"{_label(self.next_compute)} starts late, beside or after {communication}"


def exposed_segments(
    trace: Trace, top: int = 10, definition: str = "transfer+wait", merge_gap_us: float = 0.0
) -> tuple[ExposedSegment, ...]:
    """The longest stretches of exposed communication over all devices, the longest first.

    Args:
      trace: trace of any reader.
      top: most stretches to return.
      definition: what counts as communication, one of `profiling.metrics.DEFINITIONS`.
      merge_gap_us: gaps in compute up to this long count as compute.

    Raises:
      ValueError: the definition is unknown, or the number of stretches or the gap is negative.

    >>> dispatch = Event(0, "27", 0.0, 4.0, "a", kind="dispatch", group="transfer")
    >>> gemms = [Event(0, "7", start, start + 2.0, "b", kind="GEMM", group="compute") for start in (0.0, 4.0)]
    >>> segment, = exposed_segments(Trace("", "simulated", (dispatch, *gemms)))
    >>> segment.start, segment.end, segment.reason
    (2.0, 4.0, 'GEMM waits for dispatch')
    """
    if top < 0:
        raise ValueError(f"exposed_segments(top={top}): ask for a number of stretches that is not negative")
    devices = by_device(trace)
    found: list[tuple[int, float, float, float]] = []
    for device, events in devices.items():
        spans = sides(events, definition).exposed(merge_gap_us)
        lengths = spans[:, 1] - spans[:, 0]
        total = float(lengths.sum())
        longest = spans[np.argsort(-lengths, kind="stable")[:top]]
        found += [(device, start, end, (end - start) / total) for start, end in longest.tolist()]
    found.sort(key=lambda row: row[1] - row[2])
    parts = {device: _parts(devices[device], definition) for device in {row[0] for row in found[:top]}}
    return tuple(_segment(device, start, end, share, *parts[device]) for device, start, end, share in found[:top])


def _parts(events: Columns, definition: str) -> tuple[Columns, Columns]:
    """Communication and compute, each in the order of their starts."""
    order = np.argsort(events.starts, kind="stable")
    communication, compute = (events.take(order[is_side[order]]) for is_side in chosen(events, definition))
    return communication, compute


def _segment(
    device: int, start: float, end: float, share: float, communication: Columns, compute: Columns
) -> ExposedSegment:
    meets = (communication.starts < end) & (communication.ends > start)
    on_wire = list(communication.take(np.flatnonzero(meets)))
    following = int(np.searchsorted(compute.starts, end, "left"))
    return ExposedSegment(
        device=device,
        start=start,
        end=end,
        share=share,
        communication=max(on_wire, key=lambda event: min(event.end, end) - max(event.start, start)),
        phases=tuple(dict.fromkeys(event.phase for event in on_wire if event.phase)),
        kinds=tuple(dict.fromkeys(event.kind for event in on_wire)),
        next_compute=compute[following] if following < len(compute) else None,
    )


def _label(event: Event) -> str:
    layer = "" if event.layer is None else f" of layer {event.layer}"
    return f"{event.phase or event.kind}{layer}"
