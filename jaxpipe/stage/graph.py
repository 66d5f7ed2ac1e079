"""A jaxpr as a flat list of nodes that can be divided and evaluated in parts.

Calls (jit, remat, custom derivative rules) are inlined, but for products that can be added to a sum in its place
(`jaxpipe.stage.addend`), and so are the turns of a scan that is unrolled as a whole.
Another scan is one node that holds the nodes of its body, and a conditional one that holds those of its branches, so
that they can be divided too. Everything else stays the equation it was, and is bound again when its node runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe._jax import (
    ACCUMULABLE,
    CALLS,
    HARMLESS_EFFECTS,
    LIGHT,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    source_info_util,
)

_DONE = np.zeros((), np.bool_)
"""Stands for a side effect. Not an array without elements: XLA 0.11 crashes where a loop on CPUs stacks these."""

RECOMPUTE = "recompute"
"""Name for `jax.ad_checkpoint.checkpoint_name`: a value that is cheaper to compute again than to keep."""


@dataclasses.dataclass(eq=False)
class Value:
    """An array of a graph, by identity; ``const`` holds it where it is known.

    With ``effect`` it is a flag that stands for a side effect of the node that makes it. ``rows`` are the values that
    an unrolled scan stacked to make it.
    """

    aval: Any
    const: Any = None
    effect: bool = False
    rows: tuple[Value, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the array; 0 for key arrays, which are small."""
        dtype = self.aval.dtype
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return 0
        return self.aval.size * dtype.itemsize


@dataclasses.dataclass(eq=False)
class Node:
    """Outputs computed from inputs.

    ``eqn`` is the equation that it is, within those of ``context``; ``scan`` is set where it is a loop, ``cond`` where
    it is a conditional, ``recompute`` if it makes a value named `RECOMPUTE`, ``recomputed`` where `jax.checkpoint`
    computes a forward pass again, ``row`` where it reads this row of its input for a turn of an unrolled scan.
    """

    name: str
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    run: Callable[..., Sequence[Any]]
    eqn: JaxprEqn | None = None
    scan: Scan | None = None
    cond: Cond | None = None
    context: tuple[JaxprEqn, ...] = ()
    recompute: bool = False
    recomputed: bool = False
    row: int | None = None

    @property
    def bodies(self) -> tuple[tuple[Node, ...], ...]:
        """The nodes of a loop's body or of each of a conditional's branches; empty for others."""
        if self.scan is not None:
            return (self.scan.nodes,)
        return () if self.cond is None else tuple(branch.nodes for branch in self.cond.branches)


class Carry(NamedTuple):
    """One carry of a scan, as the four values that it is on its way through the loop.

    Attributes:
      initial: the outer graph's value that the first turn starts from.
      entering: the body's input.
      leaving: the body's output, which enters the next turn.
      final: the outer graph's value after the last turn.
    """

    initial: Value
    entering: Value
    leaving: Value
    final: Value


@dataclasses.dataclass(eq=False)
class Scan:
    """A scan whose body is nodes.

    Attributes:
      nodes: the body.
      consts: (outer, inner) pairs of values that every iteration reads.
      carries: what passes from turn to turn.
      xs: (stacked, inner) pairs.
      ys: (inner, stacked) pairs.
      length, reverse, unroll: of `jax.lax.scan`.
      context: scopes to run it in.
    """

    nodes: tuple[Node, ...]
    consts: tuple[tuple[Value, Value], ...]
    carries: tuple[Carry, ...]
    xs: tuple[tuple[Value, Value], ...]
    ys: tuple[tuple[Value, Value], ...]
    length: int
    reverse: bool
    unroll: int
    context: tuple[JaxprEqn, ...]

    def node(self) -> Node:
        """The scan as a node of the outer graph; inputs that the body does not read are left out."""
        read = {value for node in self.nodes for value in node.ins}
        read |= {carry.leaving for carry in self.carries} | {inner for inner, _ in self.ys}
        kept = dataclasses.replace(
            self,
            consts=tuple(pair for pair in self.consts if pair[1] in read),
            xs=tuple(pair for pair in self.xs if pair[1] in read),
        )
        consts, xs = [outer for outer, _ in kept.consts], [stacked for stacked, _ in kept.xs]
        ins = (*consts, *(carry.initial for carry in kept.carries), *xs)
        outs = (*(carry.final for carry in kept.carries), *(stacked for _, stacked in kept.ys))
        return Node("scan", ins, outs, kept.run, scan=kept)

    def run(self, *arrays: Any) -> list[Any]:
        """Runs the loop on the node's inputs."""
        consts = dict(zip((inner for _, inner in self.consts), arrays, strict=False))
        inits, xs = arrays[len(self.consts) :][: len(self.carries)], arrays[len(self.consts) + len(self.carries) :]

        def body(carry: Any, x: Any) -> tuple[Any, Any]:
            env = dict(consts)
            env.update(zip((each.entering for each in self.carries), carry, strict=True))
            env.update(zip((inner for _, inner in self.xs), x, strict=True))
            evaluate(self.nodes, env)
            outs = [read(env, each.leaving) for each in self.carries]
            return outs, [read(env, inner) for inner, _ in self.ys]

        with contexts(self.context):
            carry, ys = lax.scan(
                body, list(inits), list(xs), length=self.length, reverse=self.reverse, unroll=self.unroll
            )
        return [*carry, *ys]


class Branch(NamedTuple):
    """One branch of a conditional.

    Attributes:
      nodes: in an order in which they can run.
      inputs: what each of the conditional's operands is in here; None where it is not read.
      outputs: what each of its results is; None where nobody reads it if this branch was taken, so zeros will do.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]

    def reads(self) -> set[Value]:
        """What its nodes and outputs read, made among the nodes or not."""
        return {value for node in self.nodes for value in node.ins} | {v for v in self.outputs if v is not None}


@dataclasses.dataclass(eq=False)
class Cond:
    """A conditional whose branches are nodes.

    Attributes:
      index: of the branch that runs, an int32.
      operands: values of the outer graph that the branches read.
      branches: one for each index.
      results: values of the outer graph that they make.
      context: scopes to run it in.
    """

    index: Value
    operands: tuple[Value, ...]
    branches: tuple[Branch, ...]
    results: tuple[Value, ...]
    context: tuple[JaxprEqn, ...]

    def node(self) -> Node:
        """The conditional as a node of the outer graph; operands that no branch reads are left out."""
        columns = []
        for branch in self.branches:
            read = branch.reads()
            columns.append([value if value in read else None for value in branch.inputs])
        rows = [
            (operand, row)
            for operand, row in zip(self.operands, zip(*columns, strict=True), strict=True)
            if any(value is not None for value in row)
        ]
        branches = tuple(
            branch._replace(inputs=tuple(row[place] for _, row in rows)) for place, branch in enumerate(self.branches)
        )
        kept = dataclasses.replace(self, operands=tuple(operand for operand, _ in rows), branches=branches)
        return Node("cond", (kept.index, *kept.operands), kept.results, kept.run, cond=kept)

    def run(self, index: Any, *arrays: Any) -> list[Any]:
        """Runs the chosen branch on the node's inputs."""

        def function(branch: Branch) -> Callable[..., list[Any]]:
            def run(*arrays: Any) -> list[Any]:
                env = {value: array for value, array in zip(branch.inputs, arrays, strict=True) if value is not None}
                evaluate(branch.nodes, env)
                pairs = zip(branch.outputs, self.results, strict=True)
                return [_branch_output(env, value, result.aval) for value, result in pairs]

            return run

        with contexts(self.context):
            return lax.switch(index, [function(branch) for branch in self.branches], *arrays)


def _branch_output(env: dict[Value, Any], value: Value | None, aval: Any) -> Any:
    """A branch's output, of the dtype that all branches return."""
    if value is None:
        return jnp.zeros(aval.shape, aval.dtype)
    if value.const is None or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return read(env, value)
    return jnp.asarray(value.const, aval.dtype)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A function as nodes in an order in which they can run."""

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def make_graph(closed: ClosedJaxpr) -> Graph:
    """The graph of a closed jaxpr."""
    inputs = tuple(Value(var.aval) for var in closed.jaxpr.invars)
    nodes: list[Node] = []
    outputs = _emit(closed.jaxpr, closed.consts, inputs, nodes, ())
    _mark_recomputed(nodes)
    return Graph(tuple(nodes), inputs, tuple(outputs))


def evaluate(nodes: Iterable[Node], env: dict[Value, Any]) -> None:
    """Runs nodes in order, reading and extending ``env``."""
    for node in nodes:
        env.update(zip(node.outs, node.run(*(read(env, value) for value in node.ins)), strict=True))


def evaluate_shared(nodes: Iterable[Node], env: dict[Value, Any], made: dict[Any, Any]) -> None:
    """`evaluate`; what was made of the same arrays before is taken from ``made``, by what made it and of what.

    ``made`` keeps the arrays, so that no other has the identity of one.
    """
    for node in nodes:
        arrays = [read(env, value) for value in node.ins]
        alone = node.eqn is None or node.scan is not None or node.cond is not None or has_effect(node)
        params = "" if alone or node.eqn is None else repr(sorted(node.eqn.params.items()))
        if alone or "..." in params:  # as large arrays are shortened
            outs = node.run(*arrays)
        else:
            key = node.name, node.row, params, tuple(map(id, arrays))
            if key not in made:
                made[key] = node.run(*arrays), arrays
            outs = made[key][0]
        env.update(zip(node.outs, outs, strict=True))


def read(env: dict[Value, Any], value: Value) -> Any:
    """A value's array."""
    return env[value] if value.const is None else value.const


def has_effect(node: Node) -> bool:
    """Whether the node does more than to compute its outputs, or one of its body or branches does."""
    return any(value.effect for value in node.outs)


def producers(nodes: Iterable[Node]) -> dict[Value, Node]:
    """The node that makes each value."""
    return {value: node for node in nodes for value in node.outs}


def is_zero(value: Value, made: Mapping[Value, Node]) -> bool:
    """Whether an array is known to be zeros, where ``made`` has the nodes that make values."""
    node = made.get(value)
    while node is not None and node.name in ("broadcast_in_dim", "convert_element_type"):
        value = node.ins[0]
        node = made.get(value)
    const = value.const  # what is traced is a jax.Array, too
    return node is None and const is not None and not isinstance(const, jax.Array) and not np.any(np.asarray(const))


def scatter_options(eqn: JaxprEqn) -> dict[str, Any]:
    """The further arguments of `jax.lax.scatter_add` that an equation was made with."""
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    return {name: eqn.params[name] for name in names}


def _emit(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Value],
    nodes: list[Node],
    context: tuple[JaxprEqn, ...],
    *,
    recomputed: bool = False,
) -> list[Value]:
    """Appends the nodes of a jaxpr, inlined; returns its outputs."""
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update({var: Value(var.aval, const) for var, const in zip(jaxpr.constvars, consts, strict=True)})
    recomputed = recomputed or any(outer.params.get("differentiated") for outer in context)

    def lookup(atom: Any) -> Value:
        return Value(atom.aval, atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        ins = [lookup(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in CALLS and ACCUMULABLE not in eqn.params:
            inner, inner_consts = _open(eqn.params[CALLS[name]])
            if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
                ins = [_barrier(value, nodes) for value in ins]
            outs = _emit(inner, inner_consts, ins, nodes, (*context, eqn), recomputed=recomputed)
        elif name == "scan" and eqn.params["unroll"] >= eqn.params["length"] > 0:
            outs = _emit_turns(eqn, ins, nodes, context, recomputed=recomputed)
        else:
            outs = [Value(var.aval) for var in eqn.outvars]
            if name == "scan":
                nodes.append(_scan(eqn, ins, outs, context, recomputed=recomputed).node())
            elif name == "cond" and not eqn.params.get("branches_platforms"):
                nodes.append(_cond(eqn, ins, outs, context, recomputed=recomputed).node())
            else:
                nodes.append(dataclasses.replace(eqn_node(eqn, ins, outs, context), recomputed=recomputed))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [lookup(atom) for atom in jaxpr.outvars]


def _emit_turns(
    eqn: JaxprEqn, ins: Sequence[Value], nodes: list[Node], context: tuple[JaxprEqn, ...], *, recomputed: bool
) -> list[Value]:
    """Appends the nodes of all turns of a scan; returns its outputs."""
    jaxpr, consts = _open(eqn.params["jaxpr"])
    num_consts, num_carry = scan_counts(eqn)
    fixed, carry, xs = ins[:num_consts], ins[num_consts : num_consts + num_carry], ins[num_consts + num_carry :]
    length = eqn.params["length"]
    stacked: list[list[Value]] = [[] for _ in eqn.outvars[num_carry:]]
    for turn in reversed(range(length)) if eqn.params["reverse"] else range(length):
        entering = [*fixed, *carry, *(_row(value, turn, nodes) for value in xs)]
        outs = _emit(jaxpr, consts, entering, nodes, (*context, eqn), recomputed=recomputed)
        carry = outs[:num_carry]
        for column, out in zip(stacked, outs[num_carry:], strict=True):
            column.append(out)
    if eqn.params["reverse"]:
        stacked = [column[::-1] for column in stacked]
    columns = zip(stacked, eqn.outvars[num_carry:], strict=True)
    return [*carry, *(_stack(column, var.aval, nodes) for column, var in columns)]


def _row(value: Value, index: int, nodes: list[Node]) -> Value:
    """A row of a value, of a node that reads it where none has made it."""
    if value.rows:
        return value.rows[index]
    aval = value.aval.update(shape=value.aval.shape[1:])
    if value.const is not None:
        return Value(aval, value.const[index])
    out = Value(aval)
    nodes.append(Node("slice", (value,), (out,), lambda array: [array[index]], row=index))
    return out


def _stack(rows: Sequence[Value], aval: Any, nodes: list[Node]) -> Value:
    """The value with these rows, of a node that stacks them."""
    out = Value(aval, rows=tuple(rows))
    nodes.append(Node("concatenate", tuple(rows), (out,), lambda *arrays: [jnp.stack(arrays)]))
    return out


def _mark_recomputed(nodes: Sequence[Node]) -> None:
    """Marks what makes a value named `RECOMPUTE`, back to its last work that is more than light."""
    made = producers(nodes)
    named = [node for node in nodes if node.name == "name" and node.eqn and node.eqn.params["name"] == RECOMPUTE]
    pending = [value for node in named for value in node.ins]
    while pending:
        node = made.get(pending.pop())
        if node is not None and not node.recompute:
            node.recompute = True
            if node.name in LIGHT:
                pending += node.ins


def eqn_node(eqn: JaxprEqn, ins: Sequence[Value], outs: Sequence[Value], context: tuple[JaxprEqn, ...]) -> Node:
    """An equation as a node; with a side effect it has one more output."""
    run = functools.partial(_bind, eqn, context)
    if not has_side_effects(eqn.effects):
        return Node(eqn.primitive.name, tuple(ins), tuple(outs), run, eqn, context=context)
    outs = (*outs, Value(jax.typeof(_DONE), effect=True))
    return Node(eqn.primitive.name, tuple(ins), outs, lambda *arrays: [*run(*arrays), _DONE], eqn, context=context)


def _scan(
    eqn: JaxprEqn,
    ins: Sequence[Value],
    outs: Sequence[Value],
    context: tuple[JaxprEqn, ...],
    *,
    recomputed: bool,
) -> Scan:
    jaxpr, consts = _open(eqn.params["jaxpr"])
    num_consts, num_carry = scan_counts(eqn)
    inner_ins = [Value(var.aval) for var in jaxpr.invars]
    nodes: list[Node] = []
    inner_outs = _emit(jaxpr, consts, inner_ins, nodes, (), recomputed=recomputed)
    _mark_recomputed(nodes)
    effects = [value for node in nodes for value in node.outs if value.effect]
    stop = num_consts + num_carry
    carried = ins[num_consts:stop], inner_ins[num_consts:stop], inner_outs[:num_carry], outs[:num_carry]
    return Scan(
        nodes=tuple(nodes),
        consts=tuple(zip(ins[:num_consts], inner_ins[:num_consts], strict=True)),
        carries=tuple(Carry(*values) for values in zip(*carried, strict=True)),
        xs=tuple(zip(ins[stop:], inner_ins[stop:], strict=True)),
        ys=(
            *zip(inner_outs[num_carry:], outs[num_carry:], strict=True),
            *((value, stack_of(value, eqn.params["length"])) for value in effects),
        ),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
        context=(*context, eqn),
    )


def _cond(
    eqn: JaxprEqn,
    ins: Sequence[Value],
    outs: Sequence[Value],
    context: tuple[JaxprEqn, ...],
    *,
    recomputed: bool,
) -> Cond:
    branches: list[Branch] = []
    for closed in eqn.params["branches"]:
        jaxpr, consts = _open(closed)
        inputs = tuple(Value(var.aval) for var in jaxpr.invars)
        nodes: list[Node] = []
        outputs = _emit(jaxpr, consts, inputs, nodes, (), recomputed=recomputed)
        _mark_recomputed(nodes)
        branches.append(Branch(tuple(nodes), inputs, tuple(outputs)))
    # Each effect is a result of its own, which only the branch that has it makes.
    effects = [
        (place, value)
        for place, branch in enumerate(branches)
        for node in branch.nodes
        for value in node.outs
        if value.effect
    ]
    return Cond(
        index=ins[0],
        operands=tuple(ins[1:]),
        branches=tuple(
            branch._replace(outputs=(*branch.outputs, *(value if at == place else None for at, value in effects)))
            for place, branch in enumerate(branches)
        ),
        results=(*outs, *(Value(value.aval, effect=True) for _, value in effects)),
        context=(*context, eqn),
    )


def stack_of(value: Value, length: int) -> Value:
    """The rows of a value of a scan's body, one for each turn."""
    return Value(value.aval.update(shape=(length, *value.aval.shape)), effect=value.effect)


def has_side_effects(effects: Iterable[Any]) -> bool:
    """Whether any of a jaxpr's or an equation's effects is more than the use of a mesh axis.

    An unknown effect counts, since nobody can tell what it does.
    """
    return any(type(effect).__name__ not in HARMLESS_EFFECTS for effect in effects)


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many of a scan's inputs are constants and carries; jax 0.11 keeps them in a tree instead of as counts."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].update(eqn.invars).unpack()
    return len(list(consts)), len(list(carry))


def _barrier(value: Value, nodes: list[Node]) -> Value:
    """The value behind an optimization barrier, so that a recomputation is not merged with the original."""
    if value.const is not None:
        return value
    out = Value(value.aval)
    nodes.append(Node("optimization_barrier", (value,), (out,), lambda array: [lax.optimization_barrier(array)]))
    return out


def _bind(eqn: JaxprEqn, context: tuple[JaxprEqn, ...], *arrays: Any) -> Sequence[Any]:
    """Binds an equation's primitive again."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with contexts((*context, eqn)):
        result = eqn.primitive.bind(*arrays, **params)
    return result if eqn.primitive.multiple_results else [result]


@contextlib.contextmanager
def contexts(eqns: Sequence[JaxprEqn]) -> Iterator[None]:
    """The name stacks and compute contexts of nested equations, outermost first."""
    with contextlib.ExitStack() as stack:
        for eqn in eqns:
            names = source_info_util.current_name_stack() + eqn.source_info.name_stack
            stack.enter_context(source_info_util.user_context(eqn.source_info.traceback, name_stack=names))
            stack.enter_context(eqn.ctx.manager)
        yield


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())
