"""Rows in 8 bits on their way through the layer: quantised once in each direction, then moved as they are.

A cotangent has the dtype of what it belongs to, so numbers of 8 bits cannot have the gradient in 16 bits that is
theirs, nor a result in 16 bits one in 8. So what passes through the layer is `Carried`: rows, and beside them zeros of
the types of their gradient, which nothing reads and no compiled program makes. Their cotangent is the gradient.

T or N tokens, R rows sorted by slot, ep devices, C tokens from one device to another, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.kernels.recipe import RECIPES, Arithmetic
from eplb_jax.kernels.registry import Backend
from eplb_jax.kernels.scaled import ScaledRows
from eplb_jax.moe.dispatchers import Dispatcher
from eplb_jax.moe.permute import RowMap, permute_scaled, unpermute


class Carried(NamedTuple):
    """Rows that are of one type forward and of another backward.

    Tokens are `ScaledRows` whose gradient is an array of the dtype that they had; results are such an array whose
    gradient is `ScaledRows`.

    Attributes:
      value: the rows. Their cotangent means nothing.
      gradient: zeros of the types of the rows' gradient, which is their cotangent.
    """

    value: Any
    gradient: Any


@dataclasses.dataclass(frozen=True)
class Products:
    """Who makes products, and of what numbers; static.

    Attributes:
      arithmetic: of a `eplb_jax.kernels.recipe.Recipe`.
      backend: of `eplb_jax.MoEConfig`, for moved rows, too.
    """

    arithmetic: Arithmetic
    backend: Backend = "auto"


@dataclasses.dataclass(frozen=True)
class Route:
    """Between which devices rows travel, and how; static.

    Attributes:
      dispatcher: carries plain arrays, of which rows in 8 bits have two: numbers, as bytes, and scales.
      axis: the mesh axis of the experts.
    """

    dispatcher: Dispatcher
    axis: str


def scale_tokens(x: Float[Array, "T D"], products: Products) -> Carried:
    """Tokens as products read them; their gradient is in the dtype of x."""
    return _scale_tokens(x, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_tokens(x: jax.Array, products: Products) -> Carried:
    return Carried(products.arithmetic.rows(x, backend=products.backend), zeros_like(x))


_scale_tokens.defvjp(
    lambda x, products: (_scale_tokens(x, products), None),
    lambda products, _, ct: (ct.gradient,),
)


def permute_tokens(tokens: Carried, moves: RowMap, products: Products) -> Carried:
    """`permute_scaled` of tokens; gradients are added up as by `unpermute`."""
    return _permute_tokens(*same_axes_of(tokens, moves), products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _permute_tokens(tokens: Carried, moves: RowMap, products: Products) -> Carried:
    shape = moves.source.shape[0], tokens.gradient.shape[1]
    gradient, _ = same_axes(jnp.zeros(shape, tokens.gradient.dtype), moves.source)
    return Carried(permute_scaled(tokens.value, moves, backend=products.backend), gradient)


_permute_tokens.defvjp(
    lambda tokens, moves, products: (_permute_tokens(tokens, moves, products), moves),
    lambda products, moves, ct: (Carried(None, unpermute(ct.gradient, moves, backend=products.backend)), None),
)


def unpermute_results(results: Carried, moves: RowMap, products: Products) -> Carried:
    """`unpermute` of results; gradients are copied as by `permute_scaled`."""
    return _unpermute_results(*same_axes_of(results, moves), products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _unpermute_results(results: Carried, moves: RowMap, products: Products) -> Carried:
    value = unpermute(results.value, moves, backend=products.backend)
    return Carried(value, no_gradient(value, products))


_unpermute_results.defvjp(
    lambda results, moves, products: (_unpermute_results(results, moves, products), moves),
    lambda products, moves, ct: (Carried(None, permute_scaled(ct.gradient, moves, backend=products.backend)), None),
)


def dispatch_tokens(tokens: Carried, counts: Int[Array, " ep"], route: Route) -> Carried:
    """Tokens [ep * C, D] to the devices that they are for, in 8 bits; their gradients come back as they are."""
    here = jax.lax.axis_index(route.axis)
    tokens, counts, _ = same_axes_of(tokens, counts, here)
    return _dispatch_tokens(tokens, counts, route)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch_tokens(tokens: Carried, counts: jax.Array, route: Route) -> Carried:
    return Carried(_send_scaled(tokens.value, counts, route), zeros_like(tokens.gradient))


_dispatch_tokens.defvjp(
    lambda tokens, counts, route: (_dispatch_tokens(tokens, counts, route), counts),
    lambda route, counts, ct: (Carried(None, _send_plain(route.dispatcher.combine, ct.gradient, counts, route)), None),
)


def combine_results(results: Carried, counts: Int[Array, " ep"], route: Route, products: Products) -> Carried:
    """Results [ep * C, D] back to where `dispatch_tokens` took them from, as they are; gradients come in 8 bits."""
    here = jax.lax.axis_index(route.axis)
    results, counts, _ = same_axes_of(results, counts, here)
    return _combine_results(results, counts, route, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _combine_results(results: Carried, counts: jax.Array, route: Route, products: Products) -> Carried:
    value = _send_plain(route.dispatcher.combine, results.value, counts, route)
    return Carried(value, no_gradient(value, products))


_combine_results.defvjp(
    lambda results, counts, route, products: (_combine_results(results, counts, route, products), counts),
    lambda route, products, counts, ct: (Carried(None, _send_scaled(ct.gradient, counts, route)), None),
)


def _send_scaled(rows: ScaledRows, counts: jax.Array, route: Route) -> ScaledRows:
    """Numbers of 8 bits travel as they are: as other bytes they would be copied before and after."""
    parts = (rows.numbers, rows.scales.T)
    numbers, scales = (_send_plain(route.dispatcher.dispatch, part, counts, route) for part in parts)
    return ScaledRows(numbers, scales.T)


def _send_plain(send: Callable[..., jax.Array], rows: jax.Array, counts: jax.Array, route: Route) -> jax.Array:
    """An array by rows, for a recipe that leaves it as it is."""
    blocks = rows.reshape(counts.shape[0], -1, rows.shape[1])
    return send(blocks, counts, route.axis, RECIPES["bf16"]).reshape(rows.shape)


def add_results(results: tuple[Carried, ...], products: Products) -> Float[Array, "T D"]:
    """The sum of results; its gradient is quantised once for all of them."""
    return _add_results(same_axes_of(*results), products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _add_results(results: tuple[Carried, ...], products: Products) -> jax.Array:
    del products
    return functools.reduce(jnp.add, (each.value for each in results))


def _add_results_bwd(products: Products, like: tuple[jax.Array, ...], ct: jax.Array) -> tuple[Any]:
    gradient = products.arithmetic.gradient_rows(ct, backend=products.backend)
    return (tuple(Carried(None, gradient) for _ in like),)


_add_results.defvjp(
    lambda results, products: (_add_results(results, products), tuple(jnp.zeros(0) for _ in results)),
    _add_results_bwd,
)


@jax.custom_vjp
def side_by_side(first: Carried, second: Carried) -> tuple[Carried, Carried]:
    """A barrier between what makes these two and what reads either, forward and backward."""
    values = jax.lax.optimization_barrier((first.value, second.value))
    return Carried(values[0], first.gradient), Carried(values[1], second.gradient)


def _side_by_side_bwd(_: None, cts: tuple[Carried, Carried]) -> tuple[Carried, Carried]:
    first, second = jax.lax.optimization_barrier(tuple(ct.gradient for ct in cts))
    return Carried(None, first), Carried(None, second)


side_by_side.defvjp(lambda *both: (side_by_side(*both), None), _side_by_side_bwd)


@jax.custom_vjp
def return_after(tokens: Carried, sent: jax.Array) -> tuple[Carried, jax.Array]:
    """Returns both, and orders their gradients: that of tokens is sent when that of what was sent has arrived."""
    return tokens, sent


def _return_after_bwd(_: None, cts: tuple[Carried, jax.Array]) -> tuple[Carried, jax.Array]:
    gradient, sent = jax.lax.optimization_barrier((cts[0].gradient, cts[1]))
    return Carried(None, gradient), sent


return_after.defvjp(lambda *both: (both, None), _return_after_bwd)


def no_gradient(rows: Float[Array, "R D"], products: Products) -> ScaledRows:
    """Zeros of the types that the gradient of these results has."""
    types = jax.eval_shape(functools.partial(products.arithmetic.gradient_rows, backend=products.backend), rows)
    zeros = (jnp.zeros(leaf.shape, leaf.dtype) for leaf in types)
    return ScaledRows(*same_axes(*zeros, rows)[:2])


def zeros_like(x: jax.Array) -> jax.Array:
    """Zeros of the type of an array, over its mesh axes."""
    return same_axes(jnp.zeros(x.shape, x.dtype), x)[0]


def same_axes_of(*trees: Any) -> tuple[Any, ...]:
    """`same_axes` of all leaves of trees."""
    leaves, structure = jax.tree.flatten(trees)
    return jax.tree.unflatten(structure, same_axes(*leaves))
