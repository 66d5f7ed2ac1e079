"""Attention over caches of latents by XLA's own products: every platform, every float type; reads a cache twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.dtypes import wide


def attend_latents(
    query: Float[Array, "B H C"],
    cache: Float[Array, "B S C"],
    lengths: Int[Array, " B"],
    *,
    latent: int,
    scale: float,
) -> Float[Array, "B H L"]:
    """`eplb_jax.kernels.latent_attention.interface.attend_latents`, without its checks."""
    scores = jnp.einsum("bhc,bsc->bhs", query, cache, preferred_element_type=wide(query.dtype)) * scale
    seen = jnp.arange(cache.shape[1], dtype=jnp.int32) < lengths[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(query.dtype)
    # Rotary keys are mixed too and dropped: a slice of the cache would be a copy of it.
    return jnp.einsum("bhs,bsc->bhc", weights, cache)[..., :latent]
