"""Turns the simulated timeline of a schedule into a trace, for the same reports as a measured one."""

from __future__ import annotations

from jaxpipe.schedule.simulator import Timeline
from profiling.event import Event, Trace


def read_timeline(timeline: Timeline, unit_us: float = 1.0, title: str | None = None) -> Trace:
    """Turns each group of a simulated schedule into an event.

    The phase of an event is the kinds of its actions: "F", or "FB" for an overlapped pair. Its microbatch is that of
    the first action, its name lists all actions, "0F3&0B0", and its device is the pipeline rank.

    Args:
      timeline: what `jaxpipe.schedule.simulate` returns.
      unit_us: microseconds that one unit of the timeline's costs stands for.
      title: title of the trace; by default the schedule's name.

    Raises:
      ValueError: `unit_us` is not a positive number.

    >>> from jaxpipe.schedule import build, simulate
    >>> trace = read_timeline(simulate(build("gpipe", 2, 1)), unit_us=100.0)
    >>> [(event.device, event.phase, event.microbatch, event.start, event.end) for event in trace.events][:2]
    [(0, 'F', 0, 0.0, 100.0), (1, 'F', 0, 100.0, 200.0)]
    """
    if not 0 < unit_us < float("inf"):
        raise ValueError(f"read_timeline(unit_us={unit_us!r}): one unit takes a positive number of microseconds")
    events = [
        Event(
            device=event.rank,
            lane="compute",
            start=event.start * unit_us,
            end=event.end * unit_us,
            name="&".join(map(str, event.group)),
            kind="action",
            group="compute",
            phase="".join(action.kind.value for action in event.group),
            microbatch=event.group[0].microbatch,
        )
        for row in timeline.events
        for event in row
    ]
    events.sort(key=lambda event: (event.start, event.device))
    schedule = timeline.schedule
    return Trace(
        title=title or f"{schedule.name}, simulated",
        source="simulated",
        events=tuple(events),
        ranks={rank: rank for rank in range(schedule.num_ranks)},
        metadata={
            "schedule": schedule.name,
            "stages": schedule.num_stages,
            "microbatches": schedule.num_microbatches,
            "unit in us": unit_us,
        },
    )
