"""Which part of each value of a traced program a device has, where mesh axes are the compiler's.

Inside of `jax.shard_map` the shapes are whole along axes that are not manual. A pipeline constrains its parameters and
its batch as their PartitionSpecs say; from there the division is followed forwards through the equations, as XLA's is.
What no rule knows keeps it where the shape stays the same, and loses it otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxpipe._jax import REDUCTIONS, Jaxpr, JaxprEqn, Literal, is_on_host
from jaxpipe.arguments import entry_axes
from jaxpipe.planning.liveness import called_jaxpr, whole
from jaxpipe.stage.graph import scan_counts

Dims = tuple[frozenset[str], ...]
"""The axes that divide each dimension."""


class Divided:
    """The division of every variable of a jaxpr and of those inside it.

    Attributes:
      sizes: of the compiler's axes. A manual axis of size 1 here marks what its devices have parts of; the shapes are
        those parts' already.
    """

    def __init__(self, jaxpr: Jaxpr, sizes: Mapping[str, int]):
        self.sizes = sizes
        self._dims: dict[Any, Dims] = {}
        if sizes:
            self._walk(jaxpr, [self.dims(var) for var in jaxpr.invars])

    def dims(self, atom: Any) -> Dims:
        """The axes that divide each dimension of a variable or literal."""
        nothing = (frozenset(),) * len(atom.aval.shape)
        return nothing if isinstance(atom, Literal) else self._dims.get(atom, nothing)

    def share(self, axes: frozenset[str]) -> int:
        """In how many parts axes divide something."""
        return math.prod(self.sizes[name] for name in axes)

    def nbytes(self, atom: Any) -> int:
        """Bytes that one device has in its own memory."""
        return 0 if is_on_host(atom) else self.nbytes_anywhere(atom)

    def nbytes_on_host(self, atom: Any) -> int:
        """Bytes that one device has in the host's memory."""
        return self.nbytes_anywhere(atom) if is_on_host(atom) else 0

    def nbytes_anywhere(self, atom: Any) -> int:
        """Bytes that one device has, wherever they are."""
        return whole(atom) // self.share(frozenset().union(*self.dims(atom)))

    def _walk(self, jaxpr: Jaxpr, inputs: Sequence[Dims]) -> list[Dims]:
        for var, dims in zip(jaxpr.invars, inputs, strict=True):
            self._dims[var] = _join(self.dims(var), dims)
        for eqn in jaxpr.eqns:
            for var, dims in zip(eqn.outvars, self._results(eqn), strict=True):
                self._dims[var] = _join(self.dims(var), dims)
        return [self.dims(atom) for atom in jaxpr.outvars]

    def _results(self, eqn: JaxprEqn) -> list[Dims]:
        ins, name = [self.dims(atom) for atom in eqn.invars], eqn.primitive.name
        called = called_jaxpr(eqn)
        if called is not None:
            return self._walk(called, ins[len(ins) - len(called.invars) :])
        if name == "shard_map":
            return self._walk(eqn.params["jaxpr"], ins)
        if name == "scan":
            consts, carries = scan_counts(eqn)
            rows = [dims[1:] for dims in ins[consts + carries :]]
            outs = self._loop(eqn, eqn.params["jaxpr"].jaxpr, slice(0, consts), slice(consts, consts + carries), rows)
            return [*outs[:carries], *((frozenset(), *dims) for dims in outs[carries:])]
        if name == "while":
            begin = eqn.params["cond_nconsts"]
            end = begin + eqn.params["body_nconsts"]
            return self._loop(eqn, eqn.params["body_jaxpr"].jaxpr, slice(begin, end), slice(end, None), [])
        if name == "cond":
            branches = [self._walk(branch.jaxpr, ins[1:]) for branch in eqn.params["branches"]]
            return [_join(*each) for each in zip(*branches, strict=True)]
        if name == "optimization_barrier":
            return ins
        rule = _RULES.get(name, _reduced if name in REDUCTIONS else _alike)
        found = rule(eqn, ins)
        return [self._fitting(found, _shape(var)) for var in eqn.outvars]

    def _fitting(self, dims: Dims, shape: tuple[int, ...]) -> Dims:
        """What a rule says, where it is of so many dimensions and they divide evenly."""
        if len(dims) != len(shape):
            return (frozenset(),) * len(shape)
        return tuple(
            frozenset(axis for axis in axes if axis in self.sizes and size % self.sizes[axis] == 0)
            for axes, size in zip(dims, shape, strict=True)
        )

    def _loop(self, eqn: JaxprEqn, body: Jaxpr, consts: slice, start: slice, rows: list[Dims]) -> list[Dims]:
        """The results of a loop's body, its carried values divided as at the start or after a turn."""
        fixed, carried = ([self.dims(atom) for atom in eqn.invars[places]] for places in (consts, start))
        while True:
            outs = self._walk(body, [*fixed, *carried, *rows])
            after = [_join(*pair) for pair in zip(carried, outs, strict=False)]
            if after == carried:
                break
            carried = after
        for atom, dims in zip(eqn.invars[start], carried, strict=True):
            if not isinstance(atom, Literal):
                self._dims[atom] = dims  # zeros to begin with are divided as what is added to them
        return [*carried, *outs[len(carried) :]]


def _join(*several: Dims) -> Dims:
    """Divided as any of them is; an axis divides one dimension, the first that it was found at."""
    joined = list(several[0])
    for dims in several[1:]:
        used = frozenset().union(*joined)
        joined = [have | (more - used) for have, more in zip(joined, dims, strict=True)]
    return tuple(joined)


def _alike(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    """As the operands of the result's shape; of other shapes of as many dimensions, where the size is the same."""
    shape = _shape(eqn.outvars[0]) if eqn.outvars else ()
    found = [
        tuple(
            axes if size == other else frozenset() for axes, size, other in zip(dims, _shape(atom), shape, strict=True)
        )
        for atom, dims in zip(eqn.invars, ins, strict=True)
        if len(dims) == len(shape)
    ]
    return _join((frozenset(),) * len(shape), *found)


def _reduced(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    return tuple(axes for place, axes in enumerate(ins[0]) if place not in eqn.params["axes"])


def _broadcast(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    found = [frozenset()] * len(eqn.params["shape"])
    for place, axes in zip(eqn.params["broadcast_dimensions"], ins[0], strict=True):
        found[place] = axes
    return tuple(found)


def _transposed(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    return tuple(ins[0][place] for place in eqn.params["permutation"])


def _reshaped(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    """A dimension goes on in that which begins at the same place."""
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    starts = {math.prod(before[:place]): axes for place, axes in enumerate(ins[0]) if before[place] > 1}
    return tuple(
        starts.get(math.prod(after[:place]), frozenset()) if after[place] > 1 else frozenset()
        for place in range(len(after))
    )


def _product(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    (contract, batch) = eqn.params["dimension_numbers"]
    left, right = ins[0], ins[1]
    shared = [left[a] | right[b] for a, b in zip(*batch, strict=True)]
    free = [
        [axes for place, axes in enumerate(dims) if place not in (*used, *together)]
        for dims, used, together in zip((left, right), contract, batch, strict=True)
    ]
    used = frozenset().union(*shared, *free[0])
    return (*shared, *free[0], *(axes - used for axes in free[1]))


def _grouped(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    """Of rows ``[m, k]`` and matrices ``[g, k, n]``."""
    if len(ins[0]) == 2 and len(ins[1]) == 3 and len(_shape(eqn.outvars[0])) == 2:
        return ins[0][0], ins[1][2] - ins[0][0]
    return ()


def _gathered(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    """Dimensions of the indices, but the last, and of what is taken whole from the operand."""
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], _shape(eqn.invars[0])
    rest = iter(axes for axes in ins[1][:-1])
    skipped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    taken = iter(
        axes if size == full else frozenset()
        for place, (axes, size, full) in enumerate(zip(ins[0], sizes, shape, strict=True))
        if place not in skipped
    )
    places = range(len(_shape(eqn.outvars[0])))
    return tuple(next(taken if place in numbers.offset_dims else rest, frozenset()) for place in places)


def _constrained(eqn: JaxprEqn, ins: Sequence[Dims]) -> Dims:
    spec = getattr(eqn.params["sharding"], "spec", None)
    if spec is None:
        return ins[0]
    entries = [*spec, *([None] * (len(ins[0]) - len(spec)))]
    return tuple(
        axes if entry is P.UNCONSTRAINED else frozenset(entry_axes(entry))
        for entry, axes in zip(entries, ins[0], strict=True)
    )


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


_RULES: Mapping[str, Callable[[JaxprEqn, Sequence[Dims]], Dims]] = {
    "argmax": _reduced,
    "argmin": _reduced,
    "broadcast_in_dim": _broadcast,
    "transpose": _transposed,
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "dot_general": _product,
    "ragged_dot": _grouped,
    "ragged_dot_general": _grouped,
    "gather": _gathered,
    "sharding_constraint": _constrained,
}
