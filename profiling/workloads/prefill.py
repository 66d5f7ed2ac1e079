"""Prefill: the prompts of a device in two microbatches, whose attention and experts overlap each other's all-to-all.

Either each microbatch has half of the prompts, and they are independent, or half of every prompt: the second then
attends to the first's tokens too, and depends on it in attention alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpipe.deepseek import MLAParams, attend
from profiling.workloads.layer import AXIS, LayerParams, apply_layer, layer_specs
from profiling.workloads.sizes import Sizes


def make_prefill(sizes: Sizes, mesh: Mesh, *, split_prompts: bool = False) -> Callable[..., Any]:
    """The jitted workload on a mesh.

    Args:
      sizes: of the model.
      mesh: of one axis, `AXIS`.
      split_prompts: whether a microbatch has half of every prompt, instead of half of the prompts.

    Returns:
      (layers' parameters, prompts [devices * prompts, prompt, D]) -> (output [devices * prompts, prompt, D], caches of
      every layer [devices * prompts, prompt, latent + rotary], choices dropped).

    Raises:
      ValueError: prompts of an odd number of tokens that are to be split.
    """
    if split_prompts and sizes.prompt % 2:
        raise ValueError(f"prompts of {sizes.prompt} tokens do not split into two equal halves")
    axis = 1 if split_prompts else 0

    def device(layers: tuple[LayerParams, ...], prompts: jax.Array) -> Any:
        microbatches = jnp.split(prompts, 2, axis)
        caches, dropped = [], jnp.int32(0)
        with jax.named_scope("F"):
            for i, layer in enumerate(layers):
                seen: list[jax.Array] = []
                for m, x in enumerate(microbatches):
                    before = seen[0] if split_prompts and m else None
                    with jax.named_scope(f"layer_{i}"), jax.named_scope(f"microbatch_{m}"):
                        y, new, found = apply_layer(
                            layer, x.reshape(-1, sizes.width), sizes, _attention(x.shape, sizes, before)
                        )
                    microbatches[m] = y.reshape(x.shape)
                    seen.append(new)
                    dropped += found
                caches.append(jnp.concatenate(seen, axis))
        return jnp.concatenate(microbatches, axis), tuple(caches), jax.lax.psum(dropped, AXIS)

    body = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(layer_specs(sizes, "prefill"), P(AXIS)),
        out_specs=(P(AXIS), P(AXIS), P()),
    )
    return jax.jit(body)


def _attention(shape: tuple[int, ...], sizes: Sizes, before: jax.Array | None) -> Callable[..., Any]:
    def attention(params: MLAParams, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, new = attend(params, tokens.reshape(shape), sizes, before)
        return y.reshape(tokens.shape), new.rows()

    return attention
