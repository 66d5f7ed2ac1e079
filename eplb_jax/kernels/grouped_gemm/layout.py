"""Where the rows of each group are: one group after the other, each starting at a multiple of 8."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

ALIGN = 8
"""Group g has rows ``[start, start + size)``, and the next starts at the first multiple of ALIGN after them.

GPUs copy tiles of 8 rows, and ``torch._grouped_mm`` asks for the same in its weight gradient.
"""


def round_up(rows: Any) -> Any:
    """The multiple of `ALIGN` at or after a number of rows, or after each: what groups of these sizes take up.

    Args:
      rows: an int, or an array of signed integers of any shape; the result is of the same type.

    >>> round_up(17), round_up(jnp.array([3, 0, 8, 9])).tolist()
    (24, [8, 0, 8, 16])
    """
    return (rows + (ALIGN - 1)) & -ALIGN


def group_starts(group_sizes: Integer[Array | np.ndarray, " groups"]) -> Integer[Array | np.ndarray, " groups"]:
    """The first row of each group.

    Args:
      group_sizes: rows of each group, any numbers of at least zero.

    Returns:
      int32, multiples of `ALIGN`.

    >>> group_starts(jnp.array([3, 0, 8, 9])).tolist()
    [0, 8, 8, 16]
    """
    rows = round_up(group_sizes.astype(jnp.int32))
    return jnp.cumsum(rows, dtype=jnp.int32) - rows


def used_rows(group_sizes: Integer[Array | np.ndarray, " groups"], num_rows: int) -> Bool[Array, " rows"]:
    """Which of the rows belong to a group.

    >>> used_rows(jnp.array([3, 1]), 12).astype(int).tolist()
    [1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    """
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    start = group_starts(group_sizes)
    return ((row >= start) & (row < start + group_sizes.astype(jnp.int32))).any(1)
