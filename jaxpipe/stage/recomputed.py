"""When a backward pass computes again what it was not given: layer by layer, as `jax.checkpoint` does.

What is computed again depends on no cotangent, so a compiler may do so for all layers of a stage at once, and then
has the activations of all of them alive. With barriers each layer's waits for the cotangent that the one behind gives.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Sequence

from jax import lax

from jaxpipe._jax import COLLECTIVES, is_heavy
from jaxpipe.stage.graph import Node, Value, has_effect
from jaxpipe.stage.order import in_time
from jaxpipe.stage.rewrite import substitute


def recompute_in_turn(nodes: Sequence[Node], cotangents: Iterable[Value], known: Collection[Value]) -> tuple[Node, ...]:
    """The nodes, of which heavy ones that need no cotangent wait for one before what reads them.

    All that the same node that needs a cotangent is the first to read waits together, for the latest cotangent that
    something behind still reads; for one that takes no more bytes than the operands that wait if there is such a one.

    Args:
      nodes: in an order in which they can run.
      cotangents: what they are given besides what the forward pass made.
      known: what depends on parameters alone, which waits for nothing.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> def two_layers(x, y, w, ct):
    ...     ct = (ct * (y @ w)) @ w
    ...     return (ct * (x @ w)) @ w
    >>> x = jnp.ones((4, 4))
    >>> graph = make_graph(jax.make_jaxpr(two_layers)(x, x, x, x))
    >>> *_, w, ct = graph.inputs
    >>> [node.name for node in recompute_in_turn(graph.nodes, [ct], {w})]
    ['dot_general', 'mul', 'dot_general', 'optimization_barrier', 'dot_general', 'mul', 'dot_general']
    """
    late = _depending(nodes, cotangents)
    early = [node for node in nodes if late.isdisjoint(node.outs) and not has_effect(node)]
    among = set(early)
    rest = [node for node in nodes if node not in among]
    places = _first_readers(early, rest)
    waiting, costly = _waiting(early, places, known)
    found: list[Node] = []
    alias: dict[Value, Value] = {}  # at the place that has been reached
    mine = collections.defaultdict[int, list[Node]](list)
    for node in early:
        mine[places.get(node, len(rest))].append(node)
    again: list[Node] = []
    for place, node in enumerate([*rest, None]):
        again += [substitute(each, alias) for each in mine[place] if each not in costly]
        values = waiting.get(place, ())
        cotangent = _latest(rest, place, late, max(value.nbytes for value in values)) if values else None
        if cotangent is not None:
            before = (cotangent, *values)
            barrier = _barrier([alias.get(value, value) for value in before])
            alias.update(zip(before, barrier.outs, strict=True))
            found.append(barrier)
        again += [substitute(each, alias) for each in mine[place] if each in costly]
        if node is not None:
            found.append(substitute(node, alias))
    return in_time(again, found)


def _depending(nodes: Iterable[Node], values: Iterable[Value]) -> set[Value]:
    """Values, and all results of nodes that wait for them: `dependents` knows single results, a place has the node."""
    found = set(values)
    for node in nodes:
        if not found.isdisjoint(node.ins):
            found.update(node.outs)
    return found


def _first_readers(early: Sequence[Node], rest: Sequence[Node]) -> dict[Node, int]:
    """The place of the first of the rest that reads what an early node makes, or what is made of that."""
    places: dict[Value, int] = {}
    for place, node in reversed([*enumerate(rest)]):
        places.update(dict.fromkeys(node.ins, place))
    found: dict[Node, int] = {}
    for node in reversed(early):
        mine = [places[value] for value in node.outs if value in places]
        if mine:
            found[node] = min(mine)
            for value in node.ins:
                places[value] = min(places.get(value, found[node]), found[node])
    return found


def _waiting(
    early: Sequence[Node], places: dict[Node, int], known: Collection[Value]
) -> tuple[dict[int, tuple[Value, ...]], set[Node]]:
    """(by place, operands of heavy early nodes that do not follow from others of the place; those and what follows)."""
    found: dict[int, dict[Value, None]] = {}
    following: dict[int, set[Value]] = {}
    costly: set[Node] = set()
    fixed = set(known)
    for node in early:
        operands = [value for value in node.ins if value.const is None and not value.effect]
        if fixed.issuperset(operands):
            fixed.update(node.outs)
            continue
        place = places.get(node)
        if place is None:
            continue
        after = following.setdefault(place, set())
        heavy = is_heavy(node.name) or node.name in COLLECTIVES
        if heavy:
            own = found.setdefault(place, {})
            waits = (value for value in operands if value.nbytes and value not in fixed and value not in after)
            own.update(dict.fromkeys(waits))
        if heavy or not after.isdisjoint(node.ins):
            after.update(node.outs)
            costly.add(node)
    return {place: tuple(values) for place, values in found.items() if values}, costly


def _latest(rest: Sequence[Node], place: int, late: Collection[Value], most: int) -> Value | None:
    """The cotangent made last before a place that is read behind it: of few bytes, or else the one of fewest."""
    read = {value for node in rest[place:] for value in node.ins}
    found = [
        value
        for node in rest[:place]
        for value in node.outs
        if value in late and value in read and not value.effect and value.nbytes
    ]
    small = [value for value in found if value.nbytes <= most]
    return small[-1] if small else min(found, key=lambda value: value.nbytes, default=None)


def _barrier(values: Sequence[Value]) -> Node:
    """Values behind one barrier: none is read before all are there."""
    outs = tuple(Value(value.aval) for value in values)
    return Node("optimization_barrier", tuple(values), outs, lambda *arrays: lax.optimization_barrier(arrays))
