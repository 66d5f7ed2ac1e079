"""What makes numbers of 8 bits of parameters: worth doing once a step although wider numbers are made on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxpipe.stage.graph import Node, Value, has_effect, producers

_SCALES = 1024
"""Scales beside numbers of 8 bits are fewer bytes than one for so many of the parameters: they may come on top."""


class Together(NamedTuple):
    """Nodes that are worth running once a step together.

    Attributes:
      nodes: those that read parameters, constants and each other alone.
      kept: results that are no more bytes than the parameters they derive from. The others are read by ``nodes`` alone.
      roots: the parameters that each result derives from.
    """

    nodes: frozenset[Node]
    kept: frozenset[Value]
    roots: Mapping[Value, frozenset[Value]]


def quantising_nodes(
    nodes: Sequence[Node], params: Collection[Value], constants: Collection[Value], results: Collection[Value]
) -> Together:
    """The nodes that make numbers of 8 bits of parameters, with all that these are made of.

    Args:
      nodes: in an order in which they can run.
      params: what is given.
      constants: values that are made of nothing, see `constant_nodes`, which may be made again.
      results: what is read of the nodes besides.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> def scaled(w, x):
    ...     wide = w.astype(jnp.float32)
    ...     scale = jnp.abs(wide).max() / 448
    ...     return x @ (wide / scale).astype(jnp.float8_e4m3fn).astype(jnp.bfloat16)
    >>> shape = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
    >>> graph = make_graph(jax.make_jaxpr(scaled)(shape, shape))
    >>> found = quantising_nodes(graph.nodes, graph.inputs[:1], (), graph.outputs)
    >>> sorted(node.name for node in found.nodes)
    ['abs', 'convert_element_type', 'convert_element_type', 'convert_element_type', 'div', 'div', 'reduce_max']
    """
    roots = {value: frozenset({value}) for value in params}
    candidates: list[Node] = []
    narrow: frozenset[Value] = frozenset()
    for node in nodes:
        read = [value for value in node.ins if value.const is None and value not in constants]
        if read and not has_effect(node) and node.scan is None and all(value in roots for value in read):
            origin = frozenset[Value]().union(*(roots[value] for value in read))
            roots.update((out, origin) for out in node.outs)
            candidates.append(node)
            if any(_is_narrow(out) for out in node.outs):
                narrow |= origin
    if not narrow:
        return Together(frozenset(), frozenset(), {})

    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.ins:
            readers.setdefault(value, []).append(node)
    chosen = {node for node in candidates if roots[node.outs[0]] <= narrow}
    made = producers(candidates)

    def fits(node: Node) -> bool:
        own = roots[node.outs[0]]
        most = sum(root.nbytes for root in own)
        return sum(out.nbytes for out in node.outs) <= most + most // _SCALES

    def belongs(node: Node) -> bool:
        if not all(made[value] in chosen for value in node.ins if value in made):
            return False
        uses = [reader for out in node.outs for reader in readers.get(out, ())]
        inside = bool(uses) and all(reader in chosen for reader in uses) and not any(o in results for o in node.outs)
        return inside or fits(node)

    while left := {node for node in chosen if not belongs(node)}:
        chosen -= left
    kept = frozenset(out for node in chosen if fits(node) for out in node.outs)
    return Together(frozenset(chosen), kept, roots)


def constant_nodes(nodes: Sequence[Node], constants: Collection[Value] = ()) -> list[Node]:
    """The nodes that read nothing, or what such nodes make; ``constants`` are values so made elsewhere."""
    known = set(constants)
    found = []
    for node in nodes:
        single = node.scan is None and node.cond is None and not has_effect(node)
        if single and all(value.const is not None or value in known for value in node.ins):
            found.append(node)
            known.update(node.outs)
    return found


def _is_narrow(value: Value) -> bool:
    dtype = value.aval.dtype
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1
