"""Collects the events of a Kineto file in columns, as far as a trace needs them."""

from __future__ import annotations

import array
import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from profiling.read.impossible import NO_LAUNCH
from profiling.read.kineto_collective import NAME, described
from profiling.read.kineto_values import arguments, integer, last_number, microseconds, short, thread_of

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset")
ANNOTATION = "user_annotation"
PARAM_COMMS = "record_param_comms"
"""The operator in which PyTorch records the arguments of a collective."""

OTHER, GPU, HOST_LAUNCH, USER = range(4)
"""What an event is, according to its category."""

_LAUNCH = re.compile(r"(?:\w+_)?(?:runtime|driver)")
_DAY = 86_400e6


@dataclasses.dataclass(frozen=True, slots=True)
class Annotation:
    """A named stretch of a host thread, in microseconds."""

    name: str
    start: float
    end: float
    thread: int


class Collected:
    """Takes what a trace needs from one event after another, so that a million dicts never exist at once.

    Attributes:
      categories: number of events of each category.
      left_out: number of GPU events left out, by reason; example: name of one for each reason.
      damaged: number of other things left out or repaired, by reason.
      processes: names of the processes.
      begun: events that have begun and not ended, by thread.
      start, duration, name, lane, correlation, blocks, external: of each GPU event.
      described: arguments of the GPU events that belong to a collective, by index.
      launch_correlation, launch_time, launch_thread: of each launch.
      annotations: the user's annotations.
      comms: "External id", start, end, thread and arguments of each `record_param_comms`.
    """

    def __init__(self) -> None:
        self.categories: collections.Counter[str] = collections.Counter()
        self.left_out: collections.Counter[str] = collections.Counter()
        self.damaged: collections.Counter[str] = collections.Counter()
        self.example: dict[str, str] = {}
        self.processes: set[str] = set()
        self._codes: dict[Any, tuple[str, int]] = {}
        self._names: dict[Any, str] = {}
        self._lane_ids: dict[tuple[Any, Any, Any], int] = {}
        self.lanes: dict[tuple[int, str, str], int] = {}
        self._threads: dict[tuple[str, str], int] = {}
        self.begun: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.start, self.duration = array.array("d"), array.array("d")
        self.name: list[str] = []
        self.lane, self.correlation, self.blocks = array.array("i"), array.array("q"), array.array("q")
        self.external = array.array("q")
        self.described: dict[int, Mapping[str, Any]] = {}
        self.launch_correlation, self.launch_time = array.array("q"), array.array("d")
        self.launch_thread = array.array("i")
        self.annotations: list[Annotation] = []
        self.comms: list[tuple[int, float, float, int, Mapping[str, Any]]] = []

    def take(self, item: dict[str, Any]) -> None:
        """Takes an event of any kind."""
        phase = item.get("ph")
        if phase != "X":
            if phase == "B":
                self.begun.setdefault(thread_of(item), []).append(item)
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
            text, code = self.category(category)
        self.categories[text] += 1
        if code == GPU:
            self._kernel(item)
        elif code == HOST_LAUNCH:
            self._launch(item)
        elif code == USER:
            start, duration = microseconds(item.get("ts")), microseconds(item.get("dur"))
            if start is None or duration is None or duration < 0:
                self.damaged["annotations without a start or a duration, left out"] += 1
            else:
                self.annotations.append(
                    Annotation(self._text(item.get("name", "")), start, start + duration, self._thread_id(item))
                )
        elif item.get("name") == PARAM_COMMS:
            self._param_comms(item)

    def category(self, category: Any) -> tuple[str, int]:
        """A category in small letters, and the code of its events."""
        text = str(category).lower()
        code = OTHER
        if text in GPU_CATEGORIES:
            code = GPU
        elif _LAUNCH.fullmatch(text):
            code = HOST_LAUNCH
        elif text == ANNOTATION:
            code = USER
        if isinstance(category, str):
            self._codes[category] = text, code
        return text, code

    def _end(self, item: dict[str, Any]) -> None:
        """Joins the end of an event to its beginning, which may say more."""
        begun = self.begun.get(thread_of(item))
        if not begun:
            self.damaged["ends without a beginning, left out"] += 1
            return
        whole = begun.pop()
        start, end = microseconds(whole.get("ts")), microseconds(item.get("ts"))
        if start is not None and end is not None:
            whole["dur"] = end - start
        args = {**arguments(whole), **arguments(item)}
        self.take({**item, **whole, "ph": "X", "args": args})

    def _metadata(self, item: dict[str, Any]) -> None:
        if item.get("name") == "process_name" and len(self.processes) < 64:
            self.processes.add(str(arguments(item).get("name", "")))

    def _kernel(self, item: dict[str, Any]) -> None:
        args = arguments(item)
        start, duration = microseconds(item.get("ts")), microseconds(item.get("dur"))
        if start is None or duration is None or not 0 <= duration <= _DAY:
            if start is None:
                reason = "without a start" if item.get("ts") is None else "with a start that is no time"
            elif duration is None:
                reason = "without a duration" if item.get("dur") is None else "with a duration that is no time"
            else:
                reason = "with a negative duration" if duration < 0 else "that last more than a day"
            self.leave_out(reason, item.get("name", ""))
            return
        self.lane.append(self._lane_id(item, args))
        self.start.append(start)
        self.duration.append(duration)
        self.name.append(self._text(item.get("name", "")))
        correlation = args.get("correlation")
        if type(correlation) is not int and correlation is not None:
            number = integer(correlation)
            if number is None:
                self.damaged["GPU events whose correlation is no number, so that their launch is unknown"] += 1
            correlation = number
        if correlation is None or not -(2**63) < correlation < 2**63:
            correlation = NO_LAUNCH
        self.correlation.append(correlation)
        grid = args.get("grid")
        self.blocks.append(-1 if grid is None else self._grid(grid))
        if NAME in args:
            self.described[len(self.start) - 1] = described(args)
        external = args.get("External id")
        self.external.append(external if type(external) is int and 0 <= external < 2**63 else -1)

    def leave_out(self, reason: str, name: Any) -> None:
        """Counts a GPU event that is left out for a reason."""
        self.left_out[reason] += 1
        self.example.setdefault(reason, self._text(name))

    def _grid(self, grid: Any) -> int:
        """The number of thread blocks; -1 if unknown."""
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
        lane = (last_number(device), str(context), self._text(stream))
        number = self._lane_ids[device, context, stream] = self.lanes.setdefault(lane, len(self.lanes))
        return number

    def _launch(self, item: dict[str, Any]) -> None:
        correlation = arguments(item).get("correlation")
        if type(correlation) is not int:
            correlation = integer(correlation)
        if correlation is None or not -(2**63) < correlation < 2**63:
            return
        time = microseconds(item.get("ts"))
        if time is None:
            self.damaged["launches without a start, left out"] += 1
            return
        self.launch_correlation.append(correlation)
        self.launch_time.append(time)
        self.launch_thread.append(self._thread_id(item))

    def _param_comms(self, item: dict[str, Any]) -> None:
        args = arguments(item)
        start, duration = microseconds(item.get("ts")), microseconds(item.get("dur"))
        if NAME in args and start is not None and duration is not None:
            external = integer(args.get("External id"))
            thread = self._thread_id(item)
            number = -1 if external is None else external
            self.comms.append((number, start, start + duration, thread, described(args)))

    def _thread_id(self, item: dict[str, Any]) -> int:
        return self._threads.setdefault(thread_of(item), len(self._threads))

    def _text(self, name: Any) -> str:
        """A name that can be printed; equal names are one object."""
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

    def reasons(self) -> str:
        """Says how many GPU events were left out for each reason."""
        return "; ".join(
            f"{count:,} GPU event{'s' * (count != 1)} {reason} ({short(self.example[reason])})"
            for reason, count in self.left_out.items()
        )
