"""The collectives of a function and the mesh axes that they run over, read from its jaxpr."""

from __future__ import annotations

from collections.abc import Iterable

from jaxpipe._jax import SILENT, ClosedJaxpr, Jaxpr, JaxprEqn
from jaxpipe.stage.graph import Node

_NAMING = ("axes", "axis_name", "axis_names")
"""Parameters in which primitives name mesh axes; jaxprs' effects leave out those of ``ppermute`` and of inner calls."""

Collectives = frozenset[tuple[str, str]]
"""(primitive, mesh axis) of each collective."""


def collectives_of_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> Collectives:
    """All collectives in a jaxpr, however deep.

    >>> import jax, jax.numpy as jnp
    >>> function = lambda x: jax.lax.cond(x.sum() > 0, lambda x: jax.lax.psum(x, "dp"), lambda x: x, x)
    >>> sorted(collectives_of_jaxpr(jax.make_jaxpr(function, axis_env=[("dp", 2), ("pp", 2)])(jnp.ones(3))))
    [('psum', 'dp')]
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return frozenset().union(*map(_of_eqn, inner.eqns))


def collectives_of_nodes(nodes: Iterable[Node]) -> Collectives:
    """All collectives in a graph."""
    found: Collectives = frozenset()
    for node in nodes:
        for body in node.bodies:
            found |= collectives_of_nodes(body)
        if node.eqn is not None:
            found |= _of_eqn(node.eqn)
    return found


def _of_eqn(eqn: JaxprEqn) -> Collectives:
    found: Collectives = frozenset()
    for name, value in eqn.params.items():
        for part in value if isinstance(value, (tuple, list, frozenset, set)) else (value,):
            if isinstance(part, Jaxpr | ClosedJaxpr):
                found |= collectives_of_jaxpr(part)
            elif name in _NAMING and isinstance(part, str) and eqn.primitive.name not in SILENT:
                found |= {(eqn.primitive.name, part)}
    return found
