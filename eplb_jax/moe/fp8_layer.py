"""The layer between its router and its result, with products in 8 bits: dispatch, experts, combine.

Tokens are quantised once, before they travel to devices or rows and for the shared experts, too; the gradient of the
result likewise. Barriers are where `eplb_jax.moe.layer` has them, and for its reasons.

Shapes: T tokens of this device, N tokens that it has received, k choices, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN
from eplb_jax.moe import exchange
from eplb_jax.moe.carried import (
    Carried,
    Products,
    Route,
    add_results,
    combine_results,
    dispatch_tokens,
    permute_tokens,
    return_after,
    scale_tokens,
    side_by_side,
    unpermute_results,
)
from eplb_jax.moe.dispatch import Capacities, plan_sends, sort_by_slot
from eplb_jax.moe.experts import ExpertParams
from eplb_jax.moe.fp8_experts import (
    ScaledExperts,
    ScaledWeights,
    apply_scaled_experts,
    quantise_experts,
    shared_first,
    shared_second,
)
from eplb_jax.moe.levels import Level
from eplb_jax.moe.permute import permute_each


class Ways(NamedTuple):
    """How tokens reach other devices; static.

    Attributes:
      levels: exchanges, the outermost first.
      axis: the mesh axis of the experts.
    """

    levels: tuple[Level, ...]
    axis: str


def scaled_layer(
    experts: ExpertParams | ScaledExperts,
    shared: ExpertParams | ScaledExperts | None,
    x: Float[Array, "T D"],
    slots: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    num_slots: int,
    capacities: Capacities,
    products: Products,
    route: Ways | None,
) -> tuple[Float[Array, "T D"], Int[Array, ""], Int[Array, ""]]:
    """Sends tokens through their experts and the shared ones.

    Args:
      experts, shared: by slot, this device's; None: there are no shared ones.
      x: bfloat16 or float32.
      slots, weights: of each choice, among the slots of all devices.
      num_slots: of this device.
      capacities: from `eplb_jax.make_capacities`.
      products: who makes them.
      route: how tokens reach other devices; None: all slots are here.

    Returns:
      The result in the dtype of x, how many choices were dropped, and how many blocks of operands are not finite.
    """
    tokens = scale_tokens(x, products)
    if route is None:
        results, dropped, bad = local_results(experts, tokens, slots, weights, num_slots, capacities, products)
        parts = [results]
        if shared is not None:
            with jax.named_scope("shared_expert"):
                act, w_out, more = _shared_first(shared, tokens, products)
                parts.append(shared_second(w_out, act, x.shape[0], x.dtype, products))
                bad = bad + more
        return add_results(tuple(parts), products), dropped, bad

    given = tokens, slots, weights, num_slots, capacities, products
    results, beside, dropped, bad = _remote(experts, shared, *given, route)
    with jax.named_scope("combine"):
        y = add_results((results,) if beside is None else (results, beside), products)
    return y, dropped, bad


def _remote(
    experts: ExpertParams | ScaledExperts,
    shared: ExpertParams | ScaledExperts | None,
    tokens: Carried,
    slots: jax.Array,
    weights: jax.Array,
    num_slots: int,
    capacities: Capacities,
    products: Products,
    ways: Ways,
) -> tuple[Carried, Carried | None, jax.Array, jax.Array]:
    """Tokens travel to their slots and back, level by level.

    Returns:
      Results of the routed experts and of the shared ones, how many choices were dropped, and how many blocks of
      operands are not finite.
    """
    level, *further = ways.levels
    route = Route(level.dispatcher, ways.axis)
    act = w_out = beside = more = None
    top_k = slots.shape[1]
    with jax.named_scope("dispatch"):
        sends = plan_sends(slots, level.size, level.slots, level.capacity)
        sent = permute_each(weights, sends.choices.reshape(-1), sends.entries).reshape(sends.slots.shape)
        rows = permute_tokens(tokens, sends.moves, products)
        rows, sent = return_after(dispatch_tokens(rows, sends.counts, route), sent)
        message = exchange.all_to_all_listed(sends.slots, sent, ways.axis, level.groups)
    if shared is not None:
        with jax.named_scope("shared_expert"):
            act, w_out, more = _shared_first(shared, tokens, products)
            rows, act = side_by_side(rows, act)
    slots_here, weights_here = (array.reshape(-1, top_k) for array in message)
    arrived = slots_here, weights_here, num_slots, capacities, products
    if further:
        results, _, dropped, bad = _remote(experts, None, rows, *arrived, Ways(tuple(further), ways.axis))
    else:
        results, dropped, bad = local_results(experts, rows, *arrived)
    if act is not None:
        results, act = side_by_side(results, act)
    with jax.named_scope("combine"):
        results = combine_results(results, sends.counts, route, products)
    if act is not None and w_out is not None:
        with jax.named_scope("shared_expert"):
            like = tokens.gradient
            results, beside = side_by_side(results, shared_second(w_out, act, like.shape[0], like.dtype, products))
    with jax.named_scope("combine"):
        results = unpermute_results(results, sends.moves, products)
    return results, beside, dropped + sends.dropped, bad if more is None else bad + more


def local_results(
    experts: ExpertParams | ScaledExperts,
    tokens: Carried,
    slots: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    num_slots: int,
    capacities: Capacities,
    products: Products,
) -> tuple[Carried, Int[Array, ""], Int[Array, ""]]:
    """`eplb_jax.local_experts` of tokens that are quantised: results, dropped choices, blocks that are not finite."""
    with jax.named_scope("permute"):
        found = sort_by_slot(slots, num_slots, capacities.rows, FP8_ALIGN)
        rows = permute_tokens(tokens, found.moves, products)
        weight = permute_each(weights, found.assignment, found.moves.rows)
    with jax.named_scope("experts"):
        results, bad = apply_scaled_experts(_scaled(experts, products), rows, weight, found.sizes, products)
    with jax.named_scope("unpermute"):
        return unpermute_results(results, found.moves, products), found.dropped, bad


def _scaled(experts: ExpertParams | ScaledExperts, products: Products) -> ScaledExperts:
    return experts if isinstance(experts, ScaledExperts) else quantise_experts(experts, products)


def _shared_first(
    shared: ExpertParams | ScaledExperts, tokens: Carried, products: Products
) -> tuple[Carried, ScaledWeights, Int[Array, ""]]:
    w_in, w_out = _scaled(shared, products)
    act, bad = shared_first(w_in, tokens, products)
    return act, w_out, bad
