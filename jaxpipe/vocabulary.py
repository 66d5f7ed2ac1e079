"""Embedding and cross-entropy of a vocabulary whose rows are sharded over a mesh axis.

What `__all__` names is public; all else here is internal and may change without notice.

To be called where every device of the axis takes part with the same tokens: inside ``embed`` and ``head`` of
`jaxpipe.value_and_grad` with ``shared_ends=True``, or in any `jax.shard_map`. Vocabulary parallelism for pipelines:
Yeung et al. 2024, https://arxiv.org/abs/2411.05288.

Shapes: V tokens of the vocabulary, padded to a multiple of the axis; v = V / devices of the axis; D width. Device d
holds rows ``d * v`` to ``(d + 1) * v`` of the table: that is what ``PartitionSpec(axis)`` gives it.

A model with a tied embedding of 10 tokens, in which each of 2 pipeline ranks holds 5:

>>> import jax, jax.numpy as jnp, jaxpipe
>>> from jax.sharding import PartitionSpec as P
>>> from jaxpipe import vocabulary
>>> def embed(outer, data, ctx):
...     return vocabulary.embed_tokens(outer, data, "pp")
>>> def stage(params, x, ctx):
...     return x + jnp.tanh(x @ params)
>>> def head(outer, y, data, ctx):
...     return vocabulary.cross_entropy(y, outer, data, "pp").mean()
>>> schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
>>> step = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=2), embed=embed, head=head,
...                               specs=jaxpipe.Params(P("pp"), P("pp")), shared_ends=True)
>>> params = jaxpipe.Params(stages=jnp.ones((schedule.num_stages, 8, 8)), outer=jnp.ones((10, 8)))
>>> (loss, _), grads = jax.jit(step)(params, jnp.zeros((4, 16), jnp.int32))
>>> round(float(loss), 4), grads.outer.addressable_shards[0].data.shape  # log 10
(2.3026, (5, 8))
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jaxpipe.runtime.buffers import accumulation_dtype

__all__ = ["cross_entropy", "embed_tokens", "pad_vocabulary"]


def pad_vocabulary(table: Float[Array, "V D"], parts: int) -> Float[Array, "padded D"]:
    """The table with zero rows added, so that its rows divide into ``parts``.

    Give `cross_entropy` the number of rows before padding as ``size``; the rows added then never change.

    >>> pad_vocabulary(jnp.ones((10, 2)), 4).shape
    (12, 2)
    """
    return jnp.pad(table, ((0, -len(table) % parts), (0, 0)))


def embed_tokens(table: Float[Array, "v D"], tokens: Integer[Array, "*tokens"], axis: str) -> Float[Array, "*tokens D"]:
    """The tokens' rows of the whole table, on every device.

    Each device looks up the tokens whose rows it holds. One sum over the axis adds zeros to them, which is exact in any
    dtype.
    A token outside of the vocabulary gets zeros, and changes no row.

    Args:
      table: this device's rows.
      tokens: the same on every device; of any integer dtype, also one that cannot hold the vocabulary's size.
      axis: mesh axis that the rows are sharded over.

    Raises:
      ValueError: tokens are no integers.

    >>> import jaxpipe
    >>> from jax.sharding import PartitionSpec as P
    >>> table, tokens = jnp.arange(8.0).reshape(4, 2), jnp.array([3, 0])
    >>> lookup = jax.shard_map(
    ...     lambda table, tokens: embed_tokens(table, tokens, "pp"),
    ...     mesh=jaxpipe.make_mesh(pp=2), in_specs=(P("pp"), P()), out_specs=P(), check_vma=False)
    >>> lookup(table, tokens).tolist()
    [[6.0, 7.0], [0.0, 1.0]]
    """
    here, rows = _local(_ids(tokens, "tokens"), len(table), axis)
    return lax.psum(jnp.where(here[..., None], table[rows], jnp.zeros_like(table[:1])), axis)


def cross_entropy(
    y: Float[Array, "*tokens D"],
    table: Float[Array, "v D"],
    targets: Integer[Array, "*tokens"],
    axis: str,
    *,
    size: int | None = None,
) -> Float[Array, "*tokens"]:
    """Each token's ``-log softmax(y @ whole_table.T)[target]``, the same on every device.

    A device computes the logits of its rows alone, once, and keeps them for the backward pass; the largest logit, the
    sum of exponentials and the target's logit are reduced over the axis, three numbers a token. Logits and all that
    follows are float32, or float64 where y is; products take y and the table in their own dtype.

    The gradient with respect to y is this device's part, and its sum over the axis is the whole; a pipeline with shared
    ends takes that sum itself. The cotangents of the devices' copies add up, as for the result of ``lax.psum``.

    Args:
      y: the same on every device.
      table: this device's rows of the output projection, of y's dtype.
      targets: the same on every device; of any integer dtype, also one that cannot hold ``size``. A negative target,
        such as -1 or -100 where there is nothing to predict, has loss 0 and no gradient: divide by the number of the
        others. One of ``size`` or more is an error in the data: its loss is NaN, and it has no gradient.
      axis: mesh axis that the rows are sharded over.
      size: tokens of the vocabulary, where rows were added to the end of the table so that they divide: those have no
        probability and no gradient. Default: all rows are tokens.

    Raises:
      ValueError: shapes or dtypes do not fit together, or targets are no integers.

    >>> import jaxpipe
    >>> from jax.sharding import PartitionSpec as P
    >>> loss = jax.shard_map(
    ...     lambda y, table, targets: cross_entropy(y, table, targets, "pp", size=3),
    ...     mesh=jaxpipe.make_mesh(pp=2), in_specs=(P(), P("pp"), P()), out_specs=P(), check_vma=False)
    >>> print(loss(jnp.ones((1, 2)), jnp.zeros((4, 2)), jnp.array([1])))  # log 3
    [1.0986123]
    """
    targets = _ids(targets, "targets")
    rows, devices = len(table), lax.axis_size(axis)
    size = rows * devices if size is None else size
    if y.shape[:-1] != targets.shape or y.shape[-1:] != table.shape[1:] or y.dtype != table.dtype:
        raise ValueError(
            f"y is {y.dtype}{list(y.shape)}, the table's part {table.dtype}{list(table.shape)}, targets "
            f"{list(targets.shape)}: y needs the targets' shape and the table's width, and the table's dtype"
        )
    if not 0 < size <= rows * devices:
        raise ValueError(
            f"size={size}, but the table has {rows} rows on each of {devices} devices of {axis!r}: give the number of "
            "tokens in the vocabulary, and a table padded with pad_vocabulary"
        )
    return _cross_entropy(axis, size, y, table, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(axis: str, size: int, y: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    return _cross_entropy_forward(axis, size, y, table, targets)[0]


def _cross_entropy_forward(axis: str, size: int, y: jax.Array, table: jax.Array, targets: jax.Array) -> Any:
    rows = len(table)
    logits = lax.dot_general(
        y, table, (((y.ndim - 1,), (1,)), ((), ())), preferred_element_type=accumulation_dtype(y.dtype)
    )
    real = lax.axis_index(axis) * rows + jnp.arange(rows, dtype=jnp.int32) < size
    logits = jnp.where(real, logits, -jnp.inf)
    largest = lax.pmax(logits.max(-1), axis)
    total = lax.psum(jnp.exp(logits - largest[..., None]).sum(-1), axis)
    normaliser = largest + jnp.log(total)
    here, local = _local(targets, rows, axis)
    found = jnp.take_along_axis(logits, local[..., None], -1)[..., 0]
    loss = normaliser - lax.psum(jnp.where(here, found, jnp.zeros_like(found)), axis)
    loss = jnp.where(targets < 0, 0.0, jnp.where(targets < size, loss, jnp.nan)).astype(loss.dtype)
    return loss, (y, table, targets, logits, normaliser)


def _cross_entropy_backward(axis: str, size: int, residuals: Any, cotangent: jax.Array) -> Any:
    y, table, targets, logits, normaliser = residuals
    here, local = _local(targets, len(table), axis)
    hit = here[..., None] & (local[..., None] == jnp.arange(len(table), dtype=local.dtype))
    # Every device returns a copy of the loss; the copies' cotangents add up.
    whole = lax.psum(cotangent, axis)
    whole = jnp.where((targets >= 0) & (targets < size), whole, jnp.zeros_like(whole))[..., None]
    d_logits = (whole * (jnp.exp(logits - normaliser[..., None]) - hit.astype(logits.dtype))).astype(y.dtype)
    tokens = tuple(range(targets.ndim))
    d_y = lax.dot_general(d_logits, table, (((targets.ndim,), (0,)), ((), ())))
    d_table = lax.dot_general(d_logits, y, ((tokens, tokens), ((), ())))
    return d_y, d_table, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _ids(tokens: jax.Array, name: str) -> jax.Array:
    """Tokens in int32, or int64 where they have 64 bits, which also holds their differences from numbers of rows."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} are {tokens.dtype.name}{list(tokens.shape)}: give the numbers of tokens, as integers")
    wide = jnp.int64 if jnp.iinfo(tokens.dtype).bits == 64 else jnp.int32
    if jnp.issubdtype(tokens.dtype, jnp.unsignedinteger) and jnp.iinfo(tokens.dtype).bits >= 32:
        tokens = jnp.minimum(tokens, jnp.asarray(jnp.iinfo(wide).max, tokens.dtype))
    return tokens.astype(wide)


def _local(tokens: jax.Array, rows: int, axis: str) -> tuple[jax.Array, jax.Array]:
    """(whether this device holds a token's row, its index here; any valid index where it does not)."""
    index = tokens - (lax.axis_index(axis) * rows).astype(tokens.dtype)
    here = (index >= 0) & (index < rows)
    return here, jnp.clip(index, 0, rows - 1)
