"""Multi-head latent attention: over whole sequences, and of one new token over a cache of latents.

Shapes: B sequences or requests, T tokens, S cached tokens, D width, H heads, R rank of the query, L latent width,
N, P and V a head's widths: content, rotary and value.

Source: DeepSeek-V2, arXiv 2405.04434, 2.1 and appendix C.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.dtypes import wide
from jaxpipe.attention import causal_attention, expand_latents
from profiling.workloads.sizes import Sizes


class AttentionParams(NamedTuple):
    """Matrices of one layer's attention; norms have no scale of their own here."""

    query_down: Float[Array, "D R"]
    query_up: Float[Array, "R H NP"]
    latent_down: Float[Array, "D LP"]
    key_up: Float[Array, "L H N"]
    value_up: Float[Array, "L H V"]
    out: Float[Array, "H V D"]


def init_attention(key: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> AttentionParams:
    """Normal values of variance one over the number of inputs."""
    heads, content, rotary, value = sizes.heads, sizes.content, sizes.rotary, sizes.value
    keys = jax.random.split(key, len(AttentionParams._fields))

    def normal(index: int, fan_in: int, *shape: int) -> jax.Array:
        return jax.random.normal(keys[index], shape, dtype) * fan_in**-0.5

    return AttentionParams(
        query_down=normal(0, sizes.width, sizes.width, sizes.query_rank),
        query_up=normal(1, sizes.query_rank, sizes.query_rank, heads, content + rotary),
        latent_down=normal(2, sizes.width, sizes.width, sizes.latent + rotary),
        key_up=normal(3, sizes.latent, sizes.latent, heads, content),
        value_up=normal(4, sizes.latent, sizes.latent, heads, value),
        out=normal(5, heads * value, heads, value, sizes.width),
    )


def attend(
    params: AttentionParams, x: Float[Array, "B T D"], sizes: Sizes, before: Float[Array, "B S LP"] | None = None
) -> tuple[Float[Array, "B T D"], Float[Array, "B T LP"]]:
    """Causal attention of every token to those before it in its sequence.

    Args:
      params: of this layer.
      x: tokens that follow each other.
      sizes: of the model.
      before: what this function returned for the tokens that precede these; None: these are the first.

    Returns:
      The output, and latents and rotary keys of these tokens, which `attend_cached` caches.
    """
    first = 0 if before is None else before.shape[1]
    positions = first + jnp.arange(x.shape[1], dtype=jnp.int32)
    query = _query(params, x, sizes, positions)
    new = _latents(params, x, sizes, positions)
    every = new if before is None else jnp.concatenate([before, new], 1)
    latent, rotary = every[..., : sizes.latent], every[..., sizes.latent :]
    key, value = expand_latents(latent, params.key_up, params.value_up)
    key = jnp.concatenate([key, jnp.broadcast_to(rotary[:, :, None], (*key.shape[:3], sizes.rotary))], -1)
    mixed = causal_attention(query, key, value)
    return jnp.einsum("bthv,hvd->btd", mixed, params.out), new


def attend_cached(
    params: AttentionParams,
    x: Float[Array, "B D"],
    cache: Float[Array, "B S LP"],
    lengths: Int[Array, " B"],
    sizes: Sizes,
) -> tuple[Float[Array, "B D"], Float[Array, "B S LP"]]:
    """Attention of one new token of each request; key and value matrices are applied to query and result instead.

    Args:
      params: of this layer.
      x: the new tokens.
      cache: latents and rotary keys of all tokens before, and room for the new one at ``lengths``.
      lengths: tokens cached of each request; int32.
      sizes: of the model.

    Returns:
      The output, and the cache with the new tokens in it.
    """
    with jax.named_scope("project"):
        query = _query(params, x[:, None], sizes, lengths[:, None])
        new = _latents(params, x[:, None], sizes, lengths[:, None])
        cache = jax.vmap(lambda rows, row, at: jax.lax.dynamic_update_slice(rows, row, (at, jnp.int32(0))))(
            cache, new, lengths
        )
        content, rotary = query[:, 0, :, : sizes.content], query[:, 0, :, sizes.content :]
        query = jnp.concatenate([jnp.einsum("bhn,lhn->bhl", content, params.key_up), rotary], -1)
    with jax.named_scope("core"):
        scores = jnp.einsum("bhc,bsc->bhs", query, cache, preferred_element_type=wide(x.dtype))
        scores = scores * (sizes.content + sizes.rotary) ** -0.5
        seen = jnp.arange(cache.shape[1], dtype=jnp.int32) <= lengths[:, None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(x.dtype)
        # Rotary keys are mixed too and dropped: a slice of the cache would be a copy of it.
        mixed = jnp.einsum("bhs,bsc->bhc", weights, cache)[..., : sizes.latent]
        value = jnp.einsum("bhl,lhv->bhv", mixed, params.value_up)
        return jnp.einsum("bhv,hvd->bd", value, params.out), cache


def rms_norm(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Root-mean-square normalisation without scale, in float32 (float64 for float64)."""
    exact = x.astype(wide(x.dtype))
    return (exact * jax.lax.rsqrt(jnp.mean(exact * exact, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def _query(params: AttentionParams, x: jax.Array, sizes: Sizes, positions: jax.Array) -> jax.Array:
    query = jnp.einsum("btr,rhn->bthn", rms_norm(x @ params.query_down), params.query_up)
    content, rotary = query[..., : sizes.content], query[..., sizes.content :]
    return jnp.concatenate([content, _rotate(rotary, positions[..., None])], -1)


def _latents(params: AttentionParams, x: jax.Array, sizes: Sizes, positions: jax.Array) -> jax.Array:
    both = x @ params.latent_down
    latent, rotary = both[..., : sizes.latent], both[..., sizes.latent :]
    return jnp.concatenate([rms_norm(latent), _rotate(rotary, positions)], -1)


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding, arXiv 2104.09864."""
    half = x.shape[-1] // 2
    dtype = wide(x.dtype)
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=dtype) / half)
    angles = positions.astype(dtype)[..., None] * frequencies
    left, right = jnp.split(x.astype(dtype), 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1).astype(x.dtype)
