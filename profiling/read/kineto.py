"""Reads profiles of PyTorch: Chrome traces that Kineto wrote, one file for each rank."""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from profiling.classify.classifier import Rule, classify, rules_for
from profiling.event import Event, Step, Trace
from profiling.read.file_kinds import is_json
from profiling.read.kineto_file import KinetoFile, NoGpuTrace, read_file
from profiling.read.kineto_phases import Phases, microbatch
from profiling.read.kineto_values import integer
from profiling.read.trace_files import Source, sources

Path: TypeAlias = str | os.PathLike[str]


class KinetoReader:
    """Reads PyTorch's traces for `profiling.read_trace`; see `profiling.read.reader.Reader`."""

    profiler = "PyTorch"
    files = "a PyTorch trace (.json, packed or not)"

    def sniff(self, head: bytes, name: str) -> str:
        """Looks at the beginning of the text, not at the name."""
        return "JSON, as PyTorch's traces are" if is_json(head) else ""

    def find(self, folder: pathlib.Path) -> str:
        """Finds a JSON file. Leaves out those that `jax.profiler` writes beside its profiles."""
        found = json_files(folder)[0]
        profiled = {file.parent for file in folder.rglob("*.xplane.pb*")}
        found = [source for source in found if source.path.parent not in profiled]
        if profiled:
            # Such folders also hold notes of runs and programs.
            found = [source for source in found if b'"traceEvents"' in source.head()]
        return found[0].label if found else ""

    def read(self, paths: Sequence[pathlib.Path], rules: Sequence[Rule]) -> Trace:
        """Reads one file for each rank, or folders of them."""
        return read_kineto(paths, rules)


def read_kineto(path: Path | Sequence[Path], rules: Sequence[Rule] = ()) -> Trace:
    """Reads profiles of `torch.profiler` as one trace.

    * Phases: the phase of a GPU event is the innermost ``user_annotation`` that was open when the host launched it, on
      the launching thread if it has one open, otherwise on another thread.
    * Steps: the trace's steps are the profiler's own, and annotations that contain others. `Event.step` is the number
      of the profiler's step, or else of the user's ("step#3"), that was open at the launch.
    * Layers: a number in a name ("layer_3"); or, within a step, at least two phases that repeat equally often in the
      same order and hold half of the GPU time.
    * Microbatches: a number in brackets, as in "ATTN(1)".
    * Collectives: `Event.collective` holds the arguments of the kernel or of its ``record_param_comms``.
    * Devices: the rank, if every file has a rank of its own (in the file or in its name) and one GPU; the GPU's number,
      if there is one file with several GPUs. Otherwise GPUs are numbered in the order of the files, and a note says
      which is which.
    * Clocks: files that overlap in time share one clock, that of their hosts. If one lies apart from the others, each
      file begins at 0, and a note says so.

    Args:
      path: a file, several, or a folder of them, one for each rank: JSON, plain or packed as .gz, .zip, .zst, .xz or
        .bz2, under any name. Files of a folder that are no trace of a GPU are left out and noted. If a folder holds
        several sessions of the same ranks, the newest counts.
      rules: your own rules. They are tried before the tables of this package.

    Returns:
      The trace. Damaged parts of a file are repaired or left out, counted and noted.

    Raises:
      ValueError: a file does not exist, is cut short, is no Chrome trace, or has no GPU events; the message names it.
    """
    found, notes = _sources(path)
    files: list[KinetoFile] = []
    for source in found:
        try:
            files.append(read_file(source))
        except NoGpuTrace as error:
            if len(found) == 1:
                raise
            notes.append(f"left out: {source.label}: {str(error).removeprefix(f'{source.name}: ')}")
    if not files:
        raise ValueError(f"{_described(path)}: none of {len(found)} files is a trace of GPUs: {'; '.join(notes[:3])}")
    files, older = _newest(files, is_folder=_is_folder(path))
    notes += older
    numbers, numbered = _devices(files)
    notes += numbered
    origins, clock, clocks = _clocks(files)
    notes += clocks
    events: list[Event] = []
    steps: list[Step] = []
    of_files: dict[str, list[str]] = {}
    for i, file in enumerate(files):
        devices = [numbers[i, device] for device, _, _ in file.lanes]
        made, made_steps, doubts = _attributed(file, devices, origins[i])
        events += made
        steps += made_steps
        for note in (*file.notes, *doubts):
            of_files.setdefault(note, []).append(file.source.label)
    for note, labels in of_files.items():
        others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        notes.append(f"{labels[0]}{others}: {note}")
    events.sort(key=lambda event: (event.start, event.end))
    first = files[0].source.label
    trace = Trace(
        title=first if len(files) == 1 else f"{first} and {len(files) - 1} more",
        source="kineto",
        events=tuple(events),
        steps=tuple(sorted(steps, key=lambda step: step.start)),
        metadata=_metadata(files, clock),
        notes=tuple(dict.fromkeys(notes)),
    )
    del events
    return classify(trace, (*rules, *rules_for(event.name for event in trace.events)))


def _described(path: Path | Sequence[Path]) -> str:
    return str(path) if isinstance(path, (str, os.PathLike)) else ", ".join(map(str, path))


def _is_folder(path: Path | Sequence[Path]) -> bool:
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    return any(pathlib.Path(each).is_dir() for each in paths)


def _sources(path: Path | Sequence[Path]) -> tuple[list[Source], list[str]]:
    """The files to read, and notes on the other files of a folder."""
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise ValueError("there is no file to read: name one, or a folder")
    found: list[Source] = []
    notes: list[str] = []
    for each in map(pathlib.Path, paths):
        if not each.is_dir():
            found += sources(each)
            continue
        inside, others = json_files(each)
        if not inside:
            raise ValueError(
                f"{each}: there is no .json or .json.gz file to read, packed or not; name the folder of the traces"
            )
        found += inside
        if others:
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            notes.append(f"left out: {', '.join(others[:5])}{more}: no JSON")
    return list(dict.fromkeys(found)), notes


def json_files(path: pathlib.Path) -> tuple[list[Source], list[str]]:
    """The JSON files of a folder, or of all folders below if it has none, and the names of the other files."""
    for files in (path.iterdir(), path.rglob("*")):
        found: list[Source] = []
        others: list[str] = []
        for file in sorted(files):
            if file.name.startswith(".") or not file.is_file():
                continue
            inside = [source for source in sources(file) if is_json(source.head())]
            found += inside
            if not inside:
                others.append(file.name)
        if found:
            return found, others
    return [], []


def _newest(files: list[KinetoFile], is_folder: bool) -> tuple[list[KinetoFile], list[str]]:
    """Keeps one file of each rank, with notes on the others.

    In a folder, a second file of a rank is another session, and the newest counts; in a list of files it is a mistake.
    Processes that are jobs of their own, each "rank 0 of 1", all count.
    """
    by_rank: dict[int, list[KinetoFile]] = {}
    for file in files:
        if file.own_rank is not None and (integer(file.distributed.get("world_size")) or 2) > 1:
            by_rank.setdefault(file.own_rank, []).append(file)
    left: list[KinetoFile] = []
    notes: list[str] = []
    for of_rank in by_rank.values():
        same: list[KinetoFile] = []
        for file in sorted(of_rank, key=lambda file: file.window[0]):
            if is_folder and same and file.window == same[-1].window and len(file.start) == len(same[-1].start):
                left.append(file)
                notes.append(f"left out: {file.source.label}, the same as {same[-1].source.label}")
            else:
                same.append(file)
        overlap = any(one.window[1] > two.window[0] for one, two in itertools.pairwise(same))
        if len(same) > 1 and (overlap or not is_folder):
            names = [file.source.label for file in files]
            ranks = [file.rank for file in files]
            raise ValueError(f"{names} are of ranks {ranks}: read one file of each rank")
        left += same[:-1]
        notes += [
            f"left out: {file.source.label}, an earlier session of rank {file.rank}; name files to read it"
            for file in same[:-1]
        ]
    return [file for file in files if not any(file is other for other in left)], notes


def _devices(files: Sequence[KinetoFile]) -> tuple[dict[tuple[int, int], int], list[str]]:
    """``{(file, GPU): device}``, and notes on how devices are numbered."""
    gpus = [file.gpus for file in files]
    ranks = [file.rank for file in files]
    if all(len(found) == 1 for found in gpus) and None not in ranks and len(set(ranks)) == len(ranks):
        return {(i, gpus[i][0]): rank for i, rank in enumerate(ranks) if rank is not None}, []
    if len(files) == 1:
        several = len(gpus[0]) > 1
        return {(0, gpu): gpu if several and gpu >= 0 else n for n, gpu in enumerate(gpus[0])}, []
    pairs = [(i, gpu) for i, found in enumerate(gpus) for gpu in found]
    missing = [file.source.label for file in files if file.rank is None]
    why = (
        f"{len(missing)} of {len(files)} files name no rank ({missing[0]})"
        if missing
        else "a file has several GPUs"
        if any(len(found) > 1 for found in gpus)
        else "several files have the same rank"
    )
    which = [f"{number} is GPU {gpu} of {files[i].source.label}" for number, (i, gpu) in enumerate(pairs)]
    more = f"; and {len(which) - 8} more" if len(which) > 8 else ""
    return (
        {pair: number for number, pair in enumerate(pairs)},
        [f"devices are numbered in the order of the files, as {why}: {'; '.join(which[:8])}{more}"],
    )


def _clocks(files: Sequence[KinetoFile]) -> tuple[list[float], str | None, list[str]]:
    """The origin of each file in its own microseconds, which clock the files share, and notes on it."""
    windows = [file.window for file in files]
    order = sorted(range(len(files)), key=lambda i: windows[i][0])
    end = windows[order[0]][1]
    for i in order[1:]:
        if windows[i][0] > end:
            apart = windows[i][0] - end
            before = max((j for j in order if windows[j][1] <= end), key=lambda j: windows[j][1])
            note = (
                f"the files are of different moments: {files[i].source.label} begins {_long(apart)} after "
                f"{files[before].source.label} ends; each begins at 0 here, so that devices cannot be compared by time"
            )
            return [float(file.start.min()) for file in files], "each file its own", [note]
        end = max(end, windows[i][1])
    base = min(file.base for file in files)
    # In nanoseconds: a float holds microseconds since 1970 to a quarter of one at best.
    first = min((file.base - base) / 1e3 + float(file.start.min()) for file in files)
    origins = [first - (file.base - base) / 1e3 for file in files]
    if len(files) == 1:
        return origins, None, []
    hosts = sorted({str(host) for file in files if (host := file.header.get("host_name"))})
    note = [f"the files are of {len(hosts)} hosts, whose clocks may differ by milliseconds"] if len(hosts) > 1 else []
    return origins, "hosts'" if note else "common", note


def _long(microseconds: float) -> str:
    """A time in a unit that suits it."""
    for unit, size in (("days", 86_400e6), ("hours", 3_600e6), ("minutes", 60e6), ("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:,.1f} {unit}"
    return f"{microseconds:,.1f} us"


def _attributed(file: KinetoFile, devices: Sequence[int], origin: float) -> tuple[list[Event], list[Step], list[str]]:
    """The events of one file with phase, step, layer and microbatch; its steps; notes on what is doubtful."""
    communicates = {name: "nccl" in name.lower() or "rccl" in name.lower() for name in set(file.name)}
    # A kernel that waits for its peers says nothing about what a step consists of.
    work = np.where([communicates[name] for name in file.name], 0.0, file.duration)
    phases = Phases(file.annotations, file.launched, file.thread, work)
    of_annotation = [
        (phases.scopes[i], annotation.name, phases.layers.get(i), microbatch(annotation.name))
        for i, annotation in enumerate(file.annotations)
    ]
    of_annotation.append(("", "", None, None))
    lanes = [(number, lane) for number, (_, _, lane) in zip(devices, file.lanes, strict=True)]
    events = []
    starts = file.start - origin
    rows = zip(
        starts.tolist(),
        (starts + file.duration).tolist(),
        file.name,
        file.lane.tolist(),
        file.blocks.tolist(),
        phases.innermost.tolist(),
        phases.step.tolist(),
        strict=True,
    )
    for i, (start, end, name, lane, blocks, inside, step) in enumerate(rows):
        scope, phase, layer, batch = of_annotation[inside]
        device, stream = lanes[lane]
        events.append(
            Event(
                device=device,
                lane=stream,
                start=start,
                end=end,
                name=name,
                scope=scope,
                phase=phase,
                layer=layer,
                microbatch=batch,
                blocks=blocks if blocks >= 0 else None,
                step=step if step >= 0 else None,
                collective=file.collectives.get(i),
            )
        )
    notes = list(phases.notes)
    lost = int((phases.innermost < 0).sum())
    if np.isnan(file.launched).all():
        notes.append("no launch of a GPU event is in the file: events have no phase and no step")
    elif lost == len(events):
        notes.append("no annotation but those of steps was open at any launch: events have no phase")
    elif lost:
        notes.append(f"{lost} of {len(events)} GPU events were launched outside every annotation: they have no phase")
    steps = [Step(step.name, step.number, step.start - origin, step.end - origin) for step in phases.steps]
    return events, steps, notes


def _metadata(files: Sequence[KinetoFile], clock: str | None) -> dict[str, Any]:
    """Facts of the first file, and the number of events of each category in all files."""
    distributed, header = files[0].distributed, files[0].header
    chip = _chip(header.get("deviceProperties"), files[0].gpus[0])
    categories = sum((collections.Counter(file.categories) for file in files), collections.Counter())
    hosts = [file.header.get("host_name") for file in files]
    facts = {
        "trace name": _text(header.get("traceName")),
        "files": [file.source.label for file in files],
        "ranks": [file.rank for file in files],
        "world size": integer(distributed.get("world_size")),
        "backend": _text(distributed.get("backend")),
        "chip": _text(chip.get("name")),
        "SMs": integer(chip.get("numSms")),
        "hosts": hosts if any(hosts) else None,
        "clock": clock,
        "events by category": dict(categories),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _chip(properties: Any, gpu: int) -> Mapping[str, Any]:
    """The properties of a GPU: from a list of objects with ids, or from what a second export left of it."""
    listed = properties if isinstance(properties, list) else [properties]
    chips = [{"name": each} if isinstance(each, str) else each for each in listed]
    chips = [chip for chip in chips if isinstance(chip, dict)]
    return next((chip for chip in chips if chip.get("id") == gpu), chips[0] if chips else {})


def _text(value: Any) -> str | None:
    return value.encode(errors="replace").decode() if isinstance(value, str) and value else None
