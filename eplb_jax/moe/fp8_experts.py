"""Experts whose products are made of numbers of 8 bits: what they are, and what they compute of what is `Carried`.

E logical experts, S slots of this device, T tokens, R rows sorted by slot, D width, F hidden width of an expert.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN, used_rows, valid_rows
from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.kernels.scaled import ScaledMatrices, ScaledRows, count_not_finite, in_whole_blocks
from eplb_jax.moe.carried import Carried, Products, no_gradient, same_axes_of, zeros_like
from eplb_jax.moe.experts import ExpertParams, working_copies


class ScaledWeights(NamedTuple):
    """One matrix of each expert in 8 bits, [S, K, N].

    Attributes:
      forward: for the product with rows of K numbers, [S, N, K].
      backward: for its input gradient, [S, K, N].
      gradient: zeros of the shape and dtype of the matrices that these were made of, whose cotangent is their gradient;
        None where none is wanted.
    """

    forward: ScaledMatrices
    backward: ScaledMatrices
    gradient: Float[Array, "S K N"] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrices."""
        return self.backward.numbers.shape


class ScaledExperts(NamedTuple):
    """`eplb_jax.ExpertParams` in 8 bits."""

    w_in: ScaledWeights
    w_out: ScaledWeights


def quantise_experts(params: ExpertParams, products: Products, *, differentiable: bool = True) -> ScaledExperts:
    """Both matrices of each expert in both layouts.

    Within a pipeline stage this depends on parameters alone, and so is done once a step.

    Args:
      params: bfloat16 or float32.
      products: how.
      differentiable: False makes nothing for gradients: for experts that are kept, as for inference.

    Raises:
      ValueError: sides that are no multiples of 128; another dtype.

    >>> from eplb_jax.kernels.recipe import RECIPES
    >>> params = ExpertParams(jnp.ones((2, 128, 512)), jnp.ones((2, 256, 128)))
    >>> quantise_experts(params, Products(RECIPES["fp8"].arithmetic)).w_in.forward.numbers.shape
    (2, 512, 128)
    """
    if not differentiable:
        return ScaledExperts(*(_quantised(w, products)._replace(gradient=None) for w in params))
    made: Any = [_quantise(w, products) for w in params]
    return ScaledExperts(*made)


def _quantised(w: jax.Array, products: Products) -> ScaledWeights:
    forward, backward = products.arithmetic.weights(w, backend=products.backend)
    return ScaledWeights(forward, backward, zeros_like(w))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _quantise(w: jax.Array, products: Products) -> ScaledWeights:
    return _quantised(w, products)


_quantise.defvjp(
    lambda w, products: (_quantised(w, products), None),
    lambda products, _, ct: (ct.gradient,),
)


def scaled_working_copies(
    masters: ExpertParams,
    phy2log: Int[Array | np.ndarray, " P"],
    products: Products,
    axis: str | None = None,
    *,
    fetched: int | None = None,
) -> ScaledExperts:
    """`eplb_jax.working_copies` of experts that are quantised first: the same numbers, and fewer bytes to gather.

    Args:
      masters, phy2log, axis, fetched: as there; masters in bfloat16 or float32.
      products: how they are quantised.

    Returns:
      This device's slots. The gradients of an expert's copies are summed, in the dtype of the masters.

    Raises:
      ValueError: as there and `quantise_experts`.
    """
    found: Any = [_copies(w, jnp.asarray(phy2log, jnp.int32), products, axis, fetched) for w in masters]
    return ScaledExperts(*found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _copies(
    w: jax.Array, phy2log: jax.Array, products: Products, axis: str | None, fetched: int | None
) -> ScaledWeights:
    return _copies_fwd(w, phy2log, products, axis, fetched)[0]


def _copies_fwd(
    w: jax.Array, phy2log: jax.Array, products: Products, axis: str | None, fetched: int | None
) -> tuple[Any, Any]:
    """One layout travels, as plain bytes; the other is made of it on arrival."""
    _, backward = products.arithmetic.weights(w, backend=products.backend)
    dtype = backward.numbers.dtype
    plain = backward._replace(numbers=jax.lax.bitcast_convert_type(backward.numbers, jnp.uint8))
    found = working_copies(plain, phy2log, axis, fetched=fetched)
    backward = found._replace(numbers=jax.lax.bitcast_convert_type(found.numbers, dtype))
    gradient, _ = same_axes(jnp.zeros(backward.numbers.shape, w.dtype), backward.scales)
    return ScaledWeights(backward.transposed(), backward, gradient), (phy2log, _shape_of(w))


def _copies_bwd(
    products: Products, axis: str | None, fetched: int | None, residuals: Any, ct: ScaledWeights
) -> tuple[Any, None]:
    phy2log, like = residuals
    masters, _ = same_axes(jnp.zeros((like.shape[0], *ct.shape[1:]), like.dtype), like)
    _, pull = jax.vjp(lambda masters: working_copies(masters, phy2log, axis, fetched=fetched), masters)
    return pull(ct.gradient)[0], None


_copies.defvjp(_copies_fwd, _copies_bwd)


def apply_scaled_experts(
    experts: ScaledExperts,
    rows: Carried,
    weight: Float[Array, " R"],
    sizes: Int[Array, " S"],
    products: Products,
) -> tuple[Carried, Int[Array, ""]]:
    """`eplb_jax.moe.experts.apply_experts` in 8 bits; rows of no slot may hold anything and come out unspecified.

    What is kept for the backward pass: the rows, and the input of the gate, in 8 bits. Gradients of the result come in
    8 bits; the backward pass quantises the gate's gradient alone, once.

    Args:
      experts: by slot.
      rows: `ScaledRows` [R, D], groups at multiples of 128.
      weight: of each row, float32.
      sizes: rows of each slot; int32.
      products: who makes them.

    Returns:
      Rows [R, D] in the dtype of the gradient of ``rows``, whose own gradient is `ScaledRows`; and how many blocks of
      the operands of products are not finite.
    """
    return _apply(*same_axes_of(experts, rows, weight, jnp.asarray(sizes, jnp.int32)), products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _apply(
    experts: ScaledExperts, rows: Carried, weight: jax.Array, sizes: jax.Array, products: Products
) -> tuple[Carried, jax.Array]:
    return _apply_fwd(experts, rows, weight, sizes, products)[0]


def _apply_fwd(
    experts: ScaledExperts, rows: Carried, weight: jax.Array, sizes: jax.Array, products: Products
) -> tuple[Any, Any]:
    act, hidden = _first(experts.w_in, rows.value, weight, sizes, products)
    y = _second(experts.w_out, act, sizes, rows.gradient.dtype, products)
    bad = _count(sizes, rows.value, hidden, act) + _count_weights(experts)
    kept = (_without_forward(experts), rows.value, hidden, weight, sizes, jnp.zeros(0, rows.gradient.dtype))
    return (Carried(y, no_gradient(y, products)), bad), kept


def _apply_bwd(products: Products, residuals: Any, cts: tuple[Carried, Any]) -> tuple[Any, ...]:
    """The two products of input gradients, and between them the gate's; the two of weight gradients wait for no one."""
    (w_in, w_out), rows, hidden, weight, sizes, like = residuals
    dy = cts[0].gradient
    valid = valid_rows(sizes, rows.numbers.shape[0])
    matmul, outer, columns = (
        functools.partial(getattr(products.arithmetic, name), backend=products.backend)
        for name in ("matmul", "outer", "columns")
    )
    act_ct = matmul(dy, w_out.backward, sizes, dtype=jnp.bfloat16)
    gate = products.arithmetic.gate_backward(hidden, weight, act_ct, valid, backend=products.backend)
    dx = matmul(gate.hidden, w_in.backward, sizes, dtype=like.dtype)

    w_in_ct = w_out_ct = None
    if w_in.gradient is not None:
        w_in_ct = outer(columns(rows, valid), gate.hidden_columns, sizes, dtype=w_in.gradient.dtype)
    if w_out.gradient is not None:
        w_out_ct = outer(gate.act_columns, columns(dy, valid), sizes, dtype=w_out.gradient.dtype)
    experts_ct = ScaledExperts(_gradient_alone(w_in_ct), _gradient_alone(w_out_ct))
    return experts_ct, Carried(None, dx), gate.weight, None


_apply.defvjp(_apply_fwd, _apply_bwd)


def shared_first(w_in: ScaledWeights, tokens: Carried, products: Products) -> tuple[Carried, Int[Array, ""]]:
    """The activations [T, F] of the experts that every token goes to, [1, ...], up to their last product.

    Returns:
      `ScaledRows` with gradients in bfloat16, of T rounded up to 128 rows; and how many blocks are not finite.
    """
    return _shared_first(*same_axes_of(w_in, tokens), products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shared_first(w_in: ScaledWeights, tokens: Carried, products: Products) -> tuple[Carried, jax.Array]:
    return _shared_first_fwd(w_in, tokens, products)[0]


def _shared_first_fwd(w_in: ScaledWeights, tokens: Carried, products: Products) -> tuple[Any, Any]:
    rows, sizes = _padded(tokens.value)
    act, hidden = _first(w_in, rows, jnp.ones(rows.numbers.shape[0], jnp.float32), sizes, products)
    bad = _count(sizes, rows, hidden, act) + count_not_finite(w_in.forward)
    kept = _without_forward(w_in), tokens.value, hidden, jnp.zeros(0, tokens.gradient.dtype)
    gradient, _ = same_axes(jnp.zeros(act.numbers.shape, jnp.bfloat16), act.scales)
    return (Carried(act, gradient), bad), kept


def _shared_first_bwd(products: Products, residuals: Any, cts: tuple[Carried, Any]) -> tuple[Any, Any]:
    w_in, tokens, hidden, like = residuals
    rows, sizes = _padded(tokens)
    total, backend = rows.numbers.shape[0], products.backend
    valid = valid_rows(sizes, total)
    ones, _ = same_axes(jnp.ones(total, jnp.float32), rows.scales)
    gate = products.arithmetic.gate_backward(hidden, ones, cts[0].gradient, valid, backend=backend)
    dx = products.arithmetic.matmul(gate.hidden, w_in.backward, sizes, dtype=like.dtype, backend=backend)
    w_ct = None
    if w_in.gradient is not None:
        columns = products.arithmetic.columns(rows, valid, backend=backend)
        w_ct = products.arithmetic.outer(
            columns, gate.hidden_columns, sizes, dtype=w_in.gradient.dtype, backend=backend
        )
    return _gradient_alone(w_ct), Carried(None, dx[: tokens.numbers.shape[0]])


_shared_first.defvjp(_shared_first_fwd, _shared_first_bwd)


def shared_second(w_out: ScaledWeights, act: Carried, tokens: int, dtype: DTypeLike, products: Products) -> Carried:
    """Projects what `shared_first` made back to the width: so many rows of a dtype, with gradients in 8 bits."""
    return _shared_second(*same_axes_of(w_out, act), tokens, dtype, products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shared_second(w_out: ScaledWeights, act: Carried, tokens: int, dtype: DTypeLike, products: Products) -> Carried:
    sizes = jnp.array([tokens], jnp.int32)
    y = _second(w_out, act.value, sizes, dtype, products)[:tokens]
    return Carried(y, no_gradient(y, products))


def _shared_second_bwd(
    tokens: int, dtype: DTypeLike, products: Products, residuals: Any, ct: Carried
) -> tuple[Any, Any]:
    w_out, act = residuals
    dy, sizes = _padded(ct.gradient)
    backend = products.backend
    act_ct = products.arithmetic.matmul(dy, w_out.backward, sizes, dtype=jnp.bfloat16, backend=backend)
    w_ct = None
    if w_out.gradient is not None:
        valid = valid_rows(sizes, dy.numbers.shape[0])
        lhs, dout = (products.arithmetic.columns(rows, valid, backend=backend) for rows in (act, dy))
        w_ct = products.arithmetic.outer(lhs, dout, sizes, dtype=w_out.gradient.dtype, backend=backend)
    return _gradient_alone(w_ct), Carried(None, act_ct)


_shared_second.defvjp(
    lambda w_out, act, tokens, dtype, products: (
        _shared_second(w_out, act, tokens, dtype, products),
        (_without_forward(w_out), act.value),
    ),
    _shared_second_bwd,
)


def _first(
    w_in: ScaledWeights, rows: ScaledRows, weight: jax.Array, sizes: jax.Array, products: Products
) -> tuple[ScaledRows, ScaledRows]:
    """The gated activations, and the gate's input as it is kept."""
    arithmetic, backend = products.arithmetic, products.backend
    hidden = arithmetic.matmul(rows, w_in.forward, sizes, dtype=jnp.bfloat16, backend=backend)
    return arithmetic.gate(hidden, weight, backend=backend)


def _second(w_out: ScaledWeights, act: ScaledRows, sizes: jax.Array, dtype: DTypeLike, products: Products) -> jax.Array:
    return products.arithmetic.matmul(act, w_out.forward, sizes, dtype=dtype, backend=products.backend)


def _without_forward(tree: Any) -> Any:
    """Weights without what the backward pass does not read."""
    if isinstance(tree, ScaledExperts):
        return ScaledExperts(*map(_without_forward, tree))
    gradient = None if tree.gradient is None else jnp.zeros(0, tree.gradient.dtype)
    return tree._replace(forward=None, gradient=gradient)


def _gradient_alone(gradient: jax.Array | None) -> ScaledWeights:
    """The cotangent of weights, whose numbers have none."""
    nothing: Any = None
    return ScaledWeights(nothing, nothing, gradient)


def _padded(rows: ScaledRows) -> tuple[ScaledRows, jax.Array]:
    """Rows with zeros behind them up to a multiple of 128, and the size of their only group."""
    return in_whole_blocks(rows), jnp.array([rows.numbers.shape[0]], jnp.int32)


def _count(sizes: jax.Array, *scaled: ScaledRows) -> jax.Array:
    """Blocks of rows that belong to a group and are not finite."""
    used = used_rows(sizes, scaled[0].numbers.shape[0], FP8_ALIGN)
    return count_not_finite(*(each._replace(scales=jnp.where(used, each.scales, 0)) for each in scaled))


def _count_weights(experts: ScaledExperts) -> jax.Array:
    return count_not_finite(*(weights.forward for weights in experts))


def _shape_of(w: jax.Array) -> jax.Array:
    """The number of experts, the dtype and the mesh axes of an array, in one without elements."""
    return same_axes(jnp.zeros((w.shape[0], 0), w.dtype), w)[0]
