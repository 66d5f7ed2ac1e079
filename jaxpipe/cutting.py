"""A model's loss, cut at its blocks into what comes before them, their arguments, and what comes after.

The loss is traced once with each block's call as one opaque equation. In that program x runs from block to block, so
that everything else belongs to the embedding, to a block's further arguments, or to the head. The model itself is not
changed, and how it calls its blocks (a loop, `jax.jit`, `jax.checkpoint`) does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpipe._jax import ClosedJaxpr, JaxprEqn, Primitive
from jaxpipe.runtime.model import Output
from jaxpipe.stage.flops import subjaxprs
from jaxpipe.stage.graph import Graph, Node, Value, evaluate, make_graph, producers, read

_block = Primitive("pipeline_block")
_block.multiple_results = True


@_block.def_abstract_eval
def _(*_: Any, call: Call) -> Any:
    return call.results


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a block, as its equation says it.

    Attributes:
      counts: leaves of its parameters, of x and of the arrays among its further arguments.
      x: structure of the activations.
      statics: its further arguments' leaves, None in place of arrays.
      arguments: their structure, of ``(args, kwargs)``.
      results: shapes and dtypes of what it returns, x first.
    """

    counts: tuple[int, int, int]
    x: Any
    statics: tuple[Any, ...]
    arguments: Any
    results: tuple[Any, ...]


class Block(NamedTuple):
    """A block's call as values of the program."""

    call: Call
    params: tuple[Value, ...]
    x: tuple[Value, ...]
    arguments: tuple[Value, ...]
    y: tuple[Value, ...]
    others: tuple[Value, ...]


class Activations(NamedTuple):
    """What passes from stage to stage where that is more than x.

    Attributes:
      x: the blocks' activations.
      arguments: arrays that blocks are called with and that are made with parameters or random numbers.
      others: of each thing that blocks return besides x, rows for all blocks; zeros until the block has run.
    """

    x: Any
    arguments: tuple[Any, ...]
    others: tuple[Any, ...]


def call_block(run: Callable[..., Any], name: str, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Stands for ``run(params, *args, **kwargs)`` in the program that is cut; ``args[0]`` is x.

    Raises:
      ValueError: a block without positional arguments, or that returns something else than x.
    """
    if not args:
        raise ValueError(f"{name} is called without positional arguments: the first of them is the activations")
    x, x_tree = jax.tree.flatten(args[0])
    leaves, arguments = jax.tree.flatten((tuple(args[1:]), dict(kwargs)))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    statics = tuple(None if _is_array(leaf) else leaf for leaf in leaves)

    def block(params: Any, x: Any, arrays: Any) -> Any:
        args, kwargs = join_arguments(arguments, statics, arrays)
        return run(params, x, *args, **kwargs)

    program, result = jax.make_jaxpr(block, return_shape=True)(params, args[0], arrays)
    if _text(split_result(result, args[0])[0]) != _text(args[0]):
        raise ValueError(
            f"{name} maps {_text(args[0])} to {_text(result)}: a block returns activations like its first argument, or "
            "a tuple that begins with them"
        )
    given = jax.tree.leaves(params)
    call = Call((len(given), len(x), len(arrays)), x_tree, statics, arguments, tuple(program.out_avals))
    return jax.tree.unflatten(jax.tree.structure(result), _block.bind(*given, *x, *arrays, call=call))


def split_result(result: Any, x: Any) -> tuple[Any, tuple[Any, ...]]:
    """(activations, leaves of what else) of a block's result: where that is not like x, it is a tuple with x first."""
    if type(result) is tuple and result and jax.tree.structure(result) != jax.tree.structure(x):
        return result[0], tuple(jax.tree.leaves(result[1:]))
    return result, ()


def join_arguments(structure: Any, statics: Sequence[Any], arrays: Iterable[Any]) -> Any:
    """(args, kwargs) of a block's call, x left out."""
    arrays = iter(arrays)
    return jax.tree.unflatten(structure, [next(arrays) if leaf is None else leaf for leaf in statics])


class Cut:
    """A loss in parts.

    Args:
      loss: ``loss(params, key, data)``, whose blocks are called through `call_block`; params are ``(outer, blocks)``,
        blocks a list.
      params, key, data: shapes.
      names: of the blocks, for messages.

    Raises:
      ValueError: blocks that are not called once each and in order, or whose activations or arguments other code
        changes on the way.
    """

    def __init__(self, loss: Callable[..., Any], params: Any, key: Any, data: Any, names: Sequence[str]) -> None:
        traced = (params, key, data)
        closed, self._shapes = jax.make_jaxpr(loss, return_shape=True)(*traced)
        graph = make_graph(closed, _holds_block)
        outer, blocks, keys, datas = _split(graph.inputs, [params[0], params[1], key, data])
        self._graph, self._outer, self._key, self._data = graph, outer, keys, datas
        of_blocks = _split(blocks, params[1])
        self.blocks = _in_order(_blocks(graph), of_blocks, names)
        self._check_chain(names)
        self._made, self._carried = self._classify(names)
        last = self.blocks[-1]
        self._others = tuple(zip(*(block.others for block in self.blocks), strict=True))
        self._ends = {*self._outer, *self._key, *self._data}
        missing = self._needed(graph.outputs, {*self._ends, *last.y, *(v for row in self._others for v in row)})[1]
        if missing:
            raise ValueError(
                "the loss reads what a block before the last returned, which no rank has any more when it computes the "
                f"loss ({', '.join(str(value.aval) for value in missing)}): return it besides x, as a tuple"
            )

    @property
    def simple(self) -> bool:
        """Whether nothing but x passes from stage to stage."""
        return not self._carried and not self._others

    def embed(self, outer: Any, key: Any, data: Any) -> Any:
        """The first block's input."""
        values = (*self.blocks[0].x, *self._carried)
        found = self._evaluate(values, outer, key, data, {})
        count = len(self.blocks[0].x)
        x = jax.tree.unflatten(self.blocks[0].call.x, found[:count])
        if self.simple:
            return x
        others = tuple(
            jax.numpy.zeros((len(self.blocks), *row[0].aval.shape), row[0].aval.dtype) for row in self._others
        )
        return Activations(x, tuple(found[count:]), others)

    def head(self, outer: Any, activations: Any, key: Any, data: Any) -> Any:
        """What the loss returns."""
        x, others = (activations, ()) if self.simple else (activations.x, activations.others)
        known: dict[Value, Any] = dict(zip(self.blocks[-1].y, jax.tree.leaves(x), strict=True))
        for row, stacked in zip(self._others, others, strict=True):
            known.update((value, stacked[index]) for index, value in enumerate(row))
        found = self._evaluate(self._graph.outputs, outer, key, data, known)
        return jax.tree.unflatten(jax.tree.structure(self._shapes), found)

    def arguments(self, activations: Any, data: Any) -> dict[Value, Any]:
        """Every array that blocks are called with."""
        known = dict(zip(self._data, jax.tree.leaves(data), strict=True))
        nodes, _ = self._needed(self._made, set(self._data))
        evaluate(nodes, known)
        found = {value: read(known, value) for value in self._made}
        if not self.simple:
            found.update(zip(self._carried, activations.arguments, strict=True))
        return found

    def _evaluate(self, values: Sequence[Value], outer: Any, key: Any, data: Any, known: dict[Value, Any]) -> list[Any]:
        env = {**known, **dict(zip(self._outer, jax.tree.leaves(outer), strict=True))}
        env.update(zip(self._key, jax.tree.leaves(key), strict=True))
        env.update(zip(self._data, jax.tree.leaves(data), strict=True))
        nodes, _ = self._needed(values, set(env))
        evaluate(nodes, env)
        return [read(env, value) for value in values]

    def _needed(self, values: Iterable[Value], given: set[Value]) -> tuple[list[Node], list[Value]]:
        """(the nodes, without blocks, that make values from given ones; values that they would need besides)."""
        made = producers(self._graph.nodes)
        pending, wanted, missing = list(values), set(), {}
        while pending:
            value = pending.pop()
            if value in given or value.const is not None:
                continue
            node = made.get(value)
            if node is None or node.name == _block.name:
                missing[value] = None
            elif node not in wanted:
                wanted.add(node)
                pending.extend(node.ins)
        return [node for node in self._graph.nodes if node in wanted], list(missing)

    def _check_chain(self, names: Sequence[str]) -> None:
        for index, (before, after) in enumerate(zip(self.blocks, self.blocks[1:], strict=False)):
            if before.y != after.x:
                raise ValueError(
                    f"{names[index + 1]} is not called with what {names[index]} returns: what changes the activations "
                    "between two blocks belongs into one of them"
                )

    def _classify(self, names: Sequence[str]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        """(arguments of blocks made of the batch alone, those that take parameters or random numbers)."""
        made, carried = {}, {}
        for name, block in zip(names, self.blocks, strict=True):
            for value in block.arguments:
                missing = self._needed([value], set(self._data))[1]
                if not missing:
                    made[value] = None
                    continue
                if self._needed([value], {*self._data, *self._outer, *self._key})[1]:
                    raise ValueError(
                        f"{name} is called with {value.aval}, which another block computes: blocks hand on their first "
                        "argument alone, so make it a tuple of all that passes from block to block"
                    )
                carried[value] = None
        return tuple(made), tuple(carried)


def _holds_block(eqn: JaxprEqn) -> bool:
    return any(
        inner.primitive is _block or _holds_block(inner)
        for sub in subjaxprs(eqn)
        for inner in (sub.jaxpr if isinstance(sub, ClosedJaxpr) else sub).eqns
    )


def _blocks(graph: Graph) -> list[Block]:
    found = []
    for node in graph.nodes:
        if node.name != _block.name:
            continue
        assert node.eqn is not None
        call = node.eqn.params["call"]
        params, x, arguments = _cut_up(node.ins, call.counts)
        y, others = _cut_up(node.outs, (call.counts[1], len(node.outs) - call.counts[1]))
        found.append(Block(call, params, x, arguments, y, others))
    return found


def _in_order(found: Sequence[Block], params: Sequence[tuple[Value, ...]], names: Sequence[str]) -> tuple[Block, ...]:
    """The blocks, each called once and one after the other."""
    index_of = {values: index for index, values in enumerate(params)}
    order = [index_of.get(block.params) for block in found]
    if order != list(range(len(params))):
        called = ", ".join("?" if index is None else names[index] for index in order) or "none"
        raise ValueError(
            f"the loss calls the blocks {called}, of {', '.join(names)}: it must call each once, in this order, with the "
            "parameters that it has in the model"
        )
    return tuple(found)


def _cut_up(values: Sequence[Value], counts: Iterable[int]) -> list[tuple[Value, ...]]:
    found, start = [], 0
    for count in counts:
        found.append(tuple(values[start : start + count]))
        start += count
    return found


def _split(values: Sequence[Value], trees: Sequence[Any]) -> list[tuple[Value, ...]]:
    return _cut_up(values, (len(jax.tree.leaves(tree)) for tree in trees))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _text(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}", tree)


def as_output(result: Any) -> Output:
    """What a loss function returns, as a head's: a scalar, (scalar, metrics) or an Output."""
    if isinstance(result, Output):
        return result
    if isinstance(result, tuple):
        if len(result) != 2 or not isinstance(result[1], Mapping):
            raise ValueError(
                "the loss function returned a tuple that is not (loss, metrics): return a scalar, or a scalar and a flat "
                "dict of metrics, which the pipeline sums over microbatches"
            )
        return Output(result[0], metrics=dict(result[1]))
    return Output(result)
