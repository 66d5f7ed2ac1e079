"""Backward passes that read values named `PREPARED`, which are made once a step, where they would make them again.

A layer under `jax.checkpoint` makes of its parameters again what its forward made of them, and its backward may need
more of it: a matrix in 8 bits the other way round. `jaxpipe.stage.rewrite` finds the casts among this; here is what
takes more than casts.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpipe.stage.divide import Sources, derive, divide, reads_alone, roots_of, worth_hoisting
from jaxpipe.stage.graph import PREPARED, Node, Value, is_named
from jaxpipe.stage.rewrite import substitute


def read_prepared(
    nodes: Sequence[Node], once: Sequence[Node], known: Sources, alias: dict[Value, Value]
) -> tuple[list[Node], tuple[Node, ...], Sources]:
    """(nodes that read prepared values, what makes more of these, all known values).

    Args:
      nodes: of a backward pass.
      once: what the forward makes of parameters once a step.
      known: parameters, and what of ``once`` others read.
      alias: is extended by those of the nodes' results that are there already.
    """
    if not any(is_named(node, PREPARED) for node in nodes):
        return list(nodes), (), known
    nodes, twins = _without_same_work(nodes, once, known, alias)
    sources, derived = dict(known), Sources()
    alone = collections.ChainMap(derived, sources)
    rest, larger, named = [], [], []
    for node in nodes:
        if is_named(node, PREPARED) and worth_hoisting(node, alone):
            sources.update((out, roots_of(node, alone)) for out in node.outs)
            named.append(node)
            continue
        rest.append(node)
        if reads_alone(node, alone):
            derive(node, alone)
            larger.append(node)
    made = [
        dataclasses.replace(node, ins=tuple(twins.get(value, value) for value in node.ins))
        for node in (*larger, *named)
        if twins.keys().isdisjoint(node.outs)
    ]
    return rest, divide(made, [out for node in named for out in node.outs], ()).first, sources


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
