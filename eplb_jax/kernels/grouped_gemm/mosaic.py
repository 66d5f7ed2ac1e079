"""The grouped products by our own kernels for Hopper GPUs (H100, H200): bfloat16 and float16."""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from eplb_jax.kernels.backend import current_target
from eplb_jax.kernels.grouped_gemm.mosaic_outer import outer_products
from eplb_jax.kernels.grouped_gemm.mosaic_rows import rows_times_matrices
from eplb_jax.kernels.grouped_gemm.ring import CHUNK, Tile
from eplb_jax.kernels.grouped_gemm.tiles import SMALLEST, tile_for

FLOATS = ("bfloat16", "float16")


def why_not(lhs: Any, rhs: Any) -> str | None:
    """Why the kernels do not take operands of these shapes and dtypes; None if they do.

    >>> import jax
    >>> why_not(jax.ShapeDtypeStruct((64, 128), "float16"), jax.ShapeDtypeStruct((2, 128, 100), "float16"))
    'rhs (2, 128, 100) has matrices whose sides are not multiples of 64 from 128 on'
    """
    if lhs.dtype not in FLOATS:
        return f"dtype {lhs.dtype} is none of {', '.join(FLOATS)}"
    if lhs.shape[0] < CHUNK or lhs.shape[0] % 8:
        return f"lhs {lhs.shape} has a number of rows that is no multiple of 8 from {CHUNK} on"
    if any(side < SMALLEST or side % CHUNK for side in rhs.shape[1:]):
        return f"rhs {rhs.shape} has matrices whose sides are not multiples of {CHUNK} from {SMALLEST} on"
    return None


def matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups k n"] | Float[Array, "groups n k"],
    group_sizes: Integer[Array, " groups"],
    transpose_rhs: bool = False,
    *,
    tile: Tile | None = None,
) -> Float[Array, "rows n"]:
    """Each group of rows times its matrix, as `eplb_jax.kernels.grouped_gemm.xla.matmul`.

    Args:
      lhs, rhs, group_sizes, transpose_rhs: as there; operands for which `why_not` has no reason.
      tile: how to divide the work; by default as measured.
    """
    columns = rhs.shape[1 if transpose_rhs else 2]
    tile = tile or tile_for("matmul", lhs.shape[0], rhs.shape[0], lhs.shape[0], columns)
    sizes = group_sizes.astype("int32")
    return rows_times_matrices(lhs, rhs, sizes, transpose_rhs, tile, current_target().cores)


def outer(
    lhs: Float[Array, "rows k"],
    dout: Float[Array, "rows n"],
    group_sizes: Integer[Array, " groups"],
    *,
    dtype: DTypeLike | None = None,
    tile: Tile | None = None,
) -> Float[Array, "groups k n"]:
    """The product ``lhs[rows].T @ dout[rows]`` of each group's rows, as `eplb_jax.kernels.grouped_gemm.xla.outer`.

    Args:
      lhs, dout, group_sizes: as there; operands that `matmul` takes and gives.
      dtype: of the result, float32 or None: that of lhs.
      tile: how to divide the work; by default as measured.
    """
    tile = tile or tile_for("outer", lhs.shape[0], group_sizes.shape[0], lhs.shape[1], dout.shape[1])
    return outer_products(lhs, dout, group_sizes.astype("int32"), tile, current_target().cores, dtype=dtype)


def added_outer(
    lhs: Float[Array, "rows k"],
    dout: Float[Array, "rows n"],
    group_sizes: Integer[Array, " groups"],
    total: Float[Array, "groups k n"],
    *,
    tile: Tile | None = None,
) -> Float[Array, "groups k n"]:
    """`outer` in float32 added to a float32 total, in its place; what an empty group has of it stays."""
    tile = tile or tile_for("added_outer", lhs.shape[0], group_sizes.shape[0], lhs.shape[1], dout.shape[1])
    return outer_products(lhs, dout, group_sizes.astype("int32"), tile, current_target().cores, total=total)
