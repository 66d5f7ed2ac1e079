"""Attention's shapes without its arithmetic, for planning: cuDNN's attention compiles only beside a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxpipe.stage.kernel_flops import attention_flops

FORWARD, BACKWARD = "attention_forward", "attention_backward"
"""Names of the two kernels, also in compiled programs."""


def attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float | None = None) -> jax.Array:
    """Takes, gives and keeps what a kernel does that stores no scores; its results mean nothing, whatever the scale.

    Shapes: ``[B, T, H, C], [B, T, H, C], [B, T, H, V] -> [B, T, H, V]``.
    """
    return _attention(query, key, value)


@jax.custom_vjp
def _attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _forward(query, key, value)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    batch, length, heads, _ = query.shape
    mixed = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype)
    sums = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    mixed, sums = _kernel(FORWARD, 2, (query, key, value), mixed, sums)(query, key, value)
    return mixed, (query, key, value, mixed, sums)


def _backward(kept: Any, ct: jax.Array) -> Any:
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in kept[:3]]
    return tuple(_kernel(BACKWARD, 5, kept[:3], *shapes)(*kept, ct))


def _kernel(name: str, products: int, operands: Sequence[Any], *results: jax.ShapeDtypeStruct) -> Any:
    """A kernel that tells what attention of queries, keys and values with so many products costs."""

    def body(*refs: Any) -> None:
        for ref in refs[-len(results) :]:
            ref[(0,) * ref.ndim] = jnp.zeros((), ref.dtype)

    flops = round(attention_flops(*operands, products=products, causal=True))
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in (*operands, *results))
    cost = pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
    return pl.pallas_call(body, out_shape=results, grid=(1,), name=name, cost_estimate=cost)


_attention.defvjp(_forward, _backward)
