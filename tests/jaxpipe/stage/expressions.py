"""Functions as expressions of their inputs: two that give the same expression give the same numbers, in any dtype.

`expressions` traces a function and numbers what it computes: the same primitive with the same parameters of the same
operands has the same number. Calls and loops are followed turn by turn, barriers are looked through, and so are all
branches of a conditional. No arithmetic is done, so nothing is rounded, compiled or hidden by an unlucky input.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxpipe.stage.graph import scan_counts

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "closed_call": "call_jaxpr",
}


class Book:
    """Numbers of expressions; two functions can be compared if they are written in the same book."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.stacks: dict[int, tuple[int, ...]] = {}
        self.cuts: dict[int, tuple[int, int]] = {}  # arrays of one row: of what, and which
        self.keys: dict[int, int] = {}  # by their data
        self.constants: dict[int, Any] = {}
        self.choices: dict[int, tuple[int, tuple[int, ...]]] = {}  # by index: what each branch gives
        self.taken: dict[int, int] = {}  # by index: the branch that is being followed
        self.clamped: dict[int, tuple[int, Any, Any]] = {}  # scalars, between which constants

    def number(self, *expression: Any) -> int:
        return self.numbers.setdefault(expression, len(self.numbers))

    def inputs(self, name: str, tree: Any) -> Any:
        """A new expression for each leaf of a tree."""
        counter = itertools.count()
        return jax.tree.map(lambda _: self.number("input", name, next(counter)), tree)

    def row(self, stacked: int, turn: int) -> int:
        return self.stacks[stacked][turn] if stacked in self.stacks else self.number("row", stacked, turn)

    def stack(self, rows: tuple[int, ...]) -> int:
        number = self.number("stack", rows)
        self.stacks[number] = rows
        return number

    def choose(self, index: int, results: tuple[int, ...]) -> int:
        """What a conditional returns, which is what its branches return where these agree."""
        if len(set(results)) == 1:
            return results[0]
        number = self.number("choice", index, results)
        self.choices[number] = index, results
        return number

    def chosen(self, number: int, index: int, branch: int) -> int:
        """What an expression is where an index chooses a branch."""
        if number in self.choices and self.choices[number][0] == index:
            return self.chosen(self.choices[number][1][branch], index, branch)
        if number in self.stacks:
            return self.stack(tuple(self.chosen(row, index, branch) for row in self.stacks[number]))
        return number

    def constant(self, value: Any) -> int:
        if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
            return self.number("key", np.asarray(jax.random.key_data(value)).tobytes())
        value = np.asarray(value)
        number = self.number("constant", value.dtype.name, value.shape, value.tobytes())
        self.constants[number] = value
        return number


def expressions(book: Book, function: Callable[..., Any], args: Any, numbers: Any) -> tuple[Any, Any]:
    """(the function's results as expressions, their shapes and dtypes), for args whose leaves have these numbers."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    results = _follow(book, closed, jax.tree.leaves(numbers))
    return jax.tree.unflatten(jax.tree.structure(shapes), results), shapes


def _follow(book: Book, closed: Any, inputs: list[int]) -> list[int]:
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update(zip(jaxpr.constvars, map(book.constant, consts), strict=True))

    def read(atom: Any) -> int:
        return book.constant(np.asarray(atom.val, atom.aval.dtype)) if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        outs = _follow_eqn(book, eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _follow_eqn(book: Book, eqn: Any, ins: list[int]) -> list[int]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return _follow(book, params[CALLS[name]], ins)
    if name == "optimization_barrier":
        return ins
    if name == "scan":
        return _follow_scan(book, eqn, ins)
    if name == "stack" and params["axis"] == 0:
        return [book.stack(tuple(ins))]
    if name == "squeeze" and params["dimensions"] == (0,) and ins[0] in book.cuts:
        return [book.row(*book.cuts[ins[0]])]
    if name == "cond" and not params.get("branches_platforms"):
        return _follow_cond(book, eqn, ins)
    if name == "random_wrap" and ins[0] in book.keys:  # a key that was stashed as its data
        return [book.keys[ins[0]]]
    if name == "convert_element_type":
        if eqn.invars[0].aval.dtype == params["new_dtype"]:  # what makes a number's type strong
            return ins
        if ins[0] in book.constants:  # JAX casts some constants when it traces
            return [book.constant(book.constants[ins[0]].astype(params["new_dtype"]))]
        params = {"new_dtype": params["new_dtype"]}
    text = str(sorted((key, str(value)) for key, value in params.items()))
    avals = tuple((var.aval.shape, str(var.aval.dtype)) for var in eqn.outvars)
    outs = [book.number(name, text, avals, tuple(ins), i) for i in range(len(eqn.outvars))]
    if name == "slice" and eqn.outvars[0].aval.shape == (1, *eqn.invars[0].aval.shape[1:]):
        book.cuts[outs[0]] = ins[0], params["start_indices"][0]
    if name == "random_unwrap":
        book.keys[outs[0]] = ins[0]
    if name == "clamp" and {ins[0], ins[2]} <= {*book.constants} and eqn.outvars[0].aval.shape == ():
        book.clamped[outs[0]] = ins[1], book.constants[ins[0]].item(), book.constants[ins[2]].item()
    return outs


def _follow_scan(book: Book, eqn: Any, ins: list[int]) -> list[int]:
    num_consts, num_carry = scan_counts(eqn)
    consts, carry, xs = ins[:num_consts], ins[num_consts:][:num_carry], ins[num_consts + num_carry :]
    turns = range(eqn.params["length"])
    rows = {}
    for turn in reversed(turns) if eqn.params["reverse"] else turns:
        outs = _follow(book, eqn.params["jaxpr"], [*consts, *carry, *(book.row(stacked, turn) for stacked in xs)])
        carry, rows[turn] = outs[:num_carry], outs[num_carry:]
    return [*carry, *(book.stack(column) for column in zip(*(rows[turn] for turn in turns), strict=True))]


def _follow_cond(book: Book, eqn: Any, ins: list[int]) -> list[int]:
    """Each branch, given what conditionals of the same index before it made in the same branch."""
    index, *operands = ins
    last = len(eqn.params["branches"]) - 1
    while (inner := book.clamped.get(index)) and inner[1:] == (0, last):  # each time that it is bound
        index = inner[0]
    if index in book.taken:  # within a branch of the same index no other can run
        branch = min(book.taken[index], last)
        return _follow(book, eqn.params["branches"][branch], operands)
    results = []
    for branch, closed in enumerate(eqn.params["branches"]):
        book.taken[index] = branch
        results.append(_follow(book, closed, [book.chosen(number, index, branch) for number in operands]))
        del book.taken[index]
    return [book.choose(index, column) for column in zip(*results, strict=True)]
