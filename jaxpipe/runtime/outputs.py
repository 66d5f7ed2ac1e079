"""What the user's functions return, as arrays; anything else is refused while it is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

NUMBERS = (jnp.bool_, jnp.integer, jnp.inexact)
"""What can be summed."""


def as_loss(value: Any, owner: str) -> jax.Array:
    """A loss as a floating scalar array.

    Args:
      value: what the user returned; a Python float is one too.
      owner: begins an error, which goes on with the shape or dtype: "the head returned a loss of".

    Raises:
      ValueError: something else than one number, or one without a gradient.
    """
    array = _array(value)
    if array is None:
        raise ValueError(
            f"{owner} type {type(value).__name__}, {describe(value)}: return a floating scalar, the microbatch's mean "
            "loss; what else there is to report goes into jaxpipe.Output(value, aux_loss, metrics={...})"
        )
    if array.shape:
        raise ValueError(f"{owner} shape {array.shape}; return a scalar, the microbatch's mean loss")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{owner} dtype {array.dtype.name}, {describe(value)}: a loss is differentiated, so return a real floating "
            "scalar, such as float32 or 0.0; a count goes into jaxpipe.Output(value, metrics={...})"
        )
    return array


def as_metrics(metrics: Any, owner: str) -> dict[str, jax.Array]:
    """Metrics as a flat dict of arrays of numbers.

    Raises:
      ValueError: they are not that.
    """
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise ValueError(
            f"the {owner}'s metrics are {describe(metrics)}: give a flat dict of arrays with names as keys"
        )
    arrays = {name: _array(value) for name, value in metrics.items()}
    for name, array in arrays.items():
        if array is None or not any(jnp.issubdtype(array.dtype, kind) for kind in NUMBERS):
            raise ValueError(
                f"the {owner}'s metric {name!r} is {describe(metrics[name])}: metrics are a flat dict of arrays of "
                "numbers, since they are summed; give each array a name of its own"
            )
    return {name: array for name, array in arrays.items() if array is not None}


def as_arrays(tree: Any, owner: str) -> Any:
    """A tree's leaves as arrays.

    Raises:
      ValueError: one is no array and no number.
    """

    def convert(path: Any, leaf: Any) -> jax.Array:
        array = _array(leaf)
        if array is None:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"the {owner} returned {leaf!r}{where and f' at {where}'}: return a pytree of arrays")
        return array

    return jax.tree_util.tree_map_with_path(convert, tree)


def describe(value: Any) -> str:
    """A value in an error: dtype and shape of arrays, the parts of containers, else the value itself.

    >>> describe((jnp.ones(3), {"n": 1}))
    "(float32[3], {'n': 1})"
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(map(describe, value)) + right
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype.name}{list(value.shape)}"
    return repr(value)


def shape_texts(tree: Any) -> Any:
    """Dtype and shape of each array as text, in the tree's structure.

    >>> shape_texts({"h": jnp.ones((2, 3))})
    {'h': 'float32[2, 3]'}
    """
    return jax.tree.map(lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}", tree)


def _array(value: Any) -> jax.Array | None:
    """A leaf as an array, or None where it is none."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    if not is_array and not isinstance(value, bool | int | float | complex):
        return None
    try:
        return jnp.asarray(value, jnp.result_type(value))
    except (TypeError, OverflowError):
        return None
