"""What all benchmarks share: their options, the machine, medians of times, tables, and ``--record``.

A benchmark with ``--record`` puts its figures into docs/measured.json, ``{key: {"value", "unit", "command", "machine",
"date"}}``; a key is the benchmark's name, the labels of the row and the column, divided by slashes. Figures of others
have "source" in place of "command". pages.py brings them to README and documentation.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import numbers
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from pretraining.tables import markdown_head, markdown_row

MEASURED = ROOT / "docs" / "measured.json"
UNITS = ("ms", "s", "us", "µs", "%", "kB", "MB", "GB", "MiB", "GiB", "TFLOP", "TFLOP/s", "GB/s", "TB/s", "tokens/s")

Records = dict[str, dict[str, Any]]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--record", nargs="?", const=MEASURED, type=pathlib.Path, metavar="FILE",
                        help="put the figures into this file; without a name into docs/measured.json")  # fmt: skip
    parser.add_argument(
        "--record-as", metavar="NAME", help="the first part of their keys, instead of the benchmark's name"
    )
    return parser


def machine(count: int = 1) -> str:
    """So many devices and their software: '2 x NVIDIA H200, jax 0.11.2'."""
    import jax  # noqa: PLC0415  what needs no devices shall not ask for them

    device = jax.devices()[0]
    kind = processor() if device.platform == "cpu" else device.device_kind
    return f"{count} x {kind}, jax {jax.__version__}" if count > 1 else f"{kind}, jax {jax.__version__}"


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
class Recorder:
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
    def begin(cls, args: argparse.Namespace, machine: str, *notes: object) -> Recorder:
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
        try:
            for i, row in enumerate(rows):
                if not i:
                    print(markdown_head(row))
                print(markdown_row(_cell(row[name], (formats or {}).get(name)) for name in row), flush=True)
                parts = [self.name, *([title] if title else []), *map(str, list(row.values())[:labels])]
                for column in list(row)[labels:]:
                    if _is_number(row[column]):
                        found["/".join([*parts, column])] = row[column], unit_of(column)
        finally:  # of a run that is stopped, what it has measured
            if self.file and found:
                write_records(self.file, found, command=command_line(), machine=self.machine)


def _is_number(value: Any) -> bool:
    """Whether a cell is a figure: no NaN, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _cell(value: Any, form: str | None) -> str:
    if not _is_number(value):
        return "-" if isinstance(value, float) else str(value)
    return format(value, form or ("d" if isinstance(value, numbers.Integral) else ".3f"))


def command_line() -> str:
    """How this process was started, from the checkout."""
    script = pathlib.Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    platforms = os.environ.get("JAX_PLATFORMS")
    return (f"JAX_PLATFORMS={platforms} " if platforms else "") + shlex.join(["python", str(script), *sys.argv[1:]])


def write_records(file: pathlib.Path, values: Mapping[str, tuple[float, str]], *, command: str, machine: str) -> None:
    """Puts figures, key -> value and unit, into the file, whole or not at all; counts older ones of the same name."""
    records = read_records(file) if file.exists() else {}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    for key, (value, unit) in values.items():
        value = int(value) if isinstance(value, numbers.Integral) else float(f"{value:.6g}")
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
