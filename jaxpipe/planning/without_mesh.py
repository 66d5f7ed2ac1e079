"""Runs the traced program of one device of a mesh without the others.

Collectives over the mesh's axes return arrays of the right shapes that are made of what this device itself has: it
receives in an exchange what it sent, gathers as many copies of its own part as there are devices, and sums nothing of
others. Each exchange is a pass over memory in place of the network. All else is what the device runs on its mesh.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe._jax import CALLS, COLLECTIVES, ClosedJaxpr, Jaxpr, JaxprEqn, Literal, source_info_util
from jaxpipe.stage.graph import scan_counts

_SUMS = frozenset({"psum", "psum_invariant", "pmax", "pmin"})
_GATHERS = frozenset({"all_gather", "all_gather_invariant"})


class WithoutMesh:
    """Evaluates the jaxpr of a device.

    Args:
      sizes: of the axes that the jaxpr communicates over.
      places: the device's place on each, int32; they may be traced.
      received: makes what arrives by a permute of what this device sends; None: that itself.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        places: Mapping[str, jax.Array],
        received: Callable[[jax.Array], jax.Array] | None = None,
    ) -> None:
        self.sizes, self.places = sizes, places
        self.received = received or (lambda x: x)
        self._known: dict[int, tuple[Any, bool]] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The jaxpr's results.

        Raises:
          ValueError: a collective that is not known here.
        """
        values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            with _context(eqn):
                results = self._eqn(eqn, list(map(read, eqn.invars)))
            values.update(zip(eqn.outvars, results, strict=True))
        return list(map(read, jaxpr.outvars))

    def _eqn(self, eqn: JaxprEqn, arguments: list[Any]) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        if names := self._names(eqn):
            return self._collective(eqn, names, arguments)
        if not self._talks(eqn):
            results = eqn.primitive.bind(*arguments, **eqn.primitive.get_bind_params(params))
            return results if eqn.primitive.multiple_results else [results]
        if name in CALLS:
            return self._closed(params[CALLS[name]], arguments)
        if name == "scan":
            return self._scan(eqn, arguments)
        if name == "while":
            return self._while(eqn, arguments)
        if name == "cond":
            branches = [functools.partial(self._branch, branch) for branch in params["branches"]]
            return lax.switch(arguments[0], branches, *arguments[1:])
        raise ValueError(f"a {name} communicates over {self._sizes()}: without the other devices it cannot run")

    def _closed(self, jaxpr: ClosedJaxpr | Jaxpr, arguments: Sequence[Any]) -> list[Any]:
        if isinstance(jaxpr, ClosedJaxpr):
            return self.run(jaxpr.jaxpr, jaxpr.consts, arguments)
        return self.run(jaxpr, (), arguments)

    def _branch(self, jaxpr: ClosedJaxpr, *arguments: Any) -> list[Any]:
        return self._closed(jaxpr, arguments)

    def _scan(self, eqn: JaxprEqn, arguments: list[Any]) -> list[Any]:
        params, (consts, carried) = eqn.params, scan_counts(eqn)
        given, start, rows = arguments[:consts], arguments[consts : consts + carried], arguments[consts + carried :]

        def turn(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
            results = self._closed(params["jaxpr"], [*given, *carry, *row])
            return results[:carried], results[carried:]

        carry, stacked = lax.scan(
            turn, start, rows, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        return [*carry, *stacked]

    def _while(self, eqn: JaxprEqn, arguments: list[Any]) -> list[Any]:
        params = eqn.params
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        asked, given, start = arguments[:first], arguments[first:second], arguments[second:]
        return lax.while_loop(
            lambda carry: self._closed(params["cond_jaxpr"], [*asked, *carry])[0],
            lambda carry: self._closed(params["body_jaxpr"], [*given, *carry]),
            start,
        )

    def _collective(self, eqn: JaxprEqn, names: tuple[str, ...], arguments: list[Any]) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        count = math.prod(self.sizes[axis] for axis in names)
        if params.get("axis_index_groups") is not None:
            raise ValueError(f"a {name} over groups of {names}: without the other devices it cannot run")
        if name == "axis_index":
            return [self._place(names)]
        if name in _SUMS:
            return arguments
        if name == "ppermute":
            return [lax.optimization_barrier(self._moved(self.received(x))) for x in arguments]
        if name in _GATHERS:
            gather = functools.partial(
                _gather, count=count, dimension=params["all_gather_dimension"], tiled=params["tiled"]
            )
            return [lax.optimization_barrier(gather(x)) for x in arguments]
        if name == "reduce_scatter":
            scatter = functools.partial(
                _part, count=count, dimension=params["scatter_dimension"], tiled=params["tiled"]
            )
            return [lax.optimization_barrier(scatter(x, place=self._place(names))) for x in arguments]
        if name == "all_to_all":
            exchange = functools.partial(
                _exchange, count=count, split=params["split_axis"], concat=params["concat_axis"]
            )
            return [lax.optimization_barrier(self._moved(exchange(x))) for x in arguments]
        raise ValueError(f"a {name} over {names}: what it would return without the other devices is not known")

    def _moved(self, x: jax.Array) -> jax.Array:
        """The array behind a pass over memory: a product with a 1 that the compiler cannot know."""
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return x
        one = functools.reduce(jnp.logical_and, [place >= 0 for place in self.places.values()])
        return x & one if x.dtype == jnp.bool_ else x * one.astype(x.dtype)

    def _place(self, names: Sequence[str]) -> jax.Array:
        """The device's place among those of some axes."""
        place = jnp.int32(0)
        for name in names:
            place = place * self.sizes[name] + self.places[name]
        return place

    def _names(self, eqn: JaxprEqn) -> tuple[str, ...]:
        """The axes that an equation itself communicates over, or asks for its place on."""
        if eqn.primitive.name not in COLLECTIVES and eqn.primitive.name != "axis_index":
            return ()
        names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        names = names if isinstance(names, tuple | list) else (names,)
        return tuple(name for name in names if name in self.sizes)

    def _talks(self, eqn: JaxprEqn) -> bool:
        """Whether something inside of an equation does so."""
        return any(map(self._has_collectives, _inside(eqn)))

    def _has_collectives(self, jaxpr: Jaxpr) -> bool:
        if id(jaxpr) not in self._known:  # kept with the jaxpr, whose id nothing else gets then
            found = any(self._names(eqn) or self._talks(eqn) for eqn in jaxpr.eqns)
            self._known[id(jaxpr)] = jaxpr, found
        return self._known[id(jaxpr)][1]

    def _sizes(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


def _inside(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


@contextlib.contextmanager
def _context(eqn: JaxprEqn) -> Iterator[None]:
    """An equation's scopes within those around."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def _gather(x: jax.Array, *, count: int, dimension: int, tiled: bool) -> jax.Array:
    """So many copies of a device's part."""
    shape = x.shape
    whole = jnp.broadcast_to(jnp.expand_dims(x, dimension), (*shape[:dimension], count, *shape[dimension:]))
    if not tiled:
        return whole
    return whole.reshape(*shape[:dimension], count * shape[dimension], *shape[dimension + 1 :])


def _part(x: jax.Array, *, count: int, dimension: int, tiled: bool, place: jax.Array) -> jax.Array:
    """A device's part of a sum that nothing is added to."""
    if not tiled:
        return lax.dynamic_index_in_dim(x, place, dimension, keepdims=False)
    size = x.shape[dimension] // count
    return lax.dynamic_slice_in_dim(x, place * size, size, dimension)


def _exchange(x: jax.Array, *, count: int, split: int, concat: int) -> jax.Array:
    """What a device sends to each other one, where it receives that one's."""
    if split == concat:
        return x
    shape = x.shape
    parts = x.reshape(*shape[:split], count, shape[split] // count, *shape[split + 1 :])
    parts = jnp.moveaxis(parts, split, concat)
    size = parts.shape[concat] * parts.shape[concat + 1]
    return parts.reshape(*parts.shape[:concat], size, *parts.shape[concat + 2 :])
