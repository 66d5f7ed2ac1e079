"""Predicts a timeline from tasks with given durations; each lane runs its tasks in a fixed order, as soon as it can.

The durations are inputs. They may come from a trace (`profiling.metrics.phase_durations`), from operations measured
alone on one GPU, or from a model of the network. The prediction is what order and dependencies make of them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from profiling.event import GROUPS, Event, Trace


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of one lane of one device.

    Attributes:
      name: name that no other task has.
      duration: duration in microseconds.
      device, lane: where the task runs; a lane runs its tasks one at a time, in the order given.
      after: names of tasks, on any lane or device, that must end first.
      kind, group, phase, layer, microbatch, blocks: facts for the event, see `Event`.

    Raises:
      ValueError: the duration is negative or not finite, or the group is unknown.
    """

    name: str
    duration: float
    device: int = 0
    lane: str = "compute"
    after: tuple[str, ...] = ()
    kind: str = "task"
    group: str = "compute"
    phase: str = ""
    layer: int | None = None
    microbatch: int | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.duration) and self.duration >= 0):
            raise ValueError(f"task {self.name!r} takes {self.duration!r} us: a duration is finite and not negative")
        if self.group not in GROUPS:
            raise ValueError(f"task {self.name!r}: group {self.group!r} is none of {', '.join(GROUPS)}")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The phases of a layer, which repeat layer by layer on one device.

    Attributes:
      lanes: ``{lane: phases in their order}``; the lane "communication" transfers, the others compute.
      after: ``{phase: phases of the same layer that must end first}``.
      previous: ``{phase: phases of the layer before that must end first}``.
    """

    lanes: Mapping[str, tuple[str, ...]]
    after: Mapping[str, tuple[str, ...]]
    previous: Mapping[str, tuple[str, ...]]

    @property
    def phases(self) -> tuple[str, ...]:
        """All phases, lane by lane."""
        return tuple(phase for phases in self.lanes.values() for phase in phases)


OVERLAPPED_PAIR = Pattern(
    lanes={
        "compute": ("attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)", "attn(W)"),
        "communication": ("combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"),
    },
    after={
        "mlp(B)": ("combine(B)",),
        "mlp(W)": ("mlp(B)",),
        "dispatch(F)": ("attn(F)",),
        "dispatch(B)": ("mlp(B)",),
        "mlp(F)": ("dispatch(F)",),
        "attn(B)": ("dispatch(B)",),
        "attn(W)": ("attn(B)",),
        "combine(F)": ("mlp(F)",),
    },
    previous={"combine(B)": ("attn(B)",), "attn(F)": ("combine(F)",)},
)
"""DualPipe's overlapped forward and backward of two microbatches, as DeepSeek trains. The combine of the forward pass
is a dispatch in the backward pass and the other way round, so combine(B) comes before mlp(B)."""

PREFILL = Pattern(
    lanes={
        "compute": ("attn(1)", "shared(0)", "attn(0)", "mlp(1)", "mlp(0)", "shared(1)"),
        "communication": ("combine(0)", "dispatch(1)", "dispatch(0)", "combine(1)"),
    },
    after={
        "attn(0)": ("combine(0)", "shared(0)"),
        "dispatch(1)": ("attn(1)",),
        "dispatch(0)": ("attn(0)",),
        "mlp(1)": ("dispatch(1)",),
        "mlp(0)": ("dispatch(0)",),
        "combine(1)": ("mlp(1)",),
        "shared(1)": ("attn(1)",),
    },
    previous={"attn(1)": ("combine(1)", "shared(1)"), "combine(0)": ("mlp(0)",), "shared(0)": ("attn(0)",)},
)
"""Two microbatches of a prompt: one computes while the other communicates. A layer of microbatch 0 begins here with the
end of its layer before."""

DECODE = Pattern(
    lanes={
        "compute": (
            "shared(0)",
            "attn_0(1)",
            "mlp(0)",
            "attn_1(1)",
            "shared(1)",
            "attn_0(0)",
            "mlp(1)",
            "attn_1(0)",
        ),
        "communication": ("dispatch(0)", "combine(0)", "dispatch(1)", "combine(1)"),
    },
    after={
        "mlp(0)": ("dispatch(0)",),
        "combine(0)": ("mlp(0)",),
        "attn_1(1)": ("attn_0(1)",),
        "dispatch(1)": ("attn_1(1)",),
        "shared(1)": ("attn_1(1)",),
        "attn_0(0)": ("combine(0)", "shared(0)"),
        "mlp(1)": ("dispatch(1)",),
        "combine(1)": ("mlp(1)",),
        "attn_1(0)": ("attn_0(0)",),
    },
    previous={
        "dispatch(0)": ("attn_1(0)",),
        "shared(0)": ("attn_1(0)",),
        "attn_0(1)": ("combine(1)", "shared(1)"),
    },
)
"""Two microbatches of single tokens. Attention has two parts, so that each exchange has compute beside it."""


def pattern_tasks(pattern: Pattern, durations: Sequence[Mapping[str, float]], device: int = 0) -> tuple[Task, ...]:
    """The tasks of a pattern, layer after layer.

    Args:
      pattern: `OVERLAPPED_PAIR`, `PREFILL`, `DECODE` or your own.
      durations: ``[layers]`` of ``{phase: microseconds}``.
      device: device that runs them.

    Raises:
      ValueError: a layer lacks a phase of the pattern or has another one.

    >>> pattern = Pattern({"compute": ("mlp",), "communication": ("combine",)}, {"combine": ("mlp",)}, {})
    >>> [task.name for task in pattern_tasks(pattern, [{"mlp": 3.0, "combine": 2.0}])]
    ['mlp, layer 0, device 0', 'combine, layer 0, device 0']
    """

    def name(phase: str, layer: int) -> str:
        return f"{phase}, layer {layer}, device {device}"

    tasks = []
    for layer, times in enumerate(durations):
        if set(times) != set(pattern.phases):
            raise ValueError(
                f"layer {layer} has durations of {sorted(times)}: give one for each of {sorted(pattern.phases)}"
            )
        for lane, phases in pattern.lanes.items():
            for phase in phases:
                before = [name(other, layer) for other in pattern.after.get(phase, ())]
                if layer:
                    before += [name(other, layer - 1) for other in pattern.previous.get(phase, ())]
                tasks.append(
                    Task(
                        name=name(phase, layer),
                        duration=times[phase],
                        device=device,
                        lane=lane,
                        after=tuple(before),
                        kind=phase.partition("(")[0],
                        group="transfer" if lane == "communication" else "compute",
                        phase=phase,
                        layer=layer,
                    )
                )
    return tuple(tasks)


def overlapped_pair_tasks(durations: Sequence[Mapping[str, float]], device: int = 0) -> tuple[Task, ...]:
    """DualPipe's overlapped pair of chunks on one device: `pattern_tasks` of `OVERLAPPED_PAIR`.

    >>> layer = {phase: 1.0 for phase in OVERLAPPED_PAIR.phases}
    >>> replay(overlapped_pair_tasks([layer])).window
    (0.0, 6.0)
    """
    return pattern_tasks(OVERLAPPED_PAIR, durations, device)


def replay(
    tasks: Sequence[Task],
    title: str = "predicted",
    ranks: Mapping[int, int] | None = None,
    notes: Sequence[str] = (),
) -> Trace:
    """Predicts a timeline. A lane runs its tasks in the order given, each as soon as those that it needs have ended.

    Args:
      tasks: tasks of all devices. Their durations include how much they slow each other down.
      title, ranks, notes: title, ranks and notes of the trace.

    Raises:
      ValueError: two tasks have one name, a dependency is no task, or tasks wait for each other.

    >>> gemm, send = Task("gemm", 3.0), Task("send", 2.0, lane="communication", after=("gemm",), group="transfer")
    >>> [(event.name, event.start, event.end) for event in replay([gemm, send, Task("next", 4.0)]).events]
    [('gemm', 0.0, 3.0), ('send', 3.0, 5.0), ('next', 3.0, 7.0)]
    """
    times, _ = _schedule(tasks)
    events = [
        Event(
            device=task.device,
            lane=task.lane,
            start=times[task.name],
            end=times[task.name] + task.duration,
            name=task.name,
            kind=task.kind,
            group=task.group,
            phase=task.phase,
            layer=task.layer,
            microbatch=task.microbatch,
            blocks=task.blocks,
        )
        for task in tasks
    ]
    events.sort(key=lambda event: (event.start, event.end))
    return Trace(title, "simulated", tuple(events), ranks=dict(ranks or {}), notes=tuple(notes))


def critical_path(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks that the makespan consists of. Each starts when the one before ends.

    A shorter task of this path shortens the step.

    Raises:
      ValueError: as in `replay`.

    >>> gemm, send = Task("gemm", 3.0), Task("send", 2.0, lane="communication", after=("gemm",), group="transfer")
    >>> [task.name for task in critical_path([gemm, send, Task("next", 4.0)])]
    ['gemm', 'next']
    """
    times, bound = _schedule(tasks)
    by_name = {task.name: task for task in tasks}
    path: list[Task] = []
    name = max(by_name, key=lambda name: times[name] + by_name[name].duration, default=None)
    while name is not None:
        path.append(by_name[name])
        name = bound[name]
    return tuple(reversed(path))


def _schedule(tasks: Sequence[Task]) -> tuple[dict[str, float], dict[str, str | None]]:
    """The start of each task, and the task that ends then; None for a start at 0."""
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        twice = [name for name, count in collections.Counter(task.name for task in tasks).items() if count > 1]
        raise ValueError(f"tasks of the same name: {', '.join(map(repr, twice[:5]))}; give each its own")
    last: dict[tuple[int, str], str] = {}
    before: dict[str, tuple[str, ...]] = {}
    followers: dict[str, list[str]] = {task.name: [] for task in tasks}
    for task in tasks:
        lane = (task.device, task.lane)
        before[task.name] = (*dict.fromkeys((*task.after, *((last[lane],) if lane in last else ()))),)
        last[lane] = task.name
        for name in before[task.name]:
            if name not in by_name:
                raise ValueError(f"task {task.name!r} comes after {name!r}, which is no task")
            followers[name].append(task.name)
    missing = {name: len(names) for name, names in before.items()}
    ready = collections.deque(name for name, count in missing.items() if not count)
    times: dict[str, float] = {}
    bound: dict[str, str | None] = {}
    while ready:
        name = ready.popleft()
        bound[name] = max(before[name], key=lambda other: times[other] + by_name[other].duration, default=None)
        previous = bound[name]
        times[name] = 0.0 if previous is None else times[previous] + by_name[previous].duration
        for follower in followers[name]:
            missing[follower] -= 1
            if not missing[follower]:
                ready.append(follower)
    if len(times) < len(tasks):
        stuck = {name: [o for o in before[name] if o not in times] for name in by_name if name not in times}
        shown = "; ".join(f"{name!r} after {', '.join(map(repr, others))}" for name, others in list(stuck.items())[:5])
        raise ValueError(f"tasks wait for each other, by their dependencies or the order of their lane: {shown}")
    return times, bound
