"""A stage traced with its derivative: forward and backward as graphs without refs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.stage.effects import check_effects, without_refs
from jaxpipe.stage.graph import Graph, make_graph


class Traced(NamedTuple):
    """A stage's forward and backward.

    Attributes:
      forward: params, x, args -> out, aux, residuals.
      backward: residuals, floating outputs' cotangents -> cotangents of the differentiated leaves of params and of x.
      out, aux: shapes and dtypes; aux is None without one.
      num_params, num_x: how many leaves are differentiated.
    """

    forward: Graph
    backward: Graph
    out: Any
    aux: Any
    num_params: int
    num_x: int


def trace(
    stage: Callable[..., Any], params: Any, x: Any, args: Any, has_aux: bool, trainable: Sequence[bool] | None = None
) -> Traced:
    """Traces a stage and its derivative.

    ``trainable`` says for each leaf of params whether it is differentiated; None: the floating ones are.

    Raises:
      ValueError: it has an effect that a stage cannot have.
    """
    param_leaves, param_tree = jax.tree.flatten(params)
    x_leaves, x_tree = jax.tree.flatten(x)
    of_params, of_x = list(map(inexact, param_leaves)) if trainable is None else trainable, list(map(inexact, x_leaves))
    vjp_tree: Any = None
    refs: list[bool] = []

    def forward(params: Any, x: Any, args: Any) -> Any:
        nonlocal vjp_tree
        p_diff, p_rest = _divide_leaves(jax.tree.leaves(params), of_params)
        x_diff, x_rest = _divide_leaves(jax.tree.leaves(x), of_x)

        def differentiable(p_diff: Any, x_diff: Any) -> Any:
            p = jax.tree.unflatten(param_tree, _join_leaves(p_diff, p_rest))
            result = stage(p, jax.tree.unflatten(x_tree, _join_leaves(x_diff, x_rest)), *args)
            out, aux = result if has_aux else (result, None)
            return [leaf for leaf in jax.tree.leaves(out) if inexact(leaf)], (out, aux)

        _, vjp, (out, aux) = jax.vjp(differentiable, p_diff, x_diff, has_aux=True)
        residuals, vjp_tree = jax.tree.flatten(vjp)
        refs[:] = [isinstance(leaf, jax.Ref) for leaf in residuals]
        return out, aux, [leaf[...] if is_ref else leaf for leaf, is_ref in zip(residuals, refs, strict=True)]

    closed, (out, aux, residuals) = jax.make_jaxpr(forward, return_shape=True)(params, x, args)
    check_effects(closed.effects, "a stage")
    cts = [leaf for leaf in jax.tree.leaves(out) if inexact(leaf)]

    def backward(residuals: Any, cts: Any) -> Any:
        residuals = [jax.new_ref(leaf) if is_ref else leaf for leaf, is_ref in zip(residuals, refs, strict=True)]
        p_ct, x_ct = jax.tree.unflatten(vjp_tree, residuals)(cts)
        return [leaf for leaf in p_ct if leaf is not None], [leaf for leaf in x_ct if leaf is not None]

    backward_closed = jax.make_jaxpr(backward)(residuals, cts)
    forward_graph, backward_graph = (make_graph(without_refs(jaxpr)) for jaxpr in (closed, backward_closed))
    return Traced(forward_graph, backward_graph, out, aux if has_aux else None, sum(of_params), sum(of_x))


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf's shape and dtype."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"{leaf!r} of type {type(leaf).__name__} is not an array: params, x and args of a stage are pytrees of "
            "arrays; bind other values with functools.partial"
        )
    if isinstance(leaf, jax.Ref):
        raise ValueError(
            f"{leaf!r} is a ref: params, x and args of a stage are read and written by no defined order of stages and "
            "microbatches; pass the array that it holds (ref[...]), and make refs inside the stage with jax.new_ref"
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def inexact(leaf: Any) -> bool:
    """Whether a leaf is floating or complex."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _divide_leaves(leaves: Sequence[Any], chosen: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    """(chosen leaves, others), None in the other's places."""
    pairs = list(zip(leaves, chosen, strict=True))
    return [leaf if choice else None for leaf, choice in pairs], [None if choice else leaf for leaf, choice in pairs]


def _join_leaves(diff: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
    return [r if d is None else d for d, r in zip(diff, rest, strict=True)]
