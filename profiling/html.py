"""A report as one page that needs nothing else: numbers, a timeline to zoom and search in, sortable tables."""

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

from profiling.event import Event, Trace
from profiling.report import EXPLAINED, Report
from profiling.table import Column, Figure, Table, Value
from profiling.tracks import Row, counters, device_label, offsets, row_label, rows, step_rows

SCRIPTS = ("model.js", "timeline.js", "controls.js")
"""In this order, as each uses those before."""

WIDE = 8
"""Tables with at least so many columns take the whole width of the page."""


def write_html(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the page.

    Raises:
      ValueError: an event whose times are out of order.
      OSError: the file cannot be written.

    >>> import pathlib, tempfile
    >>> from profiling.report import report
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "step.html"
    >>> write_html(path, report(Trace("a step", "kineto", (Event(0, "7", 0.0, 8.0, "gemm", group="compute"),))))
    >>> "<title>a step</title>" in path.read_text(encoding="utf-8")
    True
    """
    pathlib.Path(path).write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The page as a text.

    The browser is told to run and load nothing but what stands in it, whatever the names in a trace contain.
    """
    style = _resource("page.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_resource(name) for name in SCRIPTS) + "})();\n"
    traces = [report.trace, *([report.predicted] if report.predicted else [])]
    return string.Template(_resource("page.html")).substitute(
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:",
        title=html.escape(report.trace.title or "Trace"),
        doubt=f'<p id="doubt" role="note">{html.escape(report.doubt)}</p>' if report.doubt else "",
        facts="".join(f"<span>{html.escape(fact)}</span>" for fact in report.facts),
        cards="\n".join(map(_card, report.figures)),
        tables="\n".join(map(_table, report.tables)),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in report.notes),
        definitions="\n".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(meaning)}</dd>" for name, meaning in EXPLAINED
        ),
        data=embedded(traces),
        style=style,
        script=script,
    )


def embedded(traces: Iterable[Trace]) -> str:
    """Traces as JSON that may stand in a page: no "<" in it, hence no end of the script that holds it.

    Per row, columns of nanoseconds, each start as the distance from the one before; what an event is apart from its
    times is a number in a list, as are the texts in that.

    >>> import json
    >>> found = json.loads(embedded([Trace("", "kineto", (Event(0, "7", 1.0, 3.5, "gemm"),))]))
    >>> found["rows"][0]["start"], found["rows"][0]["duration"], found["strings"][found["whats"][0][0]]
    ([1000], [2500], 'gemm')
    """
    return json.dumps(_encoded(list(traces)), separators=(",", ":")).replace("<", "\\u003c")


def _encoded(traces: list[Trace]) -> dict[str, Any]:
    tables = _Tables()
    shifts = [offset - offsets(traces)[0] for offset in offsets(traces)]  # the first trace keeps its times
    measured = traces[0]
    bands = [_Band("host", [{**tables.row(row, 0.0, "step"), "host": True} for row in step_rows(measured)])]
    places: dict[int, _Band] = {}
    for device in sorted(measured.devices, key=lambda device: (measured.ranks.get(device, device), device)):
        bands.append(places.setdefault(device, _Band(device_label(measured, device))))
    for index, (trace, shift) in enumerate(zip(traces, shifts, strict=True)):
        for row in rows(trace, nested=False):
            device = row.device if trace is measured else _same_device(measured, trace, row.device)
            if device not in places:
                bands.append(places.setdefault(device, _Band(device_label(trace, row.device))))
            label = f"predicted {row_label(row)}" if index else row_label(row)
            places[device].rows.append({**tables.row(row, shift), "label": label, "trace": index, "host": False})
    for device, named in counters(measured).items():
        places[device].exposed += _differences([round(time * 1000) for time, _ in named["exposed communication"]])
    shown = [band for band in bands if band.rows]
    return {
        "bands": [band.label for band in shown],
        "exposed": [band.exposed for band in shown],
        "rows": [{"trace": 0, **row, "band": number} for number, band in enumerate(shown) for row in band.rows],
        "whats": list(tables.whats),
        "strings": list(tables.strings),
    }


@dataclasses.dataclass
class _Band:
    """The rows of one device; where data travels and nothing is computed, as differences of nanoseconds."""

    label: str
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    exposed: list[int] = dataclasses.field(default_factory=list)


def _same_device(measured: Trace, predicted: Trace, device: int) -> int:
    """The measured device beside which a predicted one is drawn: the first of its rank, or that of its number."""
    if not (measured.ranks and device in predicted.ranks):
        return device
    same = (other for other in measured.devices if measured.ranks.get(other) == predicted.ranks[device])
    # A rank that was not measured stands on its own, under a number that no device has.
    return next(same, -1 - device)


class _Tables:
    """Lists of what events are and of the texts in that, each once, in the order of their first use."""

    def __init__(self) -> None:
        self.whats: dict[tuple[int | None, ...], int] = {}
        self.strings: dict[str, int] = {}

    def row(self, row: Row, shift: float, group: str | None = None) -> dict[str, Any]:
        starts = [round((event.start + shift) * 1000) for event in row.events]
        ends = [round((event.end + shift) * 1000) for event in row.events]
        return {
            "label": row_label(row),
            "start": _differences(starts),
            "duration": [end - start for start, end in zip(starts, ends, strict=True)],
            "what": [self.what(event, group or event.group) for event in row.events],
        }

    def what(self, event: Event, group: str) -> int:
        text = self.text
        found = (
            text(event.name),
            text(event.kind),
            text(group),
            text(event.phase),
            event.layer,
            event.microbatch,
            text(event.scope),
            text(event.hlo_op),
            event.blocks,
        )
        return self.whats.setdefault(found, len(self.whats))

    def text(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings))


def _differences(times: list[int]) -> list[int]:
    return [time - before for before, time in zip([0, *times], times, strict=False)]


def _card(figure: Figure) -> str:
    value = "" if figure.value is None else repr(figure.value)
    return (
        f'<li id="figure-{figure.name}" data-value="{html.escape(value)}">'
        f'<span class="label">{html.escape(figure.label)}</span>'
        f'<span class="value{" range" if figure.shown else ""}">{html.escape(figure.written.removesuffix(" us"))}'
        f"{'<small> us</small>' if figure.written.endswith(' us') else ''}</span>"
        f'<span class="note">{html.escape(figure.note)}</span></li>'
    )


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_class(not column.unit)}>{html.escape(column.heading)}</th>' for column in table.columns
    )
    body = []
    for number, (row, cells) in enumerate(zip(table.rows, table.cells(), strict=True)):
        span = ""
        if table.spans:
            start, end = table.spans[number]
            span = f' data-from="{start!r}" data-to="{end!r}"'
        columns = zip(table.columns, row, cells, strict=True)
        filled = "".join(_cell(column, value, cell) for column, value, cell in columns)
        body.append(f"<tr{span}>{filled}</tr>")
    wide = " wide" if len(table.columns) >= WIDE or table.spans else ""
    return (
        f'<section class="panel{wide}" aria-labelledby="{table.name}-title">'
        f'<h2 id="{table.name}-title">{html.escape(table.title)}</h2><p>{html.escape(table.caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{table.name}-title">'
        f'<table id="{table.name}"><thead><tr>{heads}</tr></thead><tbody>\n' + "\n".join(body) + "\n"
        "</tbody></table></div></section>"
    )


def _cell(column: Column, value: Value, written: str) -> str:
    """What it is sorted by is its value, which the text may round; of a range, its upper end."""
    key = "" if value is None else value if isinstance(value, str) else repr(value)
    if column.unit == "range":
        key = key.rpartition("-")[2]
    kind = "text" if not column.unit else "share" if column.is_share else ""
    name = f' class="{kind}"' if kind else ""
    return f'<td{name} data-value="{html.escape(key)}">{html.escape(written)}</td>'


def _class(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _hash(text: str) -> str:
    """What a content security policy allows by its content alone."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return importlib.resources.files("profiling").joinpath("page", name).read_text(encoding="utf-8")
