"""A model's loss, cut at its blocks: what comes before them, what they are called with, and what comes after.

The loss is traced once with each block's call as one opaque equation. In that program x runs from block to block;
everything else belongs to the embedding, to a block's further arguments, or to the head. The model itself is not
changed, and how it calls its blocks (a loop, a scan, `jax.jit`, `jax.checkpoint`) does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe._jax import CALLS, ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive
from jaxpipe.stage.flops import subjaxprs
from jaxpipe.stage.graph import Node, Value, eqn_node, evaluate, producers, read, scan_counts

CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})

_block = Primitive("pipeline_block")
_block.multiple_results = True


@_block.def_abstract_eval
def _(*_: Any, call: BlockCall) -> Any:
    return call.results


@dataclasses.dataclass(frozen=True, eq=False)
class BlockCall:
    """One call of a block, as its equation says it.

    Attributes:
      counts: leaves of its parameters, of x and of the arrays among its further arguments.
      x: structure of the activations.
      statics: its further arguments' leaves, None in place of arrays.
      arguments: their structure, of ``(args, kwargs)``.
      results: shapes and dtypes of what it returns, x first.
      tag: what the caller of `call_block` gave.
    """

    counts: tuple[int, int, int]
    x: Any
    statics: tuple[Any, ...]
    arguments: Any
    results: tuple[Any, ...]
    tag: Any = None


class CalledBlock(NamedTuple):
    """A block's call as values of the program.

    Attributes:
      call: its static part.
      params, x, arguments: what goes in.
      y: the activations that it returns.
      others: what else it returns.
      checkpoints: keywords of `jax.checkpoint` for each one that the model calls the block in, outermost first.
    """

    call: BlockCall
    params: tuple[Value, ...]
    x: tuple[Value, ...]
    arguments: tuple[Value, ...]
    y: tuple[Value, ...]
    others: tuple[Value, ...]
    checkpoints: tuple[dict[str, Any], ...]


class Activations(NamedTuple):
    """What passes from stage to stage where that is more than x.

    Attributes:
      x: the blocks' activations.
      arguments: arrays that blocks are called with and that take parameters or random numbers to make.
      others: of each thing that blocks return besides x, a row for each block; zeros until the block has run, and where
        it returns no such thing.
    """

    x: Any
    arguments: tuple[Any, ...]
    others: tuple[Any, ...]


def call_block(
    run: Callable[..., Any], name: str, params: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tag: Any = None
) -> Any:
    """Stands for ``run(params, *args, **kwargs)`` in the program that is cut; ``args[0]`` is x.

    ``tag`` is what tells programs apart that differ in more than their arguments.

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
    call = BlockCall((len(given), len(x), len(arrays)), x_tree, statics, arguments, tuple(program.out_avals), tag)
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
      loss: ``loss(outer, blocks, key, data)``, whose blocks are called through `call_block`.
      outer: parameters outside of the blocks; shapes, as all that follows.
      blocks: of each block in a list, or with ``stacked`` of all of them in rows.
      key: of the random numbers outside of the blocks, or None.
      data: the microbatch.
      names: of the blocks, for messages.
      stacked: see ``blocks``.

    Attributes:
      blocks: their calls, in order.
      columns: for each block where that stands in `Activations.others` which it returns besides x.

    Raises:
      ValueError: blocks that are not called once each and in order, or whose activations or arguments other code
        changes on the way.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        outer: Any,
        blocks: Any,
        key: Any,
        data: Any,
        names: Sequence[str],
        *,
        stacked: bool = False,
    ) -> None:
        closed, self._result = jax.make_jaxpr(loss, return_shape=True)(outer, blocks, key, data)
        program = _Program(closed)
        self._nodes, self._outputs = program.nodes, program.outputs
        self._outer, of_blocks, self._key, self._data = _split(program.inputs, (outer, blocks, key, data))
        if stacked:
            rows = [tuple(program.row(value, index) for value in of_blocks) for index in range(len(names))]
        else:
            rows = _split(of_blocks, blocks)
        self.blocks = _in_order(program.blocks(), rows, names)
        self._check_chain(names)
        self._made, self._carried = self._classify(names)
        self.columns, self._others = _columns(self.blocks)
        others = (value for column in self._others for value in column if value is not None)
        known = {*self._outer, *self._key, *self._data, *self.blocks[-1].y, *others}
        missing = self._needed(self._outputs, known)[1]
        if missing:
            raise ValueError(
                f"the loss reads {', '.join(_short(value) for value in missing)} of a block before the last, which is "
                "on another rank then: let the block return it besides x, as a tuple"
            )

    @property
    def simple(self) -> bool:
        """Whether nothing but x passes from stage to stage."""
        return not self._carried and not self._others

    def embed(self, outer: Any, key: Any, data: Any) -> Any:
        """What the first block's stage starts with."""
        found = self._evaluate((*self.blocks[0].x, *self._carried), outer, key, data, {})
        count = len(self.blocks[0].x)
        x = jax.tree.unflatten(self.blocks[0].call.x, found[:count])
        if self.simple:
            return x
        avals = [next(value.aval for value in column if value is not None) for column in self._others]
        shapes = [((len(self.blocks), *aval.shape), aval.dtype) for aval in avals]
        return Activations(x, tuple(found[count:]), tuple(jnp.zeros(*shape) for shape in shapes))

    def head(self, outer: Any, activations: Any, key: Any, data: Any) -> Any:
        """What the loss returns, of what the last stage ends with."""
        x, others = (activations, ()) if self.simple else (activations.x, activations.others)
        known: dict[Value, Any] = dict(zip(self.blocks[-1].y, jax.tree.leaves(x), strict=True))
        for column, stacked in zip(self._others, others, strict=True):
            known.update((value, stacked[index]) for index, value in enumerate(column) if value is not None)
        found = self._evaluate(self._outputs, outer, key, data, known)
        return jax.tree.unflatten(jax.tree.structure(self._result), found)

    def arguments(self, activations: Any, data: Any) -> dict[Value, Any]:
        """Every array that blocks are called with besides x."""
        known = dict(zip(self._data, jax.tree.leaves(data), strict=True))
        evaluate(self._needed(self._made, set(known))[0], known)
        found = {value: read(known, value) for value in self._made}
        if not self.simple:
            found.update(zip(self._carried, activations.arguments, strict=True))
        return found

    def _evaluate(self, values: Sequence[Value], outer: Any, key: Any, data: Any, known: dict[Value, Any]) -> list[Any]:
        env = dict(known)
        for inputs, tree in ((self._outer, outer), (self._key, key), (self._data, data)):
            env.update(zip(inputs, jax.tree.leaves(tree), strict=True))
        evaluate(self._needed(values, set(env))[0], env)
        return [read(env, value) for value in values]

    def _needed(self, values: Iterable[Value], given: set[Value]) -> tuple[list[Node], list[Value]]:
        """(the nodes, no blocks among them, that make values of given ones; values that they would need besides)."""
        made = producers(self._nodes)
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
        return [node for node in self._nodes if node in wanted], list(missing)

    def _check_chain(self, names: Sequence[str]) -> None:
        for index, (before, after) in enumerate(zip(self.blocks, self.blocks[1:], strict=False)):
            if before.y != after.x:
                raise ValueError(
                    f"{names[index + 1]} is not called with what {names[index]} returns: what changes the activations "
                    "between two blocks belongs into one of them"
                )

    def _classify(self, names: Sequence[str]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        """(arguments of blocks made of the batch alone, those that take parameters or random numbers)."""
        made: dict[Value, None] = {}
        carried: dict[Value, None] = {}
        data = set(self._data)
        for name, block in zip(names, self.blocks, strict=True):
            for value in block.arguments:
                if not self._needed([value], data)[1]:
                    made[value] = None
                elif not self._needed([value], {*data, *self._outer, *self._key})[1]:
                    carried[value] = None
                else:
                    raise ValueError(
                        f"{name} is called with {_short(value)}, which another block computes: blocks hand on their "
                        "first argument alone, so make it a tuple of all that passes from block to block"
                    )
        return tuple(made), tuple(carried)


class _Program:
    """A jaxpr as nodes, opened as far down as blocks are called; loops round them are unrolled."""

    def __init__(self, closed: ClosedJaxpr) -> None:
        self.inputs = tuple(Value(var.aval) for var in closed.jaxpr.invars)
        self.nodes: list[Node] = []
        self._rows: dict[tuple[Value, int], Value] = {}
        self.outputs = self._emit(closed.jaxpr, closed.consts, self.inputs, ())

    def row(self, stacked: Value, index: int) -> Value:
        """A row of a value, the same for the same row."""
        if (stacked, index) not in self._rows:
            aval = stacked.aval.update(shape=stacked.aval.shape[1:])
            row = self._rows[stacked, index] = Value(aval)
            self.nodes.append(Node("row", (stacked,), (row,), lambda array: [array[index]]))
        return self._rows[stacked, index]

    def blocks(self) -> list[CalledBlock]:
        """The calls of blocks, in order."""
        found = []
        for node in self.nodes:
            if node.name == _block.name:
                assert node.eqn is not None
                call = node.eqn.params["call"]
                params, x, arguments = _cut_up(node.ins, call.counts)
                y, others = _cut_up(node.outs, (call.counts[1], len(node.outs) - call.counts[1]))
                checkpoints = tuple(
                    {name: eqn.params[name] for name in ("policy", "prevent_cse")}
                    for eqn in node.context
                    if eqn.primitive.name in CHECKPOINTS
                )
                found.append(CalledBlock(call, params, x, arguments, y, others, checkpoints))
        return found

    def _emit(
        self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Value], context: tuple[JaxprEqn, ...]
    ) -> list[Value]:
        """Appends the nodes of a jaxpr; returns its outputs."""
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update({var: Value(var.aval, const) for var, const in zip(jaxpr.constvars, consts, strict=True)})

        def lookup(atom: Any) -> Value:
            return Value(atom.aval, atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ins, name = [lookup(atom) for atom in eqn.invars], eqn.primitive.name
            if eqn.primitive is _block or not _holds_block(eqn):
                outs = [Value(var.aval) for var in eqn.outvars]
                self.nodes.append(eqn_node(eqn, ins, outs, context))
            elif name in CALLS:
                outs = self._emit(*_open(eqn.params[CALLS[name]]), ins, (*context, eqn))
            elif name == "scan":
                outs = self._unroll(eqn, ins, context)
            else:
                raise ValueError(
                    f"the model calls its blocks within {name}, where they cannot be told apart: call them in a loop "
                    "of Python or in a scan"
                )
            env.update(zip(eqn.outvars, outs, strict=True))
        return [lookup(atom) for atom in jaxpr.outvars]

    def _unroll(self, eqn: JaxprEqn, ins: Sequence[Value], context: tuple[JaxprEqn, ...]) -> list[Value]:
        jaxpr, consts = _open(eqn.params["jaxpr"])
        num_consts, num_carry = scan_counts(eqn)
        shared, carry, xs = _cut_up(ins, (num_consts, num_carry, len(ins) - num_consts - num_carry))
        turns = range(eqn.params["length"])
        rows: dict[int, Sequence[Value]] = {}
        for turn in reversed(turns) if eqn.params["reverse"] else turns:
            given = (*shared, *carry, *(self.row(value, turn) for value in xs))
            outs = self._emit(jaxpr, consts, given, (*context, eqn))
            carry, rows[turn] = tuple(outs[:num_carry]), outs[num_carry:]
        stacked = [Value(var.aval) for var in eqn.outvars[num_carry:]]
        for value, column in zip(stacked, zip(*(rows[turn] for turn in turns), strict=True), strict=True):
            self.nodes.append(Node("stack", tuple(column), (value,), lambda *arrays: [jnp.stack(arrays)]))
        return [*carry, *stacked]


def _holds_block(eqn: JaxprEqn) -> bool:
    return eqn.primitive is _block or any(_holds_block(inner) for sub in subjaxprs(eqn) for inner in _open(sub)[0].eqns)


def _in_order(
    found: Sequence[CalledBlock], rows: Sequence[tuple[Value, ...]], names: Sequence[str]
) -> tuple[CalledBlock, ...]:
    """The blocks, each called once and one after the other."""
    index_of = {values: index for index, values in enumerate(rows)}
    order = [index_of.get(block.params) for block in found]
    if order != list(range(len(rows))):
        called = ", ".join("another" if index is None else names[index] for index in order) or "none"
        raise ValueError(
            f"of the blocks {', '.join(names)} the loss calls {called}: it must call each once, in this order, with "
            "the parameters that it has in the model"
        )
    return tuple(found)


def _columns(
    blocks: Sequence[CalledBlock],
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[Value | None, ...], ...]]:
    """(for each block the columns of what it returns besides x; for each column the value of each block, or None).

    Values at one place, of one shape and dtype, are one column.
    """
    keys = [[(place, v.aval.shape, v.aval.dtype) for place, v in enumerate(block.others)] for block in blocks]
    every = list(dict.fromkeys(key for row in keys for key in row))
    rows = [dict(zip(row, block.others, strict=True)) for row, block in zip(keys, blocks, strict=True)]
    columns = tuple(tuple(every.index(key) for key in row) for row in keys)
    return columns, tuple(tuple(row.get(key) for row in rows) for key in every)


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _cut_up(values: Sequence[Value], counts: Iterable[int]) -> list[tuple[Value, ...]]:
    found, start = [], 0
    for count in counts:
        found.append(tuple(values[start : start + count]))
        start += count
    return found


def _split(values: Sequence[Value], trees: Iterable[Any]) -> list[tuple[Value, ...]]:
    return _cut_up(values, (len(jax.tree.leaves(tree)) for tree in trees))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _text(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}", tree)


def _short(value: Value) -> str:
    return f"{value.aval.dtype.name}{list(value.aval.shape)}"
