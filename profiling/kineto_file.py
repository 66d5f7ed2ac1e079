"""One Kineto file as columns: GPU events, launches and annotations, and what had to be left out or repaired."""

from __future__ import annotations

import array
import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from profiling.event import Collective
from profiling.kineto_collective import NAME, collective, described, integer, process_groups
from profiling.kineto_json import CutShort, NoJson, Scan
from profiling.trace_files import DAMAGE, HEAD, Source, is_xspace, kind

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset")
ANNOTATION = "user_annotation"
PARAM_COMMS = "record_param_comms"
"""The operator in which PyTorch notes what a collective is asked to do."""

_LAUNCH = re.compile(r"(?:\w+_)?(?:runtime|driver)")
_OTHER, _GPU, _HOST_LAUNCH, _USER = range(4)
_NO_CORRELATION = -(2**63)
_DAY, _HOUR = 86_400e6, 3_600e6
_FAR = 10.0
"""How often as long as everything else an event must be for its end to be no end."""


class NoGpuTrace(ValueError):
    """A whole file, but none of what happened on GPUs: one beside the traces of a folder may be left out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Annotation:
    """Microseconds from start to end on a thread of the host, named by the user or by PyTorch."""

    name: str
    start: float
    end: float
    thread: int


@dataclasses.dataclass(frozen=True)
class KinetoFile:
    """One file; N GPU events; times in microseconds since `base` nanoseconds of the epoch.

    Attributes:
      source: where it was read from.
      base: nanoseconds of the epoch.
      header: what stands beside the events.
      categories: how many events there are of each.
      start, duration: float64[N].
      name: of each GPU event.
      lane: int[N], which of `lanes`.
      lanes: device, context and stream.
      blocks: int64[N], -1 where unknown.
      launched: float64[N], when the host launched it, NaN where no launch is known; thread: int[N], by which thread.
      collectives: of the GPU events that have one, by index.
      annotations: of the user, in the order of their starts.
      notes: what was left out, repaired or looks doubtful.
    """

    source: Source
    base: int
    header: Mapping[str, Any]
    categories: Mapping[str, int]
    start: np.ndarray
    duration: np.ndarray
    name: list[str]
    lane: np.ndarray
    lanes: list[tuple[int, str, str]]
    blocks: np.ndarray
    launched: np.ndarray
    thread: np.ndarray
    collectives: Mapping[int, Collective]
    annotations: tuple[Annotation, ...]
    notes: tuple[str, ...]

    @property
    def distributed(self) -> Mapping[str, Any]:
        """What the file says of its job; empty if nothing."""
        found = self.header.get("distributedInfo")
        return found if isinstance(found, dict) else {}

    @property
    def own_rank(self) -> int | None:
        """The rank that the profiler noted in the file."""
        rank = integer(self.distributed.get("rank"))
        return rank if rank is not None and rank >= 0 else None

    @property
    def rank(self) -> int | None:
        """The rank that stands in the file, or failing that, in its name, as in "rank-3.trace.json"."""
        named = re.search(r"(?:^|[^a-z])rank[-_ ]?(\d{1,6})", self.source.label, re.IGNORECASE)
        return int(named[1]) if self.own_rank is None and named else self.own_rank

    @property
    def gpus(self) -> list[int]:
        """The devices that have events, in order."""
        return sorted({device for device, _, _ in (self.lanes[i] for i in np.unique(self.lane))})

    @property
    def window(self) -> tuple[float, float]:
        """First start and last end, in microseconds of the epoch."""
        epoch = self.base / 1e3
        return epoch + float(self.start.min()), epoch + float((self.start + self.duration).max())


def read_file(source: Source) -> KinetoFile:
    """Reads one file.

    Raises:
      NoGpuTrace: it is whole, but no trace of a GPU.
      ValueError: no such file, damaged or cut short; or no GPU event of it can be used.
    """
    head = source.head()
    is_empty = not head.strip(b"\0 \t\r\n")
    if is_empty and source.path.stat().st_size < HEAD and not source.is_packed:
        raise ValueError(f"{source.name}: the file is empty; profile again")
    if what := "" if is_empty else kind(head, source.name):
        raise NoGpuTrace(f"{source.name}: {what}")
    if is_xspace(head, source.name):
        raise NoGpuTrace(f"{source.name}: not text but binary, of jax.profiler; read_xplane reads it")
    collected = _Collected()
    with source.open() as stream:
        try:
            scan = Scan(stream, collected.take)
        except NoJson as error:
            if is_empty:
                raise ValueError(f"{source.name}: the file is damaged or cut short ({error}); copy it again") from error
            binary = any(byte < 9 for byte in head[:256]) or b"\xff" in head[:256]
            what = "not text but binary, and no format that is known here" if binary else f"{error}, or cut short"
            raise NoGpuTrace(
                f"{source.name}: {what}; a PyTorch trace is JSON, as export_chrome_trace writes it"
            ) from error
        except CutShort as error:
            raise ValueError(f"{source.name}: no JSON, or cut short ({error}); export the trace again") from error
        except DAMAGE as error:
            raise ValueError(f"{source.name}: the file is damaged or cut short ({error}); copy it again") from error
        except OSError as error:
            raise ValueError(f"{source.name}: cannot be read: {error.strerror or error}") from error
    return collected.file(source, scan)


class _Collected:
    """Takes what is needed from each event, in columns, so that a million dicts never exist at once."""

    def __init__(self) -> None:
        self.categories: collections.Counter[str] = collections.Counter()
        self.left_out: collections.Counter[str] = collections.Counter()
        self.damaged: collections.Counter[str] = collections.Counter()
        self.example: dict[str, str] = {}
        self.processes: set[str] = set()
        self._codes: dict[Any, tuple[str, int]] = {}
        self._names: dict[Any, str] = {}
        self._devices: dict[Any, int] = {}
        self._lane_ids: dict[tuple[Any, Any, Any], int] = {}
        self._lanes: dict[tuple[int, str, str], int] = {}
        self._threads: dict[tuple[str, str], int] = {}
        self._open: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._start, self._duration = array.array("d"), array.array("d")
        self._name: list[str] = []
        self._lane, self._correlation, self._blocks = array.array("i"), array.array("q"), array.array("q")
        self._external = array.array("q")
        self._described: dict[int, Mapping[str, Any]] = {}
        self._launch_correlation, self._launch_time = array.array("q"), array.array("d")
        self._launch_thread = array.array("i")
        self._annotations: list[Annotation] = []
        self._comms: list[tuple[int, float, float, int, Mapping[str, Any]]] = []

    def take(self, item: dict[str, Any]) -> None:
        phase = item.get("ph")
        if phase != "X":
            if phase == "B":
                self._open.setdefault(_thread(item), []).append(item)
            elif phase == "E":
                self._end(item)
            elif phase == "M":
                self._metadata(item)
            elif phase is None and item:
                self.damaged["entries without a ph, which are no events, left out"] += 1
            return
        category = item.get("cat", "")
        try:
            text, code = self._codes[category]
        except (KeyError, TypeError):
            text, code = self._category(category)
        self.categories[text] += 1
        if code == _GPU:
            self._kernel(item)
        elif code == _HOST_LAUNCH:
            self._launch(item)
        elif code == _USER:
            start, duration = _time(item.get("ts")), _time(item.get("dur"))
            if start is None or duration is None or duration < 0:
                self.damaged["annotations without a start or a duration, left out"] += 1
            else:
                self._annotations.append(
                    Annotation(self._text(item.get("name", "")), start, start + duration, self._thread_id(item))
                )
        elif item.get("name") == PARAM_COMMS:
            self._param_comms(item)

    def _category(self, category: Any) -> tuple[str, int]:
        text = str(category).lower()
        code = _OTHER
        if text in GPU_CATEGORIES:
            code = _GPU
        elif _LAUNCH.fullmatch(text):
            code = _HOST_LAUNCH
        elif text == ANNOTATION:
            code = _USER
        if isinstance(category, str):
            self._codes[category] = text, code
        return text, code

    def _end(self, item: dict[str, Any]) -> None:
        """Of a pair of events, of which the second may say less than the first."""
        begun = self._open.get(_thread(item))
        if not begun:
            self.damaged["ends without a beginning, left out"] += 1
            return
        whole = begun.pop()
        start, end = _time(whole.get("ts")), _time(item.get("ts"))
        if start is not None and end is not None:
            whole["dur"] = end - start
        args = {**_args(whole), **_args(item)}
        self.take({**item, **whole, "ph": "X", "args": args})

    def _metadata(self, item: dict[str, Any]) -> None:
        if item.get("name") == "process_name" and len(self.processes) < 64:
            self.processes.add(str(_args(item).get("name", "")))

    def _kernel(self, item: dict[str, Any]) -> None:
        args = _args(item)
        start, duration = _time(item.get("ts")), _time(item.get("dur"))
        if start is None or duration is None or not 0 <= duration <= _DAY:
            if start is None:
                reason = "without a start" if item.get("ts") is None else "with a start that is no time"
            elif duration is None:
                reason = "without a duration" if item.get("dur") is None else "with a duration that is no time"
            else:
                reason = "with a negative duration" if duration < 0 else "that last more than a day"
            self._leave_out(reason, item.get("name", ""))
            return
        self._lane.append(self._lane_id(item, args))
        self._start.append(start)
        self._duration.append(duration)
        self._name.append(self._text(item.get("name", "")))
        correlation = args.get("correlation")
        if type(correlation) is not int and correlation is not None:
            number = integer(correlation)
            if number is None:
                self.damaged["GPU events whose correlation is no number, so that their launch is unknown"] += 1
            correlation = number
        if correlation is None or not -(2**63) < correlation < 2**63:
            correlation = _NO_CORRELATION
        self._correlation.append(correlation)
        grid = args.get("grid")
        self._blocks.append(-1 if grid is None else self._grid(grid))
        if NAME in args:
            self._described[len(self._start) - 1] = described(args)
        external = args.get("External id")
        self._external.append(external if type(external) is int and 0 <= external < 2**63 else -1)

    def _leave_out(self, reason: str, name: Any) -> None:
        self.left_out[reason] += 1
        self.example.setdefault(reason, self._text(name))

    def _grid(self, grid: Any) -> int:
        """Thread blocks in all, -1 if unknown."""
        if type(grid) is list and len(grid) == 3:
            x, y, z = grid
            if type(x) is type(y) is type(z) is int and 0 < x < 1 << 32 and 0 < y < 1 << 16 and 0 < z < 1 << 14:
                return x * y * z
        if isinstance(grid, str):
            grid = re.findall(r"[^\s,\[\]()]+", grid)
        sizes = [integer(size) for size in grid] if isinstance(grid, list) else []
        blocks = math.prod(size for size in sizes if size is not None)
        if sizes and None not in sizes and min(size or 0 for size in sizes) > 0 and blocks < 2**63:
            return blocks
        self.damaged["GPU events whose grid is none, so that their number of blocks is unknown"] += 1
        return -1

    def _lane_id(self, item: dict[str, Any], args: Mapping[str, Any]) -> int:
        # Old traces and re-exported ones have names such as "GPU 0" for processes and "stream 7" for threads.
        device, stream = args.get("device", item.get("pid")), args.get("stream", item.get("tid", ""))
        context = args.get("context")
        try:
            return self._lane_ids[device, context, stream]
        except KeyError:
            pass
        except TypeError:
            device, context, stream = str(device), str(context), str(stream)
        lane = (_number(device), str(context), self._text(stream))
        number = self._lane_ids[device, context, stream] = self._lanes.setdefault(lane, len(self._lanes))
        return number

    def _launch(self, item: dict[str, Any]) -> None:
        correlation = _args(item).get("correlation")
        if type(correlation) is not int:
            correlation = integer(correlation)
        if correlation is None or not -(2**63) < correlation < 2**63:
            return
        time = _time(item.get("ts"))
        if time is None:
            self.damaged["launches without a start, left out"] += 1
            return
        self._launch_correlation.append(correlation)
        self._launch_time.append(time)
        self._launch_thread.append(self._thread_id(item))

    def _param_comms(self, item: dict[str, Any]) -> None:
        args = _args(item)
        start, duration = _time(item.get("ts")), _time(item.get("dur"))
        if NAME in args and start is not None and duration is not None:
            external = integer(args.get("External id"))
            thread = self._thread_id(item)
            number = -1 if external is None else external
            self._comms.append((number, start, start + duration, thread, described(args)))

    def _thread_id(self, item: dict[str, Any]) -> int:
        return self._threads.setdefault(_thread(item), len(self._threads))

    def _text(self, name: Any) -> str:
        """A name that can be printed, without control characters and halves of pairs; one object for equal ones."""
        try:
            return self._names[name]
        except (KeyError, TypeError):
            pass
        text = "" if name is None else str(name)
        clean = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
        if clean != text:
            self.damaged["names with characters that cannot be printed, which were replaced"] += 1
        clean = self._names.setdefault(clean, clean)
        if isinstance(name, str):
            self._names[name] = clean
        return clean

    def file(self, source: Source, scan: Scan) -> KinetoFile:
        """All that was taken, once the text is read.

        Raises:
          NoGpuTrace: there is no GPU event in it.
          ValueError: there are some, but none that can be used.
        """
        header = scan.header or {}
        for begun in self._open.values():
            for item in begun:
                if self._category(item.get("cat", ""))[1] == _GPU:
                    self._leave_out("that begin and never end", item.get("name", ""))
        if not len(self._start):
            if self.left_out and any(category in GPU_CATEGORIES for category in self.categories):
                raise ValueError(f"{source.name}: no GPU event can be used: {self._reasons()}; export the trace again")
            raise NoGpuTrace(f"{source.name}: {self._refusal(header, scan)}")
        columns = _Columns(
            *(np.frombuffer(column, dtype) for column, dtype in (
                (self._start, np.float64), (self._duration, np.float64), (self._lane, np.int32),
                (self._correlation, np.int64), (self._blocks, np.int64), (self._external, np.int64),
            )),
        )  # fmt: skip
        kept = self._possible(columns)
        if not kept.any():
            raise ValueError(f"{source.name}: no GPU event can be used: {self._reasons()}; export the trace again")
        launched, thread = self._launches(columns.correlation)
        distributed = header.get("distributedInfo")
        if distributed is not None and not isinstance(distributed, dict):
            self.damaged["distributedInfo that is no object, so that the rank is unknown"] += 1
        base = header.get("baseTimeNanoseconds")
        if base is not None and integer(base) is None:
            self.damaged["baseTimeNanoseconds that is no number and counts as 0"] += 1
        groups = process_groups(distributed) if isinstance(distributed, dict) else {}
        collectives = self._collectives(columns.external, launched, thread, groups)
        names = self._name
        if not kept.all():
            places = np.cumsum(kept) - 1
            names = [name for name, keep in zip(names, kept.tolist(), strict=True) if keep]
            collectives = {int(places[i]): found for i, found in collectives.items() if kept[i]}
        annotations = sorted(self._annotations, key=lambda a: (a.start, -a.end))
        start, duration = columns.start[kept], columns.duration[kept]
        notes = [f"left out: {self._reasons()}"] if self.left_out else []
        notes += [f"{what}: {count:,}" for what, count in (scan.damage + self.damaged).items()]
        notes += _lonely(start, duration, names)
        return KinetoFile(
            source=source,
            base=integer(base) or 0,
            header=header,
            categories=dict(self.categories),
            start=start,
            duration=duration,
            name=names,
            lane=columns.lane[kept],
            lanes=list(self._lanes),
            blocks=columns.blocks[kept],
            launched=launched[kept],
            thread=thread[kept],
            collectives=collectives,
            annotations=tuple(annotations),
            notes=tuple(notes),
        )

    def _reasons(self) -> str:
        return "; ".join(
            f"{count:,} GPU event{'s' * (count != 1)} {reason} ({_short(self.example[reason])})"
            for reason, count in self.left_out.items()
        )

    def _refusal(self, header: Mapping[str, Any], scan: Scan) -> str:
        """Why there is no GPU event, and what to do."""
        if not scan.has_events:
            if "rocprofiler-sdk-tool" in header:
                return "the JSON of rocprofv3, no Chrome trace; profile with torch.profiler or jax.profiler instead"
            if "nodes" in header and "schema" in header:
                return (
                    "an execution trace of PyTorch, which has no times on GPUs and is no Chrome trace; "
                    "name the trace that export_chrome_trace wrote beside it"
                )
            if "traceEvents" in header:
                return "JSON, but no Chrome trace: its traceEvents are no list; export the trace again"
            return "JSON, but no Chrome trace: there is no list of traceEvents; name the profiler's trace"
        if not self.categories and sum(scan.damage.values()) + sum(self.damaged.values()):
            return "JSON, but no Chrome trace: its entries are no events; name the profiler's trace"
        seen = ", ".join(sorted(filter(None, self.categories))) or "none"
        if any(process.startswith(("/host:", "/device:")) for process in self.processes):
            return (
                "a Chrome trace of jax.profiler (or TensorFlow), which tells less than the .xplane.pb beside it: "
                "name that, or its folder"
            )
        if any(category.startswith("mtia") for category in self.categories):
            return f"no GPU events (categories: {seen}): a profile of MTIA devices, which are not read here"
        if "cuda_profiler_range" in self.categories:
            return (
                f"no GPU events (categories: {seen}): CUPTI counted ranges instead of tracing kernels; profile without "
                "_ExperimentalConfig(profiler_metrics=...)"
            )
        return f"no GPU events (categories: {seen}); profile with ProfilerActivity.CUDA"

    def _launches(self, correlations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """When each GPU event was launched, and by which thread; NaN and -1 where that is unknown."""
        times, threads = np.full(len(correlations), np.nan), np.full(len(correlations), -1, np.int32)
        if len(self._launch_time):
            of = np.frombuffer(self._launch_correlation, np.int64)
            order = np.argsort(of, kind="stable")
            # Of several launches with one number, the last in the file.
            at = np.searchsorted(of[order], correlations, side="right") - 1
            found = order[np.maximum(at, 0)]
            same = (at >= 0) & (of[found] == correlations) & (correlations != _NO_CORRELATION)
            times[same] = np.frombuffer(self._launch_time, np.float64)[found[same]]
            threads[same] = np.frombuffer(self._launch_thread, np.int32)[found[same]]
        return times, threads

    def _collectives(
        self, external: np.ndarray, launched: np.ndarray, thread: np.ndarray, groups: Mapping[str, tuple[int, ...]]
    ) -> dict[int, Collective]:
        """From the kernels' own arguments; where they have none, from the operator round their launch."""
        shared: dict[Collective, Collective] = {}
        found: dict[int, Collective] = {}
        by_id = {comm[0]: comm[4] for comm in self._comms if comm[0] >= 0}
        for i, args in self._described.items():
            # A kernel's list of ranks may be cut short where the operator says how they follow one another.
            whole = {**by_id.get(int(external[i]), {}), **args}
            if made := collective(whole, groups):
                found[i] = shared.setdefault(made, made)
        if not self._comms:
            return found
        comms = sorted(self._comms, key=lambda comm: comm[1])
        starts = np.array([comm[1] for comm in comms])
        for i, name in enumerate(self._name):
            lower = name.lower()
            if i in found or not ("nccl" in lower or "rccl" in lower):
                continue
            args = by_id.get(int(external[i]))
            if args is None and not math.isnan(launched[i]):
                at = int(np.searchsorted(starts, launched[i], side="right")) - 1
                # Operators nest within a few others at most.
                for comm in comms[max(at - 8, 0) : at + 1][::-1]:
                    if comm[3] == thread[i] and comm[2] >= launched[i]:
                        args = comm[4]
                        break
            if args is not None and (made := collective(args, groups)):
                found[i] = shared.setdefault(made, made)
        return found

    def _possible(self, columns: _Columns) -> np.ndarray:
        """Which events can have happened when they say; the others are counted with their reasons."""
        kept = np.ones(len(columns.start), bool)
        far = _far_away(columns.start, columns.duration)
        self._drop(kept, far, "more than an hour from all others, or at 0, as where CUPTI could note no time")
        for _ in range(3):
            overrun = _overrunning(columns, np.flatnonzero(kept))
            if not len(overrun):
                break
            self._drop(
                kept, overrun, "with an end beyond later events of the same stream, which runs one after another"
            )
        return kept

    def _drop(self, kept: np.ndarray, which: np.ndarray, reason: str) -> None:
        kept[which] = False
        for i in which.tolist():
            self._leave_out(reason, self._name[i])


@dataclasses.dataclass(frozen=True)
class _Columns:
    start: np.ndarray
    duration: np.ndarray
    lane: np.ndarray
    correlation: np.ndarray
    blocks: np.ndarray
    external: np.ndarray


def _far_away(start: np.ndarray, duration: np.ndarray) -> np.ndarray:
    """Indices of events that lie more than an hour from the largest group, or at 0 where nothing else does."""
    order = np.argsort(start, kind="stable")
    cuts = np.flatnonzero(np.diff(start[order]) > _HOUR) + 1
    groups = np.split(order, cuts)
    largest = max(groups, key=lambda group: (len(group), duration[group].sum()))
    far = [group for group in groups if group is not largest]
    # CUPTI writes 0 for a time that it could not take.
    unknown = np.flatnonzero((start == 0) & (duration == 0))
    if len(unknown) and len(unknown) < len(start):
        others = np.delete(start, unknown)
        if others.min() > 1e6:
            far.append(np.setdiff1d(unknown, np.concatenate([*far, unknown[:0]])))
    return np.concatenate(far) if far else order[:0]


def _overrunning(columns: _Columns, kept: np.ndarray) -> np.ndarray:
    """Indices of events whose ends are impossible, as whole later events of their own stream lie within them.

    A stream runs one event after another. Two may overlap at the edge, where the second was let in early, or in a
    graph, whose branches have one stream and one launch. So an event must contain others of other launches and last
    ten times as long as to the first of them, or be ten times as long as all else until the end of the trace.
    """
    order = kept[np.lexsort((-columns.duration[kept], columns.start[kept], columns.lane[kept]))]
    lane, start = columns.lane[order], columns.start[order]
    end = start + columns.duration[order]
    suspects = np.flatnonzero((lane[1:] == lane[:-1]) & (start[1:] < end[:-1]))
    if not len(suspects):
        return kept[:0]
    last_of_lane = np.searchsorted(lane, lane[suspects], side="right")
    containing = []
    for at, stop in zip(suspects.tolist(), last_of_lane.tolist(), strict=True):
        behind = at + 1 + int(np.searchsorted(start[at + 1 : stop], end[at]))
        inside = np.flatnonzero((end[at + 1 : behind] < end[at]) & (start[at + 1 : behind] > start[at])) + at + 1
        if len(inside):
            containing.append((at, inside))
    others = np.ones(len(order), bool)
    others[[at for at, _ in containing]] = False
    last = end[others].max() if others.any() else -np.inf
    impossible = []
    for at, inside in containing:
        length = end[at] - start[at]
        launches = np.unique(columns.correlation[order[np.append(inside, at)]])
        apart = len(launches[launches != _NO_CORRELATION]) > 1
        if (last > start[at] and length >= _FAR * (last - start[at])) or (
            apart and length >= _FAR * (start[inside[0]] - start[at])
        ):
            impossible.append(order[at])
    return np.array(impossible, kept.dtype)


def _lonely(start: np.ndarray, duration: np.ndarray, names: list[str]) -> list[str]:
    """A note on an event that lasts ten times as long as the rest of the trace: a hang, or a wrong end."""
    if len(start) < 2:
        return []
    longest = int(np.argmax(duration))
    rest = np.delete(start, longest)
    window = (rest + np.delete(duration, longest)).max() - rest.min()
    if duration[longest] < _FAR * window or not window:
        return []
    return [
        f"one event, {_short(names[longest])}, lasts {duration[longest]:,.1f} us and all others together take "
        f"{window:,.1f} us: it decides every share"
    ]


def _short(name: str, most: int = 60) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _args(item: Mapping[str, Any]) -> Mapping[str, Any]:
    args = item.get("args")
    return args if isinstance(args, dict) else {}


def _thread(item: Mapping[str, Any]) -> tuple[str, str]:
    return str(item.get("pid")), str(item.get("tid"))


def _time(value: Any) -> float | None:
    """A finite number of microseconds, None for anything else."""
    try:
        time = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return time if math.isfinite(time) and not isinstance(value, bool) else None


def _number(name: Any) -> int:
    """The last number in a name, 0 without one."""
    if isinstance(name, int):
        return int(name)
    found = re.findall(r"\d{1,18}", str(name))
    return int(found[-1]) if found else 0
