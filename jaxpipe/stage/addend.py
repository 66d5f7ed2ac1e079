"""Products that are added to sums over microbatches by what makes them, in the sums' place.

A kernel that makes a weight gradient may add it to a sum: neither is the gradient written, nor is there a pass that
reads it and the sum. Such a product is an equation, of any primitive, with two parameters: ``jaxpr`` makes the product
of the equation's operands, and ``accumulable`` is an object with a method

    accumulate(total, counts, *operands) -> the sum of the total and the product, in the total's shape and dtype

``total`` is an array of the product's shape, of any floating dtype, or `jax.ShapeDtypeStruct` where nothing has been
added yet. ``counts`` is a bool: where it is False the sum is the total, whatever the operands are; None counts. What is
called so in a loop should write over the total, which the loop carries.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe._jax import ACCUMULABLE, SAME_ORDER
from jaxpipe.stage.graph import Node, Value, contexts, producers

_SAME_ORDER = SAME_ORDER | {"broadcast_in_dim"}
"""Primitives whose result, where it has as many numbers, has those of their operand in the same order."""


@dataclasses.dataclass(frozen=True)
class Addend:
    """A product that has not been made yet, to be added to a sum.

    Attributes:
      node: what makes it.
      operands: of the node.
    """

    node: Node
    operands: tuple[Any, ...]

    def add_to(self, total: jax.Array | jax.ShapeDtypeStruct, counts: jax.Array | None = None) -> jax.Array:
        """The total and the product, in the total's shape and dtype; the total where ``counts`` is False.

        ``total`` has as many numbers as the product in the same order. Its shape and dtype stand for zeros.
        """
        assert self.node.eqn is not None
        shape = self.node.outs[0].aval.shape
        empty = isinstance(total, jax.ShapeDtypeStruct)
        before = jax.ShapeDtypeStruct(shape, total.dtype) if empty else total.reshape(shape)
        with contexts((*self.node.context, self.node.eqn)):
            found = self.node.eqn.params[ACCUMULABLE].accumulate(before, counts, *map(jnp.asarray, self.operands))
        return found.reshape(total.shape)


def find_addends(
    values: Sequence[Value], nodes: Sequence[Node], also: Sequence[Value] = ()
) -> tuple[Mapping[Value, Node], tuple[Node, ...]]:
    """(those of the values that are nothing but a product that can be added, with its node; the other nodes).

    Such a value may be a product in another shape, but nothing else reads it or the product: no node, and it is none of
    ``also``.
    """
    made = producers(nodes)
    reads = collections.Counter([*values, *also, *(value for node in nodes for value in node.ins)])
    found: dict[Value, Node] = {}
    left: set[Node] = set()
    for value in values:
        chain: list[Node] = []
        source = value
        while reads[source] == 1 and (node := made.get(source)):
            chain.append(node)
            if not _is_same(node):
                break
            source = node.ins[0]
        if chain and is_product(chain[-1]):
            found[value] = chain[-1]
            left.update(chain)
    return found, tuple(node for node in nodes if node not in left)


def products_of(nodes: Sequence[Node]) -> set[Value]:
    """The values that are nothing but a product which can be added to a sum, in whatever shape."""
    found: set[Value] = set()
    for node in nodes:
        if is_product(node) or (_is_same(node) and node.ins[0] in found):
            found.update(node.outs)
    return found


def is_product(node: Node) -> bool:
    """Whether a node makes a product that can be added to a sum in its place."""
    return node.eqn is not None and ACCUMULABLE in node.eqn.params


def _is_same(node: Node) -> bool:
    """Whether a node's result has the numbers of its operand, in their order."""
    return node.name in _SAME_ORDER and node.ins[0].nbytes == node.outs[0].nbytes
