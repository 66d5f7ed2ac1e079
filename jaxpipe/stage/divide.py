"""Divides a graph in two: what the first results need, and what the second results need beyond that.

`divide` cuts the backward pass into input and weight gradients. `hoist` cuts what depends on parameters alone out of
the forward pass. Both go into the bodies of scans, which then become two loops, the first one stacking for the second,
and into the branches of conditionals, which become two with the same index (`jaxpipe.stage.branches`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from jaxpipe._jax import OPAQUE, is_heavy
from jaxpipe.stage.branches import hoisted_of_branches, outputs_for, restricted, share
from jaxpipe.stage.exchanged import MAX_GROWTH, exchanged_nodes, exchanges
from jaxpipe.stage.graph import Carry, Cond, Node, Scan, Value, has_effect, producers, stack_of
from jaxpipe.stage.quantised import constant_nodes, quantising_nodes


class Parts(NamedTuple):
    """A divided graph.

    Attributes:
      first, second: nodes, each in an order in which they can run.
      crossing: values that ``second`` (or its results) read and ``first`` makes.
      opaque: names of undivided primitives in ``first`` that make results of ``second``.
    """

    first: tuple[Node, ...]
    second: tuple[Node, ...]
    crossing: frozenset[Value]
    opaque: tuple[str, ...]


def divide(nodes: Sequence[Node], first: Iterable[Value], second: Iterable[Value]) -> Parts:
    """Divides nodes into those that the values ``first`` need, and those that ``second`` need beyond these.

    No node is in both, except those that make constants, which are cheaper to make again than to keep. Nodes that
    nothing needs vanish.
    """
    need_first, need_second = set(first), set(second)
    firsts: list[Node] = []
    seconds: list[Node] = []
    opaque: list[str] = []
    for node in reversed(nodes):
        for_first = need_first.intersection(node.outs)
        for_second = need_second.intersection(node.outs) - for_first
        one, two = _divide_node(node, for_first, for_second, opaque)
        if one is not None:
            firsts.append(one)
            need_first.update(one.ins)
        if two is not None:
            seconds.append(two)
            need_second.update(two.ins)
    firsts.reverse()
    seconds.reverse()
    made = producers(firsts)
    crossing = {value for value in need_second if value in made}
    again = _remake(crossing, made)
    remade = {value for node in again for value in node.outs}
    return Parts(tuple(firsts), (*again, *seconds), frozenset(crossing - remade), tuple(reversed(opaque)))


Sources = dict[Value, frozenset[Value]]
"""For each value known from parameters alone, the parameters it derives from."""


def hoist(
    nodes: Sequence[Node],
    params: Iterable[Value],
    results: Collection[Value] = (),
    constants: Collection[Value] = (),
    *,
    max_growth: float = MAX_GROWTH,
    exchanged: bool = False,
) -> tuple[tuple[Node, ...], tuple[Node, ...], Sources]:
    """(nodes worth computing once for given params, the rest, where all values so known derive from).

    A node is worth it if it reads params alone and makes no more bytes than the params it derives from: casts,
    transposes, products of parameters, but not broadcasts. Constants stay where they are used, and so do side effects.
    Parameters that become numbers of 8 bits do so once, whatever is made on the way: see `jaxpipe.stage.quantised`.
    So does what collectives make of parameters, though it may be more bytes: see `jaxpipe.stage.exchanged`.

    Args:
      nodes: in an order in which they can run.
      params: what is given once.
      results: what is read of the nodes besides.
      constants: values that are made of nothing and given, too.
      max_growth: how many times the bytes of parameters what collectives make of them may take.
      exchanged: whether only what collectives make counts.
    """
    sources = {value: frozenset({value}) for value in params}
    once: list[Node] = []
    rest: list[Node] = []
    free = constant_nodes(nodes, constants)
    constants = {*constants, *producers(free)}
    groups = [exchanged_nodes(nodes, sources, constants, results, max_growth)]
    if not exchanged:
        groups.append(quantising_nodes(nodes, sources, constants, results))
    for node in nodes:
        mine = [group for group in groups if node in group.nodes]
        if mine:
            once.append(node)
            kept = {out: group.roots[out] for group in mine for out in node.outs if out in group.kept}
            sources.update(kept)
            if len(kept) < len(node.outs):
                rest.append(node)  # for who reads it besides; else it vanishes
        elif node.scan is not None:
            stacked, looped = _hoist_scan(node.scan, sources, constants, max_growth, exchanged=exchanged)
            if stacked is not None:
                _derive(stacked, sources)
                once.append(stacked)
            if looped is not None:
                rest.append(looped)
        elif exchanged:
            rest.append(node)
        elif _worth_hoisting(node, sources):
            _derive(node, sources)
            once.append(node)
        elif node.cond is not None:
            before, after = _hoist_cond(node.cond, sources, max_growth)
            for moved in before:
                _derive(moved, sources)
            once += before
            rest.append(after)
        else:
            rest.append(node)
    reads = {value for node in once for value in node.ins}
    return (*divide(free, reads, ()).first, *once), tuple(rest), sources


def exchanged_of_scan(
    scan: Scan, sources: Sources, constants: Collection[Value], max_growth: float
) -> tuple[Node | None, Node | None]:
    """(a scan of what collectives make of parameters alone in each turn, stacked; a scan of the rest)."""
    return _hoist_scan(scan, sources, constants, max_growth, exchanged=True)


def closure(
    values: Iterable[Value],
    nodes: Sequence[Node],
    given: Collection[Value],
    allowed: Callable[[Node], bool] | None = None,
) -> tuple[Node, ...] | None:
    """The light nodes that make values from given ones and constants; None if it takes heavier nodes.

    Scans and conditionals are cut down to what makes the values, and are light if that is. With ``allowed`` the nodes
    that it holds of are taken, and not only light ones.
    """
    allowed = is_light if allowed is None else allowed
    made = producers(nodes)
    wanted: dict[Node, set[Value]] = {}
    pending = list(values)
    while pending:
        value = pending.pop()
        if value in given or value.const is not None:
            continue
        node = made.get(value)
        if node is None:
            return None
        if value in wanted.get(node, ()):
            continue
        wanted.setdefault(node, set()).add(value)
        cut = _cut_down(node, wanted[node])
        if not allowed(cut):
            return None
        pending.extend(cut.ins)
    return tuple(_cut_down(node, wanted[node]) for node in nodes if node in wanted)


def light_results(nodes: Sequence[Node], given: Iterable[Value]) -> set[Value]:
    """Given values, and all that light nodes make of them and of constants."""
    found = set(given)
    for node in nodes:
        if is_light(node) and all(value.const is not None or value in found for value in node.ins):
            found.update(node.outs)
    return found


def count_heavy(nodes: Sequence[Node]) -> int:
    """How many nodes, in bodies and branches, too, are not light; side effects do not count."""

    def count(node: Node) -> int:
        return sum(map(count_heavy, node.bodies)) if _divisible(node) else not (is_light(node) or has_effect(node))

    return sum(map(count, nodes))


def _cut_down(node: Node, values: set[Value]) -> Node:
    """The part of a scan or conditional that makes values; other nodes as they are."""
    if not _divisible(node):
        return node
    return dataclasses.replace(divide((node,), values, ()).first[0], recompute=node.recompute)


def _divisible(node: Node) -> bool:
    return node.scan is not None or node.cond is not None


def is_light(node: Node) -> bool:
    """Whether a node may always be computed again: no products, nor side effects, in its body or branches either."""
    if _divisible(node) and not node.recompute:
        return all(is_light(inner) for body in node.bodies for inner in body)
    return (node.recompute or not is_heavy(node.name)) and not has_effect(node)


def _divide_node(
    node: Node, for_first: set[Value], for_second: set[Value], opaque: list[str]
) -> tuple[Node | None, Node | None]:
    """The parts of a node that make the given outputs for each side."""
    if not for_first and not for_second:
        return None, None
    if node.scan is not None:
        one, two = _divide_scan(node.scan, for_first, for_second, opaque)
        return (one.node() if one.carries or one.ys else None), (two.node() if two.carries or two.ys else None)
    if node.cond is not None:
        one, two = _divide_cond(node.cond, for_first, for_second, opaque)
        return (one.node() if one.results else None), (two.node() if two.results else None)
    if not for_first:
        return None, node
    if for_second and node.name in OPAQUE:
        opaque.append(node.name)
    return node, None


def _divide_scan(scan: Scan, for_first: set[Value], for_second: set[Value], opaque: list[str]) -> tuple[Scan, Scan]:
    """A scan that makes the first outputs and stacks what a second scan needs of it."""
    first_carries = _carries_for(scan, for_first, ())
    second_carries = _carries_for(scan, for_second, first_carries)
    parts = divide(
        scan.nodes,
        _body_results(scan, first_carries, for_first),
        _body_results(scan, second_carries, for_second),
    )
    opaque.extend(parts.opaque)

    # What only the first loop knows: values made there, and its carries.
    known = {value for node in parts.first for value in node.outs} | {carry.entering for carry in first_carries}
    known -= {value for node in parts.second for value in node.outs}
    first_ys = [
        (inner, stacked)
        for inner, stacked in scan.ys
        if stacked in for_first or (stacked in for_second and inner in known)
    ]
    second_ys = [pair for pair in scan.ys if pair[1] in for_second and pair not in first_ys]
    reads = {value for node in parts.second for value in node.ins} | {carry.leaving for carry in second_carries}
    crossing = [(value, stack_of(value, scan.length)) for value in _ordered(reads & known, scan, parts.first)]
    first = dataclasses.replace(scan, nodes=parts.first, carries=first_carries, ys=(*first_ys, *crossing))
    second = dataclasses.replace(
        scan,
        nodes=parts.second,
        carries=second_carries,
        xs=(*scan.xs, *((stacked, value) for value, stacked in crossing)),
        ys=tuple(second_ys),
    )
    return first, second


def _divide_cond(cond: Cond, for_first: set[Value], for_second: set[Value], opaque: list[str]) -> tuple[Cond, Cond]:
    """A conditional that makes the first results, and returns what a second one with the same index needs of it."""
    parts = [
        divide(branch.nodes, outputs_for(cond, branch, for_first), outputs_for(cond, branch, for_second))
        for branch in cond.branches
    ]
    opaque.extend(name for each in parts for name in each.opaque)
    later = [set(producers(each.second)) for each in parts]
    known = [set(producers(each.first)) - made for each, made in zip(parts, later, strict=True)]

    def is_known(place: int) -> bool:
        """Whether no branch is left to make anything for a result that one has made for the first side."""
        values = [branch.outputs[place] for branch in cond.branches]
        some = any(value in made for value, made in zip(values, known, strict=True))
        return some and not any(value in made for value, made in zip(values, later, strict=True))

    early = {result for place, result in enumerate(cond.results) if result in for_second and is_known(place)}
    late = for_second - early
    crossing = []
    for branch, each, made in zip(cond.branches, parts, known, strict=True):
        reads = {value for node in each.second for value in node.ins} | outputs_for(cond, branch, late)
        order = dict.fromkeys(value for node in (*branch.nodes, *each.first) for value in node.outs)
        crossing.append([value for value in order if value in reads and value in made])
    shared = share(crossing)
    first = restricted(cond, [each.first for each in parts], for_first | early, returned=shared)
    second = restricted(cond, [each.second for each in parts], late, given=shared)
    return first, second


def _body_results(scan: Scan, carries: Iterable[Carry], outputs: set[Value]) -> set[Value]:
    """What the body has to make for some of the carries and of the scan's outputs."""
    return {inner for inner, stacked in scan.ys if stacked in outputs} | {carry.leaving for carry in carries}


def _carries_for(scan: Scan, outputs: set[Value], excluded: Sequence[Carry]) -> tuple[Carry, ...]:
    """The carries that outputs need, without the excluded ones."""
    candidates = [carry for carry in scan.carries if carry not in excluded]
    kept = [carry for carry in candidates if carry.final in outputs]
    while True:
        wanted = _body_results(scan, kept, outputs)
        parts = divide(scan.nodes, wanted, ())
        needed = wanted | {value for node in parts.first for value in node.ins}
        grown = [carry for carry in candidates if carry in kept or carry.entering in needed]
        if len(grown) == len(kept):
            return tuple(grown)
        kept = grown


def _remake(crossing: set[Value], made: dict[Value, Node]) -> list[Node]:
    """Nodes that make crossing values again because that costs nothing: constants, and barriers on inputs."""
    again: list[Node] = []

    def free(value: Value) -> bool:
        if value.const is not None:
            return True
        node = made.get(value)
        if node is None or is_heavy(node.name) or has_effect(node):
            return False
        if node.name == "optimization_barrier" and node.eqn is None:
            return node.ins[0] not in made or free(node.ins[0])
        return all(free(source) for source in node.ins)

    def remake(value: Value) -> None:
        node = made.get(value)
        if node is None or node in again:
            return
        for source in node.ins:
            remake(source)
        again.append(node)

    for value in made:
        if value in crossing and free(value):
            remake(value)
    return again


def _worth_hoisting(node: Node, sources: Sources) -> bool:
    if has_effect(node) or not all(value.const is not None or value in sources for value in node.ins):
        return False
    if exchanges((node,)):
        return False  # that is for `exchanged_nodes` to say
    roots = frozenset().union(*(sources.get(value, ()) for value in node.ins))
    return bool(roots) and sum(out.nbytes for out in node.outs) <= sum(root.nbytes for root in roots)


def _derive(node: Node, sources: Sources) -> None:
    roots = frozenset().union(*(sources.get(value, frozenset()) for value in node.ins))
    sources.update((out, roots) for out in node.outs)


def _hoist_scan(
    scan: Scan, sources: Sources, constants: Collection[Value], max_growth: float, *, exchanged: bool
) -> tuple[Node | None, Node | None]:
    """(a scan of what each iteration derives from params alone, stacked; a scan of the rest)."""
    constant = {inner for outer, inner in scan.consts if outer in sources}
    sliced = {inner for outer, inner in scan.xs if outer in sources}
    same_always = {inner for outer, inner in scan.consts if outer in constants or outer.const is not None}
    results = _body_results(scan, scan.carries, {stacked for _, stacked in scan.ys})
    once, rest, derived = hoist(
        scan.nodes, constant | sliced, results, same_always, max_growth=max_growth, exchanged=exchanged
    )
    # What is the same in every iteration stays in the loop: stacking it would make copies.
    same = tuple(node for node in once if all(out in derived and derived[out] <= constant for out in node.outs))
    rest = (*same, *rest)
    made = {value for node in once if node not in same for value in node.outs}.difference(producers(rest))
    reads = {value for node in rest for value in node.ins} | {carry.leaving for carry in scan.carries}
    stacked_here = [(inner, stacked) for inner, stacked in scan.ys if inner in made]
    stacks = dict(stacked_here)
    crossing = [
        (value, stack_of(value, scan.length)) for value in _ordered(reads & made, scan, once) if value not in stacks
    ]
    if not stacked_here and not crossing:
        return None, scan.node()
    parts = divide(once, {inner for inner, _ in (*stacked_here, *crossing)}, ())
    before = dataclasses.replace(scan, nodes=parts.first, carries=(), ys=(*stacked_here, *crossing))
    after = dataclasses.replace(
        scan,
        nodes=rest,
        xs=(*scan.xs, *((stacked, value) for value, stacked in (*stacks.items(), *crossing))),
        ys=tuple(pair for pair in scan.ys if pair not in stacked_here),
    )
    return before.node(), (after.node() if after.carries or after.ys else None)


def _hoist_cond(cond: Cond, sources: Sources, max_growth: float) -> tuple[list[Node], Node]:
    """(what branches derive from params alone; the conditional that reads it)."""
    parts = []
    for branch in cond.branches:
        pairs = zip(cond.operands, branch.inputs, strict=True)
        inner = {value: operand for operand, value in pairs if value is not None and operand in sources}
        results = {value for value in branch.outputs if value is not None}
        once, rest, _ = hoist(branch.nodes, inner, results, max_growth=max_growth)
        left = branch._replace(nodes=rest)
        wanted = left.reads() & set(producers(once)).difference(producers(rest))
        parts.append((inner, divide(once, wanted, ()).first, left, wanted))
    return hoisted_of_branches(cond, parts)


def _ordered(values: set[Value], scan: Scan, nodes: Iterable[Node]) -> list[Value]:
    """Values in the order in which the scan makes them, so that results do not depend on hashing.

    Those that a division of the scan's body has made come last, in the order of its nodes.
    """
    made = [value for node in (*scan.nodes, *nodes) for value in node.outs]
    order = dict.fromkeys((*(carry.entering for carry in scan.carries), *made))
    return [value for value in order if value in values]
