"""What stands before the pipelined layers and after them: embedding and first dense layers, last norm and losses.

Shapes: B sequences, T tokens of each, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe import vocabulary
from jaxpipe.deepseek.block import DenseBlock
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.layers import RMSNorm, normal
from jaxpipe.deepseek.mla import Core
from jaxpipe.deepseek.mtp import MTPHead


class EmbeddingAndHead(nnx.Module):
    """Embedding, the layers without experts, last norm and output matrix, and the optional second head.

    Args:
      config: sizes.
      rngs: for the parameters, which are float32.
      core: attention of queries to keys and values.
      axis: the mesh axis over which the vocabulary's rows are spread, all its devices calling together, or None.
    """

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, core: Core = causal_attention, axis: str | None = None
    ) -> None:
        self.config, self.axis = config, axis
        self.embedding = nnx.Param(normal(rngs, (config.vocab, config.width), 50**2))
        for index in range(config.dense_layers):
            setattr(self, f"layer_{index}", DenseBlock(config, rngs, core))
        self.norm = RMSNorm(config.width)
        # Small logits: a new model guesses almost uniformly.
        self.output = nnx.Param(normal(rngs, (config.vocab, config.width), config.width * 25))
        if config.mtp:
            self.mtp = MTPHead(config, rngs, core)

    def embed(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """``int[B, T] -> [B, T, D]``, through the dense layers."""
        with jax.named_scope("embedding"):
            x = self._rows(tokens, dtype)
        for index in range(self.config.dense_layers):
            with jax.named_scope(f"layer_{index}"):
                block: DenseBlock = getattr(self, f"layer_{index}")
                x = jax.checkpoint(lambda x, block=block: block(x))(x) if self.config.remat == "layer" else block(x)
        return x

    def loss(self, y: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Mean cross-entropy over the unmasked targets, and the second head's or None; float32, in nats."""
        with jax.named_scope("head"):
            loss = self._cross_entropy(self.norm(y), targets, mask)
        if not self.config.mtp:
            return mean(loss, mask), None
        # Position t knows token t + 1, its target, and predicts t + 2; the last position has no such target.
        with jax.named_scope("mtp"):
            features = self.mtp(y, self._rows(targets, y.dtype))
            later = jnp.concatenate([mask[:, 1:] * mask[:, :-1], jnp.zeros_like(mask[:, :1])], 1)
            next_targets = jnp.concatenate([targets[:, 1:], targets[:, :1]], 1)
            second = self._cross_entropy(features, next_targets, later)
        return mean(loss, mask), mean(second, later)

    def losses(self, y: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each sequence the sum over its unmasked targets, and their number; float32 ``[B]``."""
        loss = self._cross_entropy(self.norm(y), targets, mask)
        return loss.sum(1), mask.sum(1)

    def _rows(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Tokens' embeddings."""
        if self.axis is None:
            return self.embedding[...][tokens].astype(dtype)
        return vocabulary.embed_tokens(self.embedding[...].astype(dtype), tokens, self.axis)

    def _cross_entropy(self, features: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        """``[B, T, D], int[B, T], [B, T] -> float32[B, T]``, zero where the mask is."""
        output = self.output[...].astype(features.dtype)
        if self.axis is not None:
            return vocabulary.cross_entropy(features, output, targets, self.axis) * mask
        logits = jnp.einsum("btd,vd->btv", features, output).astype(jnp.float32)
        # Optax's takes the target's logit by two gathers, and so by two scatters backwards.
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - picked) * mask


def mean(losses: jax.Array, mask: jax.Array) -> jax.Array:
    """Over the unmasked places; 0 without any."""
    return losses.sum() / jnp.maximum(mask.sum(), 1)
