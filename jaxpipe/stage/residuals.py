"""Which values to keep, in as few bytes as possible, so that light work makes all others from them again.

A minimum cut between what only heavy work can make and what is needed, where cutting a value costs its bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Sequence

from jaxpipe._jax import LIGHT
from jaxpipe.stage.graph import Node, Value, has_effect, producers


def is_light(node: Node, *, recompute: bool) -> bool:
    """Whether doing the node's work again costs less than keeping its result: by primitive or, if asked, by name."""
    return ((recompute and node.recompute) or node.name in LIGHT) and not has_effect(node)


_Place = tuple[str, Value | Node | None]
_SOURCE: _Place = ("source", None)
_SINK: _Place = ("sink", None)
_ENDLESS = 1 << 120


def minimum_cut(
    needed: Iterable[Value], nodes: Sequence[Node], given: Collection[Value], *, recompute: bool = True
) -> set[Value]:
    """Values to keep: light nodes make the needed ones from these, from given values and from constants.

    Of all cuts of fewest bytes, this is the one that leaves least to compute again.

    Args:
      needed: values among the inputs or results of nodes.
      nodes: in an order in which they can run.
      given: values that cost nothing.
      recompute: whether what makes a value named "recompute" counts as light.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> x = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    >>> graph = make_graph(jax.make_jaxpr(lambda x: (jnp.sin(x), jnp.cos(x) * 2, x.sum(0)))(x))
    >>> minimum_cut(graph.outputs, graph.nodes, ()) == set(graph.inputs)
    True
    """
    return cheapest_cut(
        needed,
        nodes,
        given,
        keep=lambda value: value.nbytes,
        again=lambda node: 0 if is_light(node, recompute=recompute) else None,
        twice=lambda value: 0,
    )


def cheapest_cut(
    needed: Iterable[Value],
    nodes: Sequence[Node],
    given: Collection[Value],
    keep: Callable[[Value], int | None],
    again: Callable[[Node], int | None],
    twice: Callable[[Value], int],
) -> set[Value]:
    """Values to keep where both keeping and computing again has a price.

    Nodes make the needed values from what is kept, from given values and from constants. The sum of all prices is as
    small as can be; of all such choices, this is the one that leaves least to compute again.

    Args:
      needed: values among the inputs or results of nodes.
      nodes: in an order in which they can run.
      given: values that cost nothing.
      keep: the price of keeping a value; None: it cannot be kept.
      again: the price of running a node again; None: it cannot run again.
      twice: what is to be paid besides for a value that is computed again.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> x = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    >>> graph = make_graph(jax.make_jaxpr(lambda x: jnp.concatenate([x, x]) @ x.T)(x))
    >>> def chosen(price):
    ...     again = {"dot_general": 600, "concatenate": 10}
    ...     prices = lambda value: price * value.nbytes, lambda node: again.get(node.name, 0), lambda value: 0
    ...     return [value.aval.shape for value in cheapest_cut(graph.outputs, graph.nodes, (), *prices)]
    >>> chosen(1), chosen(2)  # the result of 512 bytes, or what it is made of, 64 bytes, and a product
    ([(16, 8)], [(8, 2)])
    """
    made = producers(nodes)
    needed = [value for value in needed if value.const is None and value not in given]
    network = _Network()
    pending, seen = list(needed), set(needed)
    entered: set[Node] = set()
    while pending:
        value = pending.pop()
        price = keep(value)
        network.join(("in", value), ("out", value), _ENDLESS if price is None else price + 1)
        node = made.get(value)
        cost = None if node is None else again(node)
        if node is None or cost is None:
            network.join(_SOURCE, ("in", value), _ENDLESS)
            continue
        if more := twice(value):
            network.join(_SOURCE, ("in", value), more)
        network.join(("node", node), ("in", value), _ENDLESS)
        if node in entered:
            continue
        entered.add(node)
        network.join(_SOURCE, ("node", node), cost)
        for origin in node.ins:
            if origin.const is None and origin not in given:
                network.join(("out", origin), ("node", node), _ENDLESS)
                if origin not in seen:
                    seen.add(origin)
                    pending.append(origin)
    for value in needed:
        network.join(("out", value), _SINK, _ENDLESS)
    near = network.saturate(_SOURCE, _SINK)
    return {value for value in seen if ("out", value) in near and ("in", value) not in near}


class _Network:
    """A flow network: places joined by edges of limited capacity."""

    def __init__(self) -> None:
        self.free: dict[_Place, dict[_Place, int]] = collections.defaultdict(dict)

    def join(self, start: _Place, end: _Place, capacity: int) -> None:
        self.free[start][end] = capacity
        self.free[end].setdefault(start, 0)

    def saturate(self, source: _Place, sink: _Place) -> set[_Place]:
        """Sends as much as goes through, and returns the places from which the sink can still be reached.

        Source: Dinic's algorithm, Soviet Mathematics Doklady 11, 1970.
        """
        while True:
            distance = self._distances_to(sink, source)
            if source not in distance:
                return set(distance)
            untried: dict[_Place, list[_Place]] = {}
            while path := self._shortest_path(source, sink, distance, untried):
                amount = min(self.free[start][end] for start, end in path)
                for start, end in path:
                    self.free[start][end] -= amount
                    self.free[end][start] += amount

    def _distances_to(self, sink: _Place, source: _Place) -> dict[_Place, int]:
        """How far the sink is, of places nearer to it than the source."""
        found, queue = {sink: 0}, collections.deque([sink])
        while queue:
            end = queue.popleft()
            for start in self.free[end]:
                if start not in found and self.free[start][end]:
                    found[start] = found[end] + 1
                    if start == source:
                        return found
                    queue.append(start)
        return found

    def _shortest_path(
        self, source: _Place, sink: _Place, distance: dict[_Place, int], untried: dict[_Place, list[_Place]]
    ) -> list[tuple[_Place, _Place]]:
        """Edges with capacity left, from source to sink; empty where no more path has this length."""
        path: list[tuple[_Place, _Place]] = []
        place = source
        while place != sink:
            if place not in untried:
                untried[place] = list(self.free[place])
            ends = untried[place]
            while ends:
                if self.free[place][ends[-1]] and distance.get(ends[-1]) == distance[place] - 1:
                    break
                ends.pop()
            if ends:
                path.append((place, ends[-1]))
                place = ends[-1]
            elif not path:
                return []
            else:  # a dead end
                place, _ = path.pop()
                untried[place].pop()
        return path
