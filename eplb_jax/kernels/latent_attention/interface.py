"""Attention over caches of latents behind one function: checks and the choice of the backend."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eplb_jax.kernels import registry
from eplb_jax.kernels.latent_attention import xla
from eplb_jax.kernels.registry import Backend, ChosenBackend

FEW_HEADS = 32
"""Up to so many the kernel, whose blocks have 64, takes longer on an H200 than XLA: "auto" leaves them to that."""


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
    instead. The backend "mosaic" reads each cache once and keeps no scores in memory; gradients are XLA's.

    Args:
      query: of each head, [latent, rotary] columns as those of the cache.
      cache: normalised latents and rotary keys of all tokens, side by side; of the same dtype. What is behind a
        request's last key reaches no result, as long as it is finite.
      lengths: keys of each request, 1 or more; int32. More than S are S.
      latent: columns that are mixed: L.
      scale: of the scores; positive.
      backend: "xla" runs everywhere. "mosaic" is our own kernel for bfloat16 and float16 on Hopper GPUs; latents have
        a multiple of 128 columns, all columns are a multiple of 64 up to 576, and caches have a multiple of 8 keys.
        "auto" is "mosaic" where that can do it, and faster: with more than 32 heads. Operands sharded over a mesh's
        Explicit axes are XLA's. A compiler does not divide a kernel: what is sharded over Auto axes outside of
        `jax.shard_map` it gathers first.

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
    backend = "xla" if backend == "auto" and query.shape[1] <= FEW_HEADS else backend
    chosen = registry.choose("attend_latents", backend, query, cache, latent)
    operands = jnp.asarray(query), jnp.asarray(cache), jnp.asarray(lengths, jnp.int32)
    if chosen == registry.XLA:
        return xla.attend_latents(*operands, latent=latent, scale=scale)
    return _attend(*operands, chosen, latent, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(
    query: jax.Array, cache: jax.Array, lengths: jax.Array, chosen: ChosenBackend, latent: int, scale: float
) -> jax.Array:
    by_xla, static = xla.attend_latents, dict(latent=latent, scale=scale)
    return registry.dispatch(chosen, "attend_latents", by_xla, query, cache, lengths, **static)


def _attend_fwd(*arguments: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _attend(*arguments), arguments[:3]


def _attend_bwd(_: ChosenBackend, latent: int, scale: float, operands: Any, ct: jax.Array) -> tuple[Any, ...]:
    """What XLA's form has of gradients; nothing of the forward pass is kept but its operands."""
    query, cache, lengths = operands
    by_xla = functools.partial(xla.attend_latents, lengths=lengths, latent=latent, scale=scale)
    return *jax.vjp(by_xla, query, cache)[1](ct), None


_attend.defvjp(_attend_fwd, _attend_bwd)


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
