"""Copies of experts by index, whose transpose sums them in the same order every time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eplb_jax.kernels.dtypes import wide


@jax.custom_vjp
def pick(part: jax.Array, index: jax.Array, found: jax.Array) -> jax.Array:
    """The experts at an index, zeros where there is none."""
    taken = part.at[index].get(mode="promise_in_bounds")
    return jnp.where(found.reshape(-1, *(1,) * (part.ndim - 1)), taken, jnp.zeros((), part.dtype))


def _pick_fwd(part: jax.Array, index: jax.Array, found: jax.Array) -> tuple[jax.Array, Any]:
    like = jnp.zeros((part.shape[0], 0), part.dtype)  # number of experts, as a shape
    return pick(part, index, found), (index, found, like)


def _pick_bwd(residuals: Any, ct: jax.Array) -> tuple[jax.Array, None, None]:
    """A sum over copies as a product with zeros and ones: no scatter, and the same order every time."""
    index, found, like = residuals
    hot = (index == jnp.arange(like.shape[0], dtype=jnp.int32)[:, None]) & found
    dtype = wide(ct.dtype)
    total = jnp.einsum(
        "es,s...->e...", hot.astype(ct.dtype), ct, preferred_element_type=dtype, precision=jax.lax.Precision.HIGHEST
    )
    return total.astype(ct.dtype), None, None


pick.defvjp(_pick_fwd, _pick_bwd)
