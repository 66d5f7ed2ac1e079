"""Traces from what `jax.profiler` writes, on CPU and GPU.

The two differ: a GPU has a plane for every device and a line for every stream, and its events carry their scopes; on
CPU there is one plane of host threads, a device's operations hop between them, an asynchronous operation ends with a
second event, and scopes stand in the compiled modules.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.profiler import ProfileData

from profiling.classify import XLA, Rule, classify
from profiling.event import Event, Step, Trace
from profiling.scopes import PARTS, place
from profiling.wire import messages
from profiling.xplane_modules import CONTAINERS, Modules, read_modules

SIDECAR = "capture.json"
"""What `profiling.capture` writes beside a profile: which devices and pipeline ranks the events belong to."""

_GPU = re.compile(r"/device:GPU:(\d+)")
_STREAM = re.compile(r"Stream #(\d+)")
_GRID = re.compile(r"grid:(\d+),(\d+),(\d+)")
_COLLECTIVE = re.compile(r"all-|reduce-scatter|collective-|ragged-|send|recv")


def read_xplane(
    path: str | pathlib.Path,
    *,
    rules: Sequence[Rule] = (),
    parts: Mapping[str, str] = PARTS,
    ranks: Mapping[int, int] | None = None,
) -> Trace:
    """The newest profile of a folder, of all its processes, or one file.

    Args:
      path: an ``.xplane.pb`` file or a folder that `jax.profiler.start_trace` or `profiling.capture` wrote.
      rules: of your own, tried before the tables of this package.
      parts: names of a layer's parts; see `profiling.scopes.place`.
      ranks: pipeline rank of each device; None: as the capture noted it.

    Returns:
      All processes in one trace, on the clock of their hosts.

    Raises:
      ValueError: there is no profile, or it holds no operation of a device.
    """
    files = _find(pathlib.Path(path))
    with warnings.catch_warnings():
        # Where warnings are errors, this one of Python 3.12 about jaxlib's types would end the process.
        warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
        profiles = [_read_file(file, parts) for file in files]
    origin = min(profile.metadata["origin_ns"] for profile in profiles)
    events, steps, notes = [], [], []
    for profile in profiles:
        shift = (profile.metadata["origin_ns"] - origin) / 1e3
        events += [
            dataclasses.replace(event, start=event.start + shift, end=event.end + shift) if shift else event
            for event in profile.events
        ]
        steps += [Step(step.name, step.number, step.start + shift, step.end + shift) for step in profile.steps]
        notes += [note for note in profile.notes if note not in notes]
    if not events:
        raise ValueError(
            f"{path}: the profile has no operation of a device; on CPU keep host_tracer_level at 1 or above, and "
            "let the step end (jax.block_until_ready) before the profile does"
        )
    if len(profiles) > 1:
        notes.append(f"{len(profiles)} processes, aligned by their hosts' clocks: differences below 1 ms mean nothing")
    events.sort(key=lambda event: (event.start, event.end))
    known: dict[int, int] = {}
    for profile in profiles:
        known |= profile.ranks
    trace = Trace(
        title=pathlib.Path(path).name,
        source="xplane",
        events=tuple(events),
        steps=tuple(sorted(steps, key=lambda step: step.start)),
        ranks=known if ranks is None else ranks,
        metadata={**profiles[0].metadata, "processes": len(profiles)},
        notes=tuple(notes),
    )
    return classify(trace, (*rules, *XLA))


def _find(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of the newest session below a folder: one of every process."""
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"{path}: there is no *.xplane.pb file here or below; give the folder that was traced into")
    newest = max(file.parent.name for file in files)
    return [file for file in files if file.parent.name == newest]


def _read_file(file: pathlib.Path, parts: Mapping[str, str]) -> Trace:
    raw = file.read_bytes()
    try:
        modules = read_modules(raw)
        planes = list(ProfileData.from_serialized_xspace(raw).planes)
        complaints = [bytes(text).decode() for number in (2, 3) for text in messages(raw, number)]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: this is no profile, or it is cut off: {error}") from None
    known = _sidecar(file)
    devices = {int(local): device for local, device in known.get("devices", {}).items()}
    metadata: dict[str, Any] = {"origin_ns": 0, **known.get("metadata", {})}
    events: list[Event] = []
    steps: list[Step] = []
    for plane in planes:
        stats = dict(plane.stats)
        if plane.name == "Task Environment":
            metadata["origin_ns"] = int(stats.get("profile_start_time", 0))
        elif gpu := _GPU.fullmatch(plane.name):
            metadata.setdefault("sms", stats.get("core_count"))
            local = int(gpu[1])
            events += _gpu_events(plane, devices.get(local, local), modules, parts)
        elif plane.name == "/host:CPU":
            found, endless = _cpu_events(plane, devices, modules, parts)
            events += found
            steps += _steps(plane)
            if endless:
                complaints.append(f"{endless} operations have no end, so that asynchronous ones look too short")
    metadata.setdefault("platform", "gpu" if any(_GPU.fullmatch(plane.name) for plane in planes) else "cpu")
    notes = [f"the profiler reports: {complaint}" for complaint in complaints]
    if metadata["platform"] == "cpu":
        notes.append("CPU devices share cores: their times tell what happens in which order, not how fast a GPU is")
    notes += _hidden_by_graphs(events)
    ranks = {int(device): rank for device, rank in known.get("ranks", {}).items()}
    return Trace(file.stem, "xplane", tuple(events), tuple(steps), ranks, metadata, tuple(notes))


def _gpu_events(plane: Any, device: int, modules: Modules, parts: Mapping[str, str]) -> Iterator[Event]:
    for line in plane.lines:
        stream = _STREAM.match(line.name)
        if not stream:
            continue  # lines that other tools derive from the streams
        for event in line.events:
            stats = dict(event.stats)
            op = str(stats.get("hlo_op", ""))
            known = modules.get(f"{stats.get('hlo_module')}({stats.get('program_id')})", {}).get(op)
            scope = known.scope if known else ""
            if not scope:
                scope = "/".join(filter(None, (str(stats.get("prefix", "")), str(stats.get("name", "")))))
            grid = _GRID.search(str(stats.get("kernel_details", "")))
            yield _event(
                device,
                f"stream {stream[1]}",
                event.start_ns,
                event.end_ns,
                event.name,
                op,
                scope,
                parts,
                blocks=int(grid[1]) * int(grid[2]) * int(grid[3]) if grid else None,
            )


def _cpu_events(
    plane: Any, devices: Mapping[int, int], modules: Modules, parts: Mapping[str, str]
) -> tuple[list[Event], int]:
    """Operations of all devices, without those that only run others; and how many of them have no end.

    An operation's event lasts as long as the call that starts it; a second one says when it was done.
    """
    ends: dict[Any, float] = {}
    calls = []
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith("end: "):
                ends[dict(event.stats)["_c"]] = event.end_ns
            elif not event.name.startswith("Threadpool"):
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    calls.append((event.name, event.start_ns, event.end_ns, stats))
    events, endless = [], 0
    for name, start, end, stats in calls:
        op = str(stats["hlo_op"])
        known = modules.get(f"{stats.get('hlo_module')}({stats.get('program_id')})", {}).get(op)
        if known and known.opcode in CONTAINERS:
            continue
        local = int(stats.get("device_ordinal", 0))
        lane = "collectives" if _COLLECTIVE.match(known.opcode if known else op) else "compute"
        done = ends.get(stats.get("_p"))
        endless += done is None
        scope = known.scope if known else ""
        end = end if done is None else max(end, done)
        events.append(_event(devices.get(local, local), lane, start, end, name, op, scope, parts))
    return events, endless


def _event(
    device: int,
    lane: str,
    start_ns: float,
    end_ns: float,
    name: str,
    op: str,
    scope: str,
    parts: Mapping[str, str],
    blocks: int | None = None,
) -> Event:
    where = place(scope, parts)
    return Event(
        device,
        lane,
        start_ns / 1e3,
        end_ns / 1e3,
        name,
        op,
        scope,
        phase=where.phase,
        layer=where.layer,
        microbatch=where.microbatch,
        blocks=blocks,
    )


def _steps(plane: Any) -> Iterator[Step]:
    for line in plane.lines:
        if not line.name.startswith("python"):
            continue
        for event in line.events:
            stats = dict(event.stats)
            if "step_num" in stats:
                yield Step(event.name, int(stats["step_num"]), event.start_ns / 1e3, event.end_ns / 1e3)


def _hidden_by_graphs(events: Sequence[Event]) -> list[str]:
    total = sum(event.duration for event in events)
    nameless = sum(event.duration for event in events if not event.hlo_op)
    if nameless <= 0.02 * total:
        return []
    return [
        f"{nameless / total:.0%} of the device time belongs to no HLO operation; if command buffers hide them, capture "
        "with XLA_FLAGS=--xla_gpu_enable_command_buffer="
    ]


def _sidecar(file: pathlib.Path) -> dict[str, Any]:
    """What the capture noted, from the folder of the session or the one that was traced into."""
    for folder in file.parents[:4]:
        if (folder / SIDECAR).is_file():
            return json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    return {}
