"""Orders in which nodes can run so that few values live at a time."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from jaxpipe.stage.graph import Node, Value, producers


def in_time(again: Sequence[Node], nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Both in one order, each node of ``again`` right before the first that reads it.

    >>> a, b, c = Value(None), Value(None), Value(None)
    >>> early, late, reader = Node("neg", (), (a,), list), Node("sin", (), (b,), list), Node("add", (b,), (c,), list)
    >>> [node.name for node in in_time((late,), (early, reader))]
    ['neg', 'sin', 'add']
    """
    made = producers(again)
    placed: dict[Node, None] = {}

    def place(node: Node) -> None:
        if node not in placed:
            for value in node.ins:
                if value in made:
                    place(made[value])
            placed[node] = None

    for node in (*nodes, *again):
        place(node)
    return tuple(placed)


def as_soon_as_possible(nodes: Sequence[Node], among: Sequence[Node]) -> tuple[Node, ...]:
    """Both in one order, each of the nodes right after the last one that it waits for.

    What a node makes ready runs before whatever else is ready.

    Args:
      nodes: in an order in which they can run after the others.
      among: in their order, which stays.

    >>> a, b, c = Value(None), Value(None), Value(None)
    >>> one, two, reader = Node("neg", (), (a,), list), Node("sin", (), (b,), list), Node("add", (a,), (c,), list)
    >>> [node.name for node in as_soon_as_possible((reader,), (one, two))]
    ['neg', 'add', 'sin']
    """
    made = {value for node in (*among, *nodes) for value in node.outs}
    missing = {node: made.intersection(node.ins) for node in nodes}
    readers: dict[Value, list[Node]] = collections.defaultdict(list)
    for node, values in missing.items():
        for value in values:
            readers[value].append(node)
    placed: list[Node] = []

    def place(ready: Sequence[Node]) -> None:
        stack = [*reversed(ready)]
        while stack:
            node = stack.pop()
            placed.append(node)
            freed = []
            for reader in (reader for value in node.outs for reader in readers[value]):
                missing[reader].difference_update(node.outs)
                if not missing[reader] and reader not in freed:
                    freed.append(reader)
            stack.extend(reversed(freed))

    place([node for node, values in missing.items() if not values])
    for node in among:
        place([node])
    return tuple(placed)
