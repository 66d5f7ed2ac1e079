"""The benchmark of lowering prints a row for each schedule and size."""

import pathlib
import runpy
import sys

from tests.cases import cases

BENCHMARK = pathlib.Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "lowering.py"


@cases("flag", ["--shared-ends", "--forward-only"], quick=["--shared-ends"])
def test_a_row_for_each_size(flag, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["lowering.py", "--ranks", "2", "--microbatches", "8", "60", "--schedule", "1f1b", "zbv", flag]
    )
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[2], *lines[4:])]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    sizes = [(row["schedule"], int(row["microbatches"]), int(row["searched"])) for row in rows]
    assert [size[:2] for size in sizes] == [("1f1b", 8), ("1f1b", 60), ("zbv", 8), ("zbv", 60)]
    assert [searched == count for _, count, searched in sizes] == [True, False, True, False]  # short ones are whole
    assert all(float(row["packed / asynchronous"]) >= 1 for row in rows)
