"""Layers of the model in Flax NNX: norm, attention, feed-forward, and a block of them.

Shapes: B sequences, T tokens of each, D width, H heads, R rank of the query, L latent width, N, P and V a head's
content, rotary and value widths, F hidden width. Parameters are float32; modules compute in the dtype of the
activations, norms, rotations and the router in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eplb_jax import MoE, MoEStats, Placement
from eplb_jax.kernels.dtypes import wide
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.kernels import expand_latents

Core = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Attention of queries to keys and values, ``[B, T, H, width]`` each; values may be narrower."""


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, arXiv 1910.07467."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., D] -> [..., D]``."""
        exact = x.astype(wide(x.dtype))
        normal = exact * jax.lax.rsqrt(jnp.mean(exact * exact, -1, keepdims=True) + 1e-6)
        return (normal * self.scale[...].astype(exact.dtype)).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head latent attention, causal, positions counted from 0: DeepSeek-V2, arXiv 2405.04434, 2.1."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, core: Core):
        self.config, self.core = config, core
        width, heads, rank, latent = config.width, config.heads, config.query_rank, config.latent
        head = config.content + config.rotary
        if rank is None:
            self.query = nnx.Param(normal(rngs, (width, heads, head), width))
        else:
            self.query_down = nnx.Param(normal(rngs, (width, rank), width))
            self.query_norm = RMSNorm(rank)
            self.query_up = nnx.Param(normal(rngs, (rank, heads, head), rank))
        self.latent_down = nnx.Param(normal(rngs, (width, latent + config.rotary), width))
        self.latent_norm = RMSNorm(latent)
        self.key_up = nnx.Param(normal(rngs, (latent, heads, config.content), latent))
        self.value_up = nnx.Param(normal(rngs, (latent, heads, config.value), latent))
        # Residual branches add up: smaller steps at first keep deep models stable.
        fan_in = heads * config.value * 2 * config.layers
        self.out = nnx.Param(normal(rngs, (heads, config.value, width), fan_in))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """``[B, T, D] -> [B, T, D]``."""
        config, dtype = self.config, x_BTD.dtype
        with jax.named_scope("query"):
            if config.query_rank is None:
                q_BTHC = jnp.einsum("btd,dhc->bthc", x_BTD, self.query[...].astype(dtype))
            else:
                down = self.query_norm(x_BTD @ self.query_down[...].astype(dtype))
                q_BTHC = jnp.einsum("btr,rhc->bthc", down, self.query_up[...].astype(dtype))
            content, rotary = q_BTHC[..., : config.content], q_BTHC[..., config.content :]
            q_BTHC = jnp.concatenate([content, rotate(rotary)], -1)
        with jax.named_scope("key_value"):
            both = x_BTD @ self.latent_down[...].astype(dtype)
            latent_BTL = self.latent_norm(both[..., : config.latent])
            # One rotary key for all heads.
            shared_BT1P = rotate(both[..., None, config.latent :])
            k_BTHN, v_BTHV = expand_latents(
                latent_BTL, self.key_up[...].astype(dtype), self.value_up[...].astype(dtype)
            )
            shape = (*k_BTHN.shape[:3], config.rotary)
            k_BTHC = jnp.concatenate([k_BTHN, jnp.broadcast_to(shared_BT1P, shape)], -1)
        with jax.named_scope("core"):
            mixed_BTHV = self.core(q_BTHC, k_BTHC, v_BTHV)
        with jax.named_scope("out"):
            return jnp.einsum("bthv,hvd->btd", mixed_BTHV, self.out[...].astype(dtype))


class SwiGLU(nnx.Module):
    """Gated feed-forward layer, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, hidden = config.width, config.dense_hidden
        self.w_in = nnx.Param(normal(rngs, (width, 2 * hidden), width))
        self.w_out = nnx.Param(normal(rngs, (hidden, width), hidden * 2 * config.layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., D] -> [..., D]``."""
        gate, value = jnp.split(x @ self.w_in[...].astype(x.dtype), 2, -1)
        return (jax.nn.silu(gate) * value) @ self.w_out[...].astype(x.dtype)


class DenseBlock(nnx.Module):
    """One layer without experts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, core: Core):
        self.attention_norm, self.mlp_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.attention, self.mlp = Attention(config, rngs, core), SwiGLU(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, T, D] -> [B, T, D]``."""
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x))
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


class MoEBlock(nnx.Module):
    """One layer with experts; ``axis`` is the mesh axis that they are sharded over, or None."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, core: Core, axis: str | None = None):
        self.config = config
        self.attention_norm, self.mlp_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.attention = Attention(config, rngs, core)
        placement = first_placement(config.experts, config.redundant) if config.redundant else None
        moe = dataclasses.replace(config.moe, masters=config.moe.masters or config.experts)
        self.moe = MoE(moe, rngs, axis=axis, placement=placement)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, MoEStats]:
        """``[B, T, D] -> [B, T, D]`` and the routing's statistics; tokens outside ``mask`` go to no routed expert."""

        def attention(x: jax.Array) -> jax.Array:
            return self.attention(self.attention_norm(x))

        with jax.named_scope("attention"):
            x = x + (jax.checkpoint(attention) if self.config.remat == "attention" else attention)(x)
        with jax.named_scope("mlp"):
            y, stats = self.moe(self.mlp_norm(x), mask)
            return x + y, stats


def first_placement(experts: int, redundant: int) -> Placement:
    """A layer's placement before anything is known of loads, the same on every mesh: the first experts' copies last.

    >>> first_placement(4, 2).phy2log.tolist()
    [0, 1, 2, 3, 0, 1]
    """
    slots = np.arange(experts + redundant) % experts
    return Placement.from_phy2log(slots[None], experts).padded(redundant + 1).of_layer(0)


def rotate(x_BTHP: jax.Array) -> jax.Array:
    """Rotary position embedding, arXiv 2104.09864, positions counted from 0."""
    half, dtype = x_BTHP.shape[-1] // 2, wide(x_BTHP.dtype)
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=dtype) / half)
    angles = jnp.arange(x_BTHP.shape[1], dtype=dtype)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x_BTHP.astype(dtype), 2, -1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1).astype(x_BTHP.dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal values of variance 1 / fan_in, float32."""
    return jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
