"""The products of scaled 8-bit numbers by our own kernels for Hopper GPUs (H100, H200)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from eplb_jax.kernels.backend import current_target
from eplb_jax.kernels.fp8_gemm.mosaic_outer import scaled_outer_products
from eplb_jax.kernels.fp8_gemm.mosaic_rows import scaled_rows_times_matrices
from eplb_jax.kernels.fp8_gemm.xla import group_of_blocks
from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN, round_up, valid_rows
from eplb_jax.kernels.grouped_gemm.ring import Tile
from eplb_jax.kernels.scaled import BLOCK

TILES = {
    "scaled_matmul": Tile(BLOCK, BLOCK, 2 * BLOCK, 3),
    "scaled_outer": Tile(BLOCK, BLOCK, BLOCK, 6),
}
"""The best on an H200 of those that ``examples/benchmarks/fp8_gemm.py --sweep`` tries, as far as they were measured.

Both products read shared memory about as fast as it can be read: a step of 128 of an output tile of 128 by 128 moves
80 KiB, and the scales of columns another 32. Wider tiles, which would move less, leave too few registers. Blocks that
share the copies of their rows wait for each other, and gain nothing by it.
"""


def why_not(lhs: Any, rhs: Any) -> str | None:
    """Why the kernels do not take numbers of these shapes; None if they do.

    >>> import jax
    >>> why_not(jax.ShapeDtypeStruct((100, 128), "float8_e4m3fn"), jax.ShapeDtypeStruct((1, 128, 128), "float8_e4m3fn"))
    'lhs (100, 128) has a number of rows that is no multiple of 8; pad it'
    """
    if lhs.shape[0] % 8:
        return f"lhs {lhs.shape} has a number of rows that is no multiple of 8; pad it"
    if not all((*lhs.shape, *rhs.shape)):
        return f"lhs {lhs.shape} and rhs {rhs.shape} leave nothing to multiply"
    return None


def matmul(
    lhs: Array,
    lhs_scales: Float[Array, "K_blocks rows"],
    rhs: Array,
    rhs_scales: Float[Array, "groups N_blocks K_blocks"],
    group_sizes: Int32[Array, " groups"],
    *,
    dtype: DTypeLike,
    tile: Tile | None = None,
) -> Float[Array, "rows N"]:
    """Each group of rows times its matrix transposed, as `eplb_jax.kernels.fp8_gemm.xla.matmul`.

    Args:
      lhs, lhs_scales, rhs, rhs_scales, group_sizes, dtype: as there; numbers for which `why_not` has no reason.
      tile: how to divide the work; by default as measured.
    """
    groups, columns, _ = rhs.shape
    rows = round_up(lhs.shape[0], FP8_ALIGN)
    group_of = jnp.minimum(group_of_blocks(group_sizes, rows // BLOCK), groups - 1)
    tile = _fitting(tile or TILES["scaled_matmul"], columns)
    operands = lhs, lhs_scales, rhs, rhs_scales, group_of, valid_rows(group_sizes, rows)
    return scaled_rows_times_matrices(*operands, dtype, tile, current_target().cores)


def outer(
    lhs: Array,
    lhs_scales: Float[Array, "row_blocks K"],
    dout: Array,
    dout_scales: Float[Array, "row_blocks N"],
    group_sizes: Int32[Array, " groups"],
    *,
    dtype: DTypeLike,
    tile: Tile | None = None,
) -> Float[Array, "groups K N"]:
    """The product of each group's rows, as `eplb_jax.kernels.fp8_gemm.xla.outer`.

    Args:
      lhs, lhs_scales, dout, dout_scales, group_sizes, dtype: as there.
      tile: how to divide the work; by default as measured.
    """
    tile = _fitting(tile or TILES["scaled_outer"], dout.shape[0])
    operands = lhs, lhs_scales, dout, dout_scales, group_sizes
    return scaled_outer_products(*operands, dtype, tile, current_target().cores)


def _fitting(tile: Tile, columns: int) -> Tile:
    """The tile without its cluster where column tiles cannot be shared out evenly."""
    return tile if columns % (BLOCK * tile.cluster) == 0 else dataclasses.replace(tile, cluster=1)
