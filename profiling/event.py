"""The event model that readers make and metrics, writers and reports take: events on lanes of devices."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

GROUPS = ("compute", "transfer", "wait", "unclassified", "control")
"""What the time of an event counts as. A transfer moves data between devices. A wait is a barrier or a notification and
moves nothing. Control is a loop, branch or call around operations that have events of their own, so its time is not
counted again. Everything else that a device does is compute, copies within the device included."""


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """What a profiler says about the communication that an event is part of; None or "" where it says nothing.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "reduce", "send", "receive" ...
      group: name of the process group.
      ranks: members of the group in its order; None if the list is missing or the profiler cut it.
      size: number of ranks in the group.
      sent, received: bytes of the input and of the output on this rank.
      dtype: type of the elements, in the profiler's words.
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
      device: index over all processes; `Trace.ranks` maps it to a pipeline rank.
      lane: what runs one event after another: a GPU stream, or a name such as "compute".
      start, end: microseconds since the trace's origin.
      name: name of the kernel or the operation, as the profiler gave it.
      hlo_op: name of the instruction in the compiled module; "" if there is none.
      scope: path of named scopes that it was traced under, "jit(step)/F/layer_0/attention"; "" if unknown.
      kind: what it does, such as "grouped GEMM"; the classification sets it.
      group: one of `GROUPS`.
      phase: part of the step that it belongs to: an action's kind ("F", "B", "I", "W", "FB") or a finer name such as
        "attn(F)"; "" if unknown.
      layer, microbatch: indices; None if unknown.
      blocks: number of thread blocks that a kernel was launched with; None if unknown.
      step: number of the host's step that launched it; None if unknown.
      collective: what the profiler says about its communication; None if it says nothing.
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
    """A stretch of the host's time that the user named, such as a training step.

    Attributes:
      name: name of the annotation.
      number: number of the step; None if it has none.
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
    """Events in the order of their starts, and where they come from.

    Attributes:
      title: title for headings.
      source: which reader made it: "kineto", "xplane" or "simulated".
      events: events of the devices, without those of host threads.
      steps: steps that the host annotated.
      ranks: ``{device: pipeline rank}``; empty without a pipeline.
      metadata: facts for people, such as the chip and its number of SMs.
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
        """The first start and the last end over all devices, in microseconds; (0, 0) without events."""
        if not self.events:
            return 0.0, 0.0
        return min(map(_START, self.events)), max(map(_END, self.events))

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices that have events, in order."""
        return tuple(sorted(set(map(_DEVICE, self.events))))

    def clip(self, start: float, end: float) -> Trace:
        """The part of the trace between two times, in microseconds. Events and steps across an edge are cut there.

        Raises:
          ValueError: the start does not lie before the end.

        >>> Trace("", "simulated", (Event(0, "compute", 0.0, 2.0, "a"),)).clip(1.0, 5.0).events[0].duration
        1.0
        """
        if not start < end:
            raise ValueError(f"clip({start}, {end}): the start must lie before the end")
        kept = tuple(_cut(event, start, end) for event in self.events if event.start < end and event.end > start)
        steps = tuple(_cut(step, start, end) for step in self.steps if step.start < end and step.end > start)
        return dataclasses.replace(self, events=kept, steps=steps)


def _cut(of: T, start: float, end: float) -> T:
    """The event or step itself if it lies within the two times, otherwise the part that does."""
    if start <= of.start and of.end <= end:
        return of
    return dataclasses.replace(of, start=max(of.start, start), end=min(of.end, end))
