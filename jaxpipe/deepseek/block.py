"""A layer of the model: attention and a feed-forward layer or experts, each beside a residual branch.

Shapes: B sequences, T tokens of each, D width. Parameters are float32; modules compute in the dtype of the activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from eplb_jax import MoE, MoEStats, Placement
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.layers import RMSNorm, SwiGLU
from jaxpipe.deepseek.mla import MLA, Core

Part = Callable[[jax.Array], tuple[jax.Array, Any]]
"""Tokens to tokens, and what else there is to tell."""


def apply_block(
    x: Float[Array, "*batch D"],
    attention_norm: Callable[[jax.Array], jax.Array],
    attention: Part,
    mlp_norm: Callable[[jax.Array], jax.Array],
    mlp: Part,
    *,
    remat_attention: bool = False,
) -> tuple[Float[Array, "*batch D"], Any, Any]:
    """``x + attention(norm(x))``, and the same of the second part.

    Args:
      x: tokens.
      attention_norm, mlp_norm: what comes before each part.
      attention: the first part.
      mlp: the second part. The scope "mlp" does not cover it: experts name the parts of theirs.
      remat_attention: whether the backward pass computes the attention and its norm again.

    Returns:
      The tokens, and what else the attention and the second part told.

    >>> y, _, told = apply_block(jax.numpy.ones(2), lambda x: x, lambda x: (x, None), lambda x: x, lambda x: (2 * x, 5))
    >>> y.tolist(), told
    ([6.0, 6.0], 5)
    """

    def attend(x: jax.Array) -> tuple[jax.Array, Any]:
        return attention(attention_norm(x))

    with jax.named_scope("attention"):
        y, seen = (jax.checkpoint(attend) if remat_attention else attend)(x)
        x = x + y
    with jax.named_scope("mlp"):
        normal = mlp_norm(x)
    y, told = mlp(normal)
    with jax.named_scope("mlp"):
        return x + y, seen, told


class DenseBlock(nnx.Module):
    """One layer without experts.

    Args:
      config: sizes.
      rngs: for the parameters.
      core: attention of queries to keys and values.
      axis: the mesh axis over which the rows of the feed-forward layer's matrices are spread, or None.
    """

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, core: Core = causal_attention, axis: str | None = None
    ) -> None:
        self.config, branches = config, 2 * config.layers
        self.attention_norm, self.mlp_norm = (RMSNorm(config.width, config.norm_eps) for _ in range(2))
        self.attention = MLA(config, rngs, core, branches=branches)
        sizes = config.width, config.dense_hidden
        self.mlp = SwiGLU(*sizes, rngs, branches=branches, axis=axis, precision=config.precision)

    def __call__(self, x: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """``[B, T, D] -> [B, T, D]``; of ``segments`` see `jaxpipe.deepseek.causal_attention`."""

        def mlp(x: jax.Array) -> tuple[jax.Array, None]:
            with jax.named_scope("mlp"):
                return self.mlp(x), None

        return apply_block(
            x,
            self.attention_norm,
            lambda x: (self.attention(x, segments), None),
            self.mlp_norm,
            mlp,
            remat_attention=self.config.remat == "attention",
        )[0]


class MoEBlock(nnx.Module):
    """One layer with experts.

    Args:
      config: sizes.
      rngs: for the parameters.
      core: attention of queries to keys and values.
      axis: the mesh axis that the experts are sharded over, or None.
    """

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, core: Core = causal_attention, axis: str | None = None
    ) -> None:
        self.config = config
        self.attention_norm, self.mlp_norm = (RMSNorm(config.width, config.norm_eps) for _ in range(2))
        self.attention = MLA(config, rngs, core, branches=2 * config.layers)
        placement = first_placement(config.experts, config.redundant) if config.redundant else None
        moe = dataclasses.replace(config.moe, masters=config.moe.masters or config.experts)
        self.moe = MoE(moe, rngs, axis=axis, placement=placement)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, MoEStats]:
        """``[B, T, D] -> [B, T, D]`` and the routing's statistics; tokens outside ``mask`` go to no routed expert.

        Of ``segments`` see `jaxpipe.deepseek.causal_attention`.
        """

        def mlp(x: jax.Array) -> tuple[jax.Array, MoEStats]:
            with jax.named_scope("mlp"):
                return self.moe(x, mask)

        y, _, stats = apply_block(
            x,
            self.attention_norm,
            lambda x: (self.attention(x, segments), None),
            self.mlp_norm,
            mlp,
            remat_attention=self.config.remat == "attention",
        )
        return y, stats


def first_placement(experts: int, redundant: int) -> Placement:
    """A layer's placement before anything is known of loads, the same on every mesh: the first experts' copies last.

    >>> first_placement(4, 2).phy2log.tolist()
    [0, 1, 2, 3, 0, 1]
    """
    slots = np.arange(experts + redundant) % experts
    return Placement.from_phy2log(slots[None], experts).padded(redundant + 1).of_layer(0)
