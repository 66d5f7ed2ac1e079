"""Schedules as text: round trips, PyTorch's own file, and what bad text is told."""

from __future__ import annotations

import pathlib

import pytest

from jaxpipe.schedule import BUILDERS, Action, Kind, Schedule, build
from jaxpipe.schedule.csv import from_csv, to_csv

GOLDEN = pathlib.Path(__file__).parent.parent.parent / "golden" / "dualpipev_4rank_10mb.csv"


@pytest.mark.parametrize("sizes", [(2, 4), (4, 8), (4, 10), (8, 16), (8, 20)], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_round_trip(name: str, sizes: tuple[int, int]) -> None:
    try:
        schedule = build(name, *sizes)
    except ValueError:
        pytest.skip("the schedule does not exist for these numbers")
    assert from_csv(to_csv(schedule), name=name) == schedule


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_exists_for_8_ranks_and_16_microbatches(name: str) -> None:
    assert from_csv(to_csv(build(name, 8, 16)), name=name).num_ranks == 8


def test_golden_is_what_the_builder_writes() -> None:
    assert GOLDEN.read_text() == to_csv(build("dualpipev", 4, 10))


def test_golden_round_trip() -> None:
    assert to_csv(from_csv(GOLDEN.read_text())) == GOLDEN.read_text()


def test_one_microbatch() -> None:
    assert from_csv("0F0,0B0\n1F0,1B0").routes == ((0, 1),)


def test_empty_cells_lines_and_spaces_are_skipped() -> None:
    assert from_csv("0F0,,,0B0,\r\n\n , 1F0,1B0\n") == from_csv("0F0,0B0\n1F0,1B0\n")


def test_overlapped_forward_and_input_gradient() -> None:
    text = "0F0,(0F1;0I0)OVERLAP_F_I,0W0,0B1\n"
    schedule = from_csv(text)
    assert schedule.ranks[0][1] == (Action(0, Kind.F, 1), Action(0, Kind.I, 0))
    assert to_csv(schedule) == text


def test_two_directions() -> None:
    schedule = from_csv("0F0,1F1,1B1,0B0\n1F0,1B0,0F1,0B1\n", name="two")
    assert isinstance(schedule, Schedule)
    assert schedule.routes == ((0, 1), (1, 0))


@pytest.mark.parametrize(
    "cell", ["0X0", "0F", "F0", "0F0 0B0", "(0F0;0B0)", "(0F0)OVERLAP_F_B", "(0F0;1B0;2F0)OVERLAP_F_B", "-1F0"]
)
def test_bad_cell_is_named_with_line_and_column(cell: str) -> None:
    with pytest.raises(ValueError, match=r"line 2, column 3: .* is not an action; write .*, or an overlapped pair"):
        from_csv(f"0F0,0B0\n1F0,,{cell},1B0\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no actions; each line is a rank's"),
        ("0F0,0B0\n9F0,9B0", "stage 1 of 10 never runs"),
        ("0F0\n1F0,1B0", "stage 0 runs F for microbatch 0"),
        ("0F0,0B0\n1B0,1F0", "needs 1F0, which is not before it"),
        ("0F0,0B0,1F1,1B1\n1F0,1B0", "stage 0 runs nothing for microbatch 1"),
        ("0F0,0B0,1F0\n1F0,1B0", "1F0"),
    ],
)
def test_unsound_schedules_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_csv(text)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff0F0,0B0\n1F0,1B0\n",
        '"0F0","0B0"\n"1F0","1B0"',
        "0F0,0B0\r\n1F0,1B0\r\n",
        "0F0,0B0,,,\n1F0,1B0,,,\n,,,\n\n",
        ' 0F0 ,\t0B0\n\n1F0, "1B0" \n',
        "0f0,0b0\n1f0,1b0",
    ],
)
def test_what_editors_and_spreadsheets_write(text):
    assert from_csv(text) == from_csv("0F0,0B0\n1F0,1B0\n")


def test_overlapped_pairs_in_quotes_and_lower_case():
    text = to_csv(build("dualpipev", 2, 4))
    quoted = "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines())
    assert from_csv(quoted) == from_csv(text) == from_csv(text.lower()) == from_csv(text.replace(";", " ; "))


def test_bytes_are_refused():
    with pytest.raises(ValueError, match=r"type bytes: pass its text"):
        from_csv(b"0F0,0B0")
