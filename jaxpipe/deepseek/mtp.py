"""Multi-token prediction: the head that predicts the token after the next one.

Shapes: B sequences, T tokens of each, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.deepseek.block import DenseBlock
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.layers import RMSNorm, normal
from jaxpipe.deepseek.mla import Core


class MTPHead(nnx.Module):
    """Multi-token prediction's second head: features for the token after the next one.

    Its block is dense, so that the head does not communicate; DeepSeek's has experts.

    Args:
      config: sizes.
      rngs: for the parameters, which are float32.
      core: attention of queries to keys and values.

    Source: the DeepSeek-V3 report, arXiv 2412.19437, 2.2.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, core: Core = causal_attention) -> None:
        self.hidden_norm, self.embedding_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.project = nnx.Param(normal(rngs, (2 * config.width, config.width), 2 * config.width))
        self.block = DenseBlock(config, rngs, core)
        self.norm = RMSNorm(config.width)

    def __call__(self, y: jax.Array, known: jax.Array) -> jax.Array:
        """``[B, T, D], [B, T, D] -> [B, T, D]``: features so far and the next tokens' embeddings."""
        both = jnp.concatenate([self.hidden_norm(y), self.embedding_norm(known)], -1)
        return self.norm(self.block(both @ self.project[...].astype(y.dtype)))
