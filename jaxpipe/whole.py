"""A whole model as a pipeline: its loss function cut at its blocks, whatever library the model is written in."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpipe import inputs
from jaxpipe.api import Pipeline, value_and_grad
from jaxpipe.arguments import entry_axes
from jaxpipe.cutting import Activations, Call, Cut, join_arguments, split_result
from jaxpipe.layers import stack_layers, stage_of_layers, unstack_layers
from jaxpipe.optimizer_state import map_params
from jaxpipe.params import Params
from jaxpipe.restacking import restore
from jaxpipe.runtime.copies import cast
from jaxpipe.runtime.model import Context, Output
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.stacking import Stacking


class Model(Protocol):
    """What a library's models must give to be cut.

    Attributes:
      names: of the blocks, in order.
      outer: shapes of the parameters outside of the blocks.
      blocks: shapes of each block's parameters, a list; with ``stacked`` of all of them, in rows.
      stacked: whether the model keeps its blocks in rows.
    """

    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def outer(self) -> Any: ...  # noqa: D102

    @property
    def blocks(self) -> Any: ...  # noqa: D102

    @property
    def stacked(self) -> bool: ...  # noqa: D102

    def loss(self, outer: Any, blocks: Any, key: Any, data: Any) -> Any:
        """The user's loss of a microbatch, blocks called through `jaxpipe.cutting.call_block`."""

    def kind(self, index: int, call: Call) -> Any:
        """What is equal for blocks that run the same program but for arrays."""

    def run(
        self, call: Call, members: Sequence[int], row: Any, params: Any, ctx: Context, args: Any, kwargs: Any
    ) -> Any:
        """Calls a block: the one of index ``members[row]`` among those of one kind."""

    def take(self, model: Any) -> tuple[Any, Any]:
        """(outer, blocks) of the parameters of a model like this one."""
        ...

    def put(self, outer: Any, blocks: Sequence[Any]) -> Any:
        """A model with these parameters: the inverse of `take`."""

    def put_state(self, outer: Any, blocks: Sequence[Any]) -> Any:
        """What an optimizer keeps for each parameter, in the form of those that it is given of the plain model."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PipelinedModel:
    """A model as a pipeline, called and jitted as a `jaxpipe.Pipeline`; made by `from_nnx` and `from_linen`.

    Attributes:
      pipeline: the step, ``pipeline(params, batch, rng) -> ((loss, aux), grads)``.
      params: the model's parameters where the step wants them: each stage's on its rank, in storage order.
      shardings: of the parameters, a tree like ``params``.
    """

    pipeline: Pipeline
    params: Params
    shardings: Params
    _model: Model

    @functools.cached_property
    def stacking(self) -> Stacking:
        """Where each block's parameters are, for masks, norms and optimizers by layer."""
        names = tuple(self._model.names)
        return Stacking(self.pipeline.program.schedule, len(names), "storage", names)

    @property
    def __name__(self) -> str:
        """The pipeline's, which `jax.jit` names the compiled module by."""
        return self.pipeline.__name__

    def __repr__(self) -> str:
        return f"<jaxpipe.flax.PipelinedModel of {len(self._model.names)} blocks in {self.pipeline!r}>"

    def __call__(self, params: Params, batch: Any, rng: jax.Array | None = None) -> Any:
        """((loss, aux), grads); see `jaxpipe.value_and_grad`."""
        return self.pipeline(params, batch, rng)

    def merge(self, params: Params) -> Any:
        """The model (of Linen, its parameters) with these parameters in place; gradients in the model's structure."""
        return self._model.put(params.outer, self._rows(params))

    def split(self, model: Any) -> Params:
        """The parameters of a model like the pipelined one, where the step wants them: the inverse of `merge`."""
        return jax.device_put(stack(self._model, self.pipeline.program.schedule, model), self.shardings)

    def merge_state(self, state: Any) -> Any:
        """An optimizer's state of the plain model, of one of the pipelined parameters.

        What has the form of the parameters (averages of gradients) gets that of the model's parameters, as an optimizer
        started from them has it: of NNX ``nnx.state(model, nnx.Param)``, of Linen the dict. The rest stays.

        Args:
          state: what ``optimizer.init(pipe.params)`` or ``optimizer.update`` returned.

        Raises:
          ValueError: a state of other parameters.
        """
        return map_params(lambda params: self._model.put_state(params.outer, self._rows(params)), state)

    def restore(self, read: Callable[[Any], Any], like: Any, source: Stacking) -> Any:
        """Reads a checkpoint of another schedule or mesh; see `jaxpipe.restore`.

        Args:
          read: ``read(abstract)`` returns the arrays, ``lambda like: checkpointer.restore(path, like)`` with Orbax.
          like: what to read as this pipeline has it: ``{"params": pipe.params, "state": optimizer.init(pipe.params)}``.
          source: ``stacking`` of the pipeline that wrote it.
        """
        mesh = self.pipeline.mesh
        assert isinstance(mesh, Mesh)
        return restore(read, like, source, self.stacking, mesh, axis=self.pipeline.axes.pipeline)

    def _rows(self, params: Params) -> list[Any]:
        return unstack_layers(params.stages, len(self._model.names), self.pipeline.program.schedule, "storage")


def stack(model: Model, schedule: Schedule, params: Any) -> Params:
    """The stacked parameters of a model, in storage order."""
    outer, blocks = model.take(params)
    return Params(stack_layers(blocks, schedule, "storage")[0], outer)


def pipelined(
    model: Model,
    make: Callable[[], Any],
    schedule: Schedule,
    mesh: Mesh,
    *,
    made: bool,
    specs: Params | None,
    options: Mapping[str, Any],
) -> PipelinedModel:
    """A model as a pipeline.

    Args:
      model: cut.
      make: gives the user's model, from which `Model.take` takes the parameters.
      schedule, mesh: as for `jaxpipe.value_and_grad`.
      made: whether the model has been made: its parameters are then moved, otherwise made in parts under `jax.jit`.
      specs, options: for `jaxpipe.value_and_grad`.
    """
    start = lambda: stack(model, schedule, make())  # noqa: E731
    shapes = jax.eval_shape(start)
    parts = _Parts(model, schedule, options.get("compute_dtype"), lambda: _local_shapes(model, pipeline, shapes))
    pipeline = value_and_grad(
        parts.stage, schedule, mesh, embed=parts.embed, head=parts.head, specs=specs, order="storage", **options
    )
    found = inputs.broadcast_specs(pipeline.specs, shapes, pipeline.axes, mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), found, is_leaf=inputs.is_spec)
    params = jax.device_put(start(), shardings) if made else jax.jit(start, out_shardings=shardings)()
    return PipelinedModel(pipeline, params, shardings, model)


def _local_shapes(model: Model, pipeline: Pipeline, shapes: Params) -> tuple[Any, Any]:
    """(outer, blocks) of a device's parameters, divided as far as specs divide them over axes handled by hand."""
    axes, schedule = pipeline.axes, pipeline.program.schedule
    specs = inputs.broadcast_specs(pipeline.specs, shapes, axes, pipeline.mesh)

    def local(names: frozenset[str], leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        parts = [math.prod(axes.sizes[name] for name in entry_axes(entry) if name in names) for entry in spec]
        parts += [1] * (leaf.ndim - len(parts))
        sizes = (size // part for size, part in zip(leaf.shape, parts, strict=True))
        return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)

    stages = jax.tree.map(functools.partial(local, axes.names - {axes.pipeline}), shapes.stages, specs.stages)
    outer = jax.tree.map(functools.partial(local, axes.names), shapes.outer, specs.outer)

    def unstack(stages: Any) -> Any:
        rows = unstack_layers(stages, len(model.names), schedule, "storage")
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows) if model.stacked else rows

    return outer, jax.eval_shape(unstack, stages)


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """A cut model as the functions of a pipeline.

    Attributes:
      model: cut.
      schedule: of its stages.
      dtype: of the working copies, or None.
      shapes: gives (outer, blocks) of a device's parameters.
    """

    model: Model
    schedule: Schedule
    dtype: Any
    shapes: Callable[[], tuple[Any, Any]]

    def embed(self, outer: Any, data: Any, ctx: Context) -> Any:
        """What the first stage starts with."""
        return self._cut(ctx).embed(outer, _key(ctx), data)

    def head(self, outer: Any, x: Any, data: Any, ctx: Context) -> Any:
        """The loss of what the last stage ends with."""
        return as_output(self._cut(ctx).head(outer, x, _key(ctx), data))

    def stage(self, params: Any, x: Any, ctx: Context) -> Any:
        """A stage's blocks."""
        cut = self._cut(ctx)
        arrays = cut.arguments(x, ctx.data)
        kinds = [(self.model.kind(index, block.call), _kind(block)) for index, block in enumerate(cut.blocks)]
        kind_of = [next(k for k, other in enumerate(kinds) if _equal(kind, other)) for kind in kinds]
        firsts = sorted(set(kind_of))
        groups = [[index for index, kind in enumerate(kind_of) if kind == first] for first in firsts]
        functions = [functools.partial(self._block, cut, arrays, members) for members in groups]
        return stage_of_layers(functions, [firsts.index(kind) for kind in kind_of], self.schedule)(params, x, ctx)

    def _block(self, cut: Cut, arrays: Any, members: Sequence[int], params: Any, x: Any, ctx: Context) -> Any:
        """One of those blocks that are alike but for arrays."""
        row = jnp.asarray([members.index(i) if i in members else 0 for i in range(len(cut.blocks))], jnp.int32)
        row = row[ctx.layer]
        first = cut.blocks[members[0]]
        columns = zip(*(cut.blocks[index].arguments for index in members), strict=True)
        given = [choose([arrays[value] for value in column], row) for column in columns]

        def run(params: Any, x: Any, given: Any, row: Any) -> Any:
            args, kwargs = join_arguments(first.call.arguments, first.call.statics, given)
            return self.model.run(first.call, members, row, params, ctx, (x, *args), kwargs)

        for keywords in reversed(first.checkpoints):
            run = jax.checkpoint(run, **keywords)
        inner = x if cut.simple else x.x
        y, others = split_result(run(params, inner, given, row), inner)
        if cut.simple:
            return y
        rows = (stacked.at[ctx.layer].set(value) for stacked, value in zip(x.others, others, strict=True))
        return Activations(y, x.arguments, tuple(rows))

    def _cut(self, ctx: Context) -> Cut:
        leaves, structure = jax.tree.flatten((_key(ctx), ctx.data))
        return self._cut_for(structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))

    @functools.cached_property
    def _cut_for(self) -> Callable[[Any, Any], Cut]:
        """The loss cut for a key and data of some shapes: embed, stage and head, traced several times, share it."""

        @functools.lru_cache(maxsize=4)
        def cut(structure: Any, shapes: tuple[tuple[Any, Any], ...]) -> Cut:
            key, data = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
            outer, blocks = jax.eval_shape(functools.partial(cast, dtype=self.dtype), self.shapes())
            return Cut(self.model.loss, outer, blocks, key, data, self.model.names, stacked=self.model.stacked)

        return cut


def choose(column: Sequence[Any], row: Any) -> Any:
    """One of several arrays alike, which are often one."""
    return column[0] if all(other is column[0] for other in column) else jnp.stack(column)[row]


def as_output(result: Any) -> Output:
    """What a loss function returns, as a head's: a scalar, (scalar, metrics) or an Output."""
    if isinstance(result, Output):
        return result
    if not isinstance(result, tuple):
        return Output(result)
    if len(result) != 2 or not isinstance(result[1], Mapping):
        raise ValueError(
            "the loss function returned a tuple that is not (loss, metrics): return a scalar, or a scalar and a flat "
            "dict of metrics, which the pipeline sums over microbatches"
        )
    return Output(result[0], metrics=dict(result[1]))


def _key(ctx: Context) -> Any:
    """The key of what stands outside of the blocks: the embedding's, in the head too, which computes parts of it."""
    return None if ctx.rng is None else ctx.at_layer(-1).rng


def _kind(block: Any) -> Any:
    """What a call must have in common with others to run the same program."""
    avals = tuple((value.aval.shape, value.aval.dtype) for value in block.arguments)
    return block.call.statics, block.call.arguments, avals, block.checkpoints


def _equal(a: Any, b: Any) -> bool:
    """Whether definitions are equal; not where one cannot tell."""
    try:
        return bool(a == b)
    except (TypeError, ValueError):
        return False
