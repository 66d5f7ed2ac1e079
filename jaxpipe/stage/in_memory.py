"""Which values a device's memory holds in any case, since a kernel makes or reads them whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxpipe._jax import LIGHT, SAME_ORDER
from jaxpipe.stage.graph import Node, Value


def held_in_memory(nodes: Sequence[Node], results: Iterable[Value] = ()) -> set[Value]:
    """Values that kernels make or read, as they are or in another shape; elementwise work on the way is fused.

    Args:
      nodes: in an order in which they can run.
      results: what else is in memory, with what has its bytes.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> graph = make_graph(jax.make_jaxpr(lambda x: jnp.cos(jnp.sin(x)) @ x + 1)(x))
    >>> held = held_in_memory(graph.nodes)
    >>> [(node.name, node.outs[0] in held) for node in graph.nodes]
    [('sin', False), ('cos', True), ('dot_general', True), ('add', False)]
    """
    found = {*results, *_read_by_kernels(nodes), *(v for node in nodes if node.name not in LIGHT for v in node.outs)}
    for node in nodes:
        if node.name in SAME_ORDER and node.ins[0] in found:
            found.update(node.outs)
    return _with_operands(found, nodes)


def read_by_kernels(nodes: Sequence[Node]) -> set[Value]:
    """Values that kernels read whole, as they are or in another shape.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> graph = make_graph(jax.make_jaxpr(lambda x: jnp.sin(x @ x))(x))
    >>> read_by_kernels(graph.nodes) == set(graph.inputs)
    True
    """
    return _with_operands(_read_by_kernels(nodes), nodes)


def _read_by_kernels(nodes: Sequence[Node]) -> set[Value]:
    """As they are."""
    return {value for node in nodes if node.name not in LIGHT for value in node.ins}


def _with_operands(found: set[Value], nodes: Sequence[Node]) -> set[Value]:
    """Also the values that some of these have in another shape."""
    for node in reversed(nodes):
        if node.name in SAME_ORDER and node.outs[0] in found:
            found.add(node.ins[0])
    return found
