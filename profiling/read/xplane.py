"""Reads profiles of `jax.profiler`, on GPU, TPU and CPU."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from profiling.classify.classifier import XLA, Rule, classify
from profiling.event import Event, Step, Trace
from profiling.read.file_kinds import is_xspace
from profiling.read.impossible import overrunning_at_end
from profiling.read.scopes import PARTS
from profiling.read.wire import messages
from profiling.read.xplane_events import GPU, HOST, OVERRUN, TPU, PlaneReader, Window, has_events
from profiling.read.xplane_files import Clock, clock, find_profile, host_of, read_bytes, sidecar
from profiling.read.xplane_modules import PLANE, Modules, read_modules
from profiling.read.xspace import Plane, complaints, plane_name, read_plane

_DAY = 86_400e6
_MARGIN = 10e6
_EPOCH = 10**17  # times in nanoseconds: above, of the epoch, from 1973 on; below, since the profile's start


class XplaneReader:
    """Reads profiles of `jax.profiler` for `profiling.read_trace`; see `profiling.read.reader.Reader`."""

    profiler = "jax.profiler"
    files = "a profile of jax.profiler (.xplane.pb)"

    def sniff(self, head: bytes, name: str) -> str:
        """Looks at the planes that a profile begins with, or at its name."""
        return "a profile of jax.profiler" if is_xspace(head, name) else ""

    def find(self, folder: pathlib.Path) -> str:
        """Finds the first profile in the order of the paths."""
        return next((file.name for file in sorted(folder.rglob("*.xplane.pb*"))), "")

    def read(self, paths: Sequence[pathlib.Path], rules: Sequence[Rule]) -> Trace:
        """Reads one file, or one folder with the files of all processes."""
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {len(paths) - 1} more: of jax.profiler; name one folder with all of them")
        return read_xplane(paths[0], rules=rules)


@dataclasses.dataclass(frozen=True)
class _File:
    """The profile of one process before its events are read.

    Attributes:
      path: path of the file.
      planes: all planes but that of the compiled modules.
      modules: compiled modules that the profile carries.
      clock: when the profile was taken.
      since: whether times count from the start of the profile and not from the epoch.
      known: what the capture noted.
      notes: what the profiler reports.
      doubts: what was left out, and how often.
    """

    path: pathlib.Path
    planes: tuple[Plane, ...]
    modules: Modules
    clock: Clock
    since: bool
    known: Mapping[str, Any]
    notes: tuple[str, ...]
    doubts: collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class _Profile:
    events: list[Event]
    steps: list[Step]
    metadata: dict[str, Any]
    notes: list[str]


def read_xplane(
    path: str | pathlib.Path,
    *,
    rules: Sequence[Rule] = (),
    parts: Mapping[str, str] = PARTS,
    ranks: Mapping[int, int] | None = None,
) -> Trace:
    """Reads one file, or the newest profile of a folder with all its processes.

    Files that `profiling.capture` wrote name their devices. Devices of other files are numbered in the order of the
    names of log folders and hosts and, within a file, in the profiler's order; the notes say which is which. A single
    file keeps the profiler's numbers.

    Args:
      path: an ``.xplane.pb`` file, packed with gzip or not, or a folder that `jax.profiler.start_trace` or
        `profiling.capture` wrote. Sessions of a folder that began within a minute are one job's if every host has only
        one file in them, or its files were written at the same time; otherwise the newest session is read.
      rules: your own rules, tried before the tables of this package.
      parts: ``{name of a scope: part of a layer}``, such as {"attention": "attn"}.
      ranks: pipeline rank of each device; None takes what the capture noted.

    Returns:
      One trace of all processes, on the clock of their hosts.

    Raises:
      ValueError: there is no profile, it is damaged, or it holds no operation of a device; the message names the file.
    """
    paths, about_files = find_profile(pathlib.Path(path))
    files = [_open(file) for file in paths]
    origin = _origin(files)
    numbers = _Numbers(files)
    known = {int(device): rank for file in files for device, rank in file.known.get("ranks", {}).items()}
    about_files += _clock_notes(files, origin)
    profiles = []
    for i, file in enumerate(files):
        profiles.append(_read(file, numbers, parts, origin))
        files[i] = dataclasses.replace(file, planes=())  # the bytes are done with
    events = [event for profile in profiles for event in profile.events]
    if not events:
        raise ValueError(f"{path}: {_nothing(profiles)}")
    events.sort(key=lambda event: (event.start, event.end))
    metadata: dict[str, Any] = {"origin_ns": origin or 0}
    for profile in profiles:
        metadata = {**profile.metadata, **metadata}
    notes = [note for profile in profiles for note in profile.notes]
    trace = Trace(
        title=pathlib.Path(path).name,
        source="xplane",
        events=tuple(events),
        steps=_joint_steps([profile.steps for profile in profiles]),
        ranks=known if ranks is None else ranks,
        metadata={**metadata, "processes": len(profiles)},
        notes=tuple(dict.fromkeys([*notes, *_hidden_by_graphs(events), *numbers.notes, *about_files])),
    )
    return classify(trace, (*rules, *XLA))


def _open(path: pathlib.Path) -> _File:
    data = read_bytes(path)
    doubts: collections.Counter[str] = collections.Counter()
    try:
        planes = tuple(read_plane(plane, doubts) for plane in messages(data, 1) if plane_name(plane) not in (PLANE, ""))
        return _File(
            path=path,
            planes=planes,
            modules=read_modules(data, doubts),
            clock=clock(data),
            since=_typical_time(planes) < _EPOCH,
            known=sidecar(path),
            notes=tuple(f"the profiler reports: {complaint}" for complaint in complaints(data)),
            doubts=doubts,
        )
    except ValueError as error:
        if str(path.parent) in str(error):
            raise
        raise ValueError(f"{path}: this is no profile, or it is damaged: {error}; copy or record it again") from None


def _typical_time(planes: Iterable[Plane]) -> float:
    times = [line.timestamp_ns for plane in planes for line in plane.lines if line.count]
    return statistics.median(times) if times else 0


def _began(file: _File) -> int | None:
    """When the profile of a process began, in nanoseconds of the epoch; None if it does not say."""
    if file.clock.start_ns is not None or file.since:
        return file.clock.start_ns
    return int(_typical_time(file.planes))


def _origin(files: Sequence[_File]) -> int | None:
    """The origin of the trace's times; None if not every file says when it began."""
    began = [_began(file) for file in files]
    known = [time for time in began if time is not None]
    return min(known) if len(known) == len(began) else None


def _window(file: _File, origin: int | None) -> Window:
    began = _began(file) or 0
    shift = 0 if origin is None else began - origin
    start, stop = file.clock.start_ns, file.clock.stop_ns
    length = (stop - start) / 1e3 if start is not None and stop is not None else 0.0
    # Twice the length and a margin, as devices' clocks drift from the host's and work goes on when a profile ends.
    beyond = length + _MARGIN if 0 < length < _DAY else _DAY
    return Window(
        zero_ns=(0 if file.since else began) - shift, low=shift / 1e3 - beyond, high=shift / 1e3 + length + beyond
    )


def _clock_notes(files: Sequence[_File], origin: int | None) -> list[str]:
    if len(files) == 1:
        return []
    if origin is None:
        return [
            f"{len(files)} processes, of which not all say when they began: each counts from its own start, and times "
            "of different processes cannot be compared"
        ]
    notes = []
    clocks = [file.clock for file in files]
    starts = [clock.start_ns for clock in clocks if clock.start_ns is not None]
    stops = [clock.stop_ns for clock in clocks if clock.stop_ns is not None]
    if stops and len(starts) == len(stops) == len(files) and max(starts) >= min(stops):
        notes.append("not all processes were profiled at the same time: a profile begins after another has ended")
    notes.append(f"{len(files)} processes, aligned by their hosts' clocks: differences below 1 ms mean nothing")
    return notes


class _Numbers:
    """Numbers the devices of all files, and notes which is which.

    Args:
      files: all files. What a capture noted counts, unless two captures name the same devices: they ran without knowing
        of each other and are numbered as if they had noted nothing.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        self._alone = len(files) == 1
        claims = [tuple(file.known.get("devices", {}).values()) for file in files]
        claimed = collections.Counter(device for claim in claims for device in set(claim))
        self._trusted = {
            file.path: bool(claim) and (self._alone or all(claimed[device] == 1 for device in claim))
            for file, claim in zip(files, claims, strict=True)
        }
        trusted = [claim for file, claim in zip(files, claims, strict=True) if self._trusted[file.path]]
        self._next = max((device + 1 for claim in trusted for device in claim), default=0)
        self._given: list[str] = []
        self._doubted = any(claim and not self._trusted[file.path] for file, claim in zip(files, claims, strict=True))

    def give(self, file: _File, kind: str, found: Iterable[int]) -> dict[int, int]:
        """``{the profiler's number: the trace's number}`` of the devices of a file."""
        local = sorted(set(found))
        known = {int(number): device for number, device in file.known.get("devices", {}).items()}
        numbers = {n: known[n] for n in local if n in known} if self._trusted[file.path] else {}
        for n in local:
            if n not in numbers:
                numbers[n] = n if self._alone else self._next
                self._next += not self._alone
        if not self._alone and not self._trusted[file.path] and local:
            given = [numbers[n] for n in local]
            self._given.append(f"{_range(given)}: {kind} {_range(local)} of {host_of(file.path)}")
        return numbers

    @property
    def notes(self) -> list[str]:
        """Says which device is which, if the files do not say it themselves."""
        if not self._given:
            return []
        why = "captures name the same devices" if self._doubted else "the files do not name their devices"
        return [f"{why}, so they are numbered in the order of the hosts' names: {'; '.join(self._given)}"]


def _range(numbers: Sequence[int]) -> str:
    is_run = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]} to {numbers[-1]}" if is_run else ", ".join(map(str, numbers))


def _read(file: _File, numbers: _Numbers, parts: Mapping[str, str], origin: int | None) -> _Profile:
    metadata: dict[str, Any] = dict(file.known.get("metadata", {}))
    doubts = file.doubts
    reader = PlaneReader(file.modules, parts, _window(file, origin), doubts)
    notes = list(file.notes)
    devices = [plane for plane in file.planes if has_events(plane)]
    events: list[Event] = []
    steps: list[Step] = []
    left: list[str] = []
    try:
        for kind, pattern, read in (("GPU", GPU, reader.gpu), ("TPU", TPU, reader.tpu)):
            local = [(int(found[1]), plane) for plane in devices if (found := pattern.fullmatch(plane.name))]
            given = numbers.give(file, kind, (n for n, _ in local))
            for n, plane in local:
                found = list(read(plane, given[n]))
                events += _possible(found, doubts) if kind == "GPU" else found
                metadata |= _of_plane(plane, metadata)
                metadata.setdefault("platform", kind.lower())
        for plane in file.planes:
            if plane.name == HOST:
                steps += reader.steps(plane)
                if devices:
                    reader.count_host_operations(plane)
                else:
                    events += reader.cpu(plane, lambda found: numbers.give(file, "CPU", found))
            elif plane.name.startswith("/device:") and plane not in devices:
                left += [f"{line.name!r} of {plane.name} ({line.count})" for line in plane.lines if line.count]
    except ValueError as error:
        raise ValueError(f"{file.path}: the profile is damaged: {error}; copy or record it again") from None
    metadata.setdefault("platform", "cpu")
    if left:
        more = f", and {len(left) - 4} more" if len(left) > 4 else ""
        notes.append(f"lines (and their events) of devices that are not read here: {', '.join(left[:4])}{more}")
    notes += [f"{doubt}: {count:,}" for doubt, count in sorted(doubts.items()) if count]
    if metadata["platform"] == "cpu" and events:
        notes.append("CPU devices share cores: their times tell what happens in which order, not how fast a GPU is")
    if metadata["platform"] == "tpu":
        notes.append("planes of TPUs are read by the public description of their format, without a TPU to check it on")
    return _Profile(events, steps, metadata, notes)


def _possible(events: list[Event], doubts: collections.Counter[str]) -> list[Event]:
    """The events of one GPU without those whose ends are impossible, which are counted."""
    overrun = set(map(id, overrunning_at_end(events)))
    doubts[OVERRUN] += len(overrun)
    return [event for event in events if id(event) not in overrun] if overrun else events


def _of_plane(plane: Plane, known: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that the plane of a device tells and the capture did not note."""
    said = {
        "sms": plane.stats.get("core_count"),
        "chip": plane.stats.get("gpu_device_name") or plane.stats.get("device_type_string"),
        "vendor": plane.stats.get("device_vendor"),
    }
    return {key: value for key, value in said.items() if value is not None and key not in known}


def _nothing(profiles: Sequence[_Profile]) -> str:
    reasons = [note for profile in profiles for note in profile.notes]
    because = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
    return (
        f"the profile has no operation of a device that is read here, a GPU, a TPU or a CPU{because}; on CPU keep "
        "host_tracer_level at 1 or above, and let the step end (jax.block_until_ready) before the profile does"
    )


def _joint_steps(found: Sequence[Sequence[Step]]) -> tuple[Step, ...]:
    """Joins steps of one name and number of all processes, from the first start to the last end.

    If a process has a step twice, the first ones of all processes are one step and the second ones another.
    """
    joint: dict[tuple[str, int | None, int], list[Step]] = collections.defaultdict(list)
    for steps in found:
        seen: collections.Counter[tuple[str, int | None]] = collections.Counter()
        for step in sorted(steps, key=lambda step: step.start):
            joint[step.name, step.number, seen[step.name, step.number]].append(step)
            seen[step.name, step.number] += 1
    merged = [
        Step(name, number, min(step.start for step in steps), max(step.end for step in steps))
        for (name, number, _), steps in joint.items()
    ]
    return tuple(sorted(merged, key=lambda step: step.start))


def _hidden_by_graphs(events: Sequence[Event]) -> list[str]:
    total = sum(event.duration for event in events)
    nameless = sum(event.duration for event in events if not event.hlo_op)
    if nameless <= 0.02 * total:
        return []
    return [
        f"{nameless / total:.0%} of the device time belongs to no HLO operation; if command buffers hide them, capture "
        "with XLA_FLAGS=--xla_gpu_enable_command_buffer="
    ]
