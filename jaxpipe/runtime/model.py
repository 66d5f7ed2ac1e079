"""What the executor runs: the functions of a pipelined model and the records that pass between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.runtime.outputs import as_arrays, as_loss, as_metrics


class Params(NamedTuple):
    """The parameters of a pipelined model, and its gradients.

    Attributes:
      stages: pytree whose leaves are ``[num_stages, ...]``, row i holding the parameters of stage
        ``schedule.storage_order[i]``; sharded over the pipeline axis by rows. See `jaxpipe.stack_stages`.
      outer: pytree of everything outside the stages: embedding, head, tied or not. One copy a rank, or
        with ``shared_ends`` sharded over ranks as ``specs.outer`` says; ``embed`` and ``head`` both receive all of
        it, so using a leaf in both needs nothing else.

    Leaves may be integers, bools and keys; see `jaxpipe.floating_only` for optimizers.
    """

    stages: Any
    outer: Any = None


class Context(NamedTuple):
    """Where a piece of the model runs.

    Attributes:
      stage: int32 scalar, the stage in the order of the forward pass; ``num_stages`` for the head, -1 for embed.
      microbatch: int32 scalar.
      rng: a key of its own for each (stage, microbatch), so that a result does not depend on the schedule;
        None when the step was called without one.
      data: the microbatch, a slice of the batch: leaves ``[batch / num_microbatches, ...]``.
    """

    stage: Any
    microbatch: Any
    rng: Any
    data: Any


class Output(NamedTuple):
    """What a stage or head returns when it has more to say than its value.

    Attributes:
      value: the stage's activations, or the head's loss.
      aux_loss: floating scalar added to the objective where it arises (a router's balance loss), or None.
      metrics: a flat dict of arrays, summed over stages, microbatches and data-parallel devices, whatever the
        microbatches' weights. Sums are int32 of bool and of smaller integers (uint32 of unsigned ones), float32 of
        smaller floats, and of any other dtype itself: int32 counts wrap beyond 2^31.
    """

    value: Any
    aux_loss: Any = None
    metrics: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Model:
    """The functions of a pipelined model.

    Attributes:
      stage: ``stage(params, x, ctx) -> y or Output``; y has x's structure, shapes and dtypes.
      embed: ``embed(outer, data, ctx) -> x``, or None: the microbatch itself is x.
      head: ``head(outer, y, data, ctx) -> loss or Output``, or None. In a forward-only program it may
        return any pytree of per-example outputs.
      weight: ``weight(data) -> real scalar``, the weight of a microbatch in the mean loss, or None: all equal.
    """

    stage: Callable[..., Any]
    embed: Callable[..., Any] | None = None
    head: Callable[..., Any] | None = None
    weight: Callable[..., Any] | None = None

    def run_embed(self, outer: Any, ctx: Context) -> Any:
        """The first stage's input for a microbatch."""
        return ctx.data if self.embed is None else self.embed(outer, ctx.data, ctx)

    def run_stage(self, params: Any, x: Any, ctx: Context) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """((y, aux_loss), metrics) of one stage; aux_loss is None where the stage returns none."""
        output = as_output(self.stage(params, x, ctx))
        aux_loss = None if output.aux_loss is None else as_loss(output.aux_loss, "the stage's aux_loss has")
        return (as_arrays(output.value, "stage"), aux_loss), as_metrics(output.metrics, "stage")

    def run_head(self, outer: Any, y: Any, ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """(loss, metrics) of one microbatch."""
        assert self.head is not None
        output = as_output(self.head(outer, y, ctx.data, ctx))
        loss = as_loss(output.value, "the head returned a loss of")
        if output.aux_loss is not None:
            aux_loss = as_loss(output.aux_loss, "the head's aux_loss has")
            dtype = jnp.promote_types(loss.dtype, aux_loss.dtype)
            loss = loss.astype(dtype) + aux_loss.astype(dtype)
        return loss, as_metrics(output.metrics, "head")


def as_output(result: Any) -> Output:
    """A plain value as an Output without auxiliary loss or metrics."""
    return result if isinstance(result, Output) else Output(result)
