"""The products of scaled 8-bit numbers by XLA, everywhere: the numerics that kernels must agree with.

The numbers of 128 of the contraction, which share scales, are multiplied and summed in float32; that sum is scaled and
added to the others' in float32. Every product of two numbers of e4m3 is exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN, round_up
from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.kernels.scaled import BLOCK


def matmul(
    lhs: Array,
    lhs_scales: Float[Array, "K_blocks rows"],
    rhs: Array,
    rhs_scales: Float[Array, "groups N_blocks K_blocks"],
    group_sizes: Int32[Array, " groups"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "rows N"]:
    """Each group of rows times its matrix transposed; rows of no group get anything.

    Beside the result it needs memory for three arrays of its shape in float32.

    Args:
      lhs, lhs_scales: the fields of `eplb_jax.kernels.scaled.ScaledRows`, groups starting at multiples of 128 rows.
      rhs, rhs_scales: those of `eplb_jax.kernels.scaled.ScaledMatrices`.
      group_sizes: rows of each group.
      dtype: of the result.
    """
    rows, depth = lhs.shape
    groups, columns, _ = rhs.shape
    height = FP8_ALIGN if groups > 1 else rows
    blocks, steps = rows // height if rows else 0, depth // BLOCK
    group = (
        jnp.zeros(blocks, jnp.int32) if groups == 1 else jnp.minimum(group_of_blocks(group_sizes, blocks), groups - 1)
    )
    total = jnp.zeros((blocks, height, columns), jnp.float32)
    total, lhs, lhs_scales, rhs, rhs_scales, group = same_axes(total, lhs, lhs_scales, rhs, rhs_scales, group)

    def add(total: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
        a = jax.lax.dynamic_slice_in_dim(lhs, k * BLOCK, BLOCK, 1).astype(jnp.float32).reshape(blocks, height, BLOCK)
        b = jax.lax.dynamic_slice_in_dim(rhs, k * BLOCK, BLOCK, 2).astype(jnp.float32)[group]
        a_scales = jax.lax.dynamic_index_in_dim(lhs_scales, k, 0, keepdims=False).reshape(blocks, height, 1)
        b_scales = jax.lax.dynamic_index_in_dim(rhs_scales, k, 2, keepdims=False)[group]
        sums = jnp.einsum("brk,bnk->brn", a, b, preferred_element_type=jnp.float32)
        return total + sums * (a_scales * jnp.repeat(b_scales, BLOCK, 1)[:, None]), None

    total, _ = jax.lax.scan(add, total, jnp.arange(steps, dtype=jnp.int32))
    return total.reshape(rows, columns).astype(dtype)


def outer(
    lhs: Array,
    lhs_scales: Float[Array, "row_blocks K"],
    dout: Array,
    dout_scales: Float[Array, "row_blocks N"],
    group_sizes: Int32[Array, " groups"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "groups K N"]:
    """The product ``lhs[:, rows] @ dout[:, rows].T`` of each group's rows; zeros for an empty group.

    Args:
      lhs, lhs_scales: the fields of `eplb_jax.kernels.scaled.ScaledRows`, the rows of groups last; those between the
        groups are zeros.
      dout, dout_scales: likewise.
      group_sizes: rows of each group, which start at multiples of 128.
      dtype: of the result.
    """
    height, rows = lhs.shape
    columns, groups = dout.shape[0], group_sizes.shape[0]
    blocks = rows // BLOCK
    if not blocks:
        return jnp.zeros((groups, height, columns), dtype)
    group = group_of_blocks(group_sizes, blocks)
    total = jnp.zeros((groups, height, columns), jnp.float32)
    total, lhs, lhs_scales, dout, dout_scales, group = same_axes(total, lhs, lhs_scales, dout, dout_scales, group)

    def add(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        a, b = (jax.lax.dynamic_slice_in_dim(x, block * BLOCK, BLOCK, 1).astype(jnp.float32) for x in (lhs, dout))
        a_scales, b_scales = (
            jax.lax.dynamic_index_in_dim(x, block, 0, keepdims=False) for x in (lhs_scales, dout_scales)
        )
        sums = jnp.einsum("kr,nr->kn", a, b, preferred_element_type=jnp.float32)
        return total.at[group[block]].add(sums * (a_scales[:, None] * b_scales), mode="drop"), None

    total, _ = jax.lax.scan(add, total, jnp.arange(blocks, dtype=jnp.int32))
    return total.astype(dtype)


def group_of_blocks(group_sizes: jax.Array, blocks: int) -> jax.Array:
    """The group that each block of 128 rows belongs to; the number of groups for those behind the last."""
    ends = jnp.cumsum(round_up(group_sizes, FP8_ALIGN), dtype=jnp.int32)
    return (jnp.arange(blocks, dtype=jnp.int32)[:, None] * FP8_ALIGN >= ends).sum(1, dtype=jnp.int32)
