"""Decode: one token of every request, in two microbatches that hide each other's all-to-all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpipe.deepseek import MLAParams, attend_cached
from profiling.workloads.layer import AXIS, LayerParams, apply_layer, layer_specs
from profiling.workloads.sizes import Sizes


def make_decode(sizes: Sizes, mesh: Mesh) -> Callable[..., Any]:
    """The jitted workload on a mesh; its caches are donated, so use the returned ones.

    Args:
      sizes: of the model.
      mesh: of one axis, `AXIS`.

    Returns:
      (layers' parameters, tokens [devices * requests, D], caches, lengths int32 [devices * requests]) -> (output
      [devices * requests, D], caches with the new tokens, choices dropped). The caches are, of every layer and each of
      the two microbatches, [devices * requests / 2, context, latent + rotary]; lengths are below the context.
    """

    def device(layers: tuple[LayerParams, ...], tokens: jax.Array, caches: Any, lengths: jax.Array) -> Any:
        microbatches, lengths_of = jnp.split(tokens, 2), jnp.split(lengths, 2)
        filled, dropped = [], jnp.int32(0)
        with jax.named_scope("F"):
            for i, layer in enumerate(layers):
                row = []
                for m, x in enumerate(microbatches):
                    with jax.named_scope(f"layer_{i}"), jax.named_scope(f"microbatch_{m}"):
                        attention = _attention(caches[i][m], lengths_of[m], sizes)
                        microbatches[m], cache, found = apply_layer(layer, x, sizes, attention)
                    row.append(cache)
                    dropped += found
                filled.append(tuple(row))
        return jnp.concatenate(microbatches), tuple(filled), jax.lax.psum(dropped, AXIS)

    body = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(layer_specs(sizes, "decode"), P(AXIS), P(AXIS), P(AXIS)),
        out_specs=(P(AXIS), P(AXIS), P()),
    )
    return jax.jit(body, donate_argnums=2)


def _attention(cache: jax.Array, lengths: jax.Array, sizes: Sizes) -> Callable[..., Any]:
    def attention(params: MLAParams, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return attend_cached(params, tokens, cache, lengths, sizes)

    return attention
