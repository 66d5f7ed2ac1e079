"""The mixture-of-experts layer as Flax modules.

Both hold masters by logical expert, [num_masters, ...], or within `jax.shard_map` over the experts' axis this device's
part of them, and the placement as arrays beside the parameters: changing its values compiles nothing again. Within a
pipeline stage the working copies depend on parameters alone, so they are made once a step; the gradients of copies are
summed over microbatches where they are, and return to the masters once a step.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eplb_jax._jax import Tracer
from eplb_jax.kernels.mesh_axis import is_bound
from eplb_jax.moe.experts import ExpertParams
from eplb_jax.moe.layer import MoEConfig, MoEParams, MoEStats, init_moe, moe_layer, working_copies_for
from eplb_jax.plan.placement import Placement


class RouterBias(nnx.Variable):
    """The selection bias, which `eplb_jax.moe.router.update_bias` changes.

    No ``nnx.Param``, so that neither gradients nor an optimizer's weight decay reach it. Within a pipeline it travels
    with the parameters of its stage.
    """

    pipeline_parameter = True
    """It travels with parameters; see `jaxpipe.flax.nnx_function`."""


class PlacementParam(nnx.Variable):
    """An integer array of the placement, which no gradient and no optimizer touches; as `RouterBias`."""

    pipeline_parameter = True


class MoE(nnx.Module):
    """A mixture-of-experts layer in Flax NNX.

    ``module(x) -> (y, stats)`` for x ``[tokens, width]`` or ``[batch, sequence, width]``, one sequence a row of the
    batch. Computes in x's dtype, except the router.

    Args:
      config: sizes and choices.
      rngs: for the parameters.
      axis: the mesh axis of the experts, within `jax.shard_map`; None: all experts are on one device. A module made
        outside of it holds all masters, ``[num_masters, ...]``; one made inside, this device's. The experts' parameters
        are annotated with it, as by `nnx.with_partitioning`.
      placement: of this layer, `Placement.of_layer`; None: slot i holds expert i, until `set_placement`.
      dtype: of the parameters.

    >>> from eplb_jax.moe.router import RouterConfig
    >>> layer = MoE(MoEConfig(width=8, hidden=4, router=RouterConfig(4, 2, 1, 1)), nnx.Rngs(0))
    >>> y, stats = layer(jnp.ones((2, 3, 8)))
    >>> y.shape, int(stats.dropped)
    ((2, 3, 8), 0)
    """

    def __init__(
        self,
        config: MoEConfig,
        rngs: nnx.Rngs,
        *,
        axis: str | None = None,
        placement: Placement | None = None,
        dtype: Any = jnp.float32,
    ):
        params = init_moe(rngs.params(), config, dtype, axis=axis)
        assert params.bias is not None
        self.config, self.axis = config, axis
        self.router = nnx.Param(params.router)
        self.bias = RouterBias(params.bias)
        # For whoever places the parameters: which dimension `axis` divides, and that the layer takes its part of them.
        rows = {} if axis is None else {"out_sharding": (axis,), "eager_sharding": False, "by_hand": True}
        self.w_in, self.w_out = (nnx.Param(leaf, **rows) for leaf in params.experts)
        if params.shared is not None:
            self.shared_in, self.shared_out = nnx.Param(params.shared.w_in), nnx.Param(params.shared.w_out)
        self.redundant = False
        if placement is not None:
            self.set_placement(placement)

    def set_placement(self, placement: Placement) -> None:
        """Another placement of one layer; arrays of the same shapes compile nothing again (`Placement.padded`).

        A module that had none gets one, and with it another structure. Whether the sizes are those of this layer and
        of its devices is for the call to say.

        Raises:
          ValueError: arrays of this layer's experts that contradict each other, as far as their values are known here.
        """
        _check_values(placement, self.config.router.num_experts)
        arrays = (PlacementParam(jnp.asarray(array, jnp.int32)) for array in placement)
        self.phy2log, self.log2phy, self.logcnt = arrays
        self.redundant = True

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, MoEStats]:
        """``[tokens, D]`` or ``[batch, sequence, D]`` to the same shape, and statistics; mask without the last axis."""
        placement = shared = None
        if self.redundant:
            placement = Placement(self.phy2log[...], self.log2phy[...], self.logcnt[...])
        if self.config.num_shared:
            shared = ExpertParams(self.shared_in[...], self.shared_out[...])
        experts = ExpertParams(self.w_in[...], self.w_out[...])
        params = MoEParams(self.router[...], self.bias[...], experts, shared)
        return _apply(params, x, mask, self.config, placement, self.axis)


class LinenMoE(nn.Module):
    """`MoE` in Flax Linen: ``module.apply(variables, x, placement) -> (y, stats)``.

    Attributes:
      config: sizes and choices.
      axis: the mesh axis of the experts, bound by a `jax.shard_map` around ``apply``, or None. ``init`` makes all
        masters outside of one, to be sharded by rows over the axis, and this device's rows of the same ones inside.
      param_dtype: of the parameters.

    >>> from eplb_jax.moe.router import RouterConfig
    >>> layer = LinenMoE(MoEConfig(width=8, hidden=4, router=RouterConfig(4, 2, 1, 1)))
    >>> variables = layer.init(jax.random.key(0), jnp.ones((6, 8)))
    >>> sorted(variables["params"])
    ['bias', 'router', 'shared_in', 'shared_out', 'w_in', 'w_out']
    """

    config: MoEConfig
    axis: str | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, placement: Placement | None = None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, MoEStats]:
        """As `MoE`, with the placement as an argument."""
        made: MoEParams | None = None

        def make(key: jax.Array, pick: Any) -> jax.Array:
            nonlocal made
            made = init_moe(key, self.config, self.param_dtype, axis=self.axis) if made is None else made
            return pick(made)

        shared = None
        experts = ExpertParams(
            self.param("w_in", make, lambda p: p.experts.w_in), self.param("w_out", make, lambda p: p.experts.w_out)
        )
        if self.config.num_shared:
            shared = ExpertParams(
                self.param("shared_in", make, lambda p: p.shared.w_in),
                self.param("shared_out", make, lambda p: p.shared.w_out),
            )
        router, bias = self.param("router", make, lambda p: p.router), self.param("bias", make, lambda p: p.bias)
        whole = self.is_initializing() and self.axis is not None and not is_bound(self.axis)
        axis = None if whole else self.axis
        return _apply(MoEParams(router, bias, experts, shared), x, mask, self.config, placement, axis)


def _check_values(placement: Placement, experts: int) -> None:
    """Raises ValueError if a layer's placement of as many experts contradicts itself; traced arrays tell nothing."""
    arrays = list(placement)
    known = all(not isinstance(a, Tracer) and getattr(a, "is_fully_addressable", True) for a in arrays)
    if not known or arrays[0].ndim != 1 or arrays[2].shape != (experts,):
        return
    phy2log, log2phy, logcnt = (np.asarray(array)[None] for array in arrays)
    if log2phy.max(initial=-1) >= phy2log.shape[1]:
        raise ValueError(f"log2phy lists slot {log2phy.max()}, and phy2log has {phy2log.shape[1]} slots")
    Placement(phy2log, log2phy, logcnt).check(1)


def _apply(
    params: MoEParams,
    x: jax.Array,
    mask: jax.Array | None,
    config: MoEConfig,
    placement: Placement | None,
    axis: str | None,
) -> tuple[jax.Array, MoEStats]:
    """The layer with masters as experts, in x's dtype, and sequences joined."""
    if x.ndim not in (2, 3):
        raise ValueError(f"x has shape {x.shape}: it must be [tokens, width] or [batch, sequence, width]")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask has shape {mask.shape}: it must be {x.shape[:-1]}, one for each token")
    experts, shared = jax.tree.map(lambda leaf: leaf.astype(x.dtype), (params.experts, params.shared))
    if placement is not None:
        experts = working_copies_for(experts, placement.phy2log, config, axis)
    y, stats = moe_layer(
        params._replace(experts=experts, shared=shared),
        x.reshape(-1, x.shape[-1]),
        config,
        placement=placement,
        axis=axis,
        sequences=x.shape[0] if x.ndim == 3 else 1,
        mask=None if mask is None else mask.reshape(-1),
    )
    return y.reshape(x.shape), stats
