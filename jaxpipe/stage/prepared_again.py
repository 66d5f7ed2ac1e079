"""Backward passes that read what is made of parameters once a step, and do not make it again.

A layer under `jax.checkpoint` quantises its parameters again, or gathers them again, and its backward may need more of
them than its forward: matrices the other way round. `jaxpipe.stage.rewrite` finds casts that are done twice; here is
what takes more.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxpipe.stage.branches import entering, restricted
from jaxpipe.stage.divide import Sources, divide, exchanged_of_scan
from jaxpipe.stage.exchanged import exchanged_nodes, exchanges
from jaxpipe.stage.graph import Cond, Node, Scan, Value, has_effect
from jaxpipe.stage.quantised import Together, constant_nodes, quantising_nodes
from jaxpipe.stage.rewrite import substitute

_Group = Callable[..., Together]
_Found = tuple[list[Node], tuple[Node, ...], Sources]


def read_quantised(
    nodes: Sequence[Node], once: Sequence[Node], known: Sources, alias: dict[Value, Value], results: Sequence[Value]
) -> _Found:
    """(nodes that read what there is, what makes more of parameters once a step, all values so known).

    Args:
      nodes: of a backward pass.
      once: what the forward makes of parameters once a step.
      known: parameters, and what of ``once`` others read.
      alias: leads from values of the nodes to equal ones; it is extended.
      results: of the nodes.
    """
    return _read(nodes, once, known, alias, results, quantising_nodes)


def read_exchanged(
    nodes: Sequence[Node],
    once: Sequence[Node],
    known: Sources,
    alias: dict[Value, Value],
    results: Sequence[Value],
    max_growth: float,
) -> _Found:
    """The same of what collectives make of parameters, in loops, too; ``max_growth`` as of `exchanged_nodes`."""
    if not exchanges(nodes):
        return list(nodes), (), known
    free = constant_nodes(nodes)
    constants = {value for node in free for value in node.outs}
    outside: dict[Value, Value] = {}
    _match_all(free, constant_nodes(once), outside)
    rest: list[Node] = []
    more: list[Node] = []
    for node in nodes:
        node = substitute(node, alias)
        stacked = None
        if node.scan is not None and exchanges((node,)) and not has_effect(node):
            stacked, node = exchanged_of_scan(node.scan, known, constants, max_growth)
        if stacked is not None:
            twins: dict[Value, Value] = {}
            for other in (*once, *more):
                if other.scan is not None:
                    twins |= _twin_stacks(stacked, other.scan, constant_nodes(once), outside)
            alias.update((value, twin) for value, twin in twins.items() if twin in known)
            more += divide((stacked,), set(stacked.outs) - alias.keys(), ()).first
            roots = frozenset[Value]().union(*(known.get(value, ()) for value in stacked.ins))
            known = {**known, **dict.fromkeys((out for out in stacked.outs if out not in alias), roots)}
        if node is not None:
            rest.append(substitute(node, alias))

    group = functools.partial(exchanged_nodes, max_growth=max_growth)
    rest, further, known = _read(rest, (*once, *more), known, alias, results, group)
    return rest, (*more, *further), known


def _read(
    nodes: Sequence[Node],
    once: Sequence[Node],
    known: Sources,
    alias: dict[Value, Value],
    results: Sequence[Value],
    group: _Group,
) -> _Found:
    """`read_quantised` of what belongs to a group."""

    def find() -> tuple[list[Node], Together]:
        """(what is made of nothing, what belongs to the group)."""
        free = constant_nodes(nodes)
        ends = {alias.get(value, value) for value in results}
        return free, group(nodes, known, {value for node in free for value in node.outs}, ends)

    if not find()[1].nodes:
        return list(nodes), (), known
    nodes, twins = _without_same_work(nodes, once, known, alias)
    free, found = find()
    made = [
        _reading(node, twins)
        for node in (*free, *(node for node in nodes if node in found.nodes))
        if not twins.keys() >= set(node.outs) or not found.kept.isdisjoint(node.outs)
    ]
    more = [out for node in made for out in node.outs if out in found.kept]
    sources = {out: frozenset().union(*(known[root] for root in found.roots[out])) for out in more}
    rest = [node for node in nodes if node not in found.nodes or not found.kept.issuperset(node.outs)]
    return rest, divide(made, more, ()).first, {**known, **sources}


def _reading(node: Node, twins: Mapping[Value, Value]) -> Node:
    """The node reading the twins of what it reads; what it makes stays."""
    return substitute(node, {value: twin for value, twin in twins.items() if value not in node.outs})


def _without_same_work(
    nodes: Sequence[Node], once: Sequence[Node], known: Sources, alias: dict[Value, Value]
) -> tuple[list[Node], dict[Value, Value]]:
    """(nodes without those that make known values again, what ``once`` makes on its way to these by its twin here)."""
    twins: dict[Value, Value] = {}
    match = _Match(once, twins)
    kept = []
    for node in nodes:
        node = substitute(node, alias)
        same = match.results(node)
        alias.update((value, twin) for value, twin in same.items() if twin in known)
        twins.update(same)
        left = set(node.outs) - alias.keys()
        if node.cond is not None and 0 < len(left) < len(node.outs):
            node = restricted(node.cond, node.bodies, left).node()
        if left or not node.outs:
            kept.append(node)
    return kept, twins


class _Match:
    """Finds, of nodes, the same work among earlier ones.

    Args:
      earlier: nodes in an order in which they can run.
      twins: leads from values to equal ones that the earlier nodes make or read; extended by those among themselves.
    """

    def __init__(self, earlier: Iterable[Node], twins: dict[Value, Value]) -> None:
        self._twins = twins
        self._done: dict[Any, list[Node]] = collections.defaultdict(list)
        for node in earlier:
            same = self.results(node)
            twins.update(same)
            if not same:
                self._done[self._key(node)].append(node)

    def results(self, node: Node) -> dict[Value, Value]:
        """The results of a node that an earlier one makes, with what that makes."""
        likely = self._done.get(self._key(node), ())
        if node.cond is not None:
            found = (_twin_results(node.cond, other.cond, self._twins) for other in likely if other.cond is not None)
            return next((pairs for pairs in found if pairs), {})
        if node.name == "optimization_barrier" and node.eqn is None:
            return {node.outs[0]: self._twins[node.ins[0]]} if node.ins[0] in self._twins else {}
        if node.row is not None:
            same = next(iter(likely), None)
        elif node.eqn is None:
            return {}
        else:
            params = node.eqn.params
            same = next((other for other in likely if other.eqn and other.eqn.params == params), None)
        return {} if same is None else dict(zip(node.outs, same.outs, strict=True))

    def _key(self, node: Node) -> Any:
        if node.cond is not None:
            return "cond", _identity(node.cond.index, self._twins)
        return node.name, node.row, tuple(_identity(value, self._twins) for value in node.ins)


def _twin_results(cond: Cond, other: Cond, twins: Mapping[Value, Value]) -> dict[Value, Value]:
    """The results of a conditional that another one with the same index makes in all branches."""
    columns: list[tuple[list[Any], list[Any]]] = []
    for branch, theirs in zip(cond.branches, other.branches, strict=True):
        inputs = {_identity(outer, {}): inner for outer, inner in entering(other, theirs)}
        pairs = [(_identity(outer, twins), inner) for outer, inner in entering(cond, branch)]
        inside = {inner: inputs[outer] for outer, inner in pairs if outer in inputs}
        _match_all(branch.nodes, theirs.nodes, inside)
        own = [None if value is None else _identity(value, inside) for value in branch.outputs]
        columns.append((own, [None if value is None else _identity(value, {}) for value in theirs.outputs]))
    found = {}
    for place, result in enumerate(cond.results):
        for at, twin in enumerate(other.results):
            if all(own[place] in (None, them[at]) for own, them in columns):
                found[result] = twin
                break
    return found


def _twin_stacks(node: Node, other: Scan, free: Sequence[Node], outside: Mapping[Value, Value]) -> dict[Value, Value]:
    """What a loop without carries stacks of what another one stacks alike.

    One may make in its turns what the other reads of ``free`` nodes outside, whose values ``outside`` leads to.
    """
    scan = node.scan
    assert scan is not None
    if other.carries or scan.length != other.length:
        return {}
    rows = dict(other.xs)
    inside = {inner: outer for outer, inner in other.consts}
    inside |= {inner: outside.get(outer, outer) for outer, inner in scan.consts}
    inside |= {inner: rows[outer] for outer, inner in scan.xs if outer in rows}
    _match_all(scan.nodes, (*free, *other.nodes), inside)
    stacks = dict(other.ys)
    return {stacked: stacks[inside[inner]] for inner, stacked in scan.ys if inside.get(inner) in stacks}


def _match_all(nodes: Sequence[Node], earlier: Sequence[Node], twins: dict[Value, Value]) -> None:
    """Extends twins by what nodes of a body make as earlier ones of another do."""
    match = _Match(earlier, twins)
    for node in nodes:
        twins.update(match.results(node))


def _identity(value: Value, twins: Mapping[Value, Value]) -> Any:
    """What a value is: itself or its twin, and numbers what they are."""
    while (twin := twins.get(value, value)) is not value:
        value = twin
    if value.const is not None and not isinstance(value.const, jax.Array):  # what is traced is one, too
        return value.aval.shape, value.aval.dtype, np.asarray(value.const).tobytes()
    return value
