"""Writes traces as Chrome's JSON, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import gzip
import heapq
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from profiling.event import Event, Trace
from profiling.write.tracks import (
    PhaseLink,
    TrackRow,
    facts,
    flows,
    panels,
    row_label,
    side_by_side,
)

COLOURS = {
    "compute": "thread_state_running",
    "transfer": "rail_animation",
    "wait": "terrible",
    "unclassified": "yellow",
    "control": "grey",
}
"""Names of colours in chrome://tracing, by group; Perfetto takes its own."""

Json = dict[str, Any]


def write_chrome(
    path: str | os.PathLike[str],
    traces: Trace | Sequence[Trace],
    *,
    links: Iterable[PhaseLink] = (),
    counted: bool = True,
) -> None:
    """Writes one trace, or several side by side with their first events at the same time.

    Each device is a process, and each row of a lane is a thread on which events nest. The host's steps are a process of
    their own. Times are in microseconds, to the nanosecond.

    Args:
      path: path that ends in ".json", or in ".json.gz" for a compressed file.
      traces: traces of any reader; several are told apart by their titles.
      links: phases to join by arrows, such as `MOE_LINKS`.
      counted: whether to add counters of exposed communication and of thread blocks in transfers.

    Raises:
      ValueError: the path has another ending, there are no traces, or an event ends before it starts.
      OSError: the file cannot be written.

    >>> import json, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "step.json"
    >>> write_chrome(path, Trace("", "simulated", (Event(3, "gpu", 1.0, 2.5, "a"),)))
    >>> [event["dur"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    [1.5]
    """
    whole, links = side_by_side(path, traces, (".json", ".json.gz")), tuple(links)
    writer = _ChromeWriter()
    for trace, offset, prefix in whole:
        writer.add(trace, offset, prefix, links, counted)
    sources = [
        {
            "title": trace.title,
            "source": trace.source,
            "notes": trace.notes,
            "metadata": {name: str(value) for name, value in trace.metadata.items()},
        }
        for trace, _, _ in whole
    ]
    with pathlib.Path(path).open("wb") as raw:
        # No name and no time in the header: equal traces make equal files.
        packed = gzip.GzipFile("", "wb", 6, raw, 0) if os.fspath(path).endswith(".gz") else raw
        with io.TextIOWrapper(packed, encoding="utf-8") as file:
            file.write(f'{{"displayTimeUnit":"ns","otherData":{_dumps({"traces": sources})},"traceEvents":[')
            separator = "\n"
            for event in writer.events():
                file.write(separator + _dumps(event))
                separator = ",\n"
            file.write("\n]}\n")


class _ChromeWriter:
    """Numbers processes and threads from 1, as 0 is the idle process to viewers. No thread's number is used twice."""

    def __init__(self) -> None:
        self.header: list[Json] = []
        self.streams: list[Iterable[Json]] = []
        self.process_ids = itertools.count(1)
        self.thread_ids = itertools.count(1)
        self.flow_ids = itertools.count(1)

    def events(self) -> Iterator[Json]:
        yield from self.header
        yield from heapq.merge(*self.streams, key=lambda event: event["ts"])

    def add(self, trace: Trace, offset: float, prefix: str, links: tuple[PhaseLink, ...], counted: bool) -> None:
        joined = flows(trace, links, self.flow_ids, "s", "f")
        for panel in panels(trace, counted):
            process = self.process(prefix + panel.label)
            for name, samples in panel.counters.items():
                self.streams.append(_counter(process, name, samples, offset))
            for row in panel.rows:
                thread = self.thread(process, row_label(row))
                if panel.is_host:
                    self.streams.append([_slice(process, thread, event, offset, {}) for event in row.events])
                else:
                    self.streams.append(_thread(process, thread, row, offset, joined))

    def process(self, name: str) -> int:
        process = next(self.process_ids)
        self._describe("process", process, 0, name, process)
        return process

    def thread(self, process: int, name: str) -> int:
        thread = next(self.thread_ids)
        self._describe("thread", process, thread, name, thread)
        return thread

    def _describe(self, what: str, process: int, thread: int, name: str, order: int) -> None:
        common = {"ph": "M", "pid": process, "tid": thread}
        self.header.append({"name": f"{what}_name", **common, "args": {"name": name}})
        self.header.append({"name": f"{what}_sort_index", **common, "args": {"sort_index": order}})


def _thread(
    process: int, thread: int, row: TrackRow, offset: float, joined: dict[Event, list[tuple[str, int]]]
) -> Iterator[Json]:
    for event in row.events:
        made = _slice(process, thread, event, offset, facts(event))
        yield made
        for phase, flow in joined.get(event, ()) if joined else ():
            yield {
                "ph": phase,
                "pid": process,
                "tid": thread,
                "ts": made["ts"],
                "name": "takes",
                "cat": "flow",
                "id": flow,
                **({"bp": "e"} if phase == "f" else {}),
            }


def _slice(process: int, thread: int, event: Event, offset: float, args: Json) -> Json:
    start, end = round((event.start + offset) * 1000), round((event.end + offset) * 1000)
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "ts": _microseconds(start),
        "dur": _microseconds(end - start),
        "name": event.name,
        "cat": event.group,
        "cname": COLOURS[event.group],
        "args": args,
    }


def _counter(process: int, name: str, samples: Iterable[tuple[float, float]], offset: float) -> list[Json]:
    common = {"ph": "C", "pid": process, "tid": 0, "name": name}
    return [
        {**common, "ts": _microseconds(round((time + offset) * 1000)), "args": {"value": value}}
        for time, value in samples
    ]


def _microseconds(nanoseconds: int) -> float | int:
    whole, rest = divmod(nanoseconds, 1000)
    return nanoseconds / 1000 if rest else whole


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
