"""Numbers of 8 bits with scales, as FP8 products read them: the types, and how XLA makes them and reads them back.

The contraction is the last axis everywhere ("K-major"), since Hopper's tensor cores take 8-bit operands in no other
order. A product over rows, a weight gradient, reads both operands transposed: `quantise_columns` makes them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3."""
BLOCK = 128
"""Numbers along the contraction, and rows and columns of a matrix, that share a scale."""


class ScaledRows(NamedTuple):
    """Rows of e4m3, a scale for 128 numbers of a row: the left operand of a product, or either of a weight gradient.

    Attributes:
      numbers: float8_e4m3fn.
      scales: float32, block by block, so that the scales of neighbouring rows are neighbours.
    """

    numbers: Array  # [rows, K]
    scales: Float[Array, "blocks rows"]


class ScaledMatrices(NamedTuple):
    """Matrices of e4m3, a scale for a square of 128 by 128: the right operand of a product.

    Attributes:
      numbers: float8_e4m3fn, the contraction last.
      scales: float32.
    """

    numbers: Array  # [groups, N, K]
    scales: Float[Array, "groups N_blocks K_blocks"]

    def transposed(self) -> ScaledMatrices:
        """The same numbers with the other axis last: for the product with the transposed matrices."""
        return ScaledMatrices(self.numbers.swapaxes(-1, -2), self.scales.swapaxes(-1, -2))


def scale_of(largest: Float[Array, "*shape"], *, power_of_two: bool) -> tuple[Array, Array]:
    """(scale, its reciprocal) of blocks whose largest magnitude is given; zeros where that is zero or too small.

    With ``power_of_two`` the scale is the least power of two with which nothing saturates, and both are exact: then
    quantising again along another axis rounds only what becomes subnormal. Otherwise the largest becomes 448. Every
    backend computes both with these operations, so results agree bit for bit. A largest magnitude that is not finite
    gives a scale that is not finite, and numbers that are NaN.
    """
    scale = largest * jnp.float32(1 / LARGEST)
    finite = largest < jnp.inf
    if power_of_two:
        bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
        up = (bits + jnp.int32(0x7FFFFF)) & jnp.int32(0x7F800000)  # the mantissa carries into the exponent
        scale = jnp.where(finite, jax.lax.bitcast_convert_type(up, jnp.float32), largest)
        back = jax.lax.bitcast_convert_type(jnp.int32(254 << 23) - up, jnp.float32)
    else:
        back = jnp.float32(LARGEST) / largest
    unused = largest < jnp.float32(1e-30)  # not where it is NaN
    back = jnp.where(finite, back, jnp.float32(jnp.nan))
    return jnp.where(unused, 0, scale), jnp.where(unused, 0, back)


def largest_of(x: Float[Array, "*shape"], axis: int | tuple[int, ...]) -> Float[Array, "*rest"]:
    """The largest magnitude along axes, float32; NaN where one is NaN, which maxima of floats may pass over.

    >>> largest_of(jnp.array([1.0, -3.0]), 0), largest_of(jnp.array([1.0, jnp.nan, jnp.inf]), 0)
    (Array(3., dtype=float32), Array(nan, dtype=float32))
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & jnp.int32(0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(bits.max(axis), jnp.float32)


def quantise_rows(x: Float[Array, "rows K"], *, power_of_two: bool = True) -> ScaledRows:
    """Rows with a scale for each 128 numbers of a row.

    Raises:
      ValueError: K that is no multiple of 128.

    >>> numbers, scales = quantise_rows(jnp.full((2, 128), 7.0))
    >>> float(numbers[0, 0]), scales.tolist()
    (448.0, [[0.015625, 0.015625]])
    """
    rows, width = x.shape
    if width % BLOCK:
        raise ValueError(f"width {width} is not a multiple of {BLOCK}, the numbers that share a scale in FP8")
    blocks = x.astype(jnp.float32).reshape(rows, width // BLOCK, BLOCK)
    scales, back = scale_of(largest_of(blocks, -1), power_of_two=power_of_two)
    return ScaledRows((blocks * back[..., None]).astype(E4M3).reshape(x.shape), scales.T)


def quantise_columns(x: Float[Array, "rows K"], *, power_of_two: bool = True) -> ScaledRows:
    """`quantise_rows` of the transposed array: a scale for each 128 rows of a column; numbers are [K, rows]."""
    return quantise_rows(x.T, power_of_two=power_of_two)


def quantise_matrices(w: Float[Array, "groups N K"], *, power_of_two: bool = True) -> ScaledMatrices:
    """Matrices with a scale for each 128 by 128 numbers.

    Raises:
      ValueError: sides that are no multiples of 128.

    >>> quantise_matrices(jnp.ones((2, 128, 256))).scales.shape
    (2, 1, 2)
    """
    groups, high, wide = w.shape
    if high % BLOCK or wide % BLOCK:
        raise ValueError(f"matrices of {high} x {wide}: both sides must be multiples of {BLOCK} in FP8")
    blocks = w.astype(jnp.float32).reshape(groups, high // BLOCK, BLOCK, wide // BLOCK, BLOCK)
    scales, back = scale_of(largest_of(blocks, (2, 4)), power_of_two=power_of_two)
    return ScaledMatrices((blocks * back[:, :, None, :, None]).astype(E4M3).reshape(w.shape), scales)


def dequantise_rows(rows: ScaledRows, dtype: DTypeLike = jnp.float32) -> Float[Array, "rows K"]:
    """What `quantise_rows` rounded."""
    blocks = rows.numbers.astype(jnp.float32).reshape(rows.numbers.shape[0], -1, BLOCK)
    return (blocks * rows.scales.T[..., None]).reshape(rows.numbers.shape).astype(dtype)


def dequantise_matrices(w: ScaledMatrices, dtype: DTypeLike = jnp.float32) -> Float[Array, "groups N K"]:
    """What `quantise_matrices` rounded."""
    groups, high, wide = w.numbers.shape
    blocks = w.numbers.astype(jnp.float32).reshape(groups, high // BLOCK, BLOCK, wide // BLOCK, BLOCK)
    return (blocks * w.scales[:, :, None, :, None]).reshape(w.numbers.shape).astype(dtype)


def in_whole_blocks(rows: ScaledRows) -> ScaledRows:
    """Rows with zeros behind them, up to a multiple of 128.

    >>> in_whole_blocks(quantise_rows(jnp.ones((3, 256)))).scales.shape
    (2, 128)
    """
    missing = -rows.numbers.shape[0] % BLOCK
    if not missing:
        return rows
    return ScaledRows(jnp.pad(rows.numbers, ((0, missing), (0, 0))), jnp.pad(rows.scales, ((0, 0), (0, missing))))


def count_not_finite(*scaled: ScaledRows | ScaledMatrices) -> Int[Array, ""]:
    """How many blocks held something that is not finite."""
    return sum((~jnp.isfinite(each.scales)).sum(dtype=jnp.int32) for each in scaled) + jnp.int32(0)
