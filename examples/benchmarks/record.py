"""What benchmarks print and record, and the pages that quote it.

    python examples/benchmarks/record.py            # says which figures of pages differ from docs/measured.json
    python examples/benchmarks/record.py --pages    # writes the file's figures into the pages

A benchmark with ``--record`` puts its figures into docs/measured.json, ``{key: {"value", "unit", "command", "machine",
"date"}}``; a key is the benchmark's name, the labels of the row and the column, divided by slashes. Figures of others
have "source" in place of "command". A page ties its figures to keys with comments that readers do not see:

* ``<!--m:KEY-->1,234<!--/m-->`` round a figure of a sentence. ``min PATTERN`` and ``max PATTERN`` in place of a key are
  the least and the greatest of several, with ``*`` for what differs.
* ``<!--table:KEY-->`` on a line of its own before a table, with ``{0}``, ``{1}`` and so on for the row's first cells,
  its labels (an empty one is that of the row above), and ``{column}`` for the column's title. Every number of the other
  cells is a figure; the second of a cell has the key of the first and " (2)", or the second key where ``;`` divides keys.

The page says with how many decimals a figure stands there.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import functools
import json
import math
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
MEASURED = ROOT / "docs" / "measured.json"

NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?")
FIGURE = re.compile(r"<!--m:(?P<key>.+?)-->(?P<text>.*?)<!--/m-->")
TABLE = re.compile(r"^<!--table:(?P<keys>.+?)-->\n+(?P<rows>(?:\|.*\n)+)", re.MULTILINE)
UNITS = ("ms", "s", "us", "µs", "%", "kB", "MB", "GB", "MiB", "GiB", "TFLOP", "TFLOP/s", "GB/s", "TB/s", "tokens/s")

Records = dict[str, dict[str, Any]]


# What a benchmark does: parse, time, print, record.


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--record", nargs="?", const=MEASURED, type=pathlib.Path, metavar="FILE",
                        help="put the figures into this file; without a name into docs/measured.json")  # fmt: skip
    parser.add_argument("--record-as", metavar="NAME", help="the first part of their keys, instead of the benchmark's name")
    return parser


def machine() -> str:
    """Devices and versions of this process: '2 x NVIDIA H200, jax 0.11.2'."""
    import jax  # noqa: PLC0415  the pages need no devices

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return processor() + f", jax {jax.__version__}"
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{count}{devices[0].device_kind}, jax {jax.__version__}"


def processor() -> str:
    """The processor, its cores and Python's version."""
    named = re.search(r"model name\s*: (.*)", _cpuinfo())
    name = named[1] if named else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _cpuinfo() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def medians_ms(
    calls: Sequence[Callable[[], Any]],
    repeats: int,
    *,
    inner: int | float = 1,
    warm: int = 1,
    wait: Callable[[Any], Any] | None = None,
) -> list[float]:
    """Median milliseconds of calls that take turns, so that a GPU that grows hot slows all of them down alike.

    Args:
      calls: what is timed.
      repeats: turns that count.
      inner: calls of a turn, one behind the other without waiting; or, as a float, the seconds that a turn should
        take, with 1 to 50 calls.
      warm: turns before those that count.
      wait: waits for a result; None is `jax.block_until_ready`.
    """
    if wait is None:
        import jax  # noqa: PLC0415

        wait = jax.block_until_ready

    def seconds(call: Callable[[], Any], count: int) -> float:
        start, result = time.perf_counter(), None
        for _ in range(count):
            result = call()
        wait(result)
        return (time.perf_counter() - start) / count

    for _ in range(warm):
        for call in calls:
            seconds(call, 1)
    counts = [inner if isinstance(inner, int) else max(1, min(50, round(inner / seconds(call, 1)))) for call in calls]
    turns = [[seconds(call, count) for call, count in zip(calls, counts, strict=True)] for _ in range(repeats)]
    return [statistics.median(taken) * 1e3 for taken in zip(*turns, strict=True)]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run prints and records.

    Attributes:
      name: first part of the keys.
      machine: what was measured.
      file: of records; None where nothing is recorded.
    """

    name: str
    machine: str
    file: pathlib.Path | None = None

    @classmethod
    def begin(cls, args: argparse.Namespace, machine: str, *notes: object) -> Report:
        """Prints the machine and what else the tables are of."""
        print(", ".join(map(str, (machine, *notes))) + "\n", flush=True)
        return cls(args.record_as or pathlib.Path(sys.argv[0]).stem, machine, args.record)

    def table(
        self,
        rows: Iterable[Mapping[str, Any]],
        labels: int = 1,
        title: str | None = None,
        formats: Mapping[str, str] | None = None,
    ) -> None:
        """Prints a Markdown table, row by row as they come, and records its numbers.

        Args:
          rows: column -> cell; a number is a figure, anything else is text.
          labels: how many of the first columns say what the row is of.
          title: a further part of the keys, between the name and the labels; printed before the table.
          formats: column -> format of its numbers; fractions have three decimals otherwise.
        """
        if title:
            print(f"\n{title}\n", flush=True)
        found: dict[str, tuple[float, str]] = {}
        for i, row in enumerate(rows):
            if not i:
                print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
            print("| " + " | ".join(_cell(row[name], (formats or {}).get(name)) for name in row) + " |", flush=True)
            parts = [self.name, *([title] if title else []), *map(str, list(row.values())[:labels])]
            for column in list(row)[labels:]:
                if _is_number(row[column]):
                    found["/".join([*parts, column])] = row[column], unit_of(column)
        if self.file:
            write_records(self.file, found, command=command_line(), machine=self.machine)


def _is_number(value: Any) -> bool:
    """Whether a cell is a figure: no NaN, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cell(value: Any, form: str | None) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "-"
    if form and _is_number(value):
        return format(value, form)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def command_line() -> str:
    """How this process was started, from the checkout."""
    script = pathlib.Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return shlex.join(["python", str(script), *sys.argv[1:]])


def write_records(file: pathlib.Path, values: Mapping[str, tuple[float, str]], *, command: str, machine: str) -> None:
    """Puts figures, key -> value and unit, into the file, whole or not at all; says which of their kind are of an older run."""
    records = read_records(file) if file.exists() else {}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    for key, (value, unit) in values.items():
        value = value if isinstance(value, int) else float(f"{value:.6g}")
        records[key] = {"value": value, "unit": unit, "command": command, "machine": machine, "date": date}
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(dump(records), encoding="utf-8")
    os.replace(scratch, file)
    kinds = {key.partition("/")[0] for key in values}
    older = sum(key.partition("/")[0] in kinds and key not in values for key in records)
    print(f"\nrecorded {len(values)} figures in {file}; {older} of the same name are of other runs", file=sys.stderr)


def unit_of(column: str) -> str:
    """The unit that a column's title ends with, or "" for ratios and counts.

    >>> unit_of("step ms"), unit_of("tokens/s"), unit_of("ratio")
    ('ms', 'tokens/s', '')
    """
    last = column.split()[-1]
    return last if last in UNITS else ""


def read_records(file: pathlib.Path = MEASURED) -> Records:
    """The file's records."""
    return json.loads(file.read_text(encoding="utf-8"))


def dump(records: Records) -> str:
    """The file's text: a line a record, sorted by key."""
    lines = (f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(records[key], ensure_ascii=False)}"
             for key in sorted(records))  # fmt: skip
    return "{\n" + ",\n".join(lines) + "\n}\n"


# What pages do with it.


@dataclasses.dataclass(frozen=True)
class Quote:
    """A figure of a page: its key or expression, its text, and where that is."""

    key: str
    text: str
    start: int
    end: int


def value_of(key: str, records: Records) -> float:
    """The value of a key, or of "min PATTERN" or "max PATTERN".

    Raises:
      KeyError: there is none.
    """
    for name, choose in (("min ", min), ("max ", max)):
        if key.startswith(name):
            pattern = key.removeprefix(name)
            found = [record["value"] for each, record in records.items() if fnmatch.fnmatchcase(each, pattern)]
            if not found:
                raise KeyError(key)
            return choose(found)
    return records[key]["value"]


def shown(value: float, like: str) -> str:
    """The value with the decimals and the commas of a text.

    >>> shown(1805.4721, like="1,921.6"), shown(0.68, like="0.7"), shown(3, like="12")
    ('1,805.5', '0.7', '3')
    """
    decimals = len(like.partition(".")[2])
    return f"{value:,.{decimals}f}" if "," in like else f"{value:.{decimals}f}"


def quotes(page: str) -> list[Quote]:
    """All figures of a page that are tied to keys, in order."""
    found = [Quote(each["key"], each["text"], *each.span("text")) for each in FIGURE.finditer(page)]
    found += [quote for table in TABLE.finditer(page) for quote in _of_table(table)]
    return sorted(found, key=lambda quote: quote.start)


def _of_table(table: re.Match[str]) -> Iterator[Quote]:
    keys = [key.strip() for key in table["keys"].split(";")]
    labels = max((int(digit) + 1 for digit in re.findall(r"\{(\d)\}", table["keys"])), default=0)
    titles: list[str] = []
    above = [""] * labels
    start = table.start("rows")
    for number, line in enumerate(table["rows"].splitlines(keepends=True)):
        cells = _cells(line, start)
        start += len(line)
        if number == 0:
            titles = [_label(text) for text, _ in cells]
        if number < 2:
            continue
        above = [_label(text) or before for (text, _), before in zip(cells, above, strict=False)]
        for title, (text, at) in list(zip(titles, cells, strict=True))[labels:]:
            if "<!--m:" in text:
                continue  # it has keys of its own
            for i, figure in enumerate(NUMBER.finditer(text)):
                key = keys[min(i, len(keys) - 1)]
                key = functools.reduce(lambda key, n: key.replace(f"{{{n}}}", above[n]), range(labels), key)
                key = key.replace("{column}", title) + (f" ({i + 2 - len(keys)})" if i >= len(keys) else "")
                yield Quote(key, figure[0], at + figure.start(), at + figure.end())


def _cells(line: str, start: int) -> list[tuple[str, int]]:
    """The cells of a line, and where each begins."""
    found, at = [], start + 1
    for cell in line.strip()[1:-1].split("|"):
        text = cell.strip()
        found.append((text, at + cell.index(text) if text else at))
        at += len(cell) + 1
    return found


def _label(text: str) -> str:
    return text.replace("`", "")


def differences(page: str, records: Records) -> list[str]:
    """A sentence for each figure of a page that the records do not have, or have otherwise."""
    found = []
    for quote in quotes(page):
        try:
            want = shown(value_of(quote.key, records), like=quote.text)
        except KeyError:
            found.append(f"no record {quote.key!r}, quoted as {quote.text}")
            continue
        if want != quote.text:
            found.append(f"{quote.key}: {quote.text} stands there, {want} was measured")
    return found


def with_figures(page: str, records: Records) -> str:
    """The page with the records' figures."""
    for quote in reversed(quotes(page)):
        page = page[: quote.start] + shown(value_of(quote.key, records), like=quote.text) + page[quote.end :]
    return page


def pages() -> list[pathlib.Path]:
    """README and the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Checks the pages, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", action="store_true", help="write the figures into the pages")
    args = parser.parse_args()
    records, wrong = read_records(), 0
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if args.pages:
            path.write_text(with_figures(text, records), encoding="utf-8")
            continue
        for sentence in differences(text, records):
            print(f"{path.relative_to(ROOT)}: {sentence}")
            wrong += 1
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
