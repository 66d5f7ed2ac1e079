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
from eplb_jax.kernels.fp8_gemm.slots import ScaledTile
from eplb_jax.kernels.scaled import BLOCK

TILES = {
    "scaled_matmul": ScaledTile(BLOCK, BLOCK, 2 * BLOCK, 3),
    "scaled_outer": ScaledTile(2 * BLOCK, BLOCK, BLOCK, 4),
    "scaled_outer in float32": ScaledTile(BLOCK, BLOCK, BLOCK, 6, pieces=0),
    "added_scaled_outer": ScaledTile(BLOCK, BLOCK, BLOCK, 6, pieces=0),
}
"""The best on an H200 of those that ``examples/benchmarks/fp8_gemm.py --sweep`` tries, as far as they were measured.

Both products read shared memory about as fast as it can be read: a step of 128 of an output tile of 128 by 128 moves
80 KiB, and the scales of columns another 32. An output tile of 256 rows moves less, but leaves no registers for a
second sum on its way, without which a product of rows has half its speed. Blocks that share the copies of their rows
wait for each other, and gain nothing by it.
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
    tile: ScaledTile | None = None,
) -> Float[Array, "rows N"]:
    """Each group of rows times its matrix transposed, as `eplb_jax.kernels.fp8_gemm.xla.matmul`.

    Args:
      lhs, lhs_scales, rhs, rhs_scales, group_sizes, dtype: as there; numbers for which `why_not` has no reason.
      tile: how to divide the work; by default as measured.
    """
    (rows, depth), (groups, columns, _) = lhs.shape, rhs.shape
    tile = _fitting(tile or for_rows(rows, depth, groups, columns, current_target().cores), columns)
    return scaled_rows_times_matrices(
        lhs, lhs_scales, rhs, rhs_scales, group_sizes, dtype, tile, current_target().cores
    )


def outer(
    lhs: Array,
    lhs_scales: Float[Array, "row_blocks K"],
    dout: Array,
    dout_scales: Float[Array, "row_blocks N"],
    group_sizes: Int32[Array, " groups"],
    *,
    dtype: DTypeLike,
    tile: ScaledTile | None = None,
) -> Float[Array, "groups K N"]:
    """The product of each group's rows, as `eplb_jax.kernels.fp8_gemm.xla.outer`.

    Args:
      lhs, lhs_scales, dout, dout_scales, group_sizes, dtype: as there.
      tile: how to divide the work; by default as measured.
    """
    wide = jnp.dtype(dtype) == jnp.float32
    tile = _fitting_outer(tile or TILES["scaled_outer in float32" if wide else "scaled_outer"], lhs, dout)
    operands = lhs, lhs_scales, dout, dout_scales, group_sizes
    return scaled_outer_products(*operands, dtype, tile, current_target().cores)


def added_outer(
    lhs: Array,
    lhs_scales: Float[Array, "row_blocks K"],
    dout: Array,
    dout_scales: Float[Array, "row_blocks N"],
    group_sizes: Int32[Array, " groups"],
    total: Float[Array, "groups K N"],
    *,
    tile: ScaledTile | None = None,
) -> Float[Array, "groups K N"]:
    """`outer` in float32 added to a float32 total, in its place; what an empty group has of it stays."""
    tile = _fitting_outer(tile or TILES["added_scaled_outer"], lhs, dout)
    operands = lhs, lhs_scales, dout, dout_scales, group_sizes
    return scaled_outer_products(*operands, jnp.float32, tile, current_target().cores, total=total)


def for_rows(rows: int, depth: int, groups: int, columns: int, cores: int) -> ScaledTile:
    """The division of a product of rows and matrices.

    Where a dense product has too few output tiles for half of the multiprocessors, several of these divide the
    contraction of each tile between them: reading the matrix takes the time, and each reads as fast as it can.

    >>> for_rows(64, 7168, 1, 4096, 132).splits, for_rows(64, 2048, 1, 24576, 132).splits
    (4, 1)
    """
    tile = TILES["scaled_matmul"]
    tiles = -(-rows // BLOCK) * (columns // BLOCK)
    if groups > 1 or not 0 < 2 * tiles <= cores:
        return tile
    slots = -(-depth // tile.k)
    per_split = max(-(-slots // (cores // tiles)), 2)
    splits = -(-slots // per_split)
    return dataclasses.replace(tile, splits=splits, pieces=0) if splits > 1 else tile


def _fitting(tile: ScaledTile, columns: int) -> ScaledTile:
    """The tile without its cluster where column tiles cannot be shared out evenly."""
    return tile if columns % (BLOCK * tile.cluster) == 0 else dataclasses.replace(tile, cluster=1)


def _fitting_outer(tile: ScaledTile, lhs: Array, dout: Array) -> ScaledTile:
    """A weight gradient's tile that is no higher than it, and fits as `_fitting` has it."""
    if lhs.shape[0] % tile.m:
        tile = dataclasses.replace(tile, m=BLOCK)
    return _fitting(tile, dout.shape[0])
