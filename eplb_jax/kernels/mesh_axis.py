"""Where a device is on a mesh axis, and over which axes values vary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp


def size_and_index(axis: str | None) -> tuple[int, jax.Array]:
    """Size of the axis and this device's place on it, int32; 1 and 0 for no axis.

    Raises:
      ValueError: an axis that no `jax.shard_map` binds here.
    """
    if axis is None:
        return 1, jnp.int32(0)
    if not is_bound(axis):
        raise ValueError(
            f"axis={axis!r} is not bound: call this within jax.shard_map over a mesh that has this axis, or with "
            "axis=None where one device holds all experts"
        )
    return jax.lax.axis_size(axis), jax.lax.axis_index(axis).astype(jnp.int32)


def is_bound(axis: str) -> bool:
    """Whether a `jax.shard_map` binds the axis here."""
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True


def explicit_axes(*operands: Any) -> tuple[str, ...]:
    """The mesh axes of type Explicit that arrays among the operands are sharded over, in alphabetical order.

    >>> explicit_axes(jnp.ones(2), 3)
    ()
    """
    found: set[str] = set()
    for operand in operands:
        spec = jax.typeof(operand).sharding.spec if isinstance(operand, jax.Array) else ()
        for names in spec:
            found.update((names,) if isinstance(names, str) else names or ())
    return tuple(sorted(found))


def same_axes(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Makes the arrays vary over the mesh axes of all of them.

    A function with a custom derivative calls this first, because its rule gives every cotangent the results' axes. The
    transpose of varying is a sum over the axis, so gradients of what was the same on all devices come out summed.
    With ``check_vma=False`` nothing is known to vary, this does nothing, and the sum is the caller's.
    """
    axes = _axes_of(arrays)
    return tuple(_vary(x, axes) for x in arrays)


def varying(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with results that vary over its arguments' mesh axes; a kernel's own vary over none."""

    def call(*arguments: jax.Array) -> Any:
        axes = _axes_of(arguments)
        return jax.tree.map(lambda result: _vary(result, axes), function(*arguments))

    return call


def _axes_of(arrays: Iterable[jax.Array]) -> frozenset[str]:
    return frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
