"""Linear nodes run on sums, which may be wider than what they were traced with: nothing is narrowed on the way."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxpipe._jax import ADDS_ROWS
from jaxpipe.stage.graph import Branch, Cond, Node, Scan, Value, contexts, eqn_node, read, scatter_options


def evaluate_wide(nodes: Iterable[Node], env: dict[Value, Any], sums: Iterable[Value]) -> None:
    """Runs nodes in order, reading and extending ``env``, whose sums may be wider than their values say.

    What is made of sums is as wide as these, and no narrower than the values say. Casts to narrower ones are left out.

    Args:
      nodes: those that read sums, or what is made of them, are linear in it, as `jaxpipe.stage.late` finds them.
      env: arrays by value.
      sums: the values of ``env`` that are sums.
    """
    live = set(sums)
    for node in nodes:
        arrays = [read(env, value) for value in node.ins]
        if live.isdisjoint(node.ins):
            outs = node.run(*arrays)
        else:
            pairs = [(value, array) for value, array in zip(node.ins, arrays, strict=True) if value in live]
            wide = widest([dtype for value, array in pairs for dtype in (value.aval.dtype, array.dtype)])
            outs = _run(node, wide, arrays, live)
            live.update(node.outs)
        env.update(zip(node.outs, outs, strict=True))


def _run(node: Node, dtype: Any, arrays: Sequence[Any], live: Container[Value]) -> Sequence[Any]:
    if node.cond is not None:
        return _run_cond(node.cond, dtype, arrays, live)
    if node.scan is not None:
        return _run_scan(node.scan, dtype, arrays, live)
    arrays = [_cast(array, dtype) for array in arrays]
    if node.eqn is None:
        return node.run(*arrays)
    if node.name in ADDS_ROWS:  # whose own function adds numbers of the old dtype
        with contexts(node.context):
            return [lax.scatter_add(*arrays, **scatter_options(node.eqn))]
    params = dict(node.eqn.params)
    for name in ("new_dtype", "preferred_element_type"):
        if params.get(name) is not None:
            params[name] = widest([params[name], dtype])
    return eqn_node(node.eqn.replace(params=params), node.ins, node.outs, node.context).run(*arrays)


def _run_cond(cond: Cond, dtype: Any, arrays: Sequence[Any], live: Container[Value]) -> Sequence[Any]:
    """The chosen branch, whose results are all as wide as those of the others."""
    dtypes = [widest([result.aval.dtype, dtype]) for result in cond.results]

    def function(branch: Branch) -> Callable[..., list[Any]]:
        def run(*arrays: Any) -> list[Any]:
            env = {value: array for value, array in zip(branch.inputs, arrays, strict=True) if value is not None}
            pairs = zip(cond.operands, branch.inputs, strict=True)
            evaluate_wide(branch.nodes, env, [inner for outer, inner in pairs if inner is not None and outer in live])
            return [
                jnp.zeros(result.aval.shape, dtype) if value is None else _cast(read(env, value), dtype)
                for value, result, dtype in zip(branch.outputs, cond.results, dtypes, strict=True)
            ]

        return run

    index, *operands = arrays
    with contexts(cond.context):
        return lax.switch(index, [function(branch) for branch in cond.branches], *operands)


def _run_scan(scan: Scan, dtype: Any, arrays: Sequence[Any], live: Container[Value]) -> Sequence[Any]:
    """The loop, with carries that are as wide as what enters it."""
    consts = dict(zip((inner for _, inner in scan.consts), arrays, strict=False))
    rest = arrays[len(scan.consts) :]
    count = len(scan.carries)
    inside = [inner for outer, inner in (*scan.consts, *scan.xs) if outer in live]
    inside += [carry.entering for carry in scan.carries]

    def widened(values: Sequence[Any]) -> list[Any]:
        pairs = zip(values, scan.carries, strict=True)
        return [_cast(value, widest([carry.entering.aval.dtype, dtype])) for value, carry in pairs]

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        env = dict(consts)
        env.update(zip((each.entering for each in scan.carries), carry, strict=True))
        env.update(zip((inner for _, inner in scan.xs), x, strict=True))
        evaluate_wide(scan.nodes, env, inside)
        return widened([read(env, each.leaving) for each in scan.carries]), [read(env, inner) for inner, _ in scan.ys]

    options = {"length": scan.length, "reverse": scan.reverse, "unroll": scan.unroll}
    with contexts(scan.context):
        carry, ys = lax.scan(body, widened(rest[:count]), list(rest[count:]), **options)
    return [*carry, *ys]


def _cast(array: Any, dtype: Any) -> Any:
    """A floating array at least as wide as a dtype; others as they are."""
    array = jnp.asarray(array)
    return array.astype(widest([array.dtype, dtype])) if jnp.issubdtype(array.dtype, jnp.inexact) else array


def widest(dtypes: Sequence[Any]) -> Any:
    """The dtype of numbers like those of the first, real or complex, that are as wide as those of any.

    >>> widest([jnp.bfloat16, jnp.float16]), widest([jnp.float32, jnp.complex128]), widest([jnp.complex64, jnp.float64])
    (dtype('float32'), dtype('float64'), dtype('complex128'))
    """
    widest, *others = (jnp.finfo(dtype) for dtype in dtypes)
    for other in others:
        if other.bits > widest.bits:
            widest = other
        elif other.bits == widest.bits and other.dtype != widest.dtype:
            widest = jnp.finfo(jnp.float32)  # of bfloat16 and float16
    is_complex = jnp.issubdtype(dtypes[0], jnp.complexfloating)
    if is_complex:
        return jnp.dtype(jnp.complex128 if widest.bits == 64 else jnp.complex64)
    return jnp.dtype(widest.dtype)
