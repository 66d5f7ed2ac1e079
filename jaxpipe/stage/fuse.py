"""Parameters gathered within the loop that uses them.

A loop over layers that gathers each layer's parameters of their shards leaves, for its backward, what it gathered.
That is never kept: a loop before the backward's own gathers all layers again, and would hold them all at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from jaxpipe.stage.graph import Node, Scan, Value
from jaxpipe.stage.order import in_time

GATHERED = "jaxpipe_gathered"
"""Name for `jax.ad_checkpoint.checkpoint_name`: a parameter that was gathered of its shards."""


def fuse_gathers(nodes: Sequence[Node], results: Iterable[Value]) -> tuple[Node, ...]:
    """The nodes, with what one loop gathers and stacks for another one made in that other loop.

    Args:
      nodes: in an order in which they can run.
      results: values that are read when all have run.
    """
    makers = {
        stacked: (node.scan, inner)
        for node in nodes
        if node.scan is not None and not node.scan.carries and any(map(is_gathered, node.scan.nodes))
        for inner, stacked in node.scan.ys
    }
    if not makers:
        return tuple(nodes)
    fused = [_with_makers(node, makers) for node in nodes]
    read = {value for node in fused for value in node.ins} | set(results)
    return tuple(node for node in fused if not (read.isdisjoint(node.outs) and makers.keys() & set(node.outs)))


def is_gathered(node: Node) -> bool:
    """Whether the node names what was gathered of shards."""
    return node.name == "name" and node.eqn is not None and node.eqn.params["name"] == GATHERED


def _with_makers(node: Node, makers: Mapping[Value, tuple[Scan, Value]]) -> Node:
    """A loop that makes in each turn what it read of rows that another loop had made."""
    scan = node.scan
    if scan is None:
        return node
    found = [(*makers[stacked], inner) for stacked, inner in scan.xs if stacked in makers]
    found = [(maker, made, inner) for maker, made, inner in found if maker.length == scan.length]
    if not found:
        return node
    again = {each: None for maker, _, _ in found for each in maker.nodes}
    entering = [Node("copy", (made,), (inner,), lambda array: [array]) for _, made, inner in found]
    fused = {inner for _, _, inner in found}
    return dataclasses.replace(
        scan,
        nodes=in_time((*again, *entering), scan.nodes),
        consts=tuple(dict.fromkeys((*scan.consts, *(pair for maker, _, _ in found for pair in maker.consts)))),
        xs=tuple(
            dict.fromkeys(
                (
                    *(pair for pair in scan.xs if pair[1] not in fused),
                    *(pair for maker, _, _ in found for pair in maker.xs),
                )
            )
        ),
    ).node()
