"""Tables of numbers, and how a terminal, Markdown and a page show them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from profiling.classify.names import kernel_labels

Value: TypeAlias = str | int | float | None
"""A cell; None if there is nothing to measure."""

TIMES = {"us": 1.0, "ms": 1e3, "s": 1e6}
"""Units of time, in microseconds."""
LONGEST_NAME = 72
"""Characters that a kernel's label has at most."""
LONGEST_TEXT = 160
"""Characters that any other text has at most, in a document and on a page."""
LONGEST_HEADING = 28
"""Characters that a heading has at most, its unit aside."""
NARROWEST = {"name": 28, "": 12}
"""Characters that a column of texts keeps in a terminal, however narrow that is."""


@dataclasses.dataclass(frozen=True)
class Column:
    """The heading of a column and the unit of its values.

    Attributes:
      title: text of the heading, without the unit.
      unit: "us" for microseconds, written in the unit that the largest value of the column needs; "%" for shares of 1;
        "x" for factors; "n" for whole numbers; "range" for two of them; "name" for names of kernels, written as labels;
        "" for texts.
      is_share: whether a page may draw a bar of that length.
    """

    title: str
    unit: str = ""
    is_share: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the values are texts."""
        return self.unit in ("", "name")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
      name: a word for links and tests.
      title: title for people.
      caption: a sentence or two on what the numbers mean.
      columns: headings and units.
      rows: ``[rows][columns]``; times in microseconds, shares of 1, whole names, however they are written.
      spans: start and end in microseconds of what each row describes; empty if rows have none.
      events: name and kind of the events that each row describes; empty if rows have none.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    spans: tuple[tuple[float, float], ...] = ()
    events: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name!r}: the row {row} has not one cell for each of {len(self.columns)}")

    @property
    def units(self) -> tuple[str, ...]:
        """The unit of each column; times have the unit of the largest.

        >>> Table("t", "T", "", (Column("kind"), Column("time", "us")), (("GEMM", 123456.0), ("copy", 7.0))).units
        ('', 'ms')
        """
        return tuple(
            time_unit(self._column(i)) if column.unit == "us" else column.unit for i, column in enumerate(self.columns)
        )

    @property
    def headings(self) -> tuple[str, ...]:
        """Titles, shortened if they are long, with the unit if the numbers do not show it.

        >>> Table("t", "T", "", (Column("busy", "us"), Column("share", "%")), ((12.5, 0.5),)).headings
        ('busy us', 'share')
        """
        titles = [cut(column.title, LONGEST_HEADING) for column in self.columns]
        return tuple(
            f"{title} {unit}" if column.unit == "us" and title != unit else title
            for title, column, unit in zip(titles, self.columns, self.units, strict=True)
        )

    def cells(self, most: int = LONGEST_NAME) -> list[list[str]]:
        """``[rows][columns]``: the values as text; names of kernels become labels of at most ``most`` letters.

        >>> Table("t", "T", "", (Column("kind"), Column("time", "us")), (("GEMM", 1234.5),)).cells()
        [['GEMM', '1,234.5']]
        """
        units = self.units
        names = {str(row[i]) for i, unit in enumerate(units) if unit == "name" for row in self.rows if row[i]}
        labels = kernel_labels(sorted(names), most)
        return [
            [
                labels[str(value)] if unit == "name" and value else written(value, unit)
                for value, unit in zip(row, units, strict=True)
            ]
            for row in self.rows
        ]

    def filled(self) -> Table:
        """The table without the columns in which no row has a value.

        >>> table = Table("t", "T", "", (Column("kind"), Column("rank", "n")), (("GEMM", None), ("copy", None)))
        >>> table.filled().rows
        (('GEMM',), ('copy',))
        """
        kept = [i for i in range(len(self.columns)) if any(value not in (None, "") for value in self._column(i))]
        if len(kept) == len(self.columns):
            return self
        columns = tuple(self.columns[i] for i in kept)
        return dataclasses.replace(self, columns=columns, rows=tuple(tuple(row[i] for i in kept) for row in self.rows))

    def _column(self, index: int) -> list[Value]:
        return [row[index] for row in self.rows]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number with its meaning.

    Attributes:
      name: a word for tests.
      label: what the number is.
      value, unit: as in a table; times are in microseconds, however they are written.
      note: a remark that puts the number in proportion.
      shown: text to write instead of the value, such as a range; "" for the value.
    """

    name: str
    label: str
    value: Value
    unit: str
    note: str = ""
    shown: str = ""

    @property
    def written(self) -> str:
        """The value with its unit; "none" for None.

        >>> Figure("makespan", "makespan", 129012.0, "us").written
        '129.012 ms'
        """
        if self.shown:
            return self.shown
        if self.unit == "us" and not isinstance(self.value, str):
            return duration(self.value)
        return "none" if self.value is None else written(self.value, self.unit)


def time_unit(times: Iterable[Value]) -> str:
    """The unit, "us", "ms" or "s", in which the largest of some microseconds has at most four digits before its point.

    >>> time_unit([9999.0, None]), time_unit([5.0, -10_000.0]), time_unit([1e7]), time_unit([])
    ('us', 'ms', 's', 'us')
    """
    largest = max((abs(time) for time in times if isinstance(time, int | float)), default=0.0)
    return "us" if largest < 1e4 else "ms" if largest < 1e7 else "s"


def duration(microseconds: float | None) -> str:
    """A time with its unit, as reports write it in a sentence.

    >>> duration(4149.0), duration(129012.0), duration(61_500_000.0), duration(None)
    ('4,149.0 us', '129.012 ms', '61.500 s', 'none')
    """
    if microseconds is None:
        return "none"
    unit = time_unit([microseconds])
    return f"{written(microseconds, unit)} {unit}"


def counted(count: int, what: str) -> str:
    """A count with its noun.

    >>> counted(1, "gap"), counted(1516, "gap")
    ('1 gap', '1,516 gaps')
    """
    return f"{count:,} {what}{'s' * (count != 1)}"


def written(value: Value, unit: str) -> str:
    """A value as reports write it. A value other than 0 is never written as 0.

    >>> written(0.96342, "%"), written(1234.56, "us"), written(1.8511, "x"), written(12, "n"), written(None, "us")
    ('96.34%', '1,234.6', '1.851', '12', '-')
    >>> written(129012.0, "ms"), written(0.2, "ms"), written(0.00001, "%"), written(-0.00001, "%")
    ('129.012', '<0.001', '<0.01%', '>-0.01%')
    """
    if value is None:
        return "-"
    if isinstance(value, str):
        return value or "(none)"
    if unit in TIMES:
        return _rounded(value / TIMES[unit], 1 if unit == "us" else 3)
    if unit == "%":
        return _rounded(100 * value, 2) + "%"
    return f"{value:.3f}" if unit == "x" else f"{value:,}"


def _rounded(value: float, digits: int) -> str:
    least = 10.0**-digits
    if 1e-9 < abs(value) < least / 2:
        return f"<{least:.{digits}f}" if value > 0 else f">-{least:.{digits}f}"
    return f"{value if abs(value) > 1e-9 else 0.0:,.{digits}f}"


def cut(text: str, most: int) -> str:
    """A text of at most `most` characters: an ellipsis before its last third stands for what is left out.

    >>> cut("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 20)
    'ncclDevKernel…ING_LL'
    """
    if len(text) <= most:
        return text
    tail = (most - 1) // 3
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def as_text(table: Table, most: int | None = None, width: int | None = None) -> str:
    """A table for a terminal: aligned columns, numbers to the right, without the columns that have no value.

    Args:
      table: the table.
      most: most rows to write; a last line counts the others. None for all.
      width: characters of a line, None for no limit. Headings are broken first, then texts are cut, then the last
        columns are left out and counted. Numbers are never cut.

    >>> print(as_text(Table("t", "Kinds", "", (Column("kind"), Column("time", "us")), (("GEMM", 5.0), ("copy", 12.5)))))
    Kinds
    kind  time us
    GEMM      5.0
    copy     12.5
    """
    table = table.filled()
    if width is not None and len(table.columns) > 2 and (fitting := _fitting(table, most, width)) < len(table.columns):
        rows = tuple(row[:fitting] for row in table.rows)
        narrow = dataclasses.replace(table, columns=table.columns[:fitting], rows=rows)
        return f"{as_text(narrow, most, width)}\n... and {counted(len(table.columns) - fitting, 'more column')}"
    body = _body(table, most)
    heads = [[heading] for heading in table.headings]
    needed = [max((len(row[i]) for row in body), default=0) for i in range(len(heads))]
    widths = [max(len(head[0]), cells) for head, cells in zip(heads, needed, strict=True)]
    if width is not None and _line(widths) > width:
        heads = [
            textwrap.wrap(head[0], max(cells, 9), break_long_words=False)
            for head, cells in zip(heads, needed, strict=True)
        ]
        least = [max(map(len, head), default=0) for head in heads]
        widths = _narrowed(list(map(max, least, needed)), least, table.columns, width)
        names = [wide for wide, column in zip(widths, table.columns, strict=True) if column.unit == "name"]
        body = _body(table, most, min(names)) if names else body
    high = max(map(len, heads), default=0)
    headings = [[*[""] * (high - len(head)), *head] for head in heads]
    shown = [*map(list, zip(*headings, strict=True)), *body]
    lines = [
        "  ".join(
            cut(cell, wide).ljust(wide) if column.is_text else cell.rjust(wide)
            for cell, wide, column in zip(row, widths, table.columns, strict=True)
        ).rstrip()
        for row in shown
    ]
    caption = textwrap.wrap(table.caption, width) if width else [table.caption]
    return "\n".join([table.title, *(caption if table.caption else []), *lines, *_left_out(table, most)])


def _fitting(table: Table, most: int | None, width: int) -> int:
    """How many columns fit into a line once headings are broken and texts are cut as far as they may be."""
    body = _body(table, most)
    widths = [
        max(
            [
                min(cells, NARROWEST.get(column.unit, cells)),
                *map(len, textwrap.wrap(heading, max(cells, 9), break_long_words=False)),
            ]
        )
        for i, (column, heading) in enumerate(zip(table.columns, table.headings, strict=True))
        for cells in [max((len(row[i]) for row in body), default=0)]
    ]
    return max((n for n in range(2, len(widths) + 1) if _line(widths[:n]) <= width), default=2)


def _body(table: Table, most: int | None, names: int = LONGEST_NAME) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in table.cells(names)[:most]]


def _narrowed(widths: list[int], least: list[int], columns: Sequence[Column], width: int) -> list[int]:
    """Narrows the widest column of texts until a line fits, or until every text is narrow."""
    texts = [i for i, column in enumerate(columns) if column.is_text]
    while _line(widths) > width:
        open_to_it = [i for i in texts if widths[i] > max(NARROWEST[columns[i].unit], least[i])]
        if not open_to_it:
            break
        widths[max(open_to_it, key=lambda i: widths[i])] -= 1
    return widths


def _line(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def as_markdown(table: Table, most: int | None = None) -> str:
    """A table for a document; the arguments are those of `as_text`. Long texts are cut.

    >>> print(as_markdown(Table("t", "Kinds", "", (Column("kind"), Column("time", "us")), (("a|b", 5.0),))))
    ### Kinds
    <BLANKLINE>
    | kind | time us |
    |---|--:|
    | a\\|b | 5.0 |
    """
    table = table.filled()
    head = markdown_head(table.headings, [not column.is_text for column in table.columns])
    lines = [head, *map(markdown_row, table.cells()[:most])]
    caption = [escape_markdown(table.caption), ""] if table.caption else []
    left_out = _left_out(table, most)
    return "\n".join([f"### {table.title}", "", *caption, *lines, *([""] if left_out else []), *left_out])


def markdown_head(headings: Sequence[str], are_numbers: Sequence[bool] = ()) -> str:
    """The first two lines of a table in Markdown; columns of numbers are aligned to the right.

    >>> print(markdown_head(["kind", "us"], [False, True]))
    | kind | us |
    |---|--:|
    """
    right = are_numbers or [False] * len(headings)
    return f"{markdown_row(headings)}\n|" + "|".join("--:" if number else "---" for number in right) + "|"


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table in Markdown; texts are escaped, and long ones are cut.

    >>> markdown_row(["a|b", "5.0"])
    '| a\\\\|b | 5.0 |'
    """
    return "| " + " | ".join(escape_markdown(cut(" ".join(cell.split()), LONGEST_TEXT)) for cell in cells) + " |"


def escape_markdown(text: str) -> str:
    """A text, escaped so that Markdown shows it unchanged.

    >>> escape_markdown("gemm<a|b>*")
    'gemm&lt;a\\\\|b&gt;\\\\*'
    """
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|" else letter for letter in text)


def _left_out(table: Table, most: int | None) -> list[str]:
    count = len(table.rows) - len(table.rows[:most])
    return [f"... and {count:,} more"] if count else []
