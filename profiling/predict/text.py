"""Columns of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A heading and rows as lines, every column as wide as its widest cell.

    >>> aligned(("kind", "us"), [("GEMM", "12")])
    ['kind  us', 'GEMM  12']
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
