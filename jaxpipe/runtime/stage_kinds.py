"""Stages of several kinds, each with code of its own in the program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.buffers import Apart, Named, put, take


class StageKinds:
    """A stage function of several kinds: stage s runs ``functions[kind_of[s]]``.

    A rank's program has a branch for each operation of each kind that it runs. Nothing is chosen within a stage: a
    forward and a backward that overlap are one block of code whatever their kinds, and each kind is divided into input
    and weight gradient by itself. All kinds take the same ``params``, a row of ``Params.stages``, and use of it what
    they need; gradients of what they do not use are zero.

    Called as a function, as a plain program does, it chooses by ``ctx.stage``.

    Args:
      functions: each as `jaxpipe.value_and_grad`'s ``stage``.
      kind_of: of each stage, in the order of the forward pass, an index of ``functions``.

    Raises:
      ValueError: functions that are none, indices that are out of range or leave a function out.

    >>> import jaxpipe
    >>> double, add = (lambda w, x, ctx: x * w), (lambda w, x, ctx: x + w)
    >>> stage = StageKinds([double, add], [0, 1, 1, 1])
    >>> mesh, schedule = jaxpipe.make_mesh(pp=4), jaxpipe.schedule.build("zb1p", 4, 8)
    >>> pipeline = jaxpipe.value_and_grad(stage, schedule, mesh, head=lambda outer, y, data, ctx: y.sum())
    >>> (loss, _), grads = pipeline(jaxpipe.Params(jnp.arange(2.0, 6.0)), jnp.ones(8))
    >>> float(loss), grads.stages.tolist()  # 1 * 2 + 3 + 4 + 5
    (14.0, [1.0, 1.0, 1.0, 1.0])
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], kind_of: Sequence[int]) -> None:
        self.functions, self.kind_of = tuple(functions), tuple(map(int, kind_of))
        wrong = [function for function in self.functions if not callable(function)]
        if wrong or not self.functions:
            raise ValueError(f"functions has {wrong or 'none'}: pass functions, to be called as stage(params, x, ctx)")
        if sorted(set(self.kind_of)) != list(range(len(self.functions))):
            raise ValueError(
                f"kind_of={list(self.kind_of)} for {len(self.functions)} functions: give each stage an index of "
                f"functions, 0 to {len(self.functions) - 1}, and leave out functions that no stage runs"
            )

    def map(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> StageKinds:
        """The same kinds with functions that ``change`` makes of theirs."""
        changed = copy.copy(self)
        changed.functions = tuple(map(change, self.functions))
        return changed

    def __call__(self, params: Any, x: Any, ctx: Any) -> Any:
        """What the stage of the context's kind returns."""
        return jax.lax.switch(jnp.asarray(self.kind_of, jnp.int32)[ctx.stage], self.functions, params, x, ctx)


class SharedPool(NamedTuple):
    """A pool whose slots hold a value of any kind.

    What two kinds keep of equal shape and dtype has one place, so that a slot is about as large as the largest kind.

    Attributes:
      avals: shapes and dtypes of a slot's places.
      places: for each kind, the place of each of its arrays.
      kinds: for each kind, shapes and dtypes of its arrays. In a place of another shape, which is a row of numbers,
        an array is the first of them.
    """

    avals: tuple[Any, ...]
    places: tuple[tuple[int, ...], ...]
    kinds: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, kinds: Sequence[Sequence[Any]], *, flat: bool = False) -> SharedPool:
        """The pool for what each kind keeps, given as shapes and dtypes.

        With ``flat``, arrays of one dtype and several shapes have a place together where no kind keeps two of them.

        >>> small, large = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3, 3), jnp.float32)
        >>> SharedPool.of([[small, large], [large, large]]).places
        ((0, 1), (1, 2))
        >>> pool = SharedPool.of([[small, large], [large, large]], flat=True)
        >>> pool.places, [aval.shape for aval in pool.avals]
        (((0, 1), (1, 0)), [(9,), (3, 3)])
        """
        avals: list[Any] = []
        places = []
        for kind in kinds:
            mine: list[int] = []
            for aval in kind:
                same = (
                    place
                    for place, other in enumerate(avals)
                    if place not in mine and (other.shape, other.dtype) == (aval.shape, aval.dtype)
                )
                place = next(same, len(avals))
                if place == len(avals):
                    avals.append(aval)
                mine.append(place)
            places.append(tuple(mine))
        found = cls(tuple(avals), tuple(places), tuple(map(tuple, kinds)))
        return found._flattened() if flat else found

    def _flattened(self) -> SharedPool:
        """The pool with places put together, the largest first, each with the smallest that can hold it."""
        users = [{kind for kind, mine in enumerate(self.places) if place in mine} for place in range(len(self.avals))]
        together: list[list[int]] = []
        for place in sorted(range(len(self.avals)), key=lambda place: -self.avals[place].size):
            free = (
                group
                for group in reversed(together)
                if self.avals[group[0]].dtype == self.avals[place].dtype
                and all(users[place].isdisjoint(users[other]) for other in group)
            )
            group = next(free, None)
            if group is None:
                together.append(group := [])
            group.append(place)
        together.sort(key=min)
        avals = [self.avals[first] if not rest else _row(self.avals[first]) for first, *rest in together]
        new = {place: index for index, group in enumerate(together) for place in group}
        return SharedPool(tuple(avals), tuple(tuple(new[place] for place in mine) for mine in self.places), self.kinds)

    def of_kind(self, pool: Sequence[Any], kind: int) -> tuple[Any, ...]:
        """What of a pool's arrays is a kind's."""
        return tuple(pool[place] for place in self.places[kind])

    def with_kind(self, pool: Sequence[Any], kind: int, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """The pool with a kind's arrays replaced."""
        leaves = list(pool)
        for place, leaf in zip(self.places[kind], arrays, strict=True):
            leaves[place] = leaf
        return tuple(leaves)

    def take(self, pool: Any, slot: Any, kind: int) -> tuple[Any, ...]:
        """What is kept in a slot, of a kind."""
        if isinstance(pool, Apart):
            return take(pool, slot)
        if isinstance(pool, Named):
            whole = zip(self.of_kind(take(pool, slot), kind), self.kinds[kind], strict=True)
            return tuple(_first(place, aval) for place, aval in whole)
        leaves = zip(self.of_kind(pool, kind), self.kinds[kind], strict=True)
        return tuple(_take(leaf, slot, aval) for leaf, aval in leaves)

    def put(self, pool: Any, slot: Any, kind: int, values: tuple[Any, ...]) -> Any:
        """The pool with a slot's places for a kind replaced."""
        if isinstance(pool, Apart):
            return put(pool, slot, values)
        if isinstance(pool, Named):
            places = take(pool, slot)
            found = zip(self.of_kind(places, kind), values, strict=True)
            return put(pool, slot, self.with_kind(places, kind, [_with_first(place, value) for place, value in found]))
        leaves = zip(self.of_kind(pool, kind), values, strict=True)
        return self.with_kind(pool, kind, [_put(leaf, slot, value) for leaf, value in leaves])


def _row(aval: Any) -> jax.ShapeDtypeStruct:
    """The numbers of an array in a row."""
    return jax.ShapeDtypeStruct((aval.size,), aval.dtype)


def _first(place: jax.Array, aval: Any) -> jax.Array:
    """An array of a place that may be larger."""
    return place if place.shape == aval.shape else lax.slice(place, (0,), (aval.size,)).reshape(aval.shape)


def _with_first(place: jax.Array, value: jax.Array) -> jax.Array:
    """A place with an array in it."""
    if place.shape == value.shape:
        return value
    return lax.dynamic_update_slice(place, value.reshape(-1), (jnp.int32(0),))


def _take(leaf: jax.Array, slot: Any, aval: Any) -> jax.Array:
    """An array of a slot, of a place that may be larger."""
    if leaf.shape[1:] == aval.shape:
        return take(leaf, slot)
    return lax.dynamic_slice(leaf, (slot, jnp.zeros_like(slot)), (1, aval.size)).reshape(aval.shape)


def _put(leaf: jax.Array, slot: Any, value: jax.Array) -> jax.Array:
    """A place of all slots with an array in one of them."""
    if leaf.shape[1:] == value.shape:
        return put(leaf, slot, value)
    return lax.dynamic_update_slice(leaf, value.reshape(1, -1), (slot, jnp.zeros_like(slot)))
