"""Experts: their parameters, their working copies by slot, and what they compute.

E logical experts, P slots of all devices, S of one, D width, F hidden width of an expert.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eplb_jax.kernels import registry
from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.grouped_gemm import interface
from eplb_jax.kernels.grouped_gemm.interface import grouped_matmul
from eplb_jax.kernels.mesh_axis import same_axes, size_and_index
from eplb_jax.kernels.registry import Backend
from eplb_jax.moe.fetch import fetch, gather, plan_fetches
from eplb_jax.moe.pick import pick


class ExpertParams(NamedTuple):
    """SwiGLU experts, by logical expert (masters) or by slot (working copies).

    Attributes:
      w_in: gate and value side by side.
      w_out: back to the width.
    """

    w_in: Float[Array, "experts D FF"]
    w_out: Float[Array, "experts F D"]


def init_experts(key: jax.Array, num_experts: int, width: int, hidden: int, dtype: Any = jnp.float32) -> ExpertParams:
    """Normal values of variance one over the number of inputs.

    >>> init_experts(jax.random.key(0), 4, 8, 16).w_in.shape
    (4, 8, 32)
    """
    first, second = jax.random.split(key)
    w_in = jax.random.normal(first, (num_experts, width, 2 * hidden), dtype) * width**-0.5
    return ExpertParams(w_in, jax.random.normal(second, (num_experts, hidden, width), dtype) * hidden**-0.5)


def working_copies(
    masters: Any, phy2log: Int[Array | np.ndarray, " P"], axis: str | None = None, *, fetched: int | None = None
) -> Any:
    """Each of this device's slots gets a copy of its expert; the transpose sums the gradients of an expert's copies.

    Within `jax.shard_map` over ``axis`` each device has as many masters, in order, padding included. They are gathered
    in parts, so that no device holds more than about twice its own at a time; the transpose is a reduce-scatter of each
    part. With ``fetched``, only the experts that are in slots of other devices travel, in an all-to-all that carries so
    many from each device to each other; where a placement needs more for some pair of devices, all are gathered.

    Args:
      masters: a tree of arrays by logical expert, [E or more, ...], or this device's part of them.
      phy2log: the logical expert of each slot of all devices; slots of dead ones (-1) get zeros.
      axis: the mesh axis of the experts, or None: all are here.
      fetched: experts that one device may get from another, `eplb_jax.most_fetched`; None: all are gathered.

    Raises:
      ValueError: slots that do not divide over the devices; phy2log of several layers; an axis that is not bound;
        leaves of different numbers of experts; ``fetched`` below 1.

    >>> working_copies(jnp.array([1.0, 2.0, 3.0]), jnp.array([2, 0, 1, 2])).tolist()
    [3.0, 1.0, 2.0, 3.0]
    """
    if phy2log.ndim != 1:
        raise ValueError(f"phy2log has shape {phy2log.shape}: take one layer of it, placement.of_layer(i)")
    devices, here = size_and_index(axis)
    slots = phy2log.shape[0]
    if slots % devices:
        raise ValueError(f"{slots} slots do not divide over the {devices} devices of axis {axis!r}")
    if len({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(masters)}) != 1:
        raise ValueError(f"masters have shapes {jax.tree.map(jnp.shape, masters)}: all must hold as many experts")
    if fetched is not None and (isinstance(fetched, bool) or not isinstance(fetched, int) or fetched < 1):
        raise ValueError(f"fetched={fetched!r}: it must be an integer of at least 1, experts, or None to gather all")
    capacity = slots // devices
    mine = jax.lax.dynamic_slice_in_dim(jnp.asarray(phy2log, jnp.int32), here * capacity, capacity)

    if axis is None:
        return jax.tree.map(lambda owned: pick(*same_axes(owned, jnp.maximum(mine, 0), mine >= 0)), masters)
    rows = jax.tree.leaves(masters)[0].shape[0]
    if fetched is None or devices == 1 or fetched >= rows:
        return jax.tree.map(lambda owned: gather(owned, mine, devices, axis), masters)
    fetches = plan_fetches(jnp.asarray(phy2log, jnp.int32), here, devices, rows, fetched)
    return jax.lax.cond(
        fetches.most <= fetched,
        lambda masters: jax.tree.map(lambda owned: fetch(owned, fetches, axis), masters),
        lambda masters: jax.tree.map(lambda owned: gather(owned, mine, devices, axis), masters),
        masters,
    )


def swiglu(hidden: Float[Array, "rows FF"], weight: Float[Array, " rows"] | None = None) -> Float[Array, "rows F"]:
    """``silu(gate) * value * weight`` in float32 (float64 for float64), in the dtype of ``hidden``.

    The backward pass keeps the arguments alone and recomputes the rest.

    Source: arXiv 2002.05202.
    """
    if weight is None:
        weight = jnp.ones(hidden.shape[0], wide(hidden.dtype))
    return _swiglu(*same_axes(hidden, weight))


@jax.custom_vjp
def _swiglu(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    dtype = wide(hidden.dtype)
    gate, value = jnp.split(hidden.astype(dtype), 2, axis=-1)
    return (jax.nn.silu(gate) * value * weight.astype(dtype)[:, None]).astype(hidden.dtype)


def _swiglu_bwd(residuals: tuple[jax.Array, jax.Array], ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, weight = residuals
    dtype = wide(hidden.dtype)
    gate, value = jnp.split(hidden.astype(dtype), 2, axis=-1)
    share = jax.nn.sigmoid(gate)
    active = gate * share
    ct = ct.astype(dtype)
    weighted = ct * weight.astype(dtype)[:, None]
    slope = share * (1 + gate * (1 - share))
    hidden_ct = jnp.concatenate([weighted * value * slope, weighted * active], -1).astype(hidden.dtype)
    # A barrier makes XLA compute it once, and not in each of the products that read it.
    return jax.lax.optimization_barrier(hidden_ct), (ct * active * value).sum(-1).astype(weight.dtype)


_swiglu.defvjp(lambda hidden, weight: (_swiglu(hidden, weight), (hidden, weight)), _swiglu_bwd)


def apply_experts(
    params: ExpertParams,
    rows: Float[Array, "R D"],
    weight: Float[Array, " R"],
    sizes: Int[Array, " S"],
    backend: Backend = "auto",
) -> Float[Array, "R D"]:
    """Runs each row through its slot's expert, times its weight; rows of no slot come out unspecified.

    The weight multiplies the hidden activations, where it is cheap, and where its gradient needs nothing kept.
    """
    interface.check(rows, params.w_in, sizes, transpose_rhs=False)
    operands = *params, rows, weight, jnp.asarray(sizes, jnp.int32)
    w_in, w_out, *operands = same_axes(*map(jnp.asarray, operands))
    return _apply_experts(ExpertParams(w_in, w_out), *operands, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _apply_experts(params: ExpertParams, rows: Any, weight: Any, sizes: Any, backend: Backend) -> jax.Array:
    return _apply_experts_fwd(params, rows, weight, sizes, backend)[0]


def _apply_experts_fwd(params: ExpertParams, rows: Any, weight: Any, sizes: Any, backend: Backend) -> tuple[Any, Any]:
    hidden = grouped_matmul(rows, params.w_in, sizes, backend=backend)
    out = grouped_matmul(swiglu(hidden, weight), params.w_out, sizes, backend=backend)
    return out, (params, rows, hidden, weight, sizes)


def _apply_experts_bwd(backend: Backend, residuals: Any, ct: jax.Array) -> tuple[Any, ...]:
    """Recomputes the gated activations beside the gradients; the two products of the weights share nothing."""
    params, rows, hidden, weight, sizes = residuals
    transposed = functools.partial(grouped_matmul, group_sizes=sizes, backend=backend, transpose_rhs=True)
    gates = "xla" if backend == "xla" else "auto"  # "mosaic" insists on the products alone, which take more widths
    hidden_ct, act, weight_ct = gated_backward(hidden, weight, transposed(ct, params.w_out), gates)

    def outer(lhs: jax.Array, dout: jax.Array, rhs: jax.Array) -> jax.Array:
        return interface.outer(lhs, dout, sizes, interface.choose(lhs, rhs, backend))

    params_ct = ExpertParams(outer(rows, hidden_ct, params.w_in), outer(act, ct, params.w_out))
    return params_ct, transposed(hidden_ct, params.w_in), weight_ct, None


_apply_experts.defvjp(_apply_experts_fwd, _apply_experts_bwd)


def gated_backward(
    hidden: Float[Array, "R FF"], weight: Float[Array, " R"], ct: Float[Array, "R F"], backend: Backend = "auto"
) -> tuple[Float[Array, "R FF"], Float[Array, "R F"], Float[Array, " R"]]:
    """The gradients of `swiglu`'s arguments, and between them its result again.

    Args:
      hidden, weight: its arguments.
      ct: the gradient of its result.
      backend: "auto" takes our own kernel for Hopper GPUs, `eplb_jax.kernels.swiglu`, where it can, and else "xla", as
        in `eplb_jax.moe.permute.permute`.

    Raises:
      ValueError: "mosaic" for what it cannot do.
    """
    chosen = registry.choose("gate_gradient", backend, hidden)
    return registry.dispatch(chosen, "gated_backward", gated_backward_by_xla, hidden, weight, ct)


def gated_backward_by_xla(
    hidden: Float[Array, "R FF"], weight: Float[Array, " R"], ct: Float[Array, "R F"]
) -> tuple[Float[Array, "R FF"], Float[Array, "R F"], Float[Array, " R"]]:
    """`gated_backward` for every platform and dtype."""
    hidden_ct, weight_ct = _swiglu_bwd((hidden, weight), ct)
    return hidden_ct, _swiglu(hidden, weight), weight_ct


def shared_in(params: ExpertParams, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
    """The hidden activations of the experts that every token goes to, [1, ...]: several side by side are one."""
    return swiglu(jnp.matmul(x, params.w_in[0]))


def shared_out(params: ExpertParams, hidden: Float[Array, "T F"]) -> Float[Array, "T D"]:
    """Projects what `shared_in` made back to the width."""
    return jnp.matmul(hidden, params.w_out[0])
