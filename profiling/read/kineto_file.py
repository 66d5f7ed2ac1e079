"""Reads one Kineto file: its GPU events with launches and collectives, and what was left out or repaired."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from profiling.event import Collective
from profiling.read.file_kinds import is_xspace, refusal
from profiling.read.impossible import NO_LAUNCH, KernelColumns, far_away, lonely, overrunning
from profiling.read.kineto_collective import collective, process_groups
from profiling.read.kineto_columns import GPU, GPU_CATEGORIES, Annotation, Collected
from profiling.read.kineto_json import CutShort, NoJson, TraceScan
from profiling.read.kineto_values import integer
from profiling.read.trace_files import DAMAGE, HEAD, Source


class NoGpuTrace(ValueError):
    """The file is whole and holds nothing about GPUs; in a folder of traces it may be left out."""


@dataclasses.dataclass(frozen=True)
class KinetoFile:
    """One file; N GPU events; times in microseconds since `base` nanoseconds of the epoch.

    Attributes:
      source: the file or the member of an archive.
      base: origin of the times, in nanoseconds of the epoch.
      header: entries beside the events.
      categories: number of events of each category.
      start, duration: float64[N].
      name: name of each GPU event.
      lane: int[N], index in `lanes`.
      lanes: device, context and stream.
      blocks: int64[N], number of thread blocks; -1 if unknown.
      launched: float64[N], when the host launched the event; NaN if unknown. thread: int[N], by which thread.
      collectives: collectives of the GPU events that have one, by index.
      annotations: the user's annotations in the order of their starts.
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
        """What the file says about its job; empty if it says nothing."""
        found = self.header.get("distributedInfo")
        return found if isinstance(found, dict) else {}

    @property
    def own_rank(self) -> int | None:
        """The rank that the profiler noted in the file; None without one."""
        rank = integer(self.distributed.get("rank"))
        return rank if rank is not None and rank >= 0 else None

    @property
    def rank(self) -> int | None:
        """The rank in the file, or else in its name, as in "rank-3.trace.json"; None without one."""
        named = re.search(r"(?:^|[^a-z])rank[-_ ]?(\d{1,6})", self.source.label, re.IGNORECASE)
        return int(named[1]) if self.own_rank is None and named else self.own_rank

    @property
    def gpus(self) -> list[int]:
        """The devices that have events, in order."""
        return sorted({device for device, _, _ in (self.lanes[i] for i in np.unique(self.lane))})

    @property
    def window(self) -> tuple[float, float]:
        """The first start and the last end, in microseconds of the epoch."""
        epoch = self.base / 1e3
        return epoch + float(self.start.min()), epoch + float((self.start + self.duration).max())


def read_file(source: Source) -> KinetoFile:
    """Reads one file.

    Raises:
      NoGpuTrace: the file is whole and is no trace of a GPU.
      ValueError: the file does not exist, is damaged or cut short, or has no GPU event that can be used.
    """
    head = source.head()
    is_empty = not head.strip(b"\0 \t\r\n")
    if is_empty and source.path.stat().st_size < HEAD and not source.is_packed:
        raise ValueError(f"{source.name}: the file is empty; profile again")
    if what := "" if is_empty else refusal(head, source.name):
        raise NoGpuTrace(f"{source.name}: {what}")
    if is_xspace(head, source.name):
        raise NoGpuTrace(f"{source.name}: not text but binary, of jax.profiler; read_xplane reads it")
    collected = Collected()
    with source.open() as stream:
        try:
            scan = TraceScan(stream, collected.take)
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
    return _assembled(collected, source, scan)


def _assembled(collected: Collected, source: Source, scan: TraceScan) -> KinetoFile:
    """Makes a file of what was collected, after its text was read.

    Raises:
      NoGpuTrace: there is no GPU event.
      ValueError: there are GPU events, and none can be used.
    """
    header = scan.header or {}
    for begun in collected.begun.values():
        for item in begun:
            if collected.category(item.get("cat", ""))[1] == GPU:
                collected.leave_out("that begin and never end", item.get("name", ""))
    if not len(collected.start):
        if collected.left_out and any(category in GPU_CATEGORIES for category in collected.categories):
            raise ValueError(f"{source.name}: no GPU event can be used: {collected.reasons()}; export the trace again")
        raise NoGpuTrace(f"{source.name}: {_refusal(collected, header, scan)}")
    columns = KernelColumns(
        *(np.frombuffer(column, dtype) for column, dtype in (
            (collected.start, np.float64), (collected.duration, np.float64), (collected.lane, np.int32),
            (collected.correlation, np.int64), (collected.blocks, np.int64), (collected.external, np.int64),
        )),
    )  # fmt: skip
    kept = _possible(collected, columns)
    if not kept.any():
        raise ValueError(f"{source.name}: no GPU event can be used: {collected.reasons()}; export the trace again")
    launched, thread = _launches(collected, columns.correlation)
    base, groups = _checked_header(header, collected)
    collectives = _collectives(collected, columns.external, launched, thread, groups)
    names = collected.name
    if not kept.all():
        places = np.cumsum(kept) - 1
        names = [name for name, keep in zip(names, kept.tolist(), strict=True) if keep]
        collectives = {int(places[i]): found for i, found in collectives.items() if kept[i]}
    annotations = sorted(collected.annotations, key=lambda a: (a.start, -a.end))
    start, duration = columns.start[kept], columns.duration[kept]
    notes = [f"left out: {collected.reasons()}"] if collected.left_out else []
    notes += [f"{what}: {count:,}" for what, count in (scan.damage + collected.damaged).items()]
    notes += lonely(start, duration, names)
    return KinetoFile(
        source=source,
        base=base,
        header=header,
        categories=dict(collected.categories),
        start=start,
        duration=duration,
        name=names,
        lane=columns.lane[kept],
        lanes=list(collected.lanes),
        blocks=columns.blocks[kept],
        launched=launched[kept],
        thread=thread[kept],
        collectives=collectives,
        annotations=tuple(annotations),
        notes=tuple(notes),
    )


def _checked_header(header: Mapping[str, Any], collected: Collected) -> tuple[int, dict[str, tuple[int, ...]]]:
    """The origin of times in nanoseconds of the epoch, and the ranks of each process group; damage is counted."""
    distributed, base = header.get("distributedInfo"), header.get("baseTimeNanoseconds")
    if distributed is not None and not isinstance(distributed, dict):
        collected.damaged["distributedInfo that is no object, so that the rank is unknown"] += 1
    if base is not None and integer(base) is None:
        collected.damaged["baseTimeNanoseconds that is no number and counts as 0"] += 1
    return integer(base) or 0, process_groups(distributed) if isinstance(distributed, dict) else {}


def _refusal(collected: Collected, header: Mapping[str, Any], scan: TraceScan) -> str:
    """Says why there is no GPU event, and what to do."""
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
    if not collected.categories and sum(scan.damage.values()) + sum(collected.damaged.values()):
        return "JSON, but no Chrome trace: its entries are no events; name the profiler's trace"
    seen = ", ".join(sorted(filter(None, collected.categories))) or "none"
    if any(process.startswith(("/host:", "/device:")) for process in collected.processes):
        return (
            "a Chrome trace of jax.profiler (or TensorFlow), which tells less than the .xplane.pb beside it: "
            "name that, or its folder"
        )
    if any(category.startswith("mtia") for category in collected.categories):
        return f"no GPU events (categories: {seen}): a profile of MTIA devices, which are not read here"
    if "cuda_profiler_range" in collected.categories:
        return (
            f"no GPU events (categories: {seen}): CUPTI counted ranges instead of tracing kernels; profile without "
            "_ExperimentalConfig(profiler_metrics=...)"
        )
    return f"no GPU events (categories: {seen}); profile with ProfilerActivity.CUDA"


def _launches(collected: Collected, correlations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When each GPU event was launched and by which thread; NaN and -1 if unknown."""
    times, threads = np.full(len(correlations), np.nan), np.full(len(correlations), -1, np.int32)
    if len(collected.launch_time):
        of = np.frombuffer(collected.launch_correlation, np.int64)
        order = np.argsort(of, kind="stable")
        # Of several launches with one number, the last in the file counts.
        at = np.searchsorted(of[order], correlations, side="right") - 1
        found = order[np.maximum(at, 0)]
        same = (at >= 0) & (of[found] == correlations) & (correlations != NO_LAUNCH)
        times[same] = np.frombuffer(collected.launch_time, np.float64)[found[same]]
        threads[same] = np.frombuffer(collected.launch_thread, np.int32)[found[same]]
    return times, threads


def _collectives(
    collected: Collected,
    external: np.ndarray,
    launched: np.ndarray,
    thread: np.ndarray,
    groups: Mapping[str, tuple[int, ...]],
) -> dict[int, Collective]:
    """The collectives of kernels: from their own arguments, or else from the operator around their launch."""
    shared: dict[Collective, Collective] = {}
    found: dict[int, Collective] = {}
    by_id = {comm[0]: comm[4] for comm in collected.comms if comm[0] >= 0}
    for i, args in collected.described.items():
        # The operator may give the start and stride of the ranks where the kernel's list is cut short.
        whole = {**by_id.get(int(external[i]), {}), **args}
        if made := collective(whole, groups):
            found[i] = shared.setdefault(made, made)
    if not collected.comms:
        return found
    comms = sorted(collected.comms, key=lambda comm: comm[1])
    starts = np.array([comm[1] for comm in comms])
    for i, name in enumerate(collected.name):
        lower = name.lower()
        if i in found or not ("nccl" in lower or "rccl" in lower):
            continue
        args = by_id.get(int(external[i]))
        if args is None and not math.isnan(launched[i]):
            at = int(np.searchsorted(starts, launched[i], side="right")) - 1
            # Operators nest a few levels deep at most.
            around = comms[max(at - 8, 0) : at + 1][::-1]
            args = next((comm[4] for comm in around if comm[3] == thread[i] and comm[2] >= launched[i]), None)
        if args is not None and (made := collective(args, groups)):
            found[i] = shared.setdefault(made, made)
    return found


def _possible(collected: Collected, columns: KernelColumns) -> np.ndarray:
    """Which events are possible; the others are counted with their reasons."""
    kept = np.ones(len(columns.start), bool)
    far = far_away(columns.start, columns.duration)
    _drop(collected, kept, far, "more than an hour from all others, or at 0, as where CUPTI could note no time")
    for _ in range(3):
        overrun = overrunning(columns, np.flatnonzero(kept))
        if not len(overrun):
            break
        _drop(
            collected, kept, overrun, "with an end beyond later events of the same stream, which runs one after another"
        )
    return kept


def _drop(collected: Collected, kept: np.ndarray, which: np.ndarray, reason: str) -> None:
    kept[which] = False
    for i in which.tolist():
        collected.leave_out(reason, collected.name[i])
