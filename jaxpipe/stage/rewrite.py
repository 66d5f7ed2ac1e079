"""Backward passes rewritten to read what is there already."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpipe._jax import LIGHT, VIEWS
from jaxpipe.stage.graph import Node, Value, eqn_node, producers


def eliminate_common_subexpressions(
    nodes: Sequence[Node], once: Sequence[Node], known: set[Value], alias: dict[Value, Value]
) -> list[Node]:
    """The nodes of a backward pass that reads other values, as ``alias`` says, without work that ``once`` does already.

    Rows of what the forward stacked are the values that it stacked. A layer under `jax.checkpoint` casts its parameters
    again, from behind a barrier. ``alias``, which is extended, then leads from the results of these casts to those of
    ``once``.
    """

    def key(node: Node) -> Any:
        return node.name, node.ins, node.row, repr(sorted(node.eqn.params.items())) if node.eqn else ""

    done = {key(node): node for node in once if node.name in LIGHT}
    kept = []
    for node in nodes:
        node = substitute(node, alias)
        if node.name == "optimization_barrier" and node.eqn is None and node.ins[0] in known:
            alias[node.outs[0]] = node.ins[0]
        elif node.row is not None and (rows := node.ins[0].rows):
            alias[node.outs[0]] = rows[node.row]
        elif node.name in LIGHT and (same := done.get(key(node))):
            alias.update(zip(node.outs, same.outs, strict=True))
        else:
            kept.append(node)
    return kept


def substitute(node: Node, alias: Mapping[Value, Value]) -> Node:
    """The node reading and making other values; bodies and branches read only what enters through the node."""
    if not any(value in alias for value in (*node.ins, *node.outs)):
        return node

    def new(values: Iterable[Value]) -> tuple[Value, ...]:
        return tuple(alias.get(value, value) for value in values)

    if node.cond is not None:
        cond = node.cond
        (index,) = new((cond.index,))
        return dataclasses.replace(cond, index=index, operands=new(cond.operands), results=new(cond.results)).node()
    if node.scan is None:
        return dataclasses.replace(node, ins=new(node.ins), outs=new(node.outs))
    scan = node.scan
    return dataclasses.replace(
        scan,
        consts=tuple((alias.get(outer, outer), inner) for outer, inner in scan.consts),
        carries=tuple(
            carry._replace(initial=alias.get(carry.initial, carry.initial), final=alias.get(carry.final, carry.final))
            for carry in scan.carries
        ),
        xs=tuple((alias.get(outer, outer), inner) for outer, inner in scan.xs),
        ys=tuple((inner, alias.get(outer, outer)) for inner, outer in scan.ys),
    ).node()


def before_casts(values: Sequence[Value], nodes: Sequence[Node]) -> tuple[Value, ...]:
    """The values, or what nodes widened to make them."""
    made = {node.outs[0]: node.ins[0] for node in nodes if node.name == "convert_element_type"}

    def before(value: Value) -> Value:
        source = made.get(value)
        return value if source is None or source.const is not None or source.nbytes >= value.nbytes else source

    return tuple(map(before, values))


def widen_products(
    values: Sequence[Value], nodes: Sequence[Node], also: Sequence[Value] = ()
) -> tuple[tuple[Value, ...], tuple[Node, ...]]:
    """(values, nodes) with products in float32 where a value is nothing but a product of 16 bits, and its operands too.

    Such a value may be moved, but nothing else may read it or the product: no node, and it is none of ``also``.
    """
    made = producers(nodes)
    reads = collections.Counter([*values, *also, *(value for node in nodes for value in node.ins)])
    alias: dict[Value, Value] = {}
    changed: dict[Node, Node] = {}
    for value in dict.fromkeys(values):
        chain: list[Node] = []
        while reads[value] == 1 and (node := made.get(value)):
            chain.append(node)
            if node.name not in _MOVES:
                break
            value = node.ins[0]
        if chain and chain[-1].name == "dot_general" and all(map(_is_16_bits, (*chain[-1].ins, *chain[-1].outs))):
            for node in reversed(chain):
                changed[node] = _in_float32(node, alias)
    return tuple(alias.get(value, value) for value in values), tuple(changed.get(node, node) for node in nodes)


_MOVES = VIEWS | {"broadcast_in_dim"}


def _is_16_bits(value: Value) -> bool:
    return value.aval.dtype in (jnp.bfloat16, jnp.float16)


def _in_float32(node: Node, alias: dict[Value, Value]) -> Node:
    """The node with a float32 result, which ``alias`` leads to."""
    (out,) = node.outs
    alias[out] = wide = Value(out.aval.update(dtype=jnp.dtype(jnp.float32)))
    if node.name != "dot_general":
        return dataclasses.replace(node, ins=tuple(alias.get(value, value) for value in node.ins), outs=(wide,))
    assert node.eqn is not None
    params = node.eqn.params | {"preferred_element_type": jnp.dtype(jnp.float32)}
    return eqn_node(node.eqn.replace(params=params), node.ins, (wide,), node.context)
