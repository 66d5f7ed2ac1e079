"""Windows of a trace, by the number of a step or by times, and the metrics of each step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from profiling.event import Trace
from profiling.metrics.columns import Columns, by_device
from profiling.metrics.intervals import union, within
from profiling.metrics.overlaps import Breakdown, Overlap, Sides, breakdown_of, chosen, overlap_of

Window = tuple[float, float]
"""Start and end in microseconds."""

UNITS: Mapping[str, float] = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
"""Microseconds in each unit of time."""

_TIME = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(ns|us|ms|s|)"


@dataclasses.dataclass(frozen=True)
class StepRow:
    """The metrics of one step, in microseconds; times are added up over the devices.

    Attributes:
      number: number of the step.
      start, end: window of the step, the same on every device.
      breakdown: how the devices' time in the step divides.
      overlap: transfers and waits in the step, and what hides them.
      share_of_median: length of the step by the median of the others, without the first; None without others.
    """

    number: int
    start: float
    end: float
    breakdown: Breakdown
    overlap: Overlap
    share_of_median: float | None


def step_windows(trace: Trace) -> dict[int, Window]:
    """``{number: window}`` of the trace's steps, in the order of their starts.

    A window goes from the first start to the last end, over all devices, of the events that a step launched. If no
    event knows its step, the host's numbered annotations of the most frequent name decide: an event belongs to the step
    that the host began last before it. That is right unless the devices run a step behind.

    >>> from profiling.event import Event, Step
    >>> events = [Event(0, "7", 10.0 * i, 10.0 * i + 8.0, "a", step=i // 2) for i in range(4)]
    >>> step_windows(Trace("", "kineto", tuple(events)))
    {0: (0.0, 18.0), 1: (20.0, 38.0)}
    >>> step_windows(Trace("", "xplane", (Event(0, "7", 0.0, 9.0, "a"),), (Step("train", 7, 0.0, 5.0),)))
    {7: (0.0, 9.0)}
    """
    found = _widest((event.step, event.start, event.end) for event in trace.events if event.step is not None)
    if not found and (begun := _begun(trace)):
        times = np.array(sorted(begun.values()))
        numbers = sorted(begun, key=lambda number: begun[number])
        places = np.searchsorted(times, [event.start for event in trace.events], "right") - 1
        found = _widest(
            (numbers[place], event.start, event.end)
            for place, event in zip(places.tolist(), trace.events, strict=True)
            if place >= 0 and event.group != "control"
        )
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _begun(trace: Trace) -> dict[int, float]:
    """``{number: when the first host began it}`` of the annotations whose name numbers most steps."""
    by_name: dict[str, dict[int, float]] = {}
    for step in trace.steps:
        if step.number is not None:
            begun = by_name.setdefault(step.name, {})
            begun[step.number] = min(step.start, begun.get(step.number, step.start))
    return max(by_name.values(), key=len, default={})


def window_of_step(trace: Trace, number: int) -> Window:
    """The window of one step; see `step_windows`.

    Raises:
      ValueError: there is no such step; the message names the steps.
    """
    found = step_windows(trace)
    if not found:
        raise ValueError(
            f"step {number} of {trace.title!r}: no step of this trace has a number (mark steps when you profile: "
            "jax.profiler.StepTraceAnnotation, profiler.step() of torch.profiler); choose a window of times instead"
        )
    if number not in found:
        raise ValueError(f"step {number} of {trace.title!r}: there are {_numbers(found)}")
    return found[number]


def parse_window(text: str) -> tuple[float | None, float | None]:
    """Start and end of "A:B" in microseconds; None for a side that is left out.

    >>> parse_window("1500:2500.5"), parse_window("12ms:30ms"), parse_window(":1.5s")
    ((1500.0, 2500.5), (12000.0, 30000.0), (None, 1500000.0))

    Raises:
      ValueError: the text is not two times.
    """
    sides = [side.strip() for side in text.split(":")]
    found = [re.fullmatch(_TIME, side) for side in sides]
    if len(sides) != 2 or not any(found) or any(side and not match for side, match in zip(sides, found, strict=True)):
        raise ValueError(
            f"window {text!r}: write A:B, two times in microseconds or with a unit (ns, us, ms, s), 12ms:30ms for "
            "instance; a side that is left out is the trace's"
        )
    start, end = (None if match is None else float(match[1]) * UNITS[match[2] or "us"] for match in found)
    return start, end


def window_in(trace: Trace, start: float | None, end: float | None) -> Window:
    """The part of a window that lies in the trace; None for a side stands for the trace's.

    Raises:
      ValueError: the window ends before it starts, or nothing runs in it; the message names the trace's window.

    >>> from profiling.event import Event
    >>> window_in(Trace("", "kineto", (Event(0, "7", 10.0, 40.0, "a"),)), 20.0, None)
    (20.0, 40.0)
    """
    first, last = trace.window
    wanted = (first if start is None else start, last if end is None else end)
    span = f"the trace {trace.title!r} goes from {first:,.1f} to {last:,.1f} us"
    if not wanted[0] < wanted[1]:
        raise ValueError(f"window {wanted[0]:,.1f}:{wanted[1]:,.1f} us: the start must lie before the end; {span}")
    if not any(event.start < wanted[1] and event.end > wanted[0] for event in trace.events):
        raise ValueError(f"window {wanted[0]:,.1f}:{wanted[1]:,.1f} us: nothing runs on a device then; {span}")
    return max(wanted[0], first), min(wanted[1], last)


def steps(
    trace: Trace, window: Window | None = None, devices: Mapping[int, Columns] | None = None
) -> tuple[StepRow, ...]:
    """The metrics of each step, in the order of their starts.

    Args:
      trace: classified trace of any reader.
      window: only steps that lie in this window count; by default all.
      devices: events of each device, if they are at hand.

    >>> from profiling.event import Event
    >>> events = [Event(0, "7", 10.0 * i, 10.0 * i + 6.0, "a", group="compute", step=i // 2) for i in range(4)]
    >>> [(row.number, row.breakdown.compute, row.breakdown.idle) for row in steps(Trace("", "kineto", tuple(events)))]
    [(0, 12.0, 4.0), (1, 12.0, 4.0)]
    """
    found = step_windows(trace)
    if window is not None:
        found = {number: of for number, of in found.items() if window[0] <= of[0] and of[1] <= window[1]}
    if not found:
        return ()
    parts = [_Device(events) for events in (devices or by_device(trace)).values()]
    lengths = [end - start for start, end in found.values()]
    rows = []
    for place, (number, (start, end)) in enumerate(found.items()):
        others = [length for other, length in enumerate(lengths) if other not in (0, place)]
        median = float(np.median(others)) if others else 0.0
        figures = [part.figures((start, end)) for part in parts]
        rows.append(
            StepRow(
                number=number,
                start=start,
                end=end,
                breakdown=Breakdown.added([divided for divided, _ in figures]),
                overlap=Overlap.added([of for _, of in figures]),
                share_of_median=lengths[place] / median if median else None,
            )
        )
    return tuple(rows)


class _Device:
    """The times of one device as sets; each step takes its part of them."""

    def __init__(self, events: Columns) -> None:
        communication, compute = chosen(events, "transfer+wait")
        self.communication = union(events.spans[communication])
        self.compute = union(events.spans[compute])
        self.busy = union(events.spans[~events.of_groups("control")])

    def figures(self, window: Window) -> tuple[Breakdown, Overlap]:
        communication, compute, busy = (_part(of, window) for of in (self.communication, self.compute, self.busy))
        return (
            breakdown_of(busy, compute, window),
            overlap_of(Sides(window, communication, compute), "transfer+wait"),
        )


def _part(of: np.ndarray, window: Window) -> np.ndarray:
    """The times of a set within a window; only intervals in the window are looked at."""
    first = np.searchsorted(of[:, 1], window[0], "right")
    last = np.searchsorted(of[:, 0], window[1], "left")
    return within(of[first:last], *window)


def _widest(found: Iterable[tuple[int, float, float]]) -> dict[int, Window]:
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    for number, start, end in found:
        if number not in starts or start < starts[number]:
            starts[number] = start
        if number not in ends or end > ends[number]:
            ends[number] = end
    return {number: (start, ends[number]) for number, start in starts.items()}


def _numbers(found: Mapping[int, Window]) -> str:
    numbers = sorted(found)
    whole = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    named = f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers[:20]))
    more = f" and {len(numbers) - 20} more" if not whole and len(numbers) > 20 else ""
    return f"step{'s' * (len(numbers) > 1)} {named}{more}"
