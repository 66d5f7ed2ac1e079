"""Divides a stage: its backward pass into the halves for the input and for the weights, and what they keep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxpipe.schedule.ints import at_least
from jaxpipe.stage.divide import Parts, Sources, closure, count_heavy, divide, hoist, light_results
from jaxpipe.stage.effects import effects_of, without_repeated
from jaxpipe.stage.exchanged import MAX_GROWTH, check_growth
from jaxpipe.stage.fuse import fuse_gathers
from jaxpipe.stage.graph import Node, Value, is_zero, producers
from jaxpipe.stage.known import read_known
from jaxpipe.stage.late import put_off
from jaxpipe.stage.order import as_soon_as_possible, in_time
from jaxpipe.stage.prepared_again import read_exchanged, read_quantised
from jaxpipe.stage.priced import Chooser
from jaxpipe.stage.recomputed import recompute_in_turn
from jaxpipe.stage.residuals import minimum_cut
from jaxpipe.stage.rewrite import before_casts, eliminate_common_subexpressions
from jaxpipe.stage.stage import Graphs, Residuals, SplitStage, packed_shape
from jaxpipe.stage.stash import Division, Slots, fit
from jaxpipe.stage.trace import Traced, inexact, shape_of, trace


def split_stage(
    stage: Callable[..., Any],
    params: Any,
    x: Any,
    *args: Any,
    has_aux: bool = False,
    recompute: bool = True,
    trainable: Any = None,
    stash: int | None = None,
    max_growth: float = MAX_GROWTH,
) -> SplitStage:
    """Divides a stage's backward pass into input and weight gradients.

    The backward pass that JAX derives is traced; the equations that the input's cotangent needs are one half, the
    rest is the other. No annotation is needed: jit, custom derivative rules and `jax.checkpoint` are inlined (what is
    recomputed is recomputed once), scans are divided into two loops, and conditionals (`jax.lax.cond`,
    `jax.lax.switch`) into two with the same index. ``stage`` may use collectives over mesh axes if this is called where
    they are bound, inside `jax.shard_map`.

    The parts keep as few bytes for each other as they can: elementwise operations, moves and sums over axes are done
    again where their results are read, so a minimum cut (`jaxpipe.stage.residuals`) decides which values to keep. With
    ``recompute`` the same holds for what makes a value that `jax.ad_checkpoint.checkpoint_name` names "recompute",
    back to its last operation that is not light.

    Side effects, such as `jax.debug.print`, are part of the forward and of no other function: not of what a backward
    computes again, nor of `SplitStage.prepare`. The side effects of a custom derivative run once, in one of the halves.
    Refs that the stage makes (`jax.new_ref`) become values.

    Args:
      stage: ``stage(params, x, *args) -> out``; ``(out, aux)`` with ``has_aux``.
      params: pytree of arrays or of anything with shape and dtype; only these are read. Floating and complex leaves
        are differentiated.
      x: like params; where it has no floating leaf, there is no input half.
      *args: pytrees of arrays, not differentiated.
      has_aux: whether the stage also returns values that are not differentiated.
      recompute: whether what is named "recompute" is computed again; False keeps it, where there is memory for it.
      trainable: a tree of bools like params; leaves where it is False are frozen: they are not differentiated, no
        product is computed for them, and their cotangent is None. None: no leaf is frozen.
      stash: bytes that the parts may keep for each other, residuals and what crosses together: what is worth least for
        its bytes is computed again, heavy work too, and ``recompute`` counts no more. None: only light work is.
      max_growth: how many times the bytes of parameters, as they are given, may be kept all step long of what
        collectives make of them, fewer than which is made once a step; and how many times their gradients' sums may
        take where collectives make the gradients of these once a step. 1: only what is fewer bytes than they are.

    Raises:
      ValueError: a ``stash`` that is too small, with the least that works; a ``max_growth`` below 1; a leaf that is not
        an array; a ref made elsewhere, or used within a function that JAX cannot turn into one of values; an ordered
        debug callback on a mesh of several devices.

    Source: the division is zero-bubble pipelining's, arXiv 2401.10241.

    >>> import jax, jax.numpy as jnp
    >>> w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    >>> split = split_stage(lambda w, x: jnp.tanh(x @ w), w, x)
    >>> prepared = split.prepare(w)
    >>> y, residuals = split.forward(prepared, x)
    >>> x_ct, crossing = split.backward_input(prepared, residuals, jnp.ones_like(y))
    >>> split.backward_weight(prepared, residuals.weight, crossing).shape
    (4, 4)
    """
    divisible = Divisible(stage, params, x, *args, has_aux=has_aux, trainable=trainable, max_growth=max_growth)
    if stash is None:
        return divisible.split(recompute=recompute)
    return divisible.within(at_least("a stage", "stash", stash, 0))


class Divisible:
    """A stage traced with its derivative, to be divided at one price or another; arguments as of `split_stage`."""

    def __init__(
        self,
        stage: Callable[..., Any],
        params: Any,
        x: Any,
        *args: Any,
        has_aux: bool = False,
        trainable: Any = None,
        max_growth: float = MAX_GROWTH,
    ) -> None:
        max_growth = check_growth("a stage", max_growth)
        params, x, args = jax.tree.map(shape_of, (params, x, args))
        frozen = (
            jax.tree.map(lambda _: False, params) if trainable is None else jax.tree.map(lambda t: not t, trainable)
        )
        chosen = jax.tree.map(lambda leaf, frozen: inexact(leaf) and not frozen, params, frozen)
        traced = trace(stage, params, x, args, has_aux, jax.tree.leaves(chosen))
        forward = _read_forward(traced, len(jax.tree.leaves(params)), max_growth)
        self._traced = traced
        self._backward, self._forward = _read_backward(traced, forward, max_growth)
        divided = _divide_backward(self._backward)
        zeros, results = _zeros_apart(self._backward)
        second, late = put_off(
            divide(divided.second, (*results, *effects_of(divided.second)), ()).first,
            results,
            self._forward.known,
            others=(*self._forward.rest, *divided.first),
            max_growth=max_growth,
        )
        self._late = late._replace(nodes=tuple(dict.fromkeys((*zeros, *late.nodes))))
        self._divided = divided._replace(second=second)
        self._params_like = jax.tree.map(
            lambda leaf, frozen: None if inexact(leaf) and frozen else leaf, params, frozen
        )
        self._x_like = x

    def split(self, *, recompute: bool) -> SplitStage:
        """In the fewest bytes from which light work makes the rest; ``recompute`` as of `split_stage`."""
        forward, backward = self._forward, self._backward
        halves = self._halves()
        kept = _choose_residuals(forward, halves, recompute=recompute)
        first, second = (_remake_residuals(half, forward, kept) for half in halves)
        second, crossing = _choose_crossing(first, second, forward, backward.cotangents, kept, recompute=recompute)
        return self._finish(kept, first, second, None, crossing)

    def within(self, stash: int) -> SplitStage:
        """Within a budget; as of `split_stage`."""
        slots = Slots()

        def divide_at(price: float) -> Division:
            split, seconds = self.priced(price, slots)
            return Division((split,), slots.nbytes(*split.residuals, split.crossing), seconds, price)

        return fit(stash, slots, divide_at).splits[0]

    def priced(self, price: float, slots: Slots) -> tuple[SplitStage, float]:
        """(the stage divided at a price, seconds that this takes of a microbatch).

        Args:
          price: seconds that a byte of a slot is worth.
          slots: how many there are of each sort.
        """
        first, second = self._halves()
        found = self._chooser.at(price, slots)
        both = in_time(found.again, as_soon_as_possible(second.nodes, first.nodes))
        split = self._finish(
            dict.fromkeys(found.kept),
            first._replace(nodes=in_time(found.again_first, first.nodes)),
            second._replace(nodes=in_time(found.again_second, second.nodes)),
            both,
            found.crossing,
        )
        return split, found.seconds

    @functools.cached_property
    def _chooser(self) -> Chooser:
        forward, backward, divided = self._forward, self._backward, self._divided
        first, second = self._halves()
        order = (*forward.arguments, *_results(forward.rest), *backward.cotangents, *_results(divided.first))
        reads = second.reads().difference(_results(second.nodes))
        return Chooser(
            forward=forward.rest,
            arguments=forward.arguments,
            first=divided.first,
            second=divided.second,
            cotangents=backward.cotangents,
            reads_first=_shared(forward, first.reads()),
            reads_second=[value for value in dict.fromkeys(order) if value in reads],
            known=forward.known,
        )

    def _halves(self) -> tuple[_Half, _Half]:
        backward, divided = self._backward, self._divided
        return _Half(divided.first, backward.x_ct), _Half(divided.second, self._late.summands)

    def _finish(
        self,
        kept: Collection[Value],
        first: _Half,
        second: _Half,
        both: Sequence[Node] | None,
        crossing: tuple[Value, ...],
    ) -> SplitStage:
        """The stage's functions, of the halves that make again what is not kept.

        ``both`` are both halves in one order; None: they run all of each other again.
        """
        traced, forward, backward = self._traced, self._forward, self._backward
        for_first, for_second = first.reads(), second.reads()
        weight = tuple(value for value in kept if value in for_second)
        inputs = tuple(value for value in kept if value in for_first and value not in for_second)
        rest = divide(forward.rest, (*forward.outputs, *weight, *inputs, *effects_of(forward.rest)), ()).first
        rows = {node.outs[0]: node for node in forward.once if node.row is not None and node.outs[0] in forward.known}
        rest = _with_rows(rows, rest, forward.outputs)
        first, second = (half._replace(nodes=_with_rows(rows, half.nodes, half.results)) for half in (first, second))
        late = _with_rows(rows, self._late.nodes, backward.params_ct)
        used = (_reads(rest, forward.outputs) | first.reads() | second.reads() | _reads(late, ())) - rows.keys()
        prepared = tuple(value for value in forward.known if value in used)
        if both is None:
            order = as_soon_as_possible(self._divided.second, self._divided.first)
            both = in_time((*first.nodes, *second.nodes), order)
        else:
            both = _with_rows(rows, both, (*first.results, *second.results))
        alone = fuse_gathers(first.nodes, (*first.results, *crossing, *effects_of(first.nodes)))
        whole = fuse_gathers(both, (*first.results, *second.results, *effects_of(both)))
        in_turn = functools.partial(recompute_in_turn, cotangents=backward.cotangents, known=set(forward.known))
        return SplitStage(
            out=traced.out,
            aux=traced.aux,
            residuals=Residuals(*(tuple(packed_shape(value.aval) for value in values) for values in (inputs, weight))),
            crossing=tuple(packed_shape(value.aval) for value in crossing),
            summands=tuple(shape_of(value.aval) for value in self._late.summands),
            opaque=self._divided.opaque,
            _graphs=Graphs(
                params=forward.params,
                arguments=forward.arguments,
                once=divide(forward.once, prepared, ()).first,
                prepared=prepared,
                forward=rest,
                outputs=forward.outputs,
                kept=Residuals(inputs, weight),
                cotangents=backward.cotangents,
                first=in_turn(alone),
                second=fuse_gathers(second.nodes, (*second.results, *effects_of(second.nodes))),
                whole=in_turn(whole),
                crossing=crossing,
                summands=self._late.summands,
                summands_narrow=before_casts(self._late.summands, second.nodes),
                late=late,
                params_ct=backward.params_ct,
                x_ct=backward.x_ct,
                params_like=self._params_like,
                x_like=self._x_like,
            ),
        )


class _Forward(NamedTuple):
    """A stage's forward: ``once`` depends on parameters alone, ``rest`` is run for each microbatch.

    Attributes:
      residuals: what the backward that JAX derives reads.
      known: parameters and all that is made of them alone, in the order in which they are made.
    """

    params: tuple[Value, ...]
    arguments: tuple[Value, ...]
    outputs: tuple[Value, ...]
    residuals: tuple[Value, ...]
    once: tuple[Node, ...]
    rest: tuple[Node, ...]
    known: Sources


class _Backward(NamedTuple):
    """A stage's backward, in the forward's own values."""

    nodes: Sequence[Node]
    cotangents: tuple[Value, ...]
    params_ct: tuple[Value, ...]
    x_ct: tuple[Value, ...]


class _Half(NamedTuple):
    """One half of the backward: nodes, and the cotangents that they make."""

    nodes: tuple[Node, ...]
    results: tuple[Value, ...]

    def reads(self) -> set[Value]:
        """What its nodes and results read, whoever makes it."""
        return _reads(self.nodes, self.results)


def _read_forward(traced: Traced, num_params: int, max_growth: float) -> _Forward:
    """The forward's values by what they are; its nodes without what need not run for each microbatch."""
    graph = traced.forward
    num_outputs = len(jax.tree.leaves((traced.out, traced.aux)))
    params, arguments = graph.inputs[:num_params], graph.inputs[num_params:]
    once, rest, known = hoist(graph.nodes, params, set(graph.outputs), max_growth=max_growth)
    return _Forward(params, arguments, graph.outputs[:num_outputs], graph.outputs[num_outputs:], once, rest, known)


def _read_backward(traced: Traced, forward: _Forward, max_growth: float) -> tuple[_Backward, _Forward]:
    """The backward that reads the forward's own values; what these are made of can then be computed again.

    What only the backward makes of parameters, and once a step, becomes a part of the forward that does so.
    """
    graph = traced.backward
    cotangents = graph.inputs[len(forward.residuals) :]
    alias = dict(zip(graph.inputs, forward.residuals, strict=False))
    nodes = without_repeated(graph.nodes, traced.forward.nodes, cotangents)
    once = [node for node in forward.once if all(out in forward.known for out in node.outs)]
    nodes = eliminate_common_subexpressions(nodes, once, set(forward.known), alias)
    nodes, more, known = read_quantised(nodes, forward.once, forward.known, alias, graph.outputs)
    forward = forward._replace(once=(*forward.once, *more), known=known)
    nodes, more, known = read_exchanged(nodes, forward.once, forward.known, alias, graph.outputs, max_growth)
    forward = forward._replace(once=(*forward.once, *more), known=known)
    outputs = tuple(alias.get(value, value) for value in graph.outputs)
    nodes = read_known(nodes, forward.rest, forward.known, set(outputs))
    assert len(outputs) == traced.num_params + traced.num_x
    return _Backward(nodes, cotangents, outputs[: traced.num_params], outputs[traced.num_params :]), forward


def _divide_backward(backward: _Backward) -> Parts:
    """What the cotangent of x needs, and the rest; a side effect goes where it takes no heavy work more."""
    nodes, params_ct, x_ct = backward.nodes, backward.params_ct, backward.x_ct
    first, second = list(x_ct), list(params_ct)
    for effect in effects_of(nodes):
        without, within = (divide(nodes, (*x_ct, *more), params_ct).first for more in ((), (effect,)))
        (second if count_heavy(without) < count_heavy(within) else first).append(effect)
    return divide(nodes, first, second)


def _zeros_apart(backward: _Backward) -> tuple[tuple[Node, ...], list[Value]]:
    """(what makes the parameters' cotangents that are zeros, the other cotangents): zeros need no sums."""
    made = producers(backward.nodes)
    zeros = {value for value in backward.params_ct if is_zero(value, made)}
    return divide(backward.nodes, zeros, ()).first, [value for value in backward.params_ct if value not in zeros]


def _choose_residuals(forward: _Forward, halves: Iterable[_Half], *, recompute: bool) -> dict[Value, None]:
    """What the forward keeps for the backward, in the order in which it is made.

    Light work on parameters and constants costs nothing to do again. Of the rest as few bytes are kept as make all of
    it.
    """
    needed = set().union(*(half.reads() for half in halves))
    shared = _shared(forward, needed)
    costly = [value for value in shared if closure([value], forward.rest, forward.known) is None]
    chosen = minimum_cut(costly, forward.rest, light_results(forward.rest, forward.known), recompute=recompute)
    return dict.fromkeys(value for value in (*forward.arguments, *_results(forward.rest)) if value in chosen)


def _remake_residuals(half: _Half, forward: _Forward, kept: Collection[Value]) -> _Half:
    """A half that makes what it reads of the forward again of what is kept."""
    missing = [value for value in _shared(forward, half.reads()) if value not in kept]
    nodes = _remake(missing, forward.rest, {*forward.known, *kept})
    return half._replace(nodes=in_time(nodes, half.nodes))


def _choose_crossing(
    first: _Half,
    second: _Half,
    forward: _Forward,
    cotangents: Iterable[Value],
    kept: Collection[Value],
    *,
    recompute: bool,
) -> tuple[_Half, tuple[Value, ...]]:
    """The weights' half, which makes what it can again, and what the input's half hands to it.

    What can cross is what the input's half makes, and what only that is given. The cut may go through kept values, too:
    one that the weights' half then reads is stashed for it from the start and not handed over. That takes the same
    bytes at any time, and no copy.
    """
    order = dict.fromkeys((*cotangents, *_results(first.nodes)))
    reads = second.reads().difference(_results(second.nodes))
    between = [value for value in order if value in reads]
    at_hand = {*forward.known, *(value for value in kept if value in reads)}
    given = at_hand | light_results(first.nodes, forward.known)
    handed = minimum_cut(between, first.nodes, given, recompute=recompute)
    nodes = _remake([value for value in between if value not in handed], first.nodes, at_hand | handed)
    crossing = tuple(value for value in order if value in handed and value not in kept)
    return second._replace(nodes=in_time(nodes, second.nodes)), crossing


def _with_rows(rows: Mapping[Value, Node], nodes: Sequence[Node], results: Iterable[Value]) -> tuple[Node, ...]:
    """The nodes, which read rows of what is known where they need them: a row kept by itself would be a copy."""
    again: dict[Node, None] = {}
    pending = list(_reads(nodes, results) & rows.keys())
    while pending:
        node = rows[pending.pop()]
        again[node] = None
        pending += rows.keys() & set(node.ins)
    return in_time(list(again), nodes)


def _shared(forward: _Forward, reads: Collection[Value]) -> list[Value]:
    """What is read of the forward, its residuals or what it makes of nothing, and depends on more than parameters."""
    values = dict.fromkeys((*_with_their_rows(forward.residuals), *_results(forward.rest)))
    return [value for value in values if value in reads and value not in forward.known]


def _with_their_rows(values: Iterable[Value]) -> Iterator[Value]:
    """Values and, of those that an unrolled scan stacked, the rows, which the backward reads in their place."""
    for value in values:
        yield value
        yield from _with_their_rows(value.rows)


def _remake(values: Sequence[Value], nodes: Sequence[Node], given: set[Value]) -> tuple[Node, ...]:
    """The nodes that make values again from given ones; a cut has seen to it that light ones do."""
    found = closure(values, nodes, given)
    assert found is not None
    return found


def _reads(nodes: Sequence[Node], results: Iterable[Value]) -> set[Value]:
    """What nodes and results read, made among the nodes or not."""
    return {value for node in nodes for value in node.ins} | set(results)


def _results(nodes: Sequence[Node]) -> list[Value]:
    return [value for node in nodes for value in node.outs]
