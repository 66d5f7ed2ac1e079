"""Numbers with headings, written once for a terminal, for Markdown and for a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

Value: TypeAlias = str | int | float | None
"""A cell: None where there is nothing to measure."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading, and how what stands under it is written.

    Attributes:
      title: the heading.
      unit: "us" for microseconds, "%" for shares of 1, "x" for factors, "n" for whole numbers, "range" for
        two of them, "" for texts.
      is_share: whether a page may draw a bar as long as the share.
    """

    title: str
    unit: str = ""
    is_share: bool = False

    @property
    def heading(self) -> str:
        """The title, with the unit where the numbers themselves do not show it.

        >>> Column("busy", "us").heading, Column("share", "%").heading
        ('busy us', 'share')
        """
        return f"{self.title} us" if self.unit == "us" and self.title != "us" else self.title


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
      name: a word for links and tests.
      title: for people.
      caption: what the numbers mean, in a sentence or two.
      columns: of every row.
      rows: ``[rows][columns]``.
      spans: for each row, the start and end in microseconds of what it tells of; empty where rows have none.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    spans: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name!r}: the row {row} has not one cell for each of {len(self.columns)}")

    def cells(self) -> list[list[str]]:
        """``[rows][columns]``: the values as they are written.

        >>> Table("t", "T", "", (Column("kind"), Column("time", "us")), (("GEMM", 1234.5),)).cells()
        [['GEMM', '1,234.5']]
        """
        return [
            [written(value, column.unit) for value, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number that stands for itself.

    Attributes:
      name: a word for tests.
      label: what it is.
      value, unit: as in a table.
      note: what puts it in proportion.
      shown: what is written instead of the value, such as a range; "" for the value.
    """

    name: str
    label: str
    value: Value
    unit: str
    note: str = ""
    shown: str = ""

    @property
    def written(self) -> str:
        """The value with its unit, None as "none"."""
        if self.shown:
            return self.shown
        if self.value is None:
            return "none"
        return written(self.value, self.unit) + (" us" if self.unit == "us" else "")


def written(value: Value, unit: str) -> str:
    """A value as all reports write it.

    >>> written(0.96342, "%"), written(1234.56, "us"), written(1.8511, "x"), written(12, "n"), written(None, "us")
    ('96.34%', '1,234.6', '1.851', '12', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, str):
        return value or "(none)"
    return {"%": f"{100 * value:.2f}%", "us": f"{value:,.1f}", "x": f"{value:.3f}"}.get(unit) or f"{value:,}"


def as_text(table: Table, most: int | None = None) -> str:
    """For a terminal: columns of equal width, numbers to the right.

    Args:
      table: what to write.
      most: rows at most; how many are left out is said. None for all.

    >>> print(as_text(Table("t", "Kinds", "", (Column("kind"), Column("time", "us")), (("GEMM", 5.0), ("copy", 12.5)))))
    Kinds
    kind  time us
    GEMM      5.0
    copy     12.5
    """
    cells = table.cells()
    shown = [[column.heading for column in table.columns], *cells[:most]]
    widths = [max(len(row[i]) for row in shown) for i in range(len(table.columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if column.unit else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ).rstrip()
        for row in shown
    ]
    return "\n".join([table.title, *([table.caption] if table.caption else []), *lines, *_left_out(cells, most)])


def as_markdown(table: Table, most: int | None = None) -> str:
    """For documents; the arguments are those of `as_text`.

    >>> print(as_markdown(Table("t", "Kinds", "", (Column("kind"), Column("time", "us")), (("a|b", 5.0),))))
    ### Kinds
    <BLANKLINE>
    | kind | time us |
    |---|--:|
    | a\\|b | 5.0 |
    """
    cells = table.cells()
    lines = [
        _markdown_row([column.heading for column in table.columns]),
        "|" + "|".join("--:" if column.unit else "---" for column in table.columns) + "|",
        *map(_markdown_row, cells[:most]),
    ]
    caption = [escape_markdown(table.caption), ""] if table.caption else []
    left_out = _left_out(cells, most)
    return "\n".join([f"### {table.title}", "", *caption, *lines, *([""] if left_out else []), *left_out])


def escape_markdown(text: str) -> str:
    """A text that Markdown shows as it is.

    >>> escape_markdown("gemm<a|b>*")
    'gemm&lt;a\\\\|b&gt;\\\\*'
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|" else letter for letter in text)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"


def _left_out(cells: Sequence[Sequence[str]], most: int | None) -> list[str]:
    count = len(cells) - len(cells[:most])
    return [f"... and {count:,} more"] if count else []
