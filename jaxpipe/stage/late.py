"""What of a backward pass can wait for a step's end: it is done once, of sums over microbatches.

The last part of a weight gradient may be linear in what differs between microbatches: the gradients of an expert's
copies are sent to its master and added there, those of whole parameters are summed over devices. What is linear may
come after the sum over microbatches, so the network is used once a step, and so is what follows on it. Sums are then
kept of what it is made of, in place of the parameters' gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxpipe._jax import COLLECTIVES
from jaxpipe.stage.addend import products_of
from jaxpipe.stage.divide import closure, divide
from jaxpipe.stage.exchanged import MAX_GROWTH, exchanges
from jaxpipe.stage.graph import Cond, Node, Scan, Value, has_effect, is_zero, producers, stack_of
from jaxpipe.stage.residuals import cheapest_cut

_OF_ALL = frozenset({
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "cumsum", "expand_dims",
    "name", "neg", "optimization_barrier", "pbroadcast", "pcast", "pvary", "reduce_sum", "reshape", "rev",
    "sharding_constraint", "slice", "split", "squeeze", "sub", "transpose",
})  # fmt: skip
"""Primitives that are linear in all their operands together."""

_OF_SOME = {
    "dynamic_slice": (0,), "dynamic_update_slice": (0, 1), "gather": (0,), "pad": (0, 1), "scatter-add": (0, 2),
    "scatter_add": (0, 2),
}  # fmt: skip
"""Primitives that are linear in some operands together, whatever the others are."""

_OF_EACH = {"dot_general": (0, 1), "mul": (0, 1), "div": (0,)}
"""Primitives that are linear in each of some operands while the others are fixed."""


_OF_PRODUCTS = frozenset({"slice", "split", "transpose"})
"""Primitives that wait for a step's end where they move what is a product that can be added to a sum in its place."""

_MOST_PARTED = 1.25
"""Of products that are moved and not exchanged, sums take fewer than so many times the bytes of their gradients:
columns that were padded may be among them, and not those of another matrix that is frozen."""


class Late(NamedTuple):
    """What is done of sums over microbatches.

    Attributes:
      summands: what is summed.
      nodes: what makes gradients of the sums, of known values and of constants.
    """

    summands: tuple[Value, ...]
    nodes: tuple[Node, ...]


def put_off(
    nodes: Sequence[Node],
    results: Sequence[Value],
    known: Collection[Value],
    *,
    others: Sequence[Node] = (),
    reads: Collection[Value] = (),
    max_growth: float = MAX_GROWTH,
) -> tuple[tuple[Node, ...], Late]:
    """(the nodes that make summands, what makes the results of their sums).

    What is put off are collectives and what follows from them, and what makes fewer bytes to sum before them; also what
    parts or turns a product that can be added to its sum in place (`jaxpipe.stage.addend`), which is summed as it is
    made. Summands are fewer than ``max_growth`` times the bytes of the gradients in whose place they are summed.

    Args:
      nodes: in an order in which they can run; side effects among them stay.
      results: gradients that are to be summed.
      known: values that are the same for all microbatches.
      others: further nodes that run before these.
      reads: what is read of the nodes besides.
      max_growth: see `jaxpipe.stage.exchanged.MAX_GROWTH`.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> def gradient(x, y):
    ...     return jax.lax.psum(x.T @ y, "dp") * 2
    >>> x = jnp.ones((4, 3))
    >>> graph = make_graph(jax.make_jaxpr(gradient, axis_env=[("dp", 2)])(x, x))
    >>> found, late = put_off(graph.nodes, graph.outputs, ())
    >>> [node.name for node in found], [node.name for node in late.nodes]
    (['transpose', 'dot_general'], ['psum', 'mul'])
    """
    fixed = _same_always((*others, *nodes), known)
    zeros = producers((*others, *nodes))
    staying = set(reads)
    kept: list[Node] = []
    linear: list[Node] = []
    for node in reversed(nodes):
        found = [node]
        if node.scan is not None and not has_effect(node) and not _is_linear(node, fixed, zeros):
            found = _last_of_scan(node.scan, set(node.outs) - staying, fixed, max_growth)
        *found, last = found
        if staying.isdisjoint(last.outs) and _is_linear(last, fixed, zeros):
            linear.append(last)
        else:
            found.append(last)
        for each in reversed(found):
            staying.update(each.ins)
        kept += reversed(found)
    everything = [*reversed(kept), *reversed(linear)]
    late, summed = _of_sums(linear[::-1], results, fixed, products_of(everything), max_growth)
    if not late:
        return tuple(nodes), Late(tuple(dict.fromkeys(results)), ())
    summands = tuple(dict.fromkeys((*(value for value in results if value not in late), *summed)))
    end = closure(late, (*others, *everything), {*known, *summed}, lambda node: not has_effect(node))
    assert end is not None
    effects = [value for node in kept for value in node.outs if value.effect]
    return divide(everything, (*summands, *reads, *effects), ()).first, Late(summands, end)


def _same_always(nodes: Iterable[Node], known: Collection[Value]) -> set[Value]:
    """Known values, and all that is made of them alone."""
    found = set(known)
    for node in nodes:
        if not has_effect(node) and all(value.const is not None or value in found for value in node.ins):
            found.update(node.outs)
        elif node.scan is not None:
            pairs = (*node.scan.consts, *node.scan.xs)
            given = {inner for outer, inner in pairs if outer.const is not None or outer in found}
            inside = _same_always(node.scan.nodes, given)
            found.update(stacked for inner, stacked in node.scan.ys if inner in inside)
    return found


def _of_sums(
    linear: Sequence[Node],
    results: Sequence[Value],
    fixed: Collection[Value],
    products: Collection[Value],
    max_growth: float,
) -> tuple[list[Value], list[Value]]:
    """(the results that are to be made of sums, what is summed for them)."""
    made = producers(linear)
    waiting: dict[Node, bool] = {}  # whether it is or follows a collective
    for node in linear:
        before = [waiting[maker] for value in node.ins if (maker := made.get(value)) in waiting]
        if before or exchanges((node,)) or (node.name in _OF_PRODUCTS and node.ins[0] in products):
            waiting[node] = any(before) or exchanges((node,))
    needed = [
        value
        for node in waiting
        for value in node.ins
        if value.const is None and value not in fixed and made.get(value) not in waiting
    ]
    summed = cheapest_cut(needed, linear, fixed, keep=_sum_bytes, again=lambda node: 0, twice=lambda value: 0)
    order = [value for node in linear for value in (*node.ins, *node.outs)]
    summed = dict.fromkeys(value for value in order if value in summed)
    sources: dict[Value, frozenset[Value]] = {value: frozenset({value}) for value in summed}
    for node in linear:
        mine = frozenset[Value]().union(*(sources.get(value, ()) for value in node.ins))
        sources.update((out, mine) for out in node.outs if out not in summed)
    late = {value: sources[value] for value in results if made.get(value) in waiting}
    groups: list[tuple[dict[Value, None], frozenset[Value]]] = []
    for value, mine in late.items():
        own = {value: None}
        for group in [group for group in groups if not group[1].isdisjoint(mine)]:
            groups.remove(group)
            own, mine = {**group[0], **own}, mine | group[1]
        groups.append((own, mine))

    def fits(own: Collection[Value], mine: Collection[Value]) -> bool:
        exchanged = any(waiting[made[value]] for value in own)
        most = max_growth if exchanged else min(max_growth, _MOST_PARTED)
        return _all_bytes(mine) < most * _all_bytes(own)

    small = [group for group in groups if fits(*group)]
    chosen = frozenset[Value]().union(*(mine for _, mine in small))
    return [value for own, _ in small for value in own], [value for value in summed if value in chosen]


def _all_bytes(values: Iterable[Value]) -> int:
    return sum(map(_sum_bytes, values))


def _sum_bytes(value: Value) -> int:
    """Bytes of a sum over microbatches; numbers of fewer than 32 bits are summed in 32."""
    return value.aval.size * max(value.aval.dtype.itemsize, 4)


def _last_of_scan(scan: Scan, free: Collection[Value], fixed: Collection[Value], max_growth: float) -> list[Node]:
    """The scan as one that makes summands, turn by turn, and one that is linear in them; or as it is.

    Only of what is ``free`` to be made in the second.
    """
    given = {inner for outer, inner in (*scan.consts, *scan.xs) if outer.const is not None or outer in fixed}
    stay = {carry.leaving for carry in scan.carries} | {inner for inner, stacked in scan.ys if stacked not in free}
    wanted = {inner: stacked for inner, stacked in scan.ys if stacked in free and inner not in stay}
    before, late = put_off(scan.nodes, tuple(wanted), given, reads=stay, max_growth=max_growth)
    if not late.nodes:
        return [scan.node()]
    moved = {inner for inner in wanted if inner not in late.summands}
    ys = tuple(pair for pair in scan.ys if pair[0] not in moved or pair[1] not in free)
    inputs = {inner for _, inner in (*scan.consts, *scan.xs)}
    summed = [(value, stack_of(value, scan.length)) for value in late.summands if value not in {*wanted, *inputs}]
    first = dataclasses.replace(scan, nodes=before, ys=(*ys, *summed))
    second = dataclasses.replace(
        scan,
        nodes=late.nodes,
        carries=(),
        consts=tuple(pair for pair in scan.consts if pair[1] in given or pair[1] in late.summands),
        xs=(
            *(pair for pair in scan.xs if pair[1] in given or pair[1] in late.summands),
            *((stacked, value) for value, stacked in (*ys, *summed) if value in late.summands),
        ),
        ys=tuple(pair for pair in scan.ys if pair not in ys),
    )
    return [first.node(), second.node()]


def _is_linear(node: Node, fixed: Collection[Value], made: dict[Value, Node]) -> bool:
    """Whether the results are linear in what is not fixed, and depend on it."""
    live = [place for place, value in enumerate(node.ins) if value.const is None and value not in fixed]
    if not live or has_effect(node) or not all(_is_number(value) for value in (*node.outs, *_at(node.ins, live))):
        return False
    if node.cond is not None:
        return _is_linear_cond(node.cond, fixed)
    if node.scan is not None:
        return _is_linear_scan(node.scan, fixed, made)
    if node.name in COLLECTIVES:
        return node.name not in ("pmax", "pmin", "ragged_all_to_all") and len(live) == len(node.ins)
    if node.name == "select_n":
        chosen = range(1, len(node.ins))
        return 0 not in live and all(place in live or is_zero(node.ins[place], made) for place in chosen)
    if node.name == "gather" and node.eqn is not None and node.eqn.params["fill_value"] not in (None, 0):
        return False  # numbers that are filled in are added up as often as there are microbatches
    if node.name in _OF_EACH:
        return len(live) == 1 and live[0] in _OF_EACH[node.name]
    among = range(len(node.ins)) if node.name in _OF_ALL else _OF_SOME.get(node.name, ())
    return set(live) <= {*among} and all(place in live or is_zero(node.ins[place], made) for place in among)


def _is_linear_cond(cond: Cond, fixed: Collection[Value]) -> bool:
    if cond.index.const is None and cond.index not in fixed:
        return False
    for branch in cond.branches:
        pairs = [(outer, inner) for outer, inner in zip(cond.operands, branch.inputs, strict=True) if inner is not None]
        live = {inner for outer, inner in pairs if outer.const is None and outer not in fixed}
        given = {inner for _, inner in pairs} - live
        if not _are_linear(branch.nodes, live, given, [value for value in branch.outputs if value is not None]):
            return False
    return True


def _is_linear_scan(scan: Scan, fixed: Collection[Value], made: dict[Value, Node]) -> bool:
    live = {inner for outer, inner in (*scan.consts, *scan.xs) if outer.const is None and outer not in fixed}
    given = {inner for _, inner in (*scan.consts, *scan.xs)} - live
    for carry in scan.carries:
        if (carry.initial.const is not None or carry.initial in fixed) and not is_zero(carry.initial, made):
            return False
        live.add(carry.entering)
    return _are_linear(
        scan.nodes, live, given, [*(carry.leaving for carry in scan.carries), *(inner for inner, _ in scan.ys)]
    )


def _are_linear(nodes: Sequence[Node], live: set[Value], given: Collection[Value], results: Iterable[Value]) -> bool:
    """Whether results are linear in live values, of a body that reads these and given ones."""
    fixed, made = _same_always(nodes, given), producers(nodes)
    needed = divide(nodes, results, ()).first
    moving = [node for node in needed if not fixed.issuperset(node.outs)]
    return all(_is_linear(node, fixed, made) for node in moving) and all(
        value in live or (value in made and value not in fixed) or is_zero(value, made) for value in results
    )


def _at(values: Sequence[Value], places: Iterable[int]) -> list[Value]:
    return [values[place] for place in places]


def _is_number(value: Value) -> bool:
    """Whether a sum of such values is one of numbers: floating ones of 8 bits are rounded where they are made."""
    return jnp.issubdtype(value.aval.dtype, jnp.inexact) and value.aval.dtype.itemsize > 1
