"""Embedding and head run by all ranks together, wrapped so that the sum over ranks counts them once.

A pipeline's *holder* of an end is the rank that has the stage beside it: the first stage for the embedding, the last
one for the head. The operations of a shared end are those of a lone one, run by every rank at once. What the holder
has must reach all ranks, and of what all ranks return only the holder's copy may count:

* x of the embedding is masked with zeros on all ranks but the holder. Only the holder's goes on into the pipeline,
  and in the gradient only the holder's copy has a cotangent.
* y is masked likewise, summed over ranks, and given to the head. The transpose of that sum adds up what all ranks
  contribute to y's cotangent, and the holder sends it on.
* loss, metrics and outputs of the head are masked. Their sum over ranks is the holder's value.

JAX differentiates a program of many devices (`jax.shard_map` with ``check_vma=False``) as one function of all their
inputs, whose objective is the sum of all their outputs; there the transpose of ``psum`` is ``psum``. With the masks
that objective is the holder's loss. The total derivative of a loss that is the same on every rank does not depend on
whose copy is differentiated, so what comes out is exact, given the same loss on every rank and nothing else: for a
leaf that is sharded over ranks, each rank's gradient is that of its shard; for a replicated one, the sum over ranks is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.runtime.collective_checks import check_alone
from jaxpipe.runtime.model import Context, Model, Output
from jaxpipe.runtime.program import Program
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.stage import check_effects
from jaxpipe.stage.axes import collectives_of_jaxpr


def share_ends(model: Model, schedule: Schedule, axis: str, *, forward_only: bool) -> Model:
    """The model with an embed and a head that every rank of ``axis`` calls at the same time; the holder's copy counts.

    ``model.embed(outer, data, ctx)`` returns the same x on every rank, ``model.head(outer, y, data, ctx)`` the same
    loss and metrics, or the same outputs.
    """

    def embed(outer: Any, data: Any, ctx: Context) -> Any:
        return _mask(model.run_embed(outer, ctx), _is_holder(schedule, 0, ctx, axis))

    def head(outer: Any, y: Any, data: Any, ctx: Context) -> Any:
        mine = _is_holder(schedule, schedule.num_stages - 1, ctx, axis)
        if model.head is None:
            return _mask(y, mine)
        with jax.named_scope("share"):
            # A collective broadcast has its source in the program, and DualPipe has two. Between two H100s 59 MB take
            # 0.28 ms so, 0.19 ms by broadcast, 0.32 ms by all-gather: small beside a head either way.
            y = jax.tree.map(lambda leaf: sum_exactly(leaf, axis), _mask(y, mine))
        if forward_only:
            return _mask(model.head(outer, y, data, ctx), mine)
        loss, metrics = _mask(model.run_head(outer, y, ctx._replace(data=data)), mine)
        return Output(loss, metrics=metrics)

    no_head = model.head is None and not forward_only
    return dataclasses.replace(model, embed=embed, head=None if no_head else head)


def shape_of_end(program: Program, axis: str, name: str, end: Callable[..., Any], *args: Any) -> Any:
    """What an end of the model returns, as shapes and dtypes.

    Raises:
      ValueError: it uses the pipeline axis where one rank alone runs it, and would wait for the others; or it has side
        effects that cannot be had on several devices.
    """
    jaxpr, shapes = jax.make_jaxpr(end, return_shape=True)(*args)
    if not program.shared_ends:
        check_alone(name, program, axis, collectives_of_jaxpr(jaxpr))
    check_effects(jaxpr.effects, name)
    return shapes


def sum_exactly(leaf: jax.Array, axis: str) -> jax.Array:
    """The sum over ranks of which all but one hold zeros, False or keys of zeros."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        bits = lax.psum(jax.random.key_data(leaf), axis)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
    if leaf.dtype == jnp.bool_ or (jnp.issubdtype(leaf.dtype, jnp.integer) and jnp.iinfo(leaf.dtype).bits < 8):
        return lax.psum(leaf.astype(jnp.int32), axis).astype(leaf.dtype)  # no network sums these
    return lax.psum(leaf, axis)


def _is_holder(schedule: Schedule, stage: int, ctx: Context, axis: str) -> jax.Array:
    """Whether this rank runs a stage for the context's microbatch."""
    holders = np.asarray([schedule.rank_of(stage, m) for m in range(schedule.num_microbatches)], np.int32)
    return jnp.asarray(holders)[ctx.microbatch] == lax.axis_index(axis)


def _mask(tree: Any, mine: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jnp.where(mine, leaf, jnp.zeros_like(leaf)), tree)
