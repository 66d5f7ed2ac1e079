"""Turns the planes of a profile into events of devices, on GPU, TPU and CPU.

* A GPU has a plane for every device and a line for every stream, and its events carry their scopes.
* A TPU has a plane for every device, a line of operations in which loops enclose what they run, and a line of
  operations that run beside them.
* CPUs share one plane of host threads. The operations of a device hop between threads, an asynchronous operation ends
  with a second event, and scopes stand in the compiled modules.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from profiling.event import Event, Step
from profiling.read.scopes import Place, place
from profiling.read.xplane_modules import CONTAINERS, ModuleInstruction, Modules
from profiling.read.xspace import Doubts, Entry, Line, Plane, Value

GPU = re.compile(r"/device:GPU:(\d+)")
TPU = re.compile(r"/device:TPU:(\d+)")
HOST = "/host:CPU"

IMPOSSIBLE = "events at times outside of the profile were left out"
OVERRUN = "events that contain others of their stream and end long after all else were left out"
NAMELESS = "events have no name in the profile, shown as ?"
ENDLESS = "operations have no end, so that asynchronous ones look too short"
HOST_OPERATIONS = "operations of the host's own CPU backend were left out, as its devices have operations"
LAUNCHES = "launches of kernels on the host were left out, as no device reports the kernels"
COPIES = "copies that a TPU makes beside its operations were left out: they are neither compute nor communication"

_LAUNCH = re.compile(r"(hip|cuda|roc|cu)[A-Z]")
_STREAM = re.compile(r"Stream #(\d+)")
_GRID = re.compile(r"grid:(\d+),(\d+),(\d+)")
_COLLECTIVE = re.compile(r"all-|reduce-scatter|collective-|ragged-|send|recv")
_OPERATIONS, _BESIDE = "XLA Ops", "Async XLA Ops"
_TEXT = re.compile(r"%?(\S+) = ")
_OPCODE = re.compile(r"(?<![\w-])([a-z][a-z0-9-]*)\(")
_CONTAINER = re.compile(rf"({'|'.join(sorted(CONTAINERS))})([.\d]|$)")

_OF_OPERATION = ("hlo_op", "hlo_module", "program_id", "name", "prefix")
_GPU_STATS = (*_OF_OPERATION, "kernel_details")
_TPU_STATS = (*_OF_OPERATION, "tf_op", "flow", "hlo_category")
_CPU_STATS = (*_OF_OPERATION, "device_ordinal", "correlation_id", "_p", "_c", "step_num")


@dataclasses.dataclass(frozen=True)
class Window:
    """The times that are possible; bit errors make others.

    Attributes:
      zero_ns: origin of the lines' times, in nanoseconds.
      low, high: first and last possible time, in microseconds since the origin.
    """

    zero_ns: int
    low: float
    high: float


class _Beside(NamedTuple):
    """Something that runs beside a TPU's operations; its start and its end may be two events of one flow."""

    start: float
    end: float
    name: str
    op: str
    scope: str
    flow: Value | None


class PlaneReader:
    """Turns the planes of one profile into events. Facts about an operation are kept, as most run many times.

    Args:
      modules: compiled modules that the profile carries.
      parts: names of a layer's parts; see `profiling.read.scopes.place`.
      window: times that are possible.
      doubts: counts what is left out.
    """

    def __init__(self, modules: Modules, parts: Mapping[str, str], window: Window, doubts: Doubts) -> None:
        self._modules = modules
        self._by_program = {name[name.rfind("(") :]: found for name, found in modules.items()}
        self._parts = parts
        self._window = window
        self._doubts = doubts
        self._places: dict[str, Place] = {}
        self._operations: dict[tuple[Value | None, ...], tuple[str, str, ModuleInstruction | None]] = {}
        self._blocks: dict[Value, int | None] = {}

    def gpu(self, plane: Plane, device: int) -> Iterator[Event]:
        """Kernels and copies on the streams of a GPU. Other tools derive the other lines from these."""
        for line in plane.lines:
            stream = _STREAM.match(line.name)
            if not stream:
                continue
            lane = f"stream {stream[1]}"
            for entry, start, end in self._entries(plane, line, _GPU_STATS):
                op, scope, _ = self._operation(entry.stats)
                details = entry.stats.get("kernel_details", "")
                yield self._event(device, lane, start, end, self._name(plane, entry), op, scope, self._grid(details))

    def tpu(self, plane: Plane, device: int) -> Iterator[Event]:
        """Operations of a TPU's core without loops, branches and calls, and the collectives that run beside them."""
        shared: dict[int, tuple[str, str, str, dict[str, Value]]] = {}
        beside: list[_Beside] = []
        for line in plane.lines:
            if line.name not in (_OPERATIONS, _BESIDE):
                continue
            for entry, start, end in self._entries(plane, line, _TPU_STATS):
                if entry.metadata not in shared:
                    shared[entry.metadata] = self._tpu_metadata(plane, entry)
                name, op, opcode, known = shared[entry.metadata]
                stats = {**known, **entry.stats}
                op, scope, found = self._operation({"hlo_op": op, **stats})
                scope = scope or str(stats.get("tf_op", "")).rstrip(":")
                opcode = found.opcode if found else opcode
                if line.name == _OPERATIONS:
                    if opcode not in CONTAINERS:
                        yield self._event(device, _OPERATIONS, start, end, name, op, scope, None)
                elif any(_COLLECTIVE.match(text) for text in (op, opcode, str(stats.get("hlo_category", "")))):
                    beside.append(_Beside(start, end, name, op, scope, stats.get("flow")))
                else:
                    self._doubts[COPIES] += 1
        for one in _joined(beside):
            yield self._event(device, _BESIDE, one.start, one.end, one.name, one.op, one.scope, None)

    def cpu(self, plane: Plane, number: Callable[[Iterable[int]], Mapping[int, int]]) -> Iterator[Event]:
        """Operations of all CPU devices, without those that only run others.

        The event of an operation lasts as long as the call that starts it; a second event says when it was done. An
        event with a correlation's number is a launch on another device and no operation.
        """
        ends: dict[Any, float] = {}
        calls = []
        for line in plane.lines:
            for entry, start, end in self._entries(plane, line, _CPU_STATS):
                name = self._name(plane, entry)
                if name.startswith("end: "):
                    if "_c" in entry.stats:
                        ends[entry.stats["_c"]] = end
                elif "hlo_op" in entry.stats and not name.startswith("Threadpool"):
                    if _is_launch(name, entry.stats):
                        self._doubts[LAUNCHES] += 1
                        continue
                    calls.append((name, start, end, entry.stats))
        devices = number({_ordinal(stats) for _, _, _, stats in calls})
        for name, start, end, stats in calls:
            op, scope, known = self._operation({key: stats[key] for key in _OF_OPERATION[:3] if key in stats})
            if known and known.opcode in CONTAINERS:
                continue
            lane = "collectives" if _COLLECTIVE.match(known.opcode if known else op) else "compute"
            done = ends.get(stats.get("_p"))
            if done is None:
                self._doubts[ENDLESS] += 1
            end = end if done is None else max(end, done)
            yield self._event(devices[_ordinal(stats)], lane, start, end, name, op, scope, None)

    def steps(self, plane: Plane) -> Iterator[Step]:
        """Steps that `jax.profiler.StepTraceAnnotation` marked on the host's Python threads."""
        for line in plane.lines:
            if not line.name.startswith("python"):
                continue
            for entry, start, end in self._entries(plane, line, ("step_num",)):
                number = entry.stats.get("step_num")
                if isinstance(number, int):
                    yield Step(self._name(plane, entry), number, start, end)

    def count_host_operations(self, plane: Plane) -> None:
        """Counts the operations that a host ran itself beside its devices; `cpu` would read them."""
        if "hlo_op" in plane.stat_names.values():
            for line in plane.lines:
                for entry, _, _ in self._entries(plane, line, ("hlo_op", "device_ordinal")):
                    self._doubts[HOST_OPERATIONS] += len(entry.stats) == 2

    def _entries(self, plane: Plane, line: Line, wanted: Sequence[str]) -> Iterator[tuple[Entry, float, float]]:
        """The possible events, with start and end in microseconds."""
        zero = (line.timestamp_ns - self._window.zero_ns) * 1000
        low, high = self._window.low, self._window.high
        for entry in plane.entries(line, wanted, self._doubts):
            start = (zero + entry.offset) / 1e6
            end = start + entry.duration / 1e6
            if low <= start and end <= high:
                yield entry, start, end
            else:
                self._doubts[IMPOSSIBLE] += 1

    def _name(self, plane: Plane, entry: Entry) -> str:
        known = plane.metadata.get(entry.metadata)
        if known is None or not (known.name or known.display_name):
            self._doubts[NAMELESS] += 1
            return "?"
        return known.name or known.display_name

    def _tpu_metadata(self, plane: Plane, entry: Entry) -> tuple[str, str, str, dict[str, Value]]:
        """The name, operation, opcode and stats that TPU events of one kind share."""
        known = plane.metadata.get(entry.metadata)
        whole = self._name(plane, entry)
        text = _TEXT.match(whole)
        op = text[1] if text else whole.lstrip("%")
        opcode = _OPCODE.search(whole, text.end()) if text else _CONTAINER.match(op)
        name = (known.display_name if known else "") or op
        stats = {key: value for key, value in known.stats.items() if key in _TPU_STATS} if known else {}
        return name, op, opcode[1] if opcode else "", stats

    def _operation(self, stats: Mapping[str, Value]) -> tuple[str, str, ModuleInstruction | None]:
        """The name of the instruction, its scope, and the instruction in its module if that is known."""
        key = tuple(map(stats.get, _OF_OPERATION))
        if key not in self._operations:
            op = str(stats.get("hlo_op", ""))
            program = f"({stats.get('program_id')})"
            module = self._modules.get(f"{stats.get('hlo_module')}{program}")
            if module is None and "hlo_module" not in stats:
                module = self._by_program.get(program)
            known = (module or {}).get(op)
            scope = known.scope if known else ""
            if not scope:
                scope = "/".join(filter(None, (str(stats.get("prefix", "")), str(stats.get("name", "")))))
            self._operations[key] = op, scope, known
        return self._operations[key]

    def _grid(self, details: Value) -> int | None:
        if details not in self._blocks:
            grid = _GRID.search(str(details))
            self._blocks[details] = int(grid[1]) * int(grid[2]) * int(grid[3]) if grid else None
        return self._blocks[details]

    def _event(
        self, device: int, lane: str, start: float, end: float, name: str, op: str, scope: str, blocks: int | None
    ) -> Event:
        where = self._places.get(scope)
        if where is None:
            where = self._places[scope] = place(scope, self._parts)
        return Event(
            device,
            lane,
            start,
            end,
            name,
            op,
            scope,
            phase=where.phase,
            layer=where.layer,
            microbatch=where.microbatch,
            blocks=blocks,
        )


def has_events(plane: Plane) -> bool:
    """Whether a plane is of a GPU or TPU that did anything, on lines that `PlaneReader` reads."""
    if GPU.fullmatch(plane.name):
        return any(line.count and _STREAM.match(line.name) for line in plane.lines)
    return bool(TPU.fullmatch(plane.name)) and any(
        line.count and line.name in (_OPERATIONS, _BESIDE) for line in plane.lines
    )


def _ordinal(stats: Mapping[str, Value]) -> int:
    ordinal = stats.get("device_ordinal", 0)
    return ordinal if isinstance(ordinal, int) else 0


def _is_launch(name: str, stats: Mapping[str, Value]) -> bool:
    return "correlation_id" in stats or bool(_LAUNCH.match(name))


def _joined(beside: Sequence[_Beside]) -> Iterator[_Beside]:
    """Joins what runs beside a TPU's operations: one event from start to end, or two that share a flow."""
    flows: dict[Any, list[_Beside]] = collections.defaultdict(list)
    for i, one in enumerate(beside):
        flows[("alone", i) if one.flow is None else one.flow].append(one)
    for together in flows.values():
        first = min(together, key=lambda one: one.start)
        yield first._replace(end=max(one.end for one in together))
