"""Conditionals rebuilt around other nodes: with fewer results, and with values that go in or come out besides.

What one conditional hands to another with the same index, only the branch that was taken has made. So values of equal
shape and dtype of different branches share one place, and a stash is as large as the largest branch needs it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxpipe.stage.graph import Branch, Cond, Node, Value
from jaxpipe.stage.rewrite import substitute


class Shared(NamedTuple):
    """A value of the outer graph, and which value of each branch it holds; None where a branch has none."""

    outer: Value
    inner: tuple[Value | None, ...]


def share(values: Sequence[Sequence[Value]]) -> list[Shared]:
    """One place for the first value of each shape and dtype of all branches, one for the second, and so on.

    >>> import jax, jax.numpy as jnp
    >>> a, b, c = (Value(jax.typeof(jnp.zeros(size))) for size in (2, 2, 3))
    >>> [(place.outer.aval.shape, place.inner == (a, b)) for place in share([[a], [b, c]])]
    [((2,), True), ((3,), False)]
    """
    places: dict[Any, list[Value | None]] = {}
    for branch, each in enumerate(values):
        counts: collections.Counter[Any] = collections.Counter()
        for value in each:
            kind = value.aval.shape, value.aval.dtype
            places.setdefault((*kind, counts[kind]), [None] * len(values))[branch] = value
            counts[kind] += 1
    return [
        Shared(Value(next(value for value in inner if value is not None).aval), tuple(inner))
        for inner in places.values()
    ]


def operands_of_branches(pairs: Sequence[Iterable[tuple[Value, Value]]]) -> list[Shared]:
    """Operands from which each branch has its values, of (outside, inside) pairs."""
    rows: dict[tuple[Value, int], list[Value | None]] = {}
    for branch, each in enumerate(pairs):
        counts: collections.Counter[Value] = collections.Counter()
        for outer, inner in each:  # a branch may have one from outside by several names
            rows.setdefault((outer, counts[outer]), [None] * len(pairs))[branch] = inner
            counts[outer] += 1
    return [Shared(outer, tuple(inner)) for (outer, _), inner in rows.items()]


def outputs_for(cond: Cond, branch: Branch, results: Iterable[Value]) -> set[Value]:
    """What a branch has to make for some results."""
    wanted = set(results)
    pairs = zip(branch.outputs, cond.results, strict=True)
    return {value for value, result in pairs if value is not None and result in wanted}


def restricted(
    cond: Cond,
    nodes: Sequence[tuple[Node, ...]],
    results: set[Value],
    *,
    given: Sequence[Shared] = (),
    returned: Sequence[Shared] = (),
) -> Cond:
    """The conditional with these nodes in its branches, and of its results only some.

    Args:
      cond: to restrict.
      nodes: of each branch.
      results: that are left.
      given: operands besides its own.
      returned: results besides.
    """
    places = [place for place, result in enumerate(cond.results) if result in results]
    branches = tuple(
        Branch(
            nodes=nodes[index],
            inputs=(*branch.inputs, *(each.inner[index] for each in given)),
            outputs=(*(branch.outputs[place] for place in places), *(each.inner[index] for each in returned)),
        )
        for index, branch in enumerate(cond.branches)
    )
    return dataclasses.replace(
        cond,
        operands=(*cond.operands, *(each.outer for each in given)),
        branches=branches,
        results=(*(cond.results[place] for place in places), *(each.outer for each in returned)),
    )


def entering(cond: Cond, branch: Branch) -> list[tuple[Value, Value]]:
    """(outside, inside) of what a branch reads."""
    pairs = zip(cond.operands, branch.inputs, strict=True)
    return [(outer, inner) for outer, inner in pairs if inner is not None]


def with_entering(cond: Cond, branches: Sequence[Branch], pairs: Sequence[Iterable[tuple[Value, Value]]]) -> Cond:
    """The conditional with other branches, each of which reads what these (outside, inside) pairs name."""
    shared = operands_of_branches(pairs)
    rows = zip(*(each.inner for each in shared), strict=True) if shared else ((),) * len(branches)
    return dataclasses.replace(
        cond,
        operands=tuple(each.outer for each in shared),
        branches=tuple(branch._replace(inputs=tuple(row)) for branch, row in zip(branches, rows, strict=True)),
    )


def merge_recomputed(nodes: Sequence[Node], results: Iterable[Value]) -> list[Node]:
    """Nodes in which a conditional whose results only one other with the same index reads is part of that one.

    `jax.checkpoint` computes a conditional again for its derivative. Together they are divided branch by branch: what
    one branch reads in the first half, another may read in the second.

    Args:
      nodes: whose conditionals read each other's values, as `jaxpipe.stage.known.read_known` leaves them.
      results: what is read of the nodes besides.
    """
    readers: dict[Value, list[Node]] = collections.defaultdict(list)
    for node in nodes:
        for value in dict.fromkeys(node.ins):
            readers[value].append(node)
    kept = set(results)
    merged: dict[Node, Cond] = {}
    gone: set[Node] = set()
    for node in nodes:
        if node.cond is None:
            continue
        values = [value for value in node.outs if not value.effect]
        found = dict.fromkeys(reader for value in values for reader in readers[value])
        only = next(iter(found)) if len(found) == 1 and kept.isdisjoint(values) else None
        if only is not None and only.cond is not None and only.cond.index is node.cond.index:
            merged[only] = _joined(merged.get(node, node.cond), merged.get(only, only.cond))
            gone.add(node)
    return [merged[node].node() if node in merged else node for node in nodes if node not in gone]


def _joined(one: Cond, two: Cond) -> Cond:
    """Both in one, with the effects of the first."""
    effects = [place for place, result in enumerate(one.results) if result.effect]
    branches, pairs = [], []
    for first, second in zip(one.branches, two.branches, strict=True):
        made = {value for node in first.nodes for value in node.outs}
        own = {inner: outer for outer, inner in entering(one, first)}
        more = {inner: outer for outer, inner in entering(two, second) if inner not in made and inner not in own}
        outputs = (*second.outputs, *(first.outputs[place] for place in effects))
        rest = (node for node in second.nodes if not made.issuperset(node.outs))  # not what both make of parameters
        branches.append(Branch((*first.nodes, *rest), (), outputs))
        pairs.append([(outer, inner) for inner, outer in (own | more).items()])
    results = (*two.results, *(one.results[place] for place in effects))
    return with_entering(dataclasses.replace(two, results=results), branches, pairs)


def hoisted_of_branches(
    cond: Cond, parts: Sequence[tuple[Mapping[Value, Value], Sequence[Node], Branch, set[Value]]]
) -> tuple[list[Node], Node]:
    """(the nodes that leave the branches, in values of the outer graph; the conditional that reads their results).

    What several branches make alike, such as a cast of one parameter, is made once.

    Args:
      cond: whose branches they leave.
      parts: of each branch: what its inputs are outside, the nodes that leave it, what is left of it, and the values
        that this still reads of them.
    """
    moved: list[Node] = []
    done: dict[Any, Node] = {}
    pairs: list[list[tuple[Value, Value]]] = []
    for inputs, nodes, _, wanted in parts:
        outside = dict(inputs)
        for node in nodes:
            names = {**outside, **{out: dataclasses.replace(out) for out in node.outs}}
            fresh = substitute(node, names)
            key = (node.name, fresh.ins, repr(sorted(node.eqn.params.items()))) if node.eqn else fresh
            if key not in done:
                done[key] = fresh
                moved.append(fresh)
            outside.update(zip(node.outs, done[key].outs, strict=True))
        pairs.append([(outside[out], out) for node in nodes for out in node.outs if out in wanted])
    left = [branch.nodes for _, _, branch, _ in parts]
    return moved, restricted(cond, left, set(cond.results), given=operands_of_branches(pairs)).node()
