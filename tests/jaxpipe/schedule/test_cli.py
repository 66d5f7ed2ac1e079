"""The command line and the comparison behind it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from jaxpipe.__main__ import main
from jaxpipe.schedule import BUILDERS, Costs, build
from jaxpipe.schedule.compare import compare, pick, table
from jaxpipe.schedule.csv import from_csv, to_csv


def run(command: str) -> int:
    """The exit status, whether returned or raised by argparse."""
    try:
        return main(command.split())
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


@pytest.mark.parametrize("name", BUILDERS)
def test_show_prints_the_grid_and_its_figures(name, capsys) -> None:
    assert run(f"show {name} --ranks 4 --microbatches 8") == 0
    out = capsys.readouterr().out
    assert out.startswith("rank 0")
    for word in ("rank 3", "makespan", "bubble of each rank", "peak stash of each rank"):
        assert word in out


def test_show_dualpipe_as_published(capsys) -> None:
    assert run("show dualpipe --ranks 8 --microbatches 20") == 0
    out = capsys.readouterr().out
    assert "makespan 66   bubble of each rank 6 6 6 6 6 6 6 6" in out
    assert "peak stash of each rank 9 9 9 9 9 9 9 9" in out


def test_show_uses_the_costs(capsys) -> None:
    assert run("show 1f1b --ranks 2 --microbatches 2 --forward 3 --backward 5 --weight 2 --p2p 1") == 0
    assert "makespan 26 " in capsys.readouterr().out


def test_show_writes_files_and_reads_its_own_csv(tmp_path, capsys) -> None:
    files = {option: tmp_path / f"out.{option}" for option in ("svg", "perfetto", "csv")}
    options = " ".join(f"--{option} {path}" for option, path in files.items())
    assert run(f"show dualpipev --ranks 4 --microbatches 10 {options}") == 0
    first = capsys.readouterr().out.split("wrote")[0]
    assert ET.parse(files["svg"]).getroot().tag.endswith("svg")
    assert json.loads(files["perfetto"].read_text())["traceEvents"]
    assert from_csv(files["csv"].read_text(), name="dualpipev") == build("dualpipev", 4, 10)
    assert run(f"show --from-csv {files['csv']}") == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "usage"),
        ("show", "give the name of a schedule"),
        ("show nosuch", "unknown schedule 'nosuch'; choose one of"),
        ("show dualpipe --ranks 7 --microbatches 3", "num_microbatches=3"),
        ("show dualpipe --ranks many", "invalid int value"),
        ("show gpipe --from-csv x.csv", "give the name of a schedule"),
        ("show --from-csv /no/such/file", "No such file"),
        ("show gpipe --forward -1", "not negative"),
        ("show gpipe --weight nan", "a time is a finite number"),
        ("compare --backward 1 --weight 2", "--weight 2 is a part of --backward 1"),
    ],
)
def test_bad_arguments_end_with_a_message_and_status_2(command, message, capsys) -> None:
    assert run(command) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out


def test_a_bad_csv_file_ends_with_its_place(tmp_path, capsys) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("0F0,0B0\n1F0,1X0\n")
    assert run(f"show --from-csv {path}") == 2
    assert "line 2, column 2" in capsys.readouterr().err
    path.write_text(to_csv(build("gpipe", 2, 2)).replace("1B1", ""))
    assert run(f"show --from-csv {path}") == 2
    assert "stage 1 runs F for microbatch 1" in capsys.readouterr().err


def test_compare_prints_a_frozen_table(capsys) -> None:
    assert run("compare --ranks 8 --microbatches 20 --forward 1 --backward 2 --weight 1") == 0
    assert capsys.readouterr().out.splitlines() == [
        "| schedule | makespan | bubble | bubble % | peak stash | parameter copies | messages | stages a rank |",
        "|---|---|---|---|---|---|---|---|",
        "| gpipe | 81 | 21 | 25.9 | 20 | 1 | 1.75 | 1 |",
        "| 1f1b | 81 | 21 | 25.9 | 8 | 1 | 1.75 | 1 |",
        "| interleaved | 70.5 | 10.5 | 14.9 | 12.5 | 1 | 3.75 | 2 |",
        "| zb1p | 67 | 7 | 10.4 | 8 | 1 | 1.75 | 1 |",
        "| zbv | 63.5 | 3.5 | 5.5 | 8 | 1 | 3.5 | 2 |",
        "| dualpipe | 66 | 6 | 9.1 | 9 | 2 | 1.75 | 2 |",
        "| dualpipev | 67 | 7 | 10.4 | 8.5 | 1 | 3.5 | 2 |",
        "",
        "Fastest: zbv (63.5). None within 5% of it needs less memory.",
    ]


def test_compare_with_overlap_names_both_choices() -> None:
    assert pick(compare(8, 20, Costs(overlapped=2.2))) == (
        "Fastest: dualpipe (54.8). Least memory within 5% of it: dualpipev (55, peak stash 8.5 instead of 9, "
        "parameter copies 1 instead of 2)."
    )


def test_all_schedules_do_the_same_work() -> None:
    """Makespan less bubble is the same for all: one model on the same ranks."""
    assert {row.makespan - row.bubble for row in compare(8, 16, Costs(2, 3, 1))} == {16 * 6}


def test_impossible_schedules_say_why() -> None:
    rows = compare(3, 2, Costs())
    assert {row.name for row in rows if row.reason} == {"zbv", "dualpipe", "dualpipev"}
    assert "| dualpipe | dualpipe with num_microbatches=2" in table(rows)


def test_compare_without_any_possible_schedule(capsys) -> None:
    assert run("compare --ranks 0 --microbatches 2") == 0
    assert capsys.readouterr().out.endswith("No schedule exists for these numbers.\n")


def test_compare_without_time() -> None:
    assert "| gpipe | 0 | 0 | 0.0 |" in table(compare(2, 4, Costs(0, 0, 0)))
