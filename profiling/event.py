"""What every reader makes and every metric, writer and report takes: events on lanes of devices."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

GROUPS = ("compute", "transfer", "wait", "unclassified", "control")
"""What the time of an event counts as. Transfers move data between devices; a wait is a barrier or a notification,
in which nothing moves; control is a loop, branch or call round operations that have events of their own, so that its
time counts nowhere; all else that a device does is compute, copies within the device included."""


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """What a profiler says of the communication that an event is part of; None or "" where it does not say.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "reduce", "send", "receive" ...
      group: name of the process group.
      ranks: of the group, in the order of the group; None where the list is missing or was cut by the profiler.
      size: number of ranks in the group.
      sent, received: bytes of the input and of the output on this rank.
      dtype: of the elements, as the profiler names it.
      sequence: number of the collective within its group.
    """

    kind: str
    group: str = ""
    ranks: tuple[int, ...] | None = None
    size: int | None = None
    sent: int | None = None
    received: int | None = None
    dtype: str = ""
    sequence: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that one lane of one device did, from start to end.

    Attributes:
      device: index over all processes; on a pipeline it is what `Trace.ranks` maps to a pipeline rank.
      lane: what runs one event after another: a GPU stream, or a name such as "compute".
      start, end: microseconds since the trace's origin.
      name: of the kernel or the operation, as the profiler gave it.
      hlo_op: the instruction of the compiled module; "" where there is none.
      scope: the path of named scopes that it was traced under, "jit(step)/F/layer_0/attention"; "" if unknown.
      kind: what it does, a row of the classification, such as "grouped GEMM".
      group: one of `GROUPS`.
      phase: the part of the step that it belongs to: an action's kind ("F", "B", "I", "W", "FB") or a finer name such
        as "attn(F)"; "" if unattributed.
      layer, microbatch: indices, None if unknown.
      blocks: thread blocks that a kernel was launched with, None if unknown.
      step: number of the step of the host that launched it, None if unknown.
      collective: what the profiler says of it where it communicates, None if nothing.
    """

    device: int
    lane: str
    start: float
    end: float
    name: str
    hlo_op: str = ""
    scope: str = ""
    kind: str = "unclassified"
    group: str = "unclassified"
    phase: str = ""
    layer: int | None = None
    microbatch: int | None = None
    blocks: int | None = None
    step: int | None = None
    collective: Collective | None = None

    @property
    def duration(self) -> float:
        """Microseconds from start to end."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A stretch of the host's time that the user named, a training step for instance.

    Attributes:
      name: of the annotation.
      number: of the step, None if it has none.
      start, end: microseconds since the trace's origin.
    """

    name: str
    number: int | None
    start: float
    end: float


T = TypeVar("T", Event, Step)
_START, _END, _DEVICE = map(operator.attrgetter, ("start", "end", "device"))


@dataclasses.dataclass(frozen=True)
class Trace:
    """Events in the order of their starts, and what is known about where they come from.

    Attributes:
      title: for headings.
      source: which reader made it: "kineto", "xplane" or "simulated".
      events: device events; host threads are not among them.
      steps: annotations of the host.
      ranks: pipeline rank of each device, ``{device: rank}``; empty without a pipeline.
      metadata: facts for a reader, such as the chip and its number of SMs.
      notes: what is missing or doubtful in this trace; every report prints them.

    >>> Trace("two ops", "simulated", (Event(0, "compute", 0.0, 2.0, "a"), Event(0, "compute", 3.0, 4.0, "b"))).window
    (0.0, 4.0)
    """

    title: str
    source: str
    events: tuple[Event, ...]
    steps: tuple[Step, ...] = ()
    ranks: Mapping[int, int] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def window(self) -> tuple[float, float]:
        """First start and last end over all devices, in microseconds; (0, 0) without events."""
        if not self.events:
            return 0.0, 0.0
        return min(map(_START, self.events)), max(map(_END, self.events))

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices that have events, in order."""
        return tuple(sorted(set(map(_DEVICE, self.events))))

    def clip(self, start: float, end: float) -> Trace:
        """The same trace between two times: events and steps outside are left out, those across an edge are cut there.

        >>> Trace("", "simulated", (Event(0, "compute", 0.0, 2.0, "a"),)).clip(1.0, 5.0).events[0].duration
        1.0
        """
        if not start < end:
            raise ValueError(f"clip({start}, {end}): the start must lie before the end")
        kept = tuple(_cut(event, start, end) for event in self.events if event.start < end and event.end > start)
        steps = tuple(_cut(step, start, end) for step in self.steps if step.start < end and step.end > start)
        return dataclasses.replace(self, events=kept, steps=steps)


def _cut(of: T, start: float, end: float) -> T:
    """The same where it lies within, else its part."""
    if start <= of.start and of.end <= end:
        return of
    return dataclasses.replace(of, start=max(of.start, start), end=min(of.end, end))
