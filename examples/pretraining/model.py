"""A decoder-only transformer in Flax NNX, in the pieces that a pipeline runs: embed, block, head.

Shapes: B microbatch, T positions, D width, N heads, H head width, F hidden width, V vocabulary.
Modules compute in the dtype of the parameters they are given; norms, rotations, softmax and loss in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpipe
from jaxpipe.flax import layered_stages, nnx_function


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model."""

    vocab: int = 256
    width: int = 128
    heads: int = 4
    hidden: int = 384
    layers: int = 8
    sequence: int = 128

    def __post_init__(self) -> None:
        """Checks that the heads divide the width evenly."""
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not a multiple of 2 * {self.heads} heads: rotations need pairs")

    @property
    def params_per_layer(self) -> int:
        """Parameters of one block."""
        return 4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, arXiv 1910.07467."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., D] -> [..., D]``."""
        x32 = x.astype(jnp.float32)
        normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)
        return (normal * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, heads = config.width, config.heads
        self.qkv = nnx.Param(_normal(rngs, (3, width, heads, width // heads), width))
        self.out = nnx.Param(_normal(rngs, (heads, width // heads, width), width * 2 * config.layers))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """``[B, T, D] -> [B, T, D]``."""
        q, k, v = jnp.einsum("btd,cdnh->cbtnh", x_BTD, self.qkv[...])
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return jnp.einsum("btnh,nhd->btd", mixed, self.out[...])


class SwiGLU(nnx.Module):
    """Gated feed-forward layer, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.up = nnx.Param(_normal(rngs, (2, config.width, config.hidden), config.width))
        self.down = nnx.Param(_normal(rngs, (config.hidden, config.width), config.hidden * 2 * config.layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., D] -> [..., D]``."""
        gate, value = jnp.einsum("...d,cdf->c...f", x, self.up[...])
        return (jax.nn.silu(gate) * value) @ self.down[...]


class Block(nnx.Module):
    """One transformer layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = SwiGLU(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, T, D] -> [B, T, D]``."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Ends(nnx.Module):
    """What stands before the first block and after the last; embedding and output matrix are one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs, (config.vocab, config.width), 50**2))
        self.norm = RMSNorm(config.width)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """``int[B, T] -> [B, T, D]``."""
        return self.embedding[...][tokens]

    def loss(self, y: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        """Mean cross-entropy over the unmasked targets, float32, in nats."""
        logits = jnp.einsum("btd,vd->btv", self.norm(y), self.embedding[...]).astype(jnp.float32)
        log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -(log_likelihood * mask).sum() / jnp.maximum(mask.sum(), 1)


@dataclasses.dataclass(frozen=True)
class Functions:
    """The pieces as pure functions, in the form `jaxpipe.value_and_grad` takes; made by `build_model`."""

    stage: Any
    ends: Any

    def embed(self, outer: Any, data: Any, ctx: jaxpipe.Context) -> jax.Array:
        """The first stage's input."""
        return self.ends.merge(outer).embed(data["tokens"])

    def head(self, outer: Any, y: jax.Array, data: Any, ctx: jaxpipe.Context) -> jax.Array:
        """The loss of a microbatch."""
        return self.ends.merge(outer).loss(y, data["targets"], data["mask"])

    @staticmethod
    def weight(data: Any) -> jax.Array:
        """Real targets of a microbatch."""
        return data["mask"].sum()


def build_model(
    config: ModelConfig, schedule: jaxpipe.schedule.Schedule, seed: int
) -> tuple[Functions, jaxpipe.Params]:
    """The model's functions and its initial parameters, which do not depend on the schedule."""
    rngs = nnx.Rngs(seed)
    ends = nnx_function(Ends(config, rngs))
    blocks = [nnx_function(Block(config, rngs)) for _ in range(config.layers)]

    def layer(params: Any, x: jax.Array, ctx: jaxpipe.Context) -> jax.Array:
        return blocks[0](params, x)

    stage, stacked = layered_stages(layer, [block.params for block in blocks], schedule)
    return Functions(stage, ends), jaxpipe.Params(stacked, ends.params)


def rotate(x_BTNH: jax.Array) -> jax.Array:
    """Rotary position embedding, arXiv 2104.09864, positions counted from 0."""
    half = x_BTNH.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x_BTNH.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1).astype(x_BTNH.dtype)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal values of variance 1 / fan_in."""
    return jax.random.normal(rngs.params(), shape) / fan_in**0.5
