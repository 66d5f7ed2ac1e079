"""Compares a predicted trace with a measured one, task by task."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

from profiling.event import Event, Trace
from profiling.metrics import breakdown, by_device
from profiling.metrics.intervals import length, spans_of
from profiling.predict.text import aligned

Key = tuple[str, int | None, int | None]
"""Phase, layer, microbatch."""


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """One task in both traces; times are in microseconds since the start of its own trace.

    Attributes:
      device: device of the measured trace.
      phase, layer, microbatch: what tasks are matched by.
      occurrence: number of earlier tasks of that phase, layer and microbatch on the device.
      predicted_start, measured_start: first start of the events.
      predicted_duration, measured_duration: time with any of the events.
    """

    device: int
    phase: str
    layer: int | None
    microbatch: int | None
    occurrence: int
    predicted_start: float
    measured_start: float
    predicted_duration: float
    measured_duration: float

    @property
    def start_error(self) -> float:
        """Predicted less measured start."""
        return self.predicted_start - self.measured_start

    @property
    def duration_error(self) -> float:
        """Predicted less measured duration."""
        return self.predicted_duration - self.measured_duration


@dataclasses.dataclass(frozen=True)
class DeviceRow:
    """One device in both traces.

    Attributes:
      device, rank: device and pipeline rank of the measured trace; the rank is None without a pipeline.
      predicted_bubble, measured_bubble: share of the trace's window without compute.
      inversions: number of pairs of tasks on one predicted lane that started in the other order; pairs: of how many.
    """

    device: int
    rank: int | None
    predicted_bubble: float | None
    measured_bubble: float | None
    inversions: int
    pairs: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A predicted trace against a measured one.

    Attributes:
      predicted, measured: titles of the traces.
      predicted_makespan, measured_makespan: lengths of the windows, in microseconds.
      tasks: tasks of both traces, in the order of the measured starts.
      devices: one row for each measured device that was predicted.
      only_predicted, only_measured: tasks that the other trace does not have as often.
    """

    predicted: str
    measured: str
    predicted_makespan: float
    measured_makespan: float
    tasks: tuple[TaskRow, ...]
    devices: tuple[DeviceRow, ...]
    only_predicted: tuple[str, ...]
    only_measured: tuple[str, ...]

    @property
    def makespan_error(self) -> float | None:
        """The predicted less the measured makespan, as a share of the measured one; None if that is 0."""
        if not self.measured_makespan:
            return None
        return self.predicted_makespan / self.measured_makespan - 1

    @property
    def inversions(self) -> int:
        """The number of order inversions on all devices."""
        return sum(row.inversions for row in self.devices)

    def table(self, most: int = 20) -> str:
        """The comparison as text, with the tasks whose starts are furthest off."""
        error = "" if self.makespan_error is None else f", {self.makespan_error:+.1%}"
        lines = [
            f"predicted {self.predicted!r} against measured {self.measured!r}",
            f"makespan {self.predicted_makespan:,.0f} us against {self.measured_makespan:,.0f} us{error}",
            f"{len(self.tasks)} tasks matched, {self.inversions} order inversions",
            *(f"only predicted: {name}" for name in self.only_predicted[:most]),
            *(f"only measured: {name}" for name in self.only_measured[:most]),
            "",
            *aligned(
                ("device", "rank", "bubble predicted", "measured", "inversions", "of pairs"),
                [
                    (
                        str(row.device),
                        "" if row.rank is None else str(row.rank),
                        *(
                            "" if share is None else f"{share:.1%}"
                            for share in (row.predicted_bubble, row.measured_bubble)
                        ),
                        str(row.inversions),
                        str(row.pairs),
                    )
                    for row in self.devices
                ],
            ),
            "",
            *aligned(
                ("device", "task", "start us", "error", "duration us", "error"),
                [
                    (
                        str(row.device),
                        _name((row.phase, row.layer, row.microbatch), row.occurrence),
                        f"{row.measured_start:,.0f}",
                        f"{row.start_error:+,.0f}",
                        f"{row.measured_duration:,.0f}",
                        f"{row.duration_error:+,.0f}",
                    )
                    for row in sorted(self.tasks, key=lambda row: -abs(row.start_error))[:most]
                ],
            ),
        ]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Task:
    lane: str
    start: float
    events: tuple[Event, ...]

    @property
    def duration(self) -> float:
        return length(spans_of(self.events))


def compare(predicted: Trace, measured: Trace) -> Comparison:
    """Compares a predicted trace with a measured one.

    A task is what a device does without a break on one lane for one phase, layer and microbatch. The n-th predicted
    task is compared with the n-th measured one. If one trace has a single task that the other has in pieces, such as
    kernels on two streams, the pieces are joined. If both traces have pipeline ranks, devices are compared by rank,
    otherwise by number.

    Raises:
      ValueError: a trace has no events, or the traces have no device in common.

    >>> from profiling.predict.replaying import Task, replay
    >>> found = compare(replay([Task("a", 3.0, phase="F")]), replay([Task("a", 4.0, phase="F")]))
    >>> found.makespan_error, found.tasks[0].duration_error
    (-0.25, -1.0)
    """
    for trace in (predicted, measured):
        if not trace.events:
            raise ValueError(f"trace {trace.title!r} has no events: there is nothing to compare")
    pairs = _pairs(predicted, measured)
    if not pairs:
        raise ValueError(
            f"no device in common: predicted {predicted.devices} with ranks {dict(predicted.ranks)}, measured "
            f"{measured.devices} with ranks {dict(measured.ranks)}; set the ranks of both traces"
        )
    expected, found = _tasks(predicted), _tasks(measured)
    windows = predicted.window, measured.window
    parts = by_device(predicted), by_device(measured)
    rows: list[TaskRow] = []
    devices = []
    only_predicted: list[str] = []
    only_measured: list[str] = []
    for theirs, device in pairs:
        lanes: dict[str, list[tuple[float, float]]] = {}
        for key in dict.fromkeys((*expected[theirs], *found[device])):
            left, right = _matched(expected[theirs].get(key, []), found[device].get(key, []))
            if len(left) != len(right):
                where = f"{_name(key)} on device {device}"
                only_predicted += [f"{len(left)} x {where}"] if left else []
                only_measured += [f"{len(right)} x {where}"] if right else []
                continue
            for row, lane in _task_rows(device, key, left, right, (windows[0][0], windows[1][0])):
                rows.append(row)
                lanes.setdefault(lane, []).append((row.predicted_start, row.measured_start))
        devices.append(
            DeviceRow(
                device=device,
                rank=measured.ranks.get(device),
                predicted_bubble=breakdown(parts[0][theirs], windows[0]).compute_bubble,
                measured_bubble=breakdown(parts[1][device], windows[1]).compute_bubble,
                inversions=sum(map(_inversions, lanes.values())),
                pairs=sum(len(starts) * (len(starts) - 1) // 2 for starts in lanes.values()),
            )
        )
    return Comparison(
        predicted=predicted.title,
        measured=measured.title,
        predicted_makespan=windows[0][1] - windows[0][0],
        measured_makespan=windows[1][1] - windows[1][0],
        tasks=tuple(sorted(rows, key=lambda row: row.measured_start)),
        devices=tuple(devices),
        only_predicted=tuple(only_predicted),
        only_measured=tuple(only_measured),
    )


def _task_rows(
    device: int, key: Key, predicted: Sequence[_Task], measured: Sequence[_Task], origins: tuple[float, float]
) -> Iterator[tuple[TaskRow, str]]:
    """The n-th predicted task beside the n-th measured one, with the lane of the prediction."""
    for occurrence, (task, real) in enumerate(zip(predicted, measured, strict=True)):
        start, real_start = task.start - origins[0], real.start - origins[1]
        yield TaskRow(device, *key, occurrence, start, real_start, task.duration, real.duration), task.lane


def _pairs(predicted: Trace, measured: Trace) -> list[tuple[int, int]]:
    """Each measured device, after the predicted device that it is compared with."""
    if not (predicted.ranks and measured.ranks):
        known = predicted.devices
        return [(device, device) for device in measured.devices if device in known]
    of_rank: dict[int, int] = {}
    for device in predicted.devices:
        if device in predicted.ranks:
            of_rank.setdefault(predicted.ranks[device], device)
    return [
        (of_rank[measured.ranks[device]], device)
        for device in measured.devices
        if measured.ranks.get(device) in of_rank
    ]


def _tasks(trace: Trace) -> dict[int, dict[Key, list[_Task]]]:
    """``{device: {key: tasks in the order of their starts}}``: unbroken runs of one key on one lane."""
    runs: dict[tuple[int, str], list[tuple[Key, list[Event]]]] = {}
    for event in trace.events:
        if event.group == "control" or not event.phase:
            continue
        key = (event.phase, event.layer, event.microbatch)
        lane = runs.setdefault((event.device, event.lane), [])
        if not lane or lane[-1][0] != key:
            lane.append((key, []))
        lane[-1][1].append(event)
    tasks: dict[int, dict[Key, list[_Task]]] = {device: {} for device in trace.devices}
    for (device, lane), found in runs.items():
        for key, events in found:
            tasks[device].setdefault(key, []).append(_Task(lane, events[0].start, tuple(events)))
    for by_key in tasks.values():
        for found in by_key.values():
            found.sort(key=lambda task: task.start)
    return tasks


def _matched(left: list[_Task], right: list[_Task]) -> tuple[list[_Task], list[_Task]]:
    """Both lists; the pieces of one are joined if the other has a single task."""
    if len(left) == 1 < len(right):
        return left, [_joined(right)]
    if len(right) == 1 < len(left):
        return [_joined(left)], right
    return left, right


def _joined(tasks: Sequence[_Task]) -> _Task:
    return _Task(tasks[0].lane, tasks[0].start, tuple(event for task in tasks for event in task.events))


def _inversions(starts: Sequence[tuple[float, float]]) -> int:
    """The number of pairs whose second numbers are in the other order than their first."""
    seen: list[float] = []
    count = 0
    for _, start in sorted(starts):
        count += len(seen) - bisect.bisect_right(seen, start)
        bisect.insort(seen, start)
    return count


def _name(key: Key, occurrence: int = 0) -> str:
    phase, layer, microbatch = key
    parts = [phase, *(f"{what} {n}" for what, n in (("layer", layer), ("microbatch", microbatch)) if n is not None)]
    return ", ".join([*parts, *([f"again {occurrence}"] if occurrence else [])])
