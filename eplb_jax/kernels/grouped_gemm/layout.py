"""Where the rows of each group are: one group after the other, each starting at a multiple of 8, or of 128 in FP8."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Integer

ALIGN = 8
"""Group g has rows ``[start, start + size)``, and the next starts at the first multiple of ALIGN after them.

GPUs copy tiles of 8 rows, and ``torch._grouped_mm`` asks for the same in its weight gradient.
"""

FP8_ALIGN = 128
"""`ALIGN` of products in FP8, whose weight gradient has a scale for 128 rows: they must be of one group."""


def round_up(rows: Any, align: int = ALIGN) -> Any:
    """The multiple of ``align`` at or after a number of rows, or after each: what groups of these sizes take up.

    Args:
      rows: an int, or an array of signed integers of any shape; the result is of the same type.
      align: a power of two.

    >>> round_up(17), round_up(jnp.array([3, 0, 8, 9])).tolist(), round_up(17, FP8_ALIGN)
    (24, [8, 0, 8, 16], 128)
    """
    return (rows + (align - 1)) & -align


def group_starts(
    group_sizes: Integer[Array | np.ndarray, " groups"], align: int = ALIGN
) -> Integer[Array | np.ndarray, " groups"]:
    """The first row of each group.

    Args:
      group_sizes: rows of each group, any numbers of at least zero.
      align: `ALIGN` or `FP8_ALIGN`.

    Returns:
      int32, multiples of ``align``.

    >>> group_starts(jnp.array([3, 0, 8, 9])).tolist()
    [0, 8, 8, 16]
    """
    rows = round_up(group_sizes.astype(jnp.int32), align)
    return jnp.cumsum(rows, dtype=jnp.int32) - rows


def used_rows(
    group_sizes: Integer[Array | np.ndarray, " groups"], num_rows: int, align: int = ALIGN
) -> Bool[Array, " rows"]:
    """Which of the rows belong to a group.

    >>> used_rows(jnp.array([3, 1]), 12).astype(int).tolist()
    [1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    """
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    start = group_starts(group_sizes, align)
    return ((row >= start) & (row < start + group_sizes.astype(jnp.int32))).any(1)


def valid_rows(group_sizes: Integer[Array | np.ndarray, " groups"], num_rows: int) -> Int32[Array, " blocks"]:
    """How many rows of each block of `FP8_ALIGN` belong to the block's group; they are its first.

    Args:
      group_sizes: rows of each group, which starts at a multiple of `FP8_ALIGN`.
      num_rows: rows of the array.

    Raises:
      ValueError: rows that are no multiple of `FP8_ALIGN`.

    >>> valid_rows(jnp.array([130, 0, 5]), 512).tolist()
    [128, 2, 5, 0]
    """
    if num_rows % FP8_ALIGN:
        raise ValueError(f"{num_rows} rows do not divide into blocks of {FP8_ALIGN}, as FP8 needs them; pad them")
    first = jnp.arange(0, num_rows, FP8_ALIGN, dtype=jnp.int32)[:, None]
    start = group_starts(group_sizes, FP8_ALIGN)
    left = start + group_sizes.astype(jnp.int32) - first
    return jnp.where(first >= start, jnp.clip(left, 0, FP8_ALIGN), 0).sum(1, dtype=jnp.int32)
