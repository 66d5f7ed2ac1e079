"""Rows gathered by index on NVIDIA GPUs, in Pallas' Triton dialect: wide loads, where XLA's fusion loads by element."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LARGEST, SMALLEST = 1024, 128
"""Channels of a program, a power of two that divides the width; narrower arrays are left to XLA."""

DTYPES = ("bfloat16", "float16", "float32")


def fits(array: jax.Array) -> bool:
    """Whether the kernels take rows of this dtype and width; at run time they need an NVIDIA GPU besides."""
    return array.ndim == 2 and array.dtype in DTYPES and _channels(array.shape[1]) >= SMALLEST


def sum_rows(array: jax.Array, index: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Sums [N, D] of rows of array [R, D] at index [N, k], added in float32; R stands for a row of zeros.

    >>> rows = jnp.arange(256.0).reshape(2, 128)
    >>> sum_rows(rows, jnp.array([[0, 1], [1, 2]]), interpret=True)[:, 0].tolist()
    [128.0, 128.0]
    """
    _, width = array.shape
    channels = _channels(width)
    kernel = functools.partial(_sum_rows, channels=channels)
    call: Any = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((index.shape[0], width), array.dtype),
        grid=(index.shape[0], width // channels),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=triton.CompilerParams(num_warps=max(1, min(4, channels // 256)), num_stages=1),
        interpret=interpret,
        name="sum_rows",
    )
    return call(array, index)


def _sum_rows(array: Any, index: Any, out: Any, *, channels: int) -> None:
    """One row of the result, some of its channels."""
    row, columns = pl.program_id(0), pl.ds(pl.program_id(1) * channels, channels)
    total = jnp.zeros(channels, jnp.float32)
    for choice in range(index.shape[1]):
        place = triton.load(index.at[row, jnp.int32(choice)])
        found = place < array.shape[0]
        mask = jnp.broadcast_to(found, (channels,))
        part = triton.load(array.at[jnp.where(found, place, 0), columns], mask=mask, other=0.0)
        total += part.astype(jnp.float32)
    triton.store(out.at[row, columns], total.astype(out.dtype))


def _channels(width: int) -> int:
    return min(LARGEST, width & -width)
