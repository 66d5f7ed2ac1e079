"""Writes a report as one self-contained page: figures, a timeline to zoom and search, sortable tables."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
import os
import pathlib
import string
from collections.abc import Iterable
from typing import Any

import numpy as np

from profiling.classify.names import kernel_label
from profiling.event import Event, Trace
from profiling.metrics import sides
from profiling.reports.making import EXPLAINED, Report
from profiling.table import LONGEST_TEXT, TIMES, Column, Figure, Table, Value, cut
from profiling.write.tracks import TrackRow, device_label, offsets, row_label, rows, step_rows

SCRIPTS = ("model.js", "timeline.js", "controls.js")
"""The scripts of a page, in this order, as each uses those before it."""

WIDE = 8
"""Tables with at least this many columns take the whole width of the page."""

MOST_EVENTS = 2_000_000
"""The most events that a page draws: some 40 MB, which a browser opens in a few seconds."""


def write_html(path: str | os.PathLike[str], report: Report, most: int = MOST_EVENTS) -> None:
    """Writes a report as a page for a browser. The file needs nothing else.

    Args:
      path: path of the file.
      report: what `profiling.report` returned.
      most: most events in the timeline; it holds the longest ones if there are more, and the notes say so.

    Raises:
      ValueError: an event ends before it starts.
      OSError: the file cannot be written.

    >>> import pathlib, tempfile
    >>> from profiling.reports.making import report
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "step.html"
    >>> write_html(path, report(Trace("a step", "kineto", (Event(0, "7", 0.0, 8.0, "gemm", group="compute"),))))
    >>> "<title>a step</title>" in path.read_text(encoding="utf-8")
    True
    """
    pathlib.Path(path).write_text(page(report, most), encoding="utf-8")


def page(report: Report, most: int = MOST_EVENTS) -> str:
    """The page as a text; the arguments are those of `write_html`.

    Its policy lets the browser run and load only what is in the page, whatever the names in a trace contain.
    """
    style = _resource("page.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_resource(name) for name in SCRIPTS) + "})();\n"
    traces = [report.trace, *([report.predicted] if report.predicted else [])]
    return string.Template(_resource("page.html")).substitute(
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:",
        title=html.escape(report.trace.title or "Trace"),
        doubt=f'<p id="doubt" role="note">{html.escape(report.doubt)}</p>' if report.doubt else "",
        facts="".join(f"<span>{html.escape(fact)}</span>" for fact in report.facts),
        cards="\n".join(map(_card, report.shown)),
        tables="\n".join(map(_table, report.tables)),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in (*_thinned(traces, most), *report.notes)),
        definitions="\n".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(meaning)}</dd>" for name, meaning in EXPLAINED
        ),
        data=embedded(traces, most),
        style=style,
        script=script,
    )


def _thinned(traces: Iterable[Trace], most: int) -> list[str]:
    return [
        f"the timeline shows the {most:,} longest of {len(trace.events):,} events; figures and tables are of all"
        for trace in traces
        if len(trace.events) > most
    ]


def embedded(traces: Iterable[Trace], most: int = MOST_EVENTS) -> str:
    """Traces as JSON without "<", so that it cannot end the script of the page that holds it.

    Each row has columns of nanoseconds, and each start counts from the one before. Lists hold the other facts of events
    and their texts, each once; rows refer to them by number.

    Args:
      traces: the measured trace, and the predicted one if there is one.
      most: most events of each trace; the longest are kept.

    >>> import json
    >>> found = json.loads(embedded([Trace("", "kineto", (Event(0, "7", 1.0, 3.5, "gemm"),))]))
    >>> found["rows"][0]["start"], found["rows"][0]["duration"], found["strings"][found["whats"][0][0]]
    ([1000], [2500], 'gemm')
    """
    whole = list(traces)
    tables = _Tables()
    drawn = [_longest(trace, most) for trace in whole]
    shifts = [offset - offsets(whole)[0] for offset in offsets(whole)]  # the first trace keeps its times
    measured = drawn[0]
    bands = [_Band("host", [tables.row(row, 0.0, {"host": True}, "step") for row in step_rows(measured)])]
    places: dict[int, _Band] = {}
    for device in sorted(whole[0].devices, key=lambda device: (measured.ranks.get(device, device), device)):
        bands.append(places.setdefault(device, _Band(device_label(measured, device))))
    for index, (trace, shift) in enumerate(zip(drawn, shifts, strict=True)):
        for row in rows(trace, nested=False):
            device = row.device if index == 0 else _same_device(measured, trace, row.device)
            if device not in places:
                bands.append(places.setdefault(device, _Band(device_label(trace, row.device))))
            label = f"predicted {row_label(row)}" if index else row_label(row)
            places[device].rows.append(tables.row(row, shift, {"label": label, "trace": index}))
    for device, spans in _exposed(whole[0]).items():
        places[device].exposed = spans
    shown = [band for band in bands if band.rows]
    found = {
        "bands": [band.label for band in shown],
        "exposed": [band.exposed for band in shown],
        "whats": list(tables.whats.values()),
        "strings": list(tables.strings),
        "labels": tables.labels(drawn),
        "events": len(whole[0].events),
    }
    # Each row became text by itself, so that only one row of the trace was held twice.
    listed = ",".join(f'{{"band":{number},{row}}}' for number, band in enumerate(shown) for row in band.rows)
    return f'{json.dumps(found, separators=(",", ":"))[:-1]},"rows":[{listed}]}}'.replace("<", "\\u003c")


def _longest(trace: Trace, most: int) -> Trace:
    if len(trace.events) <= most:
        return trace
    durations = np.fromiter((event.duration for event in trace.events), np.float64, len(trace.events))
    kept = np.sort(np.argpartition(-durations, most)[:most]).tolist()
    return dataclasses.replace(trace, events=tuple(trace.events[i] for i in kept))


def _exposed(trace: Trace) -> dict[int, list[int]]:
    """When each device moves data and computes nothing: starts and ends as differences of nanoseconds."""
    events: dict[int, list[Event]] = {device: [] for device in trace.devices}
    for event in trace.events:
        events[event.device].append(event)
    return {device: _differences(sides(found, "transfer+wait").exposed().ravel()) for device, found in events.items()}


@dataclasses.dataclass
class _Band:
    """The rows of one device, as the inside of JSON objects, and where its communication is exposed."""

    label: str
    rows: list[str] = dataclasses.field(default_factory=list)
    exposed: list[int] = dataclasses.field(default_factory=list)


def _same_device(measured: Trace, predicted: Trace, device: int) -> int:
    """The measured device that a predicted one is drawn beside: the first of its rank, or that of its number."""
    if not (measured.ranks and device in predicted.ranks):
        return device
    same = (other for other in measured.devices if measured.ranks.get(other) == predicted.ranks[device])
    # A rank that was not measured is drawn alone, under a number that no device has.
    return next(same, -1 - device)


class _Tables:
    """Lists of the facts of events and of their texts, each once, in the order of their first use."""

    def __init__(self) -> None:
        self.whats: dict[tuple[Any, ...], tuple[int | None, ...]] = {}
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.strings: dict[str, int] = {}

    def row(self, row: TrackRow, shift: float, facts: dict[str, Any], group: str | None = None) -> str:
        count = len(row.events)
        starts = _nanoseconds(np.fromiter((event.start for event in row.events), np.float64, count) + shift)
        ends = _nanoseconds(np.fromiter((event.end for event in row.events), np.float64, count) + shift)
        columns = {
            "start": np.diff(starts, prepend=0).tolist(),
            "duration": (ends - starts).tolist(),
            "what": [self.what(event, group or event.group) for event in row.events],
        }
        found = {"label": row_label(row), "trace": 0, "host": False} | facts | columns
        return json.dumps(found, separators=(",", ":"))[1:-1]

    def what(self, event: Event, group: str) -> int:
        key = (
            event.name, event.kind, group, event.phase, event.layer, event.microbatch, event.scope, event.hlo_op,
            event.blocks,
        )  # fmt: skip
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.numbers)
            name, kind, group, phase, layer, microbatch, scope, hlo_op, blocks = key
            first = (*map(self.text, (name, kind, group, phase)), layer, microbatch)
            self.whats[key] = (*first, *map(self.text, (scope, hlo_op)), blocks)
        return number

    def text(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings))

    def labels(self, traces: Iterable[Trace]) -> dict[int, str]:
        """``{number of a name: its label}`` of names that profilers gave; names of simulations are short already."""
        names = {event.name for trace in traces if trace.source != "simulated" for event in trace.events}
        return {self.text(name): label for name in sorted(names) if (label := kernel_label(name)) != name}


def _nanoseconds(times: np.ndarray) -> np.ndarray:
    return np.rint(times * 1000).astype(np.int64)


def _differences(times: np.ndarray) -> list[int]:
    return np.diff(_nanoseconds(times), prepend=0).tolist()


def _card(figure: Figure) -> str:
    value = "" if figure.value is None else repr(figure.value)
    number, _, unit = figure.written.rpartition(" ")
    if unit not in TIMES:
        number, unit = figure.written, ""
    return (
        f'<li id="figure-{figure.name}" data-value="{html.escape(value)}">'
        f'<span class="label">{html.escape(figure.label)}</span>'
        f'<span class="value{" range" if figure.shown else ""}">{html.escape(number)}'
        f"{f'<small> {html.escape(unit)}</small>' if unit else ''}</span>"
        f'<span class="note">{html.escape(figure.note)}</span></li>'
    )


def _table(table: Table) -> str:
    table = table.filled()
    heads = "".join(
        f'<th scope="col"{_class(column.is_text)}{_whole(column.title, heading)}>{html.escape(heading)}</th>'
        for column, heading in zip(table.columns, table.headings, strict=True)
    )
    body = []
    for number, (row, cells) in enumerate(zip(table.rows, table.cells(), strict=True)):
        place = ""
        if table.spans:
            start, end = table.spans[number]
            place = f' data-from="{start!r}" data-to="{end!r}"'
        elif table.events:
            name, kind = map(html.escape, table.events[number])
            place = f' data-event="{name}" data-kind="{kind}"'
        columns = zip(table.columns, row, cells, strict=True)
        filled = "".join(_cell(column, value, cell) for column, value, cell in columns)
        body.append(f"<tr{place}>{filled}</tr>")
    wide = " wide" if len(table.columns) >= WIDE or table.spans or table.events else ""
    return (
        f'<section class="panel{wide}" aria-labelledby="{table.name}-title">'
        f'<h2 id="{table.name}-title">{html.escape(table.title)}</h2><p>{html.escape(table.caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{table.name}-title">'
        f'<table id="{table.name}"><thead><tr>{heads}</tr></thead><tbody>\n' + "\n".join(body) + "\n"
        "</tbody></table></div></section>"
    )


def _cell(column: Column, value: Value, written: str) -> str:
    """A cell. It is sorted by its value, which the text may round or cut; a range is sorted by its upper end."""
    key = "" if value is None else value if isinstance(value, str) else repr(value)
    if column.unit == "range":
        key = key.rpartition("-")[2]
    kind = "text name" if column.unit == "name" else "text" if column.is_text else "share" if column.is_share else ""
    name = f' class="{kind}"' if kind else ""
    shown = cut(written, LONGEST_TEXT)
    whole = _whole(str(value), shown) if column.is_text and value else ""
    return f'<td{name} data-value="{html.escape(key)}"{whole}>{html.escape(shown)}</td>'


def _whole(text: str, shown: str) -> str:
    """The whole text for the pointer, if less is shown."""
    return "" if shown.startswith(text) else f' title="{html.escape(text)}"'


def _class(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _hash(text: str) -> str:
    """The hash by which a content security policy allows a text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return importlib.resources.files("profiling.reports").joinpath("page", name).read_text(encoding="utf-8")
