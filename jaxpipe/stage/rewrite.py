"""Backward passes rewritten to read what is there already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpipe._jax import LIGHT
from jaxpipe.stage.graph import Node, Value


def eliminate_common_subexpressions(
    nodes: Sequence[Node], once: Sequence[Node], known: set[Value], alias: dict[Value, Value]
) -> list[Node]:
    """The nodes of a backward pass that reads other values, as ``alias`` says, without work that ``once`` does already.

    A layer under `jax.checkpoint` casts its parameters again, from behind a barrier. ``alias``, which is extended, then
    leads from the results of these casts to those of ``once``.
    """

    def key(node: Node) -> Any:
        return node.name, node.ins, repr(sorted(node.eqn.params.items())) if node.eqn else ""

    done = {key(node): node for node in once if node.name in LIGHT}
    kept = []
    for node in nodes:
        node = substitute(node, alias)
        if node.name == "optimization_barrier" and node.eqn is None and node.ins[0] in known:
            alias[node.outs[0]] = node.ins[0]
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
