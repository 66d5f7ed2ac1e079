"""Training: the forward of one microbatch overlapped with the backward of another, the body of DualPipe.

In every pair the forward of the next microbatch and both halves of the backward of the one before stand in one basic
block and depend on nothing of each other, so that a scheduler may hide the all-to-all of one behind the other's
products. Pipeline messages are left out, as in DeepSeek's published profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpipe.deepseek import MLAParams, attend
from jaxpipe.inputs import is_spec
from jaxpipe.stage import split_stage
from profiling.workloads.layer import AXIS, LayerParams, apply_layer, layer_specs
from profiling.workloads.sizes import Sizes


def make_train(sizes: Sizes, mesh: Mesh, pairs: int = 2) -> Callable[..., Any]:
    """The jitted workload on a mesh.

    Args:
      sizes: of the model.
      mesh: of one axis, `AXIS`.
      pairs: how many overlapped pairs one call runs, after a first forward.

    Returns:
      (layers' parameters, microbatches [pairs + 1, devices * sequence, D]) -> (gradients, choices dropped). The
      gradients are float32 sums over the pairs, of half the squared output.

    Raises:
      ValueError: no pair.
    """
    if pairs < 1:
        raise ValueError(f"pairs={pairs}: at least one forward must meet a backward")

    def attention(params: MLAParams, x: jax.Array) -> tuple[jax.Array, None]:
        return attend(params, x[None], sizes)[0][0], None

    def stage(layers: tuple[LayerParams, ...], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        dropped = jnp.int32(0)
        for i, layer in enumerate(layers):
            with jax.named_scope(f"layer_{i}"):
                x, _, found = apply_layer(layer, x, sizes, attention)
            dropped += found
        return x, dropped

    def device(layers: tuple[LayerParams, ...], x: jax.Array) -> Any:
        split = split_stage(stage, layers, x[0], has_aux=True)
        with jax.named_scope("prepare"):
            prepared = split.prepare(layers)
            y, dropped, kept = split.forward(prepared, x[0])
            grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), layers)

        def pair(carry: Any, x: jax.Array) -> tuple[Any, None]:
            y, dropped, kept, grads = carry
            with jax.named_scope("F"):
                next_y, found, next_kept = split.forward(prepared, x)
            with jax.named_scope("I"):
                ct, crossing = split.backward_input(prepared, kept, y)
            with jax.named_scope("W"):
                ct_layers = split.backward_weight(prepared, kept.weight, crossing)
                grads = jax.tree.map(lambda total, ct: total + ct.astype(jnp.float32), grads, ct_layers)
            # Nobody waits for the input's gradient here, but a pipeline's neighbour would.
            next_y, _ = jax.lax.optimization_barrier((next_y, ct))
            return (next_y, dropped + found, next_kept, grads), None

        (_, dropped, _, grads), _ = jax.lax.scan(pair, (y, dropped, kept, grads), x[1:])
        with jax.named_scope("reduce"):
            return jax.tree.map(_sum_replicated, specs, grads, is_leaf=is_spec), jax.lax.psum(dropped, AXIS)

    specs = layer_specs(sizes)
    body = jax.shard_map(device, mesh=mesh, in_specs=(specs, P(None, AXIS)), out_specs=(specs, P()), check_vma=False)
    return jax.jit(body)


def _sum_replicated(spec: Any, grad: jax.Array) -> jax.Array:
    return grad if AXIS in spec else jax.lax.psum(grad, AXIS)
