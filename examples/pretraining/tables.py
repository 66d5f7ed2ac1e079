"""Tables in Markdown, as the examples and benchmarks print them: as they are, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable


def markdown_row(cells: Iterable[object]) -> str:
    """A row of a table.

    >>> markdown_row(["zbv", 12])
    '| zbv | 12 |'
    """
    return f"| {' | '.join(map(str, cells))} |"


def markdown_head(titles: Iterable[object]) -> str:
    """The two lines above a table's rows.

    >>> print(markdown_head(["schedule", "step ms"]))
    | schedule | step ms |
    |---|---|
    """
    titles = list(titles)
    return f"{markdown_row(titles)}\n|{'---|' * len(titles)}"
