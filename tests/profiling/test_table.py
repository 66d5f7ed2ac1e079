"""Tables as people read them: one unit a column, nothing empty, no line wider than the terminal, values untouched."""

import pytest

from profiling.table import Column, Figure, Table, as_markdown, as_text, cut, duration, time_unit, written

LONG = "void at::native::vectorized_elementwise_kernel<4, at::native::{}<c10::BFloat16>, std::array<char*, 3ul> >(int)"


KERNELS = (Column("kernel", "name"), Column("total", "us"), Column("share", "%"))


def table(*rows, columns=KERNELS):
    return Table("t", "Title", "", columns, rows)


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([9_999.9], "us"),
        ([10_000.0], "ms"),
        ([-20_000.0, 1.0], "ms"),
        ([9_999_999.0], "ms"),
        ([1e7], "s"),
        ([None], "us"),
    ],
)
def test_a_column_has_the_unit_of_its_largest(times, unit):
    found = Table("t", "T", "", (Column("time", "us"),), tuple((time,) for time in times))
    assert time_unit(times) == unit and found.headings == (f"time {unit}",)


def test_columns_choose_for_themselves_and_keep_their_values():
    columns = (Column("total", "us"), Column("mean", "us"))
    found = table((129_012.0, 4.25), (20.0, 0.004), columns=columns)
    assert found.headings == ("total ms", "mean us")
    assert found.cells() == [["129.012", "4.2"], ["0.020", "<0.1"]]
    assert found.rows == ((129_012.0, 4.25), (20.0, 0.004))


def test_figures_and_sentences_have_the_unit_of_their_own_value():
    assert Figure("makespan", "makespan", 129_012.0, "us").written == "129.012 ms"
    assert Figure("exposed", "exposed", 4_149.0, "us").value == 4_149.0
    assert [duration(time) for time in (0.0, 4_149.0, 61_500_000.0)] == ["0.0 us", "4,149.0 us", "61.500 s"]


def test_nothing_but_nothing_is_written_as_nothing():
    """No -0.00%, no 0.00% for what happened, and no rounding error for something."""
    shares = (0.0, -0.0, 1e-15, -1e-15, 1e-6, -1e-6)
    assert [written(share, "%") for share in shares] == ["0.00%"] * 4 + ["<0.01%", ">-0.01%"]


def test_columns_without_a_value_are_left_out_of_what_is_read():
    found = table(
        ("a", None, ""), ("b", None, ""), columns=(Column("kind"), Column("rank", "n"), Column("blocks", "range"))
    )
    assert as_text(found) == "Title\nkind\na\nb"
    assert as_markdown(found).splitlines()[2:] == ["| kind |", "|---|", "| a |", "| b |"]
    assert len(found.rows[0]) == 3
    kept = table(("a", 0, ""), ("b", None, "1"), columns=found.columns)
    assert kept.filled() is kept


def test_kernels_are_told_apart_where_their_names_are_cut():
    names = [LONG.format(functor) for functor in ("CUDAFunctor_add", "FillFunctor")]
    found = table(*((name, 5.0, 0.5) for name in names))
    assert [row[0] for row in found.cells()] == [
        "vectorized_elementwise_kernel<CUDAFunctor_add>", "vectorized_elementwise_kernel<FillFunctor>"
    ]  # fmt: skip
    assert [row[0] for row in found.rows] == names
    narrow = {line.split("  ")[0] for line in as_text(found, width=46).splitlines()[2:]}
    assert len(narrow) == 2 and all("…" in name for name in narrow)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width):
    columns = (
        Column("what waits for what"),
        *(Column(f"a long heading {i}", "us") for i in range(12)),
        Column("kernel", "name"),
    )
    found = Table("t", "Title", "word " * 60, columns, (("text " * 40, *([1234.5] * 12), LONG),) * 3)
    lines = as_text(found, width=width).splitlines()
    assert max(map(len, lines)) <= width
    shown = sum(line.count("1,234.5") for line in lines) // 3
    assert lines[-1] == f"... and {13 - shown} more column{'s' * (shown < 12)}"
    assert as_text(found).count("1,234.5") == 36


def test_long_texts_do_not_break_a_document():
    found = table(("a|b\n" * 200, 5.0, 0.5), columns=(Column("h" * 90), Column("total", "us"), Column("share", "%")))
    lines = as_markdown(found).splitlines()[2:]
    assert len(lines) == 3 and max(map(len, lines)) < 300
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}


def test_cutting_keeps_both_ends():
    assert cut("short", 9) == "short"
    assert cut("abcdefghijklmnop", 9) == "abcdef…op" and len(cut("x" * 99, 40)) == 40


def test_a_heading_may_be_empty():
    found = Table("t", "T", "", (Column(""), Column("total", "us"), Column("kernel", "name")), (("", 5.0, LONG),))
    assert "5.0" in as_text(found, width=30)
