"""What stands before the layers and after them: embedding, last norm, output matrix and losses.

Shapes: B sequences, T tokens of each, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eplb_jax.kernels.dtypes import wide
from jaxpipe import vocabulary
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.layers import RMSNorm, normal


class EmbeddingAndHead(nnx.Module):
    """Embedding, last norm and output matrix; with multi-token prediction its layer has the norm.

    Args:
      config: sizes.
      rngs: for the parameters, which are float32.
      axis: the mesh axis over which the vocabulary's rows are spread, all its devices calling together, or None.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, axis: str | None = None) -> None:
        self.config, self.axis = config, axis
        self.embedding = nnx.Param(normal(rngs, (config.vocab, config.width), 50**2))
        self.norm = None if config.mtp else RMSNorm(config.width, config.norm_eps)
        if not config.tied:
            # Small logits: a new model guesses almost uniformly.
            self.output = nnx.Param(normal(rngs, (config.vocab, config.width), config.width * 25))

    @property
    def matrix(self) -> jax.Array:
        """The output matrix ``[V, D]``: one of its own, or the embedding where both are tied."""
        return (self.embedding if self.config.tied else self.output)[...]

    def embed(self, tokens: jax.Array, dtype: Any, columns: str | None = None) -> jax.Array:
        """``int[B, T] -> [B, T, D]``.

        Args:
          tokens: this device's.
          dtype: of the result.
          columns: the mesh axis whose devices keep some of the table's columns each, and have tokens of their own;
            None: this one has all.
        """
        with jax.named_scope("embedding"):
            if self.axis is not None:
                return vocabulary.embed_tokens(self.embedding[...].astype(dtype), tokens, self.axis)
            if columns is None:
                return self.embedding[...][tokens].astype(dtype)
            parts = self.embedding[...][jax.lax.all_gather(tokens, columns)].astype(dtype)
            return jax.lax.all_to_all(parts, columns, 0, parts.ndim - 1, tiled=True)[0]

    def loss(
        self, y: jax.Array, features: jax.Array | None, targets: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Mean cross-entropy over the unmasked targets, and that of the targets after them; float32, in nats.

        Args:
          y: features of the model's last layer, which this normalises unless multi-token prediction has.
          features: those of multi-token prediction, normalised; None: there is no second loss.
          targets, mask: ``[B, T]``.
        """
        with jax.named_scope("head"):
            loss = self._cross_entropy(self._normal(y), targets, mask)
        if features is None:
            return mean(loss, mask), None
        # Position t knows token t + 1, its target, and predicts t + 2; the last position has no such target.
        with jax.named_scope("mtp"):
            later = jnp.concatenate([mask[:, 1:] * mask[:, :-1], jnp.zeros_like(mask[:, :1])], 1)
            next_targets = jnp.concatenate([targets[:, 1:], targets[:, :1]], 1)
            second = self._cross_entropy(features, next_targets, later)
        return mean(loss, mask), mean(second, later)

    def losses(self, y: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each sequence the sum over its unmasked targets, and their number; float32 ``[B]``."""
        loss = self._cross_entropy(self._normal(y), targets, mask)
        return loss.sum(1), mask.sum(1)

    def logits(self, y: jax.Array) -> jax.Array:
        """Of features of the last layer, ``[..., D] -> float32[..., V]`` (float64 of float64), with no axis alone."""
        if self.axis is not None:
            raise ValueError(f"the vocabulary is spread over axis {self.axis!r}: take EmbeddingAndHead(..., axis=None)")
        with jax.named_scope("head"):
            made = jnp.einsum("...d,vd->...v", self._normal(y), self.matrix.astype(y.dtype))
            return made.astype(wide(made.dtype))

    def _normal(self, y: jax.Array) -> jax.Array:
        return y if self.norm is None else self.norm(y)

    def _cross_entropy(self, features: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        """``[B, T, D], int[B, T], [B, T] -> float32[B, T]``, zero where the mask is; float64 of float64."""
        output = self.matrix.astype(features.dtype)
        if self.axis is not None:
            return vocabulary.cross_entropy(features, output, targets, self.axis) * mask
        return _losses(features, output, targets) * mask


@jax.custom_vjp
def _losses(features: jax.Array, output: jax.Array, targets: jax.Array) -> jax.Array:
    """``-log softmax(features @ output.T)[target]``: ``[B, T, D], [V, D], int[B, T] -> float32[B, T]``.

    Logits are kept in the features' dtype, and read twice forwards and once backwards; derived step by step they would
    be written in float32 and scattered into.
    """
    return _losses_forward(features, output, targets)[0]


def _losses_forward(features: jax.Array, output: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
    logits = jnp.einsum("btd,vd->btv", features, output)
    normaliser = jax.nn.logsumexp(logits.astype(wide(logits.dtype)), -1)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0].astype(normaliser.dtype)
    return normaliser - picked, (features, output, targets, logits, normaliser)


def _losses_backward(kept: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    features, output, targets, logits, normaliser = kept
    chances = jnp.exp(logits.astype(normaliser.dtype) - normaliser[..., None])
    targets = jnp.where(targets < 0, targets + output.shape[0], targets)  # as the forward pass picks them
    hit = targets[..., None] == jnp.arange(output.shape[0], dtype=targets.dtype)
    by_logit = (cotangent[..., None] * (chances - hit.astype(chances.dtype))).astype(logits.dtype)
    by_features = jnp.einsum("btv,vd->btd", by_logit, output)
    return by_features, jnp.einsum("btv,btd->vd", by_logit, features), None


_losses.defvjp(_losses_forward, _losses_backward)


def mean(losses: jax.Array, mask: jax.Array) -> jax.Array:
    """Over the unmasked places; 0 without any."""
    return losses.sum() / jnp.maximum(mask.sum(), 1)
