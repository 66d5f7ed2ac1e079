"""One layer of the workloads' model, and its parameters on a mesh.

Shapes: T tokens of a device, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from eplb_jax import (
    ExpertParams,
    MoEParams,
    RouterConfig,
    init_moe,
    local_experts,
    moe_layer,
    param_specs,
    route,
    router_logits,
)
from eplb_jax.moe.carried import Products
from eplb_jax.moe.dispatch import make_capacities
from eplb_jax.moe.experts import shared_in, shared_out
from eplb_jax.moe.fp8_experts import quantise_experts
from eplb_jax.moe.fp8_layer import scaled_layer
from jaxpipe.deepseek import MLAParams, apply_block, init_mla, keep_mla, rms_norm
from profiling.workloads.sizes import Sizes

AXIS = "ep"


class LayerParams(NamedTuple):
    """Of one layer; experts by slot."""

    attention: MLAParams
    moe: MoEParams


def init_layers(
    key: jax.Array, sizes: Sizes, workload: str, mesh: Mesh, dtype: jax.typing.DTypeLike
) -> tuple[LayerParams, ...]:
    """All layers' parameters on a mesh: every expert, or on one device those that it would hold of them.

    For inference in FP8 they are kept in 8 bits: `keep_layer`.

    Raises:
      ValueError: the mesh has more axes than `AXIS`; the experts are to be spread over fewer devices than it has.
    """
    spread, devices = sizes.expert_parallel[workload], mesh.devices.size
    if mesh.axis_names != (AXIS,):
        raise ValueError(f"the mesh has axes {mesh.axis_names}: a workload runs on one, {AXIS!r}")
    if devices > spread or spread % devices:
        raise ValueError(
            f"{devices} devices: {workload} spreads its experts over {spread}; take a number of devices that divides it"
        )
    experts = sizes.moe.router.num_experts
    held = experts // spread if devices == 1 else experts
    masters = held if devices == 1 else sizes.moe.masters
    routed = dataclasses.replace(sizes.moe, router=RouterConfig(held, 1, 1, 1), masters=masters)

    def layer(key: jax.Array) -> LayerParams:
        keys = jax.random.split(key, 3)
        moe = init_moe(keys[0], routed, dtype)
        router = jax.random.normal(keys[1], (sizes.width, experts), moe.router.dtype) * sizes.width**-0.5
        moe = moe._replace(router=router, bias=jnp.zeros(experts, router.dtype))
        made = LayerParams(init_mla(nnx.Rngs(keys[2]), sizes, dtype, scales=False), moe)
        return made if workload == "train" else keep_layer(made, sizes)

    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), layer_specs(sizes, workload)[0])
    return tuple(jax.jit(layer, out_shardings=placed)(key) for key in jax.random.split(key, sizes.layers))


def keep_layer(params: LayerParams, sizes: Sizes) -> LayerParams:
    """A layer's parameters as inference keeps them: in FP8 matrices are in 8 bits, quantised once."""
    if sizes.precision != "fp8":
        return params
    moe, arithmetic = params.moe, sizes.moe.recipe.arithmetic
    assert arithmetic is not None
    products = Products(arithmetic, sizes.moe.backend)

    def kept(experts: Any) -> Any:
        return None if experts is None else quantise_experts(experts, products, differentiable=False)

    moe = moe._replace(experts=kept(moe.experts), shared=kept(moe.shared))
    return LayerParams(keep_mla(params.attention), moe)


def layer_specs(sizes: Sizes, workload: str = "train") -> tuple[LayerParams, ...]:
    """How the parameters of `init_layers` lie on a mesh: experts over `AXIS`, all else whole."""
    specs = param_specs(sizes.moe, AXIS)
    if workload == "train" or sizes.precision != "fp8":
        attention = jax.eval_shape(lambda: init_mla(nnx.Rngs(0), sizes, scales=False))
        layer = LayerParams(jax.tree.map(lambda _: P(), attention), specs)
        return (layer,) * sizes.layers

    def kept() -> LayerParams:
        moe = init_moe(jax.random.key(0), sizes.moe)
        return keep_layer(LayerParams(init_mla(nnx.Rngs(0), sizes, scales=False), moe), sizes)

    found = jax.tree.map(lambda _: P(), jax.eval_shape(kept))
    experts = jax.tree.map(lambda _: P(AXIS), found.moe.experts)
    return (found._replace(moe=found.moe._replace(experts=experts)),) * sizes.layers


def apply_layer(
    params: LayerParams,
    x: Float[Array, "T D"],
    sizes: Sizes,
    attention: Callable[[MLAParams, jax.Array], tuple[jax.Array, Any]],
) -> tuple[Float[Array, "T D"], Any, Int[Array, ""]]:
    """Tokens of this device through one layer; within `jax.shard_map` over `AXIS`.

    Args:
      params: of the layer; this device's experts.
      x: its tokens.
      sizes: of the model.
      attention: of a layer, (params, normalised tokens) -> (tokens, what else it has to tell).

    Returns:
      The tokens, what else the attention told, and how many choices of experts were dropped for lack of capacity.
    """

    def experts(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        if jax.lax.axis_size(AXIS) == 1:
            return _apply_alone(params.moe, tokens, sizes)
        y, stats = moe_layer(params.moe, tokens, sizes.moe, axis=AXIS)
        return y, stats.dropped

    return apply_block(x, rms_norm, functools.partial(attention, params.attention), rms_norm, experts)


def _apply_alone(params: MoEParams, x: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """One device of many, without the others: its experts get as many rows as all devices together would send it.

    Tokens of this device stand for those of the others. Their choices among all experts go to those held here in
    turn, so that each gets what balanced routing gives it.
    """
    config = sizes.moe
    held = params.experts.w_in.shape[0]
    with jax.named_scope("router"):
        routing = route(router_logits(x, params.router), config.router, bias=params.bias)
    capacities = make_capacities(x.shape[0], config.router.top_k, 1, held, None)
    capacities = capacities._replace(rows=_rows(x.shape[0], sizes, held))
    if config.recipe.arithmetic is not None:
        operands = params.experts, params.shared, x, routing.experts % held, routing.weights, held, capacities
        y, dropped, _ = scaled_layer(*operands, Products(config.recipe.arithmetic, config.backend), None)
        return y, dropped
    y, dropped = local_experts(params.experts, x, routing.experts % held, routing.weights, held, capacities, config)
    if params.shared is None:
        return y, dropped
    assert isinstance(params.shared, ExpertParams)
    with jax.named_scope("shared_expert"):
        return y + shared_out(params.shared, shared_in(params.shared, x)), dropped


def _rows(tokens: int, sizes: Sizes, held: int) -> int:
    """Rows for choices of experts that may repeat a device's expert: all of them, and gaps."""
    return make_capacities(tokens * sizes.moe.router.top_k, 1, 1, held, None).rows
