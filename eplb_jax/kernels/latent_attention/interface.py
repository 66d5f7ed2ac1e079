"""Attention over caches of latents behind one function: checks and the choice of the backend."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eplb_jax.kernels import registry
from eplb_jax.kernels.latent_attention import xla
from eplb_jax.kernels.registry import Backend


def attend_latents(
    query: Float[Array, "B H C"],
    cache: Float[Array, "B S C"],
    lengths: Int[Array, " B"],
    *,
    latent: int,
    scale: float,
    backend: Backend = "auto",
) -> Float[Array, "B H L"]:
    """Attention of one token of each request: all its heads share the keys, whose first columns are the values.

    This is multi-head latent attention where the matrices that expand latents are applied to queries and results
    instead. The backend "mosaic" reads each cache once and keeps no scores in memory; it has no gradient.

    Args:
      query: of each head, [latent, rotary] columns as those of the cache.
      cache: normalised latents and rotary keys of all tokens, side by side; of the same dtype. What is behind a
        request's last key reaches no result, as long as it is finite.
      lengths: keys of each request, 1 or more; int32.
      latent: columns that are mixed: L.
      scale: of the scores; positive.
      backend: "xla" runs everywhere. "mosaic" is for bfloat16 and float16 on Hopper GPUs. "auto" takes "mosaic" where
        it can; see `eplb_jax.grouped_matmul`.

    Returns:
      In the dtype of the query; softmax and sums are in float32, in float64 for float64.

    Raises:
      ValueError: shapes, dtypes, columns or a scale that do not fit; "mosaic" for what it cannot do.

    Source: DeepSeek-V2, arXiv 2405.04434, 2.1.2.

    >>> query, cache = jnp.ones((1, 2, 3)), jnp.array([[[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [9.0, 9.0, 9.0]]])
    >>> attend_latents(query, cache, jnp.array([2]), latent=2, scale=1.0).tolist()
    [[[3.0, 3.0], [3.0, 3.0]]]
    """
    check(query, cache, lengths, latent, scale)
    chosen = registry.choose("attend_latents", backend, query, cache, latent)
    operands = jnp.asarray(query), jnp.asarray(cache), jnp.asarray(lengths, jnp.int32)
    return registry.dispatch(chosen, "attend_latents", xla.attend_latents, *operands, latent=latent, scale=scale)


def check(query: Any, cache: Any, lengths: Any, latent: int, scale: float) -> None:
    """Raises ValueError unless the operands fit each other."""
    shapes = query.shape, cache.shape, lengths.shape
    if [len(shape) for shape in shapes] != [3, 3, 1] or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            f"query, cache and lengths have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}: they must be "
            "[requests, heads, columns], [requests, keys, columns] and [requests]"
        )
    if query.shape[2] != cache.shape[2] or not 0 < latent <= cache.shape[2]:
        raise ValueError(
            f"queries of {query.shape[2]} columns, a cache of {cache.shape[2]} and latent={latent}: queries and cache "
            "have the same columns, of which the latents are the first"
        )
    if query.dtype != cache.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"query has dtype {query.dtype} and cache {cache.dtype}: they must be the same; cast one")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths has dtype {lengths.dtype}: it must hold numbers of keys; cast it to int32")
    if not scale > 0:
        raise ValueError(f"scale={scale} of the scores: it must be positive")
