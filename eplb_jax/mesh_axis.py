"""Where a device is on a mesh axis, and over which axes values vary."""

from __future__ import annotations

from collections.abc import Callable
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
    try:
        return jax.lax.axis_size(axis), jax.lax.axis_index(axis).astype(jnp.int32)
    except NameError as error:
        raise ValueError(
            f"axis={axis!r} is not bound: call this within jax.shard_map over a mesh that has this axis, or with "
            "axis=None where one device holds all experts"
        ) from error


def varying(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with results that vary over its arguments' mesh axes; a kernel's own vary over none."""

    def call(*arguments: jax.Array) -> Any:
        axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in arguments))

        def vary(result: jax.Array) -> jax.Array:
            missing = tuple(axes - jax.typeof(result).manual_axis_type.varying)
            return jax.lax.pcast(result, missing, to="varying") if missing else result

        return jax.tree.map(vary, function(*arguments))

    return call
