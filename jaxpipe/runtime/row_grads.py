"""Gradients that are zero but for some rows, as an embedding's: added to a sum where they belong.

The gradient of ``table[tokens]`` is an array as large as the table with one row added for each token. To make it takes
zeros everywhere, and so does it to add it to a sum: of 129,280 rows of 7168 in float32 that is 15 GB read and written
for each microbatch, where 4096 tokens have 0.06 GB. Rows that go into the sum itself take none of that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe._jax import ADDS_ROWS
from jaxpipe.runtime.buffers import accumulation_dtype, add, select
from jaxpipe.stage.divide import divide
from jaxpipe.stage.effects import effects_of
from jaxpipe.stage.graph import Node, Value, evaluate, is_zero, make_graph, producers, read, scatter_options


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("indices", "updates"), meta_fields=("shape", "options")
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """What `jax.lax.scatter_add` would add to zeros.

    Attributes:
      indices, updates: of `jax.lax.scatter_add`.
      shape: of the zeros.
      options: its further arguments, (name, value).
    """

    indices: jax.Array
    updates: jax.Array
    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def added_to(self, total: jax.Array) -> jax.Array:
        """The total with the rows added in its dtype; in one of fewer than 32 bits, rows of one place first."""
        wide = accumulation_dtype(total.dtype)
        into = total if total.dtype == wide else jnp.zeros(self.shape, wide)
        into = lax.scatter_add(into, self.indices, self.updates.astype(wide), **dict(self.options))
        return into if total.dtype == wide else total + into.astype(total.dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Nothing:
    """Stands for zeros, as a gradient of what is not read."""


def pull_back_rows(pull_back: Callable[[Any], Any], ct: Any) -> Any:
    """``pull_back(ct)`` with `Rows` in place of every array that is nothing but rows added to zeros.

    `Nothing` is in place of zeros.

    >>> _, pull_back = jax.vjp(lambda table: table[jnp.array([2, 0, 2])], jnp.ones((4, 1)))
    >>> (rows,) = pull_back_rows(pull_back, jnp.ones((3, 1)))
    >>> rows.added_to(jnp.zeros((4, 1))).ravel().tolist()
    [1.0, 0.0, 2.0, 0.0]
    """
    closed, shapes = jax.make_jaxpr(pull_back, return_shape=True)(ct)
    graph = make_graph(closed)
    made = producers(graph.nodes)
    scatters = [_scatter_of(value, made) for value in graph.outputs]
    zeros = {value for value in graph.outputs if is_zero(value, made)}
    if not any(scatters) and not zeros:
        return pull_back(ct)
    wanted = [
        value
        for output, scatter in zip(graph.outputs, scatters, strict=True)
        for value in ((output,) if scatter is None else scatter.ins[1:])
        if value not in zeros
    ]
    env = dict(zip(graph.inputs, jax.tree.leaves(ct), strict=True))
    evaluate(divide(graph.nodes, (*wanted, *effects_of(graph.nodes)), ()).first, env)
    leaves = [
        Nothing() if output in zeros else read(env, output) if scatter is None else _rows(scatter, env)
        for output, scatter in zip(graph.outputs, scatters, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def add_with_rows(total: Any, value: Any, counts: jax.Array | None = None) -> Any:
    """`jaxpipe.runtime.buffers.add` of values of which some are `Rows` or `Nothing`."""

    def one(total: jax.Array, value: Any) -> jax.Array:
        if isinstance(value, Nothing):
            return total
        if isinstance(value, Rows):
            return dataclasses.replace(value, updates=select(value.updates, counts)).added_to(total)
        return add(total, value, counts)

    return jax.tree.map(one, total, value)


def _scatter_of(value: Value, made: Mapping[Value, Node]) -> Node | None:
    """The node that adds rows to zeros, where the value is what it makes, or that in a wider dtype."""
    node = made.get(value)
    while node is not None and node.name == "convert_element_type" and node.ins[0].nbytes < node.outs[0].nbytes:
        node = made.get(node.ins[0])
    if node is None or node.eqn is None or node.name not in ADDS_ROWS or not is_zero(node.ins[0], made):
        return None
    return node


def _rows(scatter: Node, env: dict[Value, Any]) -> Rows:
    assert scatter.eqn is not None
    indices, updates = (read(env, value) for value in scatter.ins[1:])
    options = tuple(scatter_options(scatter.eqn).items())
    return Rows(jnp.asarray(indices), updates, scatter.outs[0].aval.shape, options)
