"""Multi-token prediction: the layer whose features predict the token after the next one.

Shapes: B sequences, T tokens of each, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from eplb_jax import MoEStats
from jaxpipe.deepseek.block import MoEBlock
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.layers import RMSNorm, normal, use_whole
from jaxpipe.deepseek.mla import Core


class MTPLayer(nnx.Module):
    """Multi-token prediction's layer: features for the token after the next one.

    Args:
      config: sizes.
      rngs: for the parameters, which are float32.
      core: attention of queries to keys and values.
      axis: the mesh axis over which experts and the projection's rows are spread, or None.

    The model's last norm is here, too: what is projected is the features that the output matrix reads. So it is with
    published weights in github.com/vllm-project/vllm, model_executor/models/deepseek_v2.py and deepseek_mtp.py, and in
    github.com/sgl-project/sglang; the report leaves open what "the representation given by the main model" is.

    Source: the DeepSeek-V3 report, arXiv 2412.19437, 2.2.
    """

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, core: Core = causal_attention, axis: str | None = None
    ) -> None:
        self.axis = axis
        self.main_norm = RMSNorm(config.width, config.norm_eps)
        self.hidden_norm, self.embedding_norm = (RMSNorm(config.width, config.norm_eps) for _ in range(2))
        self.project = nnx.Param(normal(rngs, (2 * config.width, config.width), 2 * config.width))
        self.block = MoEBlock(config, rngs, core, axis)
        self.norm = RMSNorm(config.width, config.norm_eps)

    def __call__(
        self,
        y: jax.Array,
        known: jax.Array,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, MoEStats]:
        """The features so far, normalised, new ones and routing's statistics.

        Of features ``y`` and the next tokens' embeddings, ``[B, T, D]`` each, as both results are.
        Tokens outside ``mask``, ``bool[B, T]``, go to no routed expert; of ``segments`` see
        `jaxpipe.deepseek.causal_attention`.
        """

        def project(x: jax.Array, matrix: jax.Array) -> jax.Array:
            return x @ matrix.astype(x.dtype)

        y = self.main_norm(y)
        with jax.named_scope("project"):
            both = jnp.concatenate([self.hidden_norm(y), self.embedding_norm(known)], -1)
            x = use_whole(project, both, (self.project[...],), self.axis)
        features, stats = self.block(x, mask, segments)
        with jax.named_scope("project"):
            return y, self.norm(features), stats
