"""Slot pools: pytrees of ``[slots, ...]`` arrays, slots apart, or slots by name; read and written one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.stage.addend import Addend

SUMS = "sums"
"""The scope in which sums of gradients begin, by which plans know them."""


class Buffers(NamedTuple):
    """Everything the scan over steps carries on one rank.

    Attributes:
      in_flight: activations and cotangents in transit, leaves ``[message slots + 1, ...]``.
      stash: residuals that live from F to I or B, tuple of ``[slots + 1, ...]``.
      weight_stash: residuals that live from F to W or B.
      cross: values that live from I to W.
      host_stash, host_weight_stash: the part of the residuals that is in host memory; () where slots are values apart.
      grads: for each local chunk, the sums of what its stage's gradients are made of, a tuple of arrays or `Zeros`.
      outer_grads: gradient accumulators of the outer parameters, None for those without a gradient.
      loss: scalar, sum of the losses this rank has seen, times their weights.
      aux_loss: scalar, that of the auxiliary losses.
      stage_metrics, head_metrics: sums.
      outputs: leaves ``[num_microbatches, ...]``, in forward-only programs.
    """

    in_flight: Any
    stash: Any = ()
    weight_stash: Any = ()
    cross: Any = ()
    host_stash: Any = ()
    host_weight_stash: Any = ()
    grads: Any = ()
    outer_grads: Any = None
    loss: Any = None
    aux_loss: Any = None
    stage_metrics: Any = None
    head_metrics: Any = None
    outputs: Any = None


def allocate(avals: Any, slots: int, *, apart: bool = False) -> Any:
    """Pool of ``slots`` slots for values of the given shapes and dtypes: zeros, or empty where they are apart."""
    if apart:
        return Apart((None,) * slots)
    return jax.tree.map(lambda aval: jnp.zeros((slots, *aval.shape), aval.dtype), avals)


class Apart(NamedTuple):
    """A pool whose slots are values of their own, None where there is none; slots are then known when traced.

    Attributes:
      slots: the values, the dummy slot's last.
    """

    slots: tuple[Any, ...]


class Named(NamedTuple):
    """A pool whose slots are arrays of their own, which loops carry and write in place; slots are known when traced.

    Attributes:
      slots: in each the arrays of all places of a slot, or None in code that does not use it; no dummy slot.
    """

    slots: tuple[Any, ...]

    def only(self, slots: Collection[Any]) -> Named:
        """The pool with None for all others."""
        return Named(tuple(arrays if i in slots else None for i, arrays in enumerate(self.slots)))

    def updated(self, part: Named) -> Named:
        """The pool with what a part of it has."""
        return Named(tuple(old if new is None else new for old, new in zip(self.slots, part.slots, strict=True)))


def uninitialised_array(aval: Any) -> jax.Array:
    """An array whose numbers are never read: whatever is in memory, but zeros where one searches for NaNs or infs."""
    if jax.config.jax_debug_nans or jax.config.jax_debug_infs:  # pyright: ignore[reportAttributeAccessIssue]
        return jnp.zeros(aval.shape, aval.dtype)
    return lax.empty(aval.shape, aval.dtype)


def numbered_array(aval: Any, number: int) -> jax.Array:
    """An array that differs from those of most other numbers: of equal ones XLA would make one, and copies of it."""
    dtype = np.dtype(aval.dtype)
    if dtype.itemsize == 1:  # some have fewer than eight bits, and one no zero
        return jnp.full(aval.shape, number % 2 if dtype == np.bool_ else 1 + number % 7, dtype)
    bits = (number % 2**15).to_bytes(dtype.itemsize, "little")
    return jnp.full(aval.shape, np.frombuffer(bits, dtype)[0], dtype)


def allocate_named(avals: Any, slots: int, fills: Iterator[int] | None) -> Named:
    """Slots for values of the given shapes and dtypes, whose first contents are never read.

    They are what `jax.lax.empty` leaves there, or, where that would be zeros, another of ``fills`` in each array: else
    XLA would make one and copies of it.
    """

    def fill(aval: Any) -> jax.Array:
        if fills is None:
            return uninitialised_array(aval)
        if jnp.issubdtype(aval.dtype, jax.dtypes.extended):  # random keys
            return jnp.zeros(aval.shape, aval.dtype)
        return numbered_array(aval, next(fills))

    return Named(tuple(jax.tree.map(fill, avals) for _ in range(slots)))


class Taken(NamedTuple):
    """Stands for a pool where the one value that is read of it is there already."""

    value: Any


def take(pool: Any, slot: Any) -> Any:
    """The value in a slot."""
    if isinstance(pool, Taken):
        return pool.value
    if isinstance(pool, (Apart, Named)):
        return pool.slots[slot]
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, slot, keepdims=False), pool)


def put(pool: Any, slot: Any, value: Any) -> Any:
    """The pool with a slot replaced."""
    if isinstance(pool, Named) and slot == len(pool.slots):
        return pool  # nobody reads the value
    if isinstance(pool, (Apart, Named)):
        return type(pool)((*pool.slots[:slot], value, *pool.slots[slot + 1 :]))
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, slot, 0), pool, value)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Zeros:
    """Stands for a sum to which nothing has been added yet; barriers see no array, so none is made.

    Attributes:
      array: the zeros, or one whose numbers nobody reads where something is sure to be added.
    """

    array: jax.Array


def with_arrays(buffers: Buffers) -> Buffers:
    """The buffers with arrays in place of `Zeros`."""
    made = jax.tree.map(
        lambda each: each.array if isinstance(each, Zeros) else each,
        buffers.grads,
        is_leaf=lambda node: isinstance(node, Zeros),
    )
    return buffers._replace(grads=made)


def accumulator(aval: Any, dtype: Any = None) -> jax.Array:
    """Zeros to sum values of an aval's shape in `sum_dtype`."""
    return jnp.zeros(aval.shape, sum_dtype(aval.dtype, dtype))


def sum_dtype(dtype: Any, given: Any = None) -> Any:
    """The dtype to sum in: real floating values in the one given, others in `accumulation_dtype`."""
    return given if given is not None and jnp.issubdtype(dtype, jnp.floating) else accumulation_dtype(dtype)


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype to sum in: float32, int32 or uint32 for narrower ones, int32 for bool, any other dtype itself.

    >>> [jnp.dtype(accumulation_dtype(kind)).name for kind in (jnp.bfloat16, jnp.bool_, jnp.uint8, jnp.int32)]
    ['float32', 'int32', 'uint32', 'int32']
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
    if dtype == jnp.bool_:
        return jnp.int32
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 32:
        return jnp.uint32 if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.int32
    return dtype


def add(total: Any, value: Any, counts: jax.Array | None = None) -> Any:
    """Total + value, leaf by leaf, in total's dtypes; total where ``counts`` is False, whatever the value.

    A value may be an `Addend`.
    """

    def plus(t: Any, v: Any) -> jax.Array:
        if isinstance(v, Addend):
            return v.add_to(jax.ShapeDtypeStruct(t.array.shape, t.array.dtype) if isinstance(t, Zeros) else t, counts)
        dtype = t.array.dtype if isinstance(t, Zeros) else t.dtype
        v = select(jnp.asarray(v).astype(dtype), counts)
        return v if isinstance(t, Zeros) else t + v

    return jax.tree.map(plus, total, value, is_leaf=lambda node: isinstance(node, Zeros))


def select(tree: Any, counts: jax.Array | None) -> Any:
    """The tree, or zeros where ``counts`` is False; None: the tree."""
    return tree if counts is None else jax.tree.map(lambda leaf: jnp.where(counts, leaf, jnp.zeros_like(leaf)), tree)
