"""Backward passes that read the parameters' numbers of 8 bits that are made once a step, and do not make them again.

A layer under `jax.checkpoint` quantises its parameters again, and its backward may need more of them than its forward:
matrices the other way round. `jaxpipe.stage.rewrite` finds casts that are done twice; here is what takes more.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpipe.stage.divide import Sources, divide
from jaxpipe.stage.graph import Node, Value
from jaxpipe.stage.quantised import Together, constant_nodes, quantising_nodes
from jaxpipe.stage.rewrite import substitute


def read_quantised(
    nodes: Sequence[Node], once: Sequence[Node], known: Sources, alias: dict[Value, Value], results: Sequence[Value]
) -> tuple[list[Node], tuple[Node, ...], Sources]:
    """(nodes that read what there is, what makes more of parameters once a step, all values so known).

    Args:
      nodes: of a backward pass.
      once: what the forward makes of parameters once a step.
      known: parameters, and what of ``once`` others read.
      alias: leads from values of the nodes to equal ones; it is extended.
      results: of the nodes.
    """

    def find() -> tuple[list[Node], Together]:
        """(what is made of nothing, what quantises parameters)."""
        free = constant_nodes(nodes)
        ends = {alias.get(value, value) for value in results}
        return free, quantising_nodes(nodes, known, {value for node in free for value in node.outs}, ends)

    if not find()[1].nodes:
        return list(nodes), (), known
    nodes, twins = _without_same_work(nodes, once, known, alias)
    free, found = find()
    made = [
        dataclasses.replace(node, ins=tuple(twins.get(value, value) for value in node.ins))
        for node in (*free, *(node for node in nodes if node in found.nodes))
        if not twins.keys() >= set(node.outs) or not found.kept.isdisjoint(node.outs)
    ]
    more = [out for node in made for out in node.outs if out in found.kept]
    sources = {out: frozenset().union(*(known[root] for root in found.roots[out])) for out in more}
    rest = [node for node in nodes if node not in found.nodes]
    return rest, divide(made, more, ()).first, {**known, **sources}


def _without_same_work(
    nodes: Sequence[Node], once: Sequence[Node], known: Sources, alias: dict[Value, Value]
) -> tuple[list[Node], dict[Value, Value]]:
    """(nodes without those that make known values again, what ``once`` makes on its way to these by its twin here)."""
    done: dict[Any, list[Node]] = collections.defaultdict(list)
    twins: dict[Value, Value] = {}

    def same_work(node: Node) -> Node | None:
        if node.eqn is None:
            return None
        params, likely = node.eqn.params, done.get((node.name, _operands(node, twins)), ())
        return next((other for other in likely if other.eqn and other.eqn.params == params), None)

    for node in once:
        same = same_work(node)
        if same is not None:
            twins.update(zip(node.outs, same.outs, strict=True))
        elif node.eqn is not None:
            done[node.name, _operands(node, twins)].append(node)
    kept = []
    for node in nodes:
        node = substitute(node, alias)
        same = same_work(node)
        if same is not None and known.keys() >= set(same.outs):
            alias.update(zip(node.outs, same.outs, strict=True))
            continue
        if same is not None:
            twins.update(zip(node.outs, same.outs, strict=True))
        kept.append(node)
    return kept, twins


def _operands(node: Node, twins: Mapping[Value, Value]) -> tuple[Any, ...]:
    """What a node reads: values by identity, numbers by what they are."""

    def of(value: Value) -> Any:
        if isinstance(value.const, (bool, int, float, np.generic, np.ndarray)):
            return str(value.aval), np.asarray(value.const).tobytes()
        return twins.get(value, value)

    return tuple(map(of, node.ins))
