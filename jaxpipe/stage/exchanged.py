"""What devices make together of parameters alone: worth doing once a step although it may be more bytes than these.

Working copies of experts are gathered of masters, and redundant ones make them more bytes. To gather them for each
microbatch takes the network each time; to keep them takes memory, but little more than the parameters'. Parameters that
are gathered of shards are as many times more bytes as there are shards: keeping those would undo the sharding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpipe._jax import COLLECTIVES
from jaxpipe.stage.fuse import is_gathered
from jaxpipe.stage.graph import Node, Value, has_effect, producers
from jaxpipe.stage.quantised import Together

MAX_GROWTH = 2.0
"""What collectives make of parameters is kept for a step where it is fewer than so many times the parameters' bytes.

Redundant experts that are fewer than the experts stay below, and shards gathered of two devices or more do not.
"""

_PARTS = frozenset({"slice", "split", "dynamic_slice"})
"""Primitives that read a part of a parameter; what is made of it is compared with that part."""


def check_growth(where: str, max_growth: Any) -> float:
    """The value as a float.

    Raises:
      ValueError: it is not a number of at least 1.

    >>> check_growth("a stage", 4)
    4.0
    """
    number = not isinstance(max_growth, bool) and isinstance(max_growth, (int, float, np.integer, np.floating))
    if not number or not max_growth >= 1:
        raise ValueError(
            f"{where} with max_growth={max_growth!r}: it must be a number of at least 1, how many times the bytes of "
            "parameters may be kept of what collectives make of them; math.inf: however many"
        )
    return float(max_growth)


def exchanges(nodes: Iterable[Node]) -> bool:
    """Whether any of the nodes, or of those in bodies and branches, is a collective."""
    return any(node.name in COLLECTIVES or any(map(exchanges, node.bodies)) for node in nodes)


def exchanged_nodes(
    nodes: Sequence[Node],
    params: Collection[Value],
    constants: Collection[Value],
    results: Collection[Value],
    max_growth: float = MAX_GROWTH,
) -> Together:
    """The collectives of parameters alone and what follows from them alone, as far as what is kept is small enough.

    Args:
      nodes: in an order in which they can run.
      params: what is given.
      constants: values that are made of nothing and may be made again.
      results: what is read of the nodes besides.
      max_growth: see `MAX_GROWTH`; it holds of each value that is kept, and of all together that are made of the same
        parameters.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> def copies(w, x):
    ...     everyones = jax.lax.all_gather(w, "ep", tiled=True)
    ...     return jnp.outer(x, everyones[:5].sum() * everyones[:5])
    >>> w, x = jnp.ones(4), jnp.ones(3)
    >>> graph = make_graph(jax.make_jaxpr(copies, axis_env=[("ep", 2)])(w, x))
    >>> found = exchanged_nodes(graph.nodes, graph.inputs[:1], (), graph.outputs)
    >>> sorted(node.name for node in found.nodes if node.name != "slice")
    ['all_gather', 'broadcast_in_dim', 'mul', 'reduce_sum']
    """
    roots: dict[Value, frozenset[Value]] = {value: frozenset({value}) for value in params}
    parts = dict(roots)  # the same, where what is made of a part of a parameter is compared with that part
    candidates: list[Node] = []
    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.ins:
            readers.setdefault(value, []).append(node)
    for node in nodes:
        read = [value for value in node.ins if value.const is None and value not in constants]
        if not read or has_effect(node) or node.scan is not None or any(value not in roots for value in read):
            continue
        if any(is_gathered(reader) for out in node.outs for reader in readers.get(out, ())):
            continue  # gathered where it is used, as `fsdp_axis` promises
        if any(out.rows for out in node.outs):
            continue  # of its rows, which are read in its place
        part = node.row is not None or node.name in _PARTS
        roots.update(dict.fromkeys(node.outs, frozenset[Value]().union(*(roots[value] for value in read))))
        origin = frozenset[Value]().union(*(parts[value] for value in read))
        parts.update((out, frozenset({out}) if part and origin.issuperset(read) else origin) for out in node.outs)
        candidates.append(node)
    chosen: set[Node] = set()
    after: set[Value] = set()
    for node in candidates:
        if exchanges((node,)) or not after.isdisjoint(node.ins):
            chosen.add(node)
            after.update(node.outs)
    if not chosen:
        return Together(frozenset(), frozenset(), {})

    results = frozenset(results)
    while chosen:
        chosen = _largest(chosen, candidates, readers, results, parts, max_growth)
        kept = _read_outside(chosen, readers, results)
        large = _too_large(kept, parts, max_growth)
        if not large:
            break
        chosen = {node for node in chosen if large.isdisjoint(parts[node.outs[0]])}
    made, found, pending = producers(candidates), set(chosen), list(chosen)
    while pending:
        more = {made[value] for value in pending.pop().ins if value in made} - found
        found |= more
        pending += more
    kept = frozenset(out for node in chosen for out in node.outs if _is_small([out], parts[out], max_growth))
    return Together(frozenset(found), kept, roots)


def _largest(
    chosen: set[Node],
    candidates: Sequence[Node],
    readers: Mapping[Value, Sequence[Node]],
    results: frozenset[Value],
    roots: Mapping[Value, frozenset[Value]],
    max_growth: float,
) -> set[Node]:
    """Those that make what is small enough to keep, or what only such nodes read."""
    after = {out for node in chosen for out in node.outs}
    made = producers(candidates)

    def belongs(node: Node) -> bool:
        if any(value in made and made[value] not in chosen for value in node.ins if value in after):
            return False
        uses = [reader for out in node.outs for reader in readers.get(out, ())]
        inside = bool(uses) and all(reader in chosen for reader in uses) and results.isdisjoint(node.outs)
        return inside or _is_small(node.outs, roots[node.outs[0]], max_growth)

    while left := {node for node in chosen if not belongs(node)}:
        chosen = chosen - left
    return chosen


def _read_outside(chosen: set[Node], readers: Mapping[Value, Sequence[Node]], results: frozenset[Value]) -> list[Value]:
    outs = [out for node in chosen for out in node.outs]
    return [out for out in outs if out in results or any(reader not in chosen for reader in readers.get(out, ()))]


def _is_small(values: Iterable[Value], roots: Iterable[Value], max_growth: float) -> bool:
    return sum(value.nbytes for value in values) < max_growth * sum(root.nbytes for root in roots)


def _too_large(kept: Sequence[Value], roots: Mapping[Value, frozenset[Value]], max_growth: float) -> frozenset[Value]:
    """The parameters of which too many bytes are kept, with all that belong to the same."""
    groups: list[tuple[set[Value], list[Value]]] = []
    for value in kept:
        mine: tuple[set[Value], list[Value]] = set(roots[value]), [value]
        others = []
        for group in groups:
            if group[0].isdisjoint(mine[0]):
                others.append(group)
            else:
                mine = mine[0] | group[0], [*mine[1], *group[1]]
        groups = [*others, mine]
    large = [own for own, values in groups if not _is_small(values, own, max_growth)]
    return frozenset[Value]().union(*large)
