"""Backward passes that read what is known from parameters, where JAX has them read copies of it.

JAX derives of a conditional one that also returns what its backward reads: what each branch keeps, in places that the
branches share. Where a branch keeps a parameter, that is a copy, for each microbatch, and in a loop for each turn. The
backward's conditional has the same index, so in each of its branches it can read the parameter instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from jaxpipe.stage.branches import entering, merge_recomputed, with_entering
from jaxpipe.stage.divide import closure, light_results
from jaxpipe.stage.graph import Branch, Cond, Node, Scan, Value, producers
from jaxpipe.stage.rewrite import substitute


def read_known(
    nodes: Sequence[Node], forward: Sequence[Node], known: Iterable[Value], results: Collection[Value]
) -> list[Node]:
    """Nodes whose conditionals, in loops, too, read known values and not what conditionals before them pass on of them.

    Args:
      nodes: of a backward pass that reads the forward's values; those without conditionals stay as they are.
      forward: the nodes of the forward.
      known: values that cost nothing to read.
      results: what is read of the nodes besides.
    """
    if not _has_cond(nodes):
        return list(nodes)
    known = light_results((*forward, *nodes), known)
    made = producers(forward)
    rebuilt = []
    for node in nodes:
        if node.cond is not None:
            node = _read_in_branches(node.cond, made, known)
        elif node.scan is not None and _has_cond(node.scan.nodes):
            node = _read_in_body(node.scan, made, known)
        rebuilt.append(node)
        made.update((value, node) for value in node.outs)
    return merge_recomputed(rebuilt, results)


def _read_in_branches(cond: Cond, made: dict[Value, Node], known: Collection[Value]) -> Node:
    """The conditional, its branches in the values of those with the same index that make what it reads."""
    makers = (made[operand].cond for operand in cond.operands if operand in made)
    earlier = [maker for maker in dict.fromkeys(makers) if maker is not None and maker.index is cond.index]
    branches: list[Branch] = []
    pairs: list[list[tuple[Value, Value]]] = []
    for place, branch in enumerate(cond.branches):
        alias: dict[Value, Value] = {}
        given: dict[Value, Value] = {}
        for maker in earlier:
            there = maker.branches[place]
            pairs_there = zip((*maker.operands, *maker.results), (*there.inputs, *there.outputs), strict=True)
            names = {outer: inner for outer, inner in pairs_there if inner is not None}
            alias |= {inner: names[outer] for outer, inner in entering(cond, branch) if outer in names}
            given |= {inner: outer for outer, inner in entering(maker, there) if outer in known}
        sources = {alias.get(inner, inner): outer for outer, inner in entering(cond, branch)}
        given |= {inner: outer for inner, outer in sources.items() if outer in known}
        forward = [node for maker in earlier for node in maker.branches[place].nodes]
        outputs = tuple(None if value is None else alias.get(value, value) for value in branch.outputs)
        results = [value for value in outputs if value is not None]
        rebuilt = Branch(_rebuild(branch.nodes, alias, forward, given, results), (), outputs)
        reads = rebuilt.reads()
        branches.append(rebuilt)
        pairs.append([(outer, inner) for inner, outer in (sources | given).items() if inner in reads])
    return with_entering(cond, branches, pairs).node()


def _read_in_body(scan: Scan, made: dict[Value, Node], known: Collection[Value]) -> Node:
    """The loop, its body in the values of those that stacked what it reads."""
    makers = (made[stacked].scan for stacked, _ in scan.xs if stacked in made)
    earlier = [maker for maker in dict.fromkeys(makers) if maker is not None and maker.length == scan.length]
    alias: dict[Value, Value] = {}
    consts: dict[Value, Value] = {}
    xs: dict[Value, Value] = {}
    for maker in earlier:
        rows = {**dict(maker.xs), **{stacked: inner for inner, stacked in maker.ys}}
        alias |= {inner: rows[stacked] for stacked, inner in scan.xs if stacked in rows}
        fixed = dict(maker.consts)
        alias |= {inner: fixed[outer] for outer, inner in scan.consts if outer in fixed}
        consts |= {inner: outer for outer, inner in maker.consts if outer in known}
        xs |= {inner: stacked for stacked, inner in maker.xs if stacked in known}

    def new(value: Value) -> Value:
        return alias.get(value, value)

    consts = {new(inner): outer for outer, inner in scan.consts} | consts
    xs = {new(inner): stacked for stacked, inner in scan.xs} | xs
    given = {inner: outer for inner, outer in (consts | xs).items() if outer in known}
    carries = tuple(carry._replace(leaving=new(carry.leaving)) for carry in scan.carries)
    ys = tuple((new(inner), stacked) for inner, stacked in scan.ys)
    results = (*(carry.leaving for carry in carries), *(inner for inner, _ in ys))
    forward = [node for maker in earlier for node in maker.nodes]
    return dataclasses.replace(
        scan,
        nodes=_rebuild(scan.nodes, alias, forward, given, results),
        consts=tuple((outer, inner) for inner, outer in consts.items()),
        carries=carries,
        xs=tuple((stacked, inner) for inner, stacked in xs.items()),
        ys=ys,
    ).node()


def _rebuild(
    nodes: Sequence[Node],
    alias: Mapping[Value, Value],
    forward: Sequence[Node],
    given: Mapping[Value, Value],
    results: Collection[Value],
) -> tuple[Node, ...]:
    """The nodes of a body or branch in the values of the forward's, after those that make known ones again."""
    inner = read_known([substitute(node, alias) for node in nodes], forward, given, set(results))
    made, known = producers(inner), light_results(forward, given)
    reads = dict.fromkeys((*(value for node in inner for value in node.ins), *results))
    missing = [value for value in reads if value in known and value not in made]
    again = closure(missing, forward, given)
    assert again is not None
    return (*again, *inner)


def _has_cond(nodes: Iterable[Node]) -> bool:
    return any(node.cond is not None or any(map(_has_cond, node.bodies)) for node in nodes)
