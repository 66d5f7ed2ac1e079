"""What the executor runs: the functions of a pipelined model and the records that pass between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.params import Params
from jaxpipe.runtime.outputs import as_arrays, as_loss, as_metrics
from jaxpipe.runtime.stage_kinds import StageKinds

HEAD = -2
"""What the head folds into a microbatch's key. A layer folds its index and embed -1; as uint32 this is no layer's."""


class Context(NamedTuple):
    """Where a piece of the model runs.

    Keys depend on what draws and on the microbatch, and on nothing else: not on the schedule, on the number of stages,
    or on how layers are divided over stages. ``rng`` is ``fold_in(fold_in(step_rng, microbatch), index)``: index is the
    layer's, -1 for embed and -2 for head. Where several devices share the batch, each has first folded its index on the
    data axes into ``step_rng``. A stage that is not divided into layers counts as the layer of its index.

    `make` gives a plain program the same contexts. This is the plain program of a pipeline without a head, for a
    microbatch ``m``, and of any `jaxpipe.flax.layered_stages` with ``stages`` the layers::

        for i, params in enumerate(stages):
            x = stage(params, x, jaxpipe.Context.make(i, m, rng, data, num_stages=len(stages)))

    Attributes:
      stage: int32 scalar, the stage in the order of the forward pass; ``num_stages`` for the head, -1 for embed.
      microbatch: int32 scalar.
      rng: a key of its own for each (layer, microbatch); None when the step was called without one.
      data: the microbatch, a slice of the batch: leaves ``[batch / num_microbatches, ...]``.
      layer: int32 scalar, the layer in the order of the forward pass, in a layer of `jaxpipe.flax.layered_stages`;
        everywhere else equal to ``stage``.
      microbatch_rng: the microbatch's key, of which `at_layer` makes those of layers.
      step_inputs: what the step was called with as ``step_inputs``, whole and the same everywhere, or None.
    """

    stage: Any
    microbatch: Any
    rng: Any
    data: Any
    layer: Any = None
    microbatch_rng: Any = None
    step_inputs: Any = None

    @classmethod
    def make(
        cls,
        stage: Any,
        microbatch: Any,
        rng: jax.Array | None,
        data: Any,
        *,
        num_stages: int | None,
        step_inputs: Any = None,
    ) -> Context:
        """The context that a pipeline gives to embed (stage -1), a stage, or head (stage ``num_stages``).

        Args:
          stage: int or int32 scalar; in a plain program of layers, the layer.
          microbatch: int or int32 scalar.
          rng: the key that the step is called with, or None.
          data: the microbatch.
          num_stages: number of stages, or of layers where ``stage`` is a layer; None where it is not the head's.
          step_inputs: what the step is called with as ``step_inputs``.

        >>> import jax
        >>> ctx = Context.make(3, 0, jax.random.key(0), None, num_stages=8)
        >>> int(ctx.layer), bool(ctx.rng == ctx.at_layer(3).rng), bool(ctx.rng == ctx.at_layer(2).rng)
        (3, True, False)
        """
        stage, microbatch = jnp.asarray(stage, jnp.int32), jnp.asarray(microbatch, jnp.int32)
        if rng is None:
            return cls(stage, microbatch, None, data, stage, step_inputs=step_inputs)
        rng = jax.random.fold_in(rng, microbatch)
        index = stage if num_stages is None else jnp.where(stage == num_stages, HEAD, stage)
        return cls(stage, microbatch, jax.random.fold_in(rng, index), data, stage, rng, step_inputs)

    def at_layer(self, layer: Any) -> Context:
        """The context of a layer of the stage: its index and its own key.

        A context made by hand, without ``microbatch_rng``, folds the layer into ``rng``.
        """
        layer = jnp.asarray(layer, jnp.int32)
        rng = self.rng if self.microbatch_rng is None else self.microbatch_rng
        return self._replace(layer=layer, rng=None if rng is None else jax.random.fold_in(rng, layer))


class Output(NamedTuple):
    """What a stage or head returns when it returns more than its value.

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
      stage: ``stage(params, x, ctx) -> y or Output``; y has x's structure, shapes and dtypes. Or `StageKinds` of such.
      embed: ``embed(outer, data, ctx) -> x``, or None: the microbatch itself is x.
      head: ``head(outer, y, data, ctx) -> loss or Output``, or None. In a forward-only program it may
        return any pytree of per-example outputs.
      weight: ``weight(data) -> real scalar``, the weight of a microbatch in the mean loss, or None: all equal.
      prepare: ``prepare(outer) -> outer``, a tree like the one it is given: what embed and head get of the outer
        parameters, made once a step, or None: these as they are.
      whole: ``whole(params) -> Params``, made once a step of the parts of parameters that a device keeps, before all
        else; or None: it keeps them whole.
    """

    stage: Callable[..., Any]
    embed: Callable[..., Any] | None = None
    head: Callable[..., Any] | None = None
    weight: Callable[..., Any] | None = None
    prepare: Callable[..., Any] | None = None
    whole: Callable[[Params], Params] | None = None

    def run_embed(self, outer: Any, ctx: Context) -> Any:
        """The first stage's input for a microbatch."""
        return ctx.data if self.embed is None else self.embed(outer, ctx.data, ctx)

    @property
    def stages(self) -> tuple[Callable[..., Any], ...]:
        """The stage functions, one for each kind of stage."""
        return self.stage.functions if isinstance(self.stage, StageKinds) else (self.stage,)

    @property
    def kind_of(self) -> tuple[int, ...] | None:
        """The kind of each stage; None where all are of one."""
        return self.stage.kind_of if isinstance(self.stage, StageKinds) else None

    def run_stage(self, params: Any, x: Any, ctx: Context) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """((y, aux_loss), metrics) of one stage; aux_loss is None where the stage returns none."""
        return self._run(self.stage, params, x, ctx)

    def run_kind(self, kind: int, params: Any, x: Any, ctx: Context) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """`run_stage` of a stage of a kind."""
        return self._run(self.stages[kind], params, x, ctx)

    @staticmethod
    def _run(stage: Callable[..., Any], params: Any, x: Any, ctx: Context) -> tuple[tuple[Any, Any], dict[str, Any]]:
        output = as_output(stage(params, x, ctx))
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
