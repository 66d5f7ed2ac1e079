"""Each microbatch's share in the mean loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.model import Model
from jaxpipe.runtime.outputs import as_arrays, describe
from jaxpipe.stage.axes import collectives_of_jaxpr


class Counts(NamedTuple):
    """Which microbatches count where: ``bool[num_microbatches]`` each, or None: all do.

    What does not count may not be finite. It is therefore selected away, from sums and from the cotangents that are
    sent on, and not multiplied by zero.

    Attributes:
      loss: those whose weight on this device is not zero.
      embed, stage, head: those which count on any device that this function communicates with. Where one does, the
        gradients on this device are in part its own.
    """

    loss: jax.Array | None = None
    embed: jax.Array | None = None
    stage: jax.Array | None = None
    head: jax.Array | None = None


class Shares(NamedTuple):
    """The shares of this device's microbatches in the mean over all microbatches and devices.

    A microbatch's share is its weight times ``unit``.

    Attributes:
      weights: ``[num_microbatches]``, relative to the largest weight; all zeros where no weight is not zero.
      unit: scalar, the share of a microbatch with the largest weight.
      seeds: ``[num_microbatches]``, cotangents of the losses: shares, or weights where there is a ``scale``.
      scale: ``unit``, by which the sums of gradients are to be multiplied in the end, or None.
      counts: which microbatches have a weight that is not zero.
    """

    weights: jax.Array
    unit: jax.Array
    seeds: jax.Array
    scale: jax.Array | None
    counts: Counts


def mean_shares(
    model: Model, batch: Any, axes: Sequence[str], losses: Any, calls: Mapping[str, tuple[Callable[..., Any], Any]]
) -> Shares:
    """The shares, where ``losses`` (a tree of shapes and dtypes) are to be averaged.

    A seed is rounded to its loss's dtype, and every gradient with it: 1/12 in bfloat16 is 0.2% too large. Where a loss
    has fewer bits than float32, seeds are therefore weights relative to the largest, exactly 1 where all are equal.

    Args:
      model: whose weight is used.
      batch: leaves ``[num_microbatches, microbatch, ...]``.
      axes: mesh axes over whose devices the mean is taken, too.
      losses: the head's and the stages'.
      calls: for "embed", "stage" and "head" a function and its arguments, as shapes and dtypes.

    Raises:
      ValueError: a weight that is not one real number.
    """
    weights = _weights(model, batch)
    total, largest = weights.sum(), jnp.abs(weights).max()
    if axes:
        total, largest = lax.psum(total, tuple(axes)), lax.pmax(largest, tuple(axes))
    counts = Counts() if model.weight is None else _counts(weights != 0, axes, calls)
    weights, unit = _ratio(weights, largest), _ratio(largest, total)
    if all(jnp.finfo(loss.dtype).bits >= 32 for loss in jax.tree.leaves(losses)):
        return Shares(weights, unit, weights * unit, None, counts)
    return Shares(weights, unit, weights, unit, counts)


def _counts(counts: jax.Array, axes: Sequence[str], calls: Mapping[str, tuple[Callable[..., Any], Any]]) -> Counts:
    def reach(function: Callable[..., Any], args: Any) -> jax.Array:
        used = {over for _, over in collectives_of_jaxpr(jax.make_jaxpr(function)(*args))} if axes else set()
        shared = tuple(axis for axis in axes if axis in used)
        return lax.pmax(counts.astype(jnp.int32), shared) > 0 if shared else counts

    return Counts(counts, **{name: reach(function, args) for name, (function, args) in calls.items()})


def _weights(model: Model, batch: Any) -> jax.Array:
    dtype, weight = jnp.result_type(float), model.weight
    if weight is None:
        return jnp.ones(jax.tree.leaves(batch)[0].shape[0], dtype)
    one = jax.eval_shape(lambda batch: as_arrays(weight(jax.tree.map(lambda leaf: leaf[0], batch)), "weight"), batch)
    if not _is_real_scalar(one):
        raise ValueError(
            f"weight returned {describe(one)} for a microbatch: return one real number, such as that of its real "
            "tokens, data['mask'].sum()"
        )
    return jax.vmap(lambda data: jnp.asarray(weight(data)).astype(dtype))(batch)


def _is_real_scalar(aval: Any) -> bool:
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return getattr(aval, "shape", None) == () and any(jnp.issubdtype(aval.dtype, kind) for kind in kinds)


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Part / whole, 0 where the whole is 0."""
    return jnp.where(whole == 0, 0.0, part / jnp.where(whole == 0, 1.0, whole)).astype(part.dtype)
