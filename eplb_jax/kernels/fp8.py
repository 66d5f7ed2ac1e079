"""The recipe "fp8_exchange": rows travel in 8 bits; products are made of the numbers that arrive, in their own dtype.

Source: the DeepSeek-V3 report, arXiv 2412.19437, 3.3.3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

FP8 = jnp.float8_e4m3fn
BLOCK = 128
"""Channels that share a scale."""


class BlocksOfE4M3:
    """A `eplb_jax.kernels.recipe.Encoding`: e4m3, and one float32 scale for 128 channels."""

    def encode(self, rows: Float[Array, "*rows D"]) -> tuple[jax.Array, ...]:
        """Numbers and scales, as `quantise` makes them."""
        return quantise(rows)

    def decode(self, parts: tuple[jax.Array, ...], dtype: DTypeLike) -> Float[Array, "*rows D"]:
        """What `encode` rounded."""
        numbers, scales = parts
        return dequantise(numbers, scales, dtype)


def quantise(x: Float[Array, "*rows D"]) -> tuple[Array, Float[Array, "*rows blocks"]]:
    """Numbers in e4m3 and float32 scales, one for 128 channels: the largest of them becomes 448.

    Raises:
      ValueError: a width that is not a multiple of 128.

    >>> numbers, scales = quantise(jnp.full((1, 128), 7.0))
    >>> float(numbers[0, 0]), scales.tolist()
    (448.0, [[0.015625]])
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"width {x.shape[-1]} is not a multiple of {BLOCK}, the channels that share a scale in FP8")
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, BLOCK)
    scales = jnp.abs(blocks).max(-1) / float(jnp.finfo(FP8).max)
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0, scales)  # too small to divide by
    numbers = jnp.where(scales[..., None] > 0, blocks / jnp.where(scales > 0, scales, 1)[..., None], 0)
    return numbers.astype(FP8).reshape(x.shape), scales


def dequantise(numbers: Array, scales: Float[Array, "*rows blocks"], dtype: DTypeLike) -> Array:
    """What `quantise` rounded, in another dtype."""
    blocks = numbers.astype(jnp.float32).reshape(*scales.shape, BLOCK)
    return (blocks * scales[..., None]).reshape(numbers.shape).astype(dtype)
