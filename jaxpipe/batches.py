"""Batches whose size does not divide into microbatches: padded with examples that do not count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.schedule.ints import at_least


def pad_batch(batch: Any, multiple: int) -> tuple[Any, np.ndarray]:
    """(the batch with as many examples as a multiple of some number, which of them are real).

    What is added are copies of the last example, so that nothing in them is infinite where real examples are not.

    Args:
      batch: pytree of arrays ``[B, ...]``.
      multiple: for a pipeline the number of microbatches times that of data-parallel devices.

    Returns:
      The batch with leaves ``[B', ...]``, numpy's of numpy's, and ``bool[B']``: True for the B examples that were
      there. A loss that takes their mean alone, and ``weight=lambda data: data["real"].sum()`` with this array in the
      batch as "real", make the pipeline's objective the mean over all real examples.

    Raises:
      ValueError: no examples, leaves of different lengths, or a multiple that is no positive integer.

    >>> batch, real = pad_batch({"x": np.arange(5.0)}, 4)
    >>> batch["x"].tolist(), real.sum().item()
    ([0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0], 5)
    """
    multiple = at_least("pad_batch", "multiple", multiple, 1)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
        raise ValueError(f"a batch with leaves of shapes {shapes}: all need the same leading dimension, of at least 1")
    ((size,),) = sizes
    total = -(-size // multiple) * multiple
    return lengthen(batch, total), np.arange(total) < size


def lengthen(batch: Any, size: int) -> Any:
    """The batch with copies of its last example, up to a size."""
    (old,) = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
    if old == size:
        return batch
    rows = np.minimum(np.arange(size), old - 1)
    return jax.tree.map(lambda leaf: (leaf if hasattr(leaf, "dtype") else np.asarray(leaf))[rows], batch)


def with_mask(batch: Any, name: str, multiple: int) -> dict[str, Any]:
    """The batch lengthened to a multiple, its leaf of some name saying which examples count.

    Raises:
      ValueError: the batch is no dict, or has something else of this name.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"example_mask={name!r}, but the batch is a {type(batch).__name__}: pass a dict of arrays, in which the "
            "mask can have a name"
        )
    mask = batch.get(name)
    if mask is not None and (np.ndim(mask) != 1 or jnp.result_type(mask) != jnp.bool_):
        raise ValueError(
            f"example_mask={name!r}, but batch[{name!r}] is {jnp.result_type(mask)}{list(np.shape(mask))}: leave it "
            "out, or make it bool[B], True for examples that count"
        )
    padded, real = pad_batch({key: leaf for key, leaf in batch.items() if key != name}, multiple)
    if mask is None:
        return {**padded, name: real}
    return {**padded, name: jnp.asarray(lengthen(mask, len(real))) & real}


def without_padding(result: tuple[Any, Any], size: int, total: int) -> tuple[Any, Any]:
    """(outputs of the first ``size`` of ``total`` examples, metrics) of a forward pass.

    Raises:
      ValueError: there are metrics, in which padding counts.
    """
    outputs, metrics = result
    if metrics:
        raise ValueError(
            f"a batch of {size} is padded to {total}, and the stages' metrics {sorted(metrics)} would count the "
            "padding: use a size that divides, or jaxpipe.pad_batch and its mask in stages"
        )
    return jax.tree.map(lambda leaf: leaf[:size], outputs), metrics
