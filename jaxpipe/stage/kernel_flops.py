"""FLOPs of the kernels of a traced program: of those that JAX knows nothing of, by rules and by their shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpipe import flops
from jaxpipe._jax import ATTENTION_PRODUCTS, PRODUCTS, JaxprEqn

FlopsRule = Callable[[Sequence[Any], Sequence[Any]], float]
"""FLOPs of a kernel, of the shapes of its operands and results; operands that it writes over are left out."""


def scaled_rows_flops(operands: Sequence[Any], results: Sequence[Any]) -> float:
    """FLOPs of rows ``[R, K]`` of 8 bits times matrices ``[G, N, K]``: every row meets one of them.

    >>> import jax
    >>> shapes = [jax.ShapeDtypeStruct(shape, "float8_e4m3fn") for shape in ((256, 128), (4, 384, 128))]
    >>> scaled_rows_flops(shapes, [jax.ShapeDtypeStruct((256, 384), "bfloat16")]) == 2 * 256 * 128 * 384
    True
    """
    del results
    rows, matrices = (operand.shape for operand in operands if operand.dtype.itemsize == 1)
    return 2.0 * math.prod(rows) * matrices[1]


def scaled_outer_flops(operands: Sequence[Any], results: Sequence[Any]) -> float:
    """FLOPs of the weight gradients of columns of 8 bits, ``[K, R]`` and ``[N, R]``."""
    del results
    left, right = (operand.shape for operand in operands if operand.dtype.itemsize == 1)
    return 2.0 * math.prod(left) * right[0]


def _none(operands: Sequence[Any], results: Sequence[Any]) -> float:
    """A cast multiplies nothing; its bytes are its time."""
    del operands, results
    return 0.0


SCALED: Mapping[str, FlopsRule] = {
    "scaled_rows": scaled_rows_flops,
    "scaled_outer": scaled_outer_flops,
    **dict.fromkeys(
        (
            "quantise", "quantise_rows", "quantise_weights", "columns_of", "scaled_gate", "scaled_gate_backward",
            "copy_rows", "add_rows", "gated_backward",
        ),
        _none,
    ),
}  # fmt: skip
"""Kernels of `eplb_jax` for numbers of 8 bits, and for rows that move, by name."""


def kernel_name(eqn: JaxprEqn) -> str:
    """The name of the kernel that an equation runs: its own, or that of the primitive."""
    params = eqn.params
    return str(params.get("name") or params.get("target_name") or params.get("call_target_name") or eqn.primitive.name)


def kernel_flops(eqn: JaxprEqn, rules: Mapping[str, FlopsRule]) -> float | None:
    """FLOPs of a kernel, or None where nothing is known of it.

    The first of these that there is: a rule of its name, a product's or a cast's of numbers of 8 bits, its own
    estimate, attention's and a grouped product's shapes.
    """
    name = kernel_name(eqn)
    operands = _read_only(eqn)
    results: list[Any] = [var.aval for var in eqn.outvars]
    if name in rules:
        return float(rules[name](operands, results))
    if name in SCALED:
        return SCALED[name](operands, results)
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return float(estimate.flops)
    if name in ATTENTION_PRODUCTS:
        causal = "CAUSAL" in str(eqn.params.get("mask_type", "")).upper()
        return attention_flops(*operands[:3], products=ATTENTION_PRODUCTS[name], causal=causal)
    return flops.grouped_flops(a.shape for a in (*operands, *results) if jnp.issubdtype(a.dtype, jnp.floating))


def kernel_depth(eqn: JaxprEqn) -> float:
    """How many numbers each result of a kernel's products is a sum of; 0 where its shapes do not say.

    Of grouped products the width of the rows, of their weight gradients the rows of a group, on average; of attention
    half of the keys, as half of the scores are masked.
    """
    operands: list[Any] = [atom.aval for atom in eqn.invars]
    results: list[Any] = [var.aval for var in eqn.outvars]
    name = kernel_name(eqn)
    if name in ATTENTION_PRODUCTS or name.startswith("attention"):
        return operands[1].shape[1] / 2
    floats = [aval for aval in operands if jnp.issubdtype(aval.dtype, jnp.floating) and len(aval.shape) > 1]
    matrices = [aval.shape for aval in results if len(aval.shape) == 3]
    if name.endswith("_rows") and floats:
        return float(floats[0].shape[-1])
    if name.endswith("_outer") and floats and matrices:
        groups, height, _ = matrices[0]
        return math.prod(floats[0].shape) / height / groups  # which are columns in FP8
    return 0.0


def is_attention_backward(eqn: JaxprEqn) -> bool:
    """Whether a kernel makes the gradients of attention's queries, keys and values."""
    return kernel_name(eqn) in ("attention_backward", "dot_product_attention_bwd_wrapper")


def _read_only(eqn: JaxprEqn) -> list[Any]:
    """Shapes and dtypes of operands that are not written over, as sums are to which a kernel adds its products."""
    written = dict(eqn.params.get("input_output_aliases") or ())
    return [atom.aval for place, atom in enumerate(eqn.invars) if place not in written]


def attention_flops(query: Any, key: Any, value: Any, *, products: int, causal: bool) -> float:
    """FLOPs of attention of queries ``[B, T, H, C]`` to keys ``[B, S, H, C]`` and values ``[B, S, H, V]``.

    ``products`` and ``causal``: as of `jaxpipe.flops.score_flops`.

    >>> import jax
    >>> q = jax.ShapeDtypeStruct((1, 4, 2, 8), "bfloat16")
    >>> attention_flops(q, q, q, products=2, causal=True)
    512.0
    """
    scores = math.prod(query.shape[:3]) * key.shape[1]
    return flops.score_flops(scores, query.shape[-1], value.shape[-1], products=products, causal=causal)


def multiplying_unit(eqn: JaxprEqn) -> str:
    """What multiplies the operands of a product or kernel, as `Chip.flops` names it: by default float32 as TF32."""
    avals = _read_only(eqn)
    floats = [aval.dtype.itemsize for aval in avals if jnp.issubdtype(aval.dtype, jnp.floating)]
    if eqn.primitive.name in PRODUCTS:
        width = max(floats[:2], default=1)  # integers multiply as 8-bit numbers do
    else:
        width = max(sorted(set(floats)), key=floats.count, default=4)
    return flops.multiplying_unit(width, highest="HIGHEST" in str(eqn.params.get("precision")))
