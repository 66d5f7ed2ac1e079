"""PyTorch's profiles: Chrome traces that Kineto wrote, one file a rank, DeepSeek's published ones among them."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import gzip
import json
import math
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from profiling.classify import Rule, classify, rules_for
from profiling.event import Event, Step, Trace

Path: TypeAlias = str | os.PathLike[str]

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver", "runtime", "driver")
ANNOTATION = "user_annotation"


@dataclasses.dataclass(frozen=True, slots=True)
class _Kernel:
    device: int
    lane: str
    start: float
    duration: float
    name: str
    correlation: int
    blocks: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Annotation:
    name: str
    start: float
    end: float

    @property
    def is_step(self) -> bool:
        """Whether the profiler itself put it round a step."""
        return self.name.startswith("ProfilerStep#")


@dataclasses.dataclass(frozen=True)
class _File:
    """One rank's profile, times in microseconds since `base` nanoseconds of the epoch."""

    path: pathlib.Path
    base: int
    header: Mapping[str, Any]
    categories: Mapping[str, int]
    kernels: tuple[_Kernel, ...]
    launches: Mapping[int, float]
    annotations: tuple[_Annotation, ...]

    @property
    def rank(self) -> int | None:
        return (self.header.get("distributedInfo") or {}).get("rank")


def read_kineto(path: Path | Sequence[Path], rules: Sequence[Rule] = ()) -> Trace:
    """Reads profiles of `torch.profiler` as one trace.

    A GPU event belongs to the innermost ``user_annotation`` that was open, on any thread, when the host launched it:
    its phase. Annotations round others are the trace's steps, as are the profiler's own. If all phases of a step occur
    equally often, those aside that occur once, their occurrences are counted as layers. A number in brackets, as in
    "ATTN(1)", is the microbatch.

    Args:
      path: a ``.json`` or ``.json.gz`` file, several, or a folder of them: one a rank. The device is the rank where
        every file names its own and has one GPU; otherwise GPUs are numbered in the order of the files.
      rules: of your own, tried before the tables of this package, those of DeepSeek's kernels where they ran.

    Raises:
      ValueError: no such file, damaged or cut short, no Chrome trace, no GPU events; the file is named.
    """
    files = [_read_file(file) for file in _paths(path)]
    gpus = [sorted({kernel.device for kernel in file.kernels}) for file in files]
    ranks = [file.rank for file in files]
    if None not in ranks and all(len(found) == 1 for found in gpus):
        if len(set(ranks)) < len(ranks):
            raise ValueError(f"{[file.path.name for file in files]} are of ranks {ranks}: read one file of each rank")
        numbers = {(i, gpus[i][0]): rank for i, rank in enumerate(ranks) if rank is not None}
    else:
        pairs = [(i, gpu) for i, found in enumerate(gpus) for gpu in found]
        numbers = {pair: number for number, pair in enumerate(pairs)}
    base = min(file.base for file in files)
    first = min(k.start + (file.base - base) / 1e3 for file in files for k in file.kernels)
    events: list[Event] = []
    steps: list[Step] = []
    notes: dict[str, None] = {}
    for i, file in enumerate(files):
        shift = (file.base - base) / 1e3 - first
        found, found_steps, found_notes = _attributed(file, shift, {gpu: numbers[i, gpu] for gpu in gpus[i]})
        events += found
        steps += found_steps
        notes |= dict.fromkeys(found_notes)
    events.sort(key=lambda event: (event.start, event.end))
    trace = Trace(
        title=files[0].path.name if len(files) == 1 else f"{files[0].path.name} and {len(files) - 1} more",
        source="kineto",
        events=tuple(events),
        steps=tuple(sorted(steps, key=lambda step: step.start)),
        metadata=_metadata(files),
        notes=tuple(notes),
    )
    return classify(trace, (*rules, *rules_for(event.name for event in events)))


def _paths(path: Path | Sequence[Path]) -> list[pathlib.Path]:
    if not isinstance(path, (str, os.PathLike)):
        paths = [pathlib.Path(each) for each in path]
    elif pathlib.Path(path).is_dir():
        paths = sorted(p for p in pathlib.Path(path).iterdir() if p.name.endswith((".json", ".json.gz")))
    else:
        paths = [pathlib.Path(path)]
    if not paths:
        raise ValueError(f"{path!s}: there is no .json or .json.gz file to read")
    return paths


def _read_file(path: pathlib.Path) -> _File:
    try:
        raw = path.read_bytes()
        # By its first bytes, not its name: browsers unpack downloads and keep the name.
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except OSError as error:
        # gzip.BadGzipFile is one as well.
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is damaged or cut short ({error}); copy it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text but binary ({error}); an .xplane.pb is read by read_xplane") from error
    del raw
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    collected = _Collected(path)
    try:
        header: Any = json.loads(text, object_hook=collected.take)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON, or cut short ({error}); export the trace again") from error
    if isinstance(header, list):
        header = {"traceEvents": header}
    if not isinstance(header, dict) or not isinstance(header.get("traceEvents"), list):
        raise ValueError(f"{path}: JSON, but no Chrome trace: there is no list of traceEvents")
    if not collected.kernels:
        seen = ", ".join(sorted(collected.categories)) or "none"
        raise ValueError(f"{path}: no GPU events (categories: {seen}); profile with ProfilerActivity.CUDA")
    del header["traceEvents"]
    return _File(
        path=path,
        base=int(header.get("baseTimeNanoseconds") or 0),
        header=header,
        categories=dict(collected.categories),
        kernels=tuple(collected.kernels),
        launches=collected.launches,
        annotations=tuple(collected.annotations),
    )


class _Collected:
    """Takes what is needed from each JSON object while it is parsed, so that a million of them never exist at once."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.categories: collections.Counter[str] = collections.Counter()
        self.kernels: list[_Kernel] = []
        self.launches: dict[int, float] = {}
        self.annotations: list[_Annotation] = []

    def take(self, item: dict[str, Any]) -> dict[str, Any] | None:
        if "ph" not in item:
            return item
        if item["ph"] != "X" or "ts" not in item:
            return None
        category = str(item.get("cat", "")).lower()
        self.categories[category] += 1
        if category in GPU_CATEGORIES:
            self.kernels.append(self._kernel(item))
        elif category in LAUNCH_CATEGORIES:
            correlation = (item.get("args") or {}).get("correlation")
            if correlation is not None:
                self.launches[int(correlation)] = self._time(item, "ts")
        elif category == ANNOTATION:
            start = self._time(item, "ts")
            self.annotations.append(
                _Annotation(sys.intern(str(item.get("name", ""))), start, start + self._time(item, "dur"))
            )
        return None

    def _kernel(self, item: dict[str, Any]) -> _Kernel:
        args = item.get("args") or {}
        correlation, grid = args.get("correlation"), args.get("grid")
        return _Kernel(
            # Old traces and re-exported ones have names such as "GPU 0" for processes and "stream 7" for threads.
            device=_number(args.get("device", item.get("pid"))),
            lane=sys.intern(str(args.get("stream", item.get("tid", "")))),
            start=self._time(item, "ts"),
            duration=self._time(item, "dur"),
            name=sys.intern(str(item.get("name", ""))),
            correlation=-1 if correlation is None else int(correlation),
            blocks=math.prod(grid) if grid else None,
        )

    def _time(self, item: dict[str, Any], key: str) -> float:
        try:
            time = float(item.get(key, 0))
        except (TypeError, ValueError):
            time = math.nan
        if not math.isfinite(time) or (key == "dur" and time < 0):
            raise ValueError(f"{self.path}: event {item.get('name')!r} has {key}={item.get(key)!r}, which is no time")
        return time


def _number(name: Any) -> int:
    """The last number in a name, 0 without one."""
    found = re.findall(r"\d+", str(name))
    return int(found[-1]) if found else 0


def _attributed(file: _File, shift: float, numbers: Mapping[int, int]) -> tuple[list[Event], list[Step], list[str]]:
    """Events of one file with phase, layer and microbatch; its steps; what is doubtful."""
    annotations = sorted(file.annotations, key=lambda a: (a.start, -a.end))
    parents = _parents(annotations)
    launches = [file.launches.get(kernel.correlation, math.nan) for kernel in file.kernels]
    innermost = _innermost(annotations, launches)
    layers, notes = _layers(annotations, parents, set(innermost) - {-1})
    scopes = _scopes(annotations, parents)
    events = []
    for kernel, i in zip(file.kernels, innermost, strict=True):
        phase = annotations[i].name if i >= 0 else ""
        microbatch = re.fullmatch(r".*\((\d+)\)", phase)
        events.append(
            Event(
                device=numbers[kernel.device],
                lane=kernel.lane,
                start=kernel.start + shift,
                end=kernel.start + shift + kernel.duration,
                name=kernel.name,
                scope=scopes[i] if i >= 0 else "",
                phase=phase,
                layer=layers.get(i),
                microbatch=int(microbatch[1]) if microbatch else None,
                blocks=kernel.blocks,
            )
        )
    outer = [a for i, a in enumerate(annotations) if i in set(parents) or a.is_step]
    steps = [_step(a, shift) for a in outer]
    lost = innermost.count(-1)
    if lost:
        notes.append(
            f"{lost} of {len(innermost)} GPU events were launched outside every annotation: they have no phase"
        )
    return events, steps, [f"{file.path.name}: {note}" for note in notes]


def _step(annotation: _Annotation, shift: float) -> Step:
    name, _, number = annotation.name.partition("#")
    return Step(name, int(number) if number.isdecimal() else None, annotation.start + shift, annotation.end + shift)


def _parents(annotations: Sequence[_Annotation]) -> list[int]:
    """For each, in the order of their starts, the innermost one that contains it; -1 for none."""
    parents, around = [], []
    for i, annotation in enumerate(annotations):
        while around and annotations[around[-1]].end < annotation.end:
            around.pop()
        parents.append(around[-1] if around else -1)
        around.append(i)
    return parents


def _scopes(annotations: Sequence[_Annotation], parents: Sequence[int]) -> list[str]:
    """For each, the names from the outermost annotation down to it, the profiler's steps aside."""
    scopes: list[str] = []
    for annotation, parent in zip(annotations, parents, strict=True):
        above = scopes[parent] if parent >= 0 else ""
        scopes.append(above if annotation.is_step else "/".join(filter(None, (above, annotation.name))))
    return scopes


def _innermost(annotations: Sequence[_Annotation], launches: Sequence[float]) -> list[int]:
    """For each launch, the annotation open at that time that started last; -1 for none."""
    found = [-1] * len(launches)
    around: list[int] = []
    entered = 0
    for i in sorted((i for i, time in enumerate(launches) if not math.isnan(time)), key=lambda i: launches[i]):
        time = launches[i]
        while entered < len(annotations) and annotations[entered].start <= time:
            if not annotations[entered].is_step:
                around.append(entered)
            entered += 1
        while around and annotations[around[-1]].end < time:
            around.pop()
        # Annotations of two threads need not nest, so that one below the last may have ended, too.
        found[i] = next((a for a in reversed(around) if annotations[a].end >= time), -1)
    return found


def _layers(
    annotations: Sequence[_Annotation], parents: Sequence[int], used: set[int]
) -> tuple[dict[int, int], list[str]]:
    """The layer of each annotation of a name that launched something, counted within each of the profiler's steps."""
    step_starts = [annotation.start for annotation in annotations if annotation.is_step]
    groups: dict[tuple[int, str], list[int]] = {}
    names = {annotations[i].name for i in used}
    for i, annotation in enumerate(annotations):
        if annotation.name in names:
            step = bisect.bisect_right(step_starts, annotation.start)
            groups.setdefault((step, annotation.name), []).append(i)
    layers: dict[int, int] = {}
    notes = []
    outer = set(parents)
    for step in sorted({step for step, _ in groups}):
        members = {name: found for (of, name), found in groups.items() if of == step}
        leaves = {name: len(found) for name, found in members.items() if not outer & set(found)}
        # What a step does once, such as the loss, belongs to no layer, unless the step is a single layer.
        counts = set(leaves.values()) - {1} or {1}
        if len(counts) == 1 and leaves:
            (count,) = counts
            layers |= {i: n for found in members.values() if len(found) == count for n, i in enumerate(found)}
        elif leaves:
            notes.append(f"phases occur unequally often ({leaves}), so that layers could not be counted")
    return layers, notes


def _metadata(files: Sequence[_File]) -> dict[str, Any]:
    """Facts of the first file, and how many events of each category all of them have."""
    distributed = files[0].header.get("distributedInfo") or {}
    chips = files[0].header.get("deviceProperties") or [{}]
    categories = sum((collections.Counter(file.categories) for file in files), collections.Counter())
    facts = {
        "trace name": files[0].header.get("traceName"),
        "files": [file.path.name for file in files],
        "ranks": [file.rank for file in files],
        "world size": distributed.get("world_size"),
        "backend": distributed.get("backend"),
        "chip": chips[0].get("name"),
        "SMs": chips[0].get("numSms"),
        "events by category": dict(categories),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}
