"""A whole model as a pipeline: its loss function cut at its blocks, whatever library the model is written in."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpipe import inputs
from jaxpipe.api import Pipeline, value_and_grad
from jaxpipe.arguments import check_mesh, check_specs_given, entry_axes
from jaxpipe.cutting import Activations, Call, Cut, join_arguments, split_result
from jaxpipe.layers import stack_layers, stage_of_layers, unstack_layers
from jaxpipe.params import Params
from jaxpipe.runtime.copies import cast
from jaxpipe.runtime.fsdp import Gather, StageOfLayers
from jaxpipe.runtime.model import Context, Output
from jaxpipe.schedule.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class ParameterAnnotation:
    """How a model annotates a parameter.

    Attributes:
      spec: its PartitionSpec.
      by_hand: whether the model's functions take the shards that it makes, and communicate themselves.
    """

    spec: P
    by_hand: bool = False

    def without(self, axes: set[str]) -> P:
        """The spec without axes over which the pipeline divides parameters by its own rule and gathers them."""
        return self.spec if self.by_hand else inputs.manual_part(inputs.axes_of(self.spec) - axes, self.spec)


class CutModel(Protocol):
    """What a library's models must give to be cut.

    Attributes:
      names: of the blocks, in order.
      outer: shapes of the parameters outside of the blocks.
      blocks: shapes of each block's parameters, a list; with ``stacked`` of all of them, in rows.
      stacked: whether the model keeps its blocks in rows.
      annotated: `ParameterAnnotation` of each parameter in ``outer`` and ``blocks``.
    """

    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def outer(self) -> Any: ...  # noqa: D102

    @property
    def blocks(self) -> Any: ...  # noqa: D102

    @property
    def stacked(self) -> bool: ...  # noqa: D102

    @property
    def annotated(self) -> tuple[Any, Any]: ...  # noqa: D102

    def loss(self, outer: Any, blocks: Any, key: Any, data: Any) -> Any:
        """The user's loss of a microbatch, blocks called through `jaxpipe.cutting.call_block`."""

    def kind(self, index: int, call: Call) -> Any:
        """What is equal for blocks that run the same program but for arrays."""

    def run(
        self, call: Call, members: Sequence[int], row: Any, params: Any, ctx: Context, args: Any, kwargs: Any
    ) -> Any:
        """Calls a block: the one of index ``members[row]`` among those of one kind."""

    def take(self, model: Any, /) -> tuple[Any, Any]:
        """(outer, blocks) of the parameters of a model like this one."""
        ...

    def put(self, outer: Any, blocks: Sequence[Any]) -> Any:
        """A model with these parameters: the inverse of `take`."""


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
    _model: CutModel

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
        rows = unstack_layers(params.stages, len(self._model.names), self.pipeline.program.schedule, "storage")
        return self._model.put(params.outer, rows)

    def split(self, model: Any) -> Params:
        """The parameters of a model like the pipelined one, where the step wants them: the inverse of `merge`."""
        return jax.device_put(stack(self._model, self.pipeline.program.schedule, model), self.shardings)


def stack(model: CutModel, schedule: Schedule, params: Any) -> Params:
    """The stacked parameters of a model, in storage order."""
    outer, blocks = model.take(params)
    return Params(stack_layers(blocks, schedule, "storage")[0], outer)


def pipelined(
    model: CutModel,
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
      make: gives the user's model, from which `CutModel.take` takes the parameters.
      schedule, mesh: as for `jaxpipe.value_and_grad`.
      made: whether the model has been made: its parameters are then moved, otherwise made in parts under `jax.jit`.
      specs, options: for `jaxpipe.value_and_grad`.
    """
    axis = options.get("axis", "pp")
    specs = _annotated_specs(model, options, axis) if specs is None else check_specs_given(specs, axis)
    start = lambda: stack(model, schedule, make())  # noqa: E731
    outer, blocks = _local_shapes(model, jax.eval_shape(start), specs, schedule, mesh, options)
    parts = _Parts(model, schedule, options.get("compute_dtype"), outer, blocks)
    stage = StageOfLayers(parts.stage)
    pipeline = value_and_grad(
        stage, schedule, mesh, embed=parts.embed, head=parts.head, specs=specs, order="storage", **options
    )
    shardings = pipeline.shardings(jax.eval_shape(start))
    params = jax.device_put(start(), shardings) if made else jax.jit(start, out_shardings=shardings)()
    return PipelinedModel(pipeline, params, shardings, model)


def _annotated_specs(model: CutModel, options: Mapping[str, Any], axis: str) -> Params:
    """The specs that the model's own annotations make."""
    fsdp = options.get("fsdp_axis") or ()
    divided = {fsdp} if isinstance(fsdp, str) else {*fsdp}
    outer, blocks = jax.tree.map(lambda annotation: annotation.without(divided), model.annotated)
    if model.stacked:
        block = jax.tree.map(lambda spec: P(*spec[1:]), blocks, is_leaf=inputs.is_spec)
    else:
        block = blocks[0]
        for index, other in enumerate(blocks):
            if other != block:
                raise ValueError(
                    f"{model.names[index]} annotates its parameters with PartitionSpecs {other}, {model.names[0]} with "
                    f"{block}: blocks are stacked, so annotate all alike, or pass specs"
                )
    return Params(jax.tree.map(lambda spec: P(axis, None, *spec), block, is_leaf=inputs.is_spec), outer)


def _local_shapes(
    model: CutModel, params: Params, specs: Params, schedule: Schedule, mesh: Mesh, options: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Shapes of ``model.outer`` and ``model.blocks`` as the model's functions see them: shards over axes by hand."""
    names = {"axis": "pp", "data_axes": (), "replicated_axes": ()}
    axes = check_mesh(schedule, mesh, *(options.get(name, default) for name, default in names.items()))
    specs = inputs.broadcast_specs(specs, params, axes, mesh)

    def local(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        counts = [math.prod(axes.sizes.get(name, 1) for name in entry_axes(entry)) for entry in spec]
        counts += [1] * (len(leaf.shape) - len(counts))
        return jax.ShapeDtypeStruct(tuple(map(operator.floordiv, leaf.shape, counts)), leaf.dtype)

    def block(shapes: Any) -> Any:
        leading = (None,) if model.stacked else ()
        return jax.tree.map(lambda leaf, spec: local(leaf, P(*leading, *spec[2:])), shapes, specs.stages)

    outer = jax.tree.map(local, model.outer, specs.outer)
    return outer, block(model.blocks) if model.stacked else list(map(block, model.blocks))


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """A cut model as the functions of a pipeline.

    Attributes:
      model: the model.
      schedule: gives the stages.
      dtype: that of the working copies, or None.
      outer, blocks: shapes of its parameters on a device.
    """

    model: CutModel
    schedule: Schedule
    dtype: Any
    outer: Any
    blocks: Any

    def embed(self, outer: Any, data: Any, ctx: Context) -> Any:
        """What the first stage starts with."""
        return self._cut(ctx).embed(outer, _key(ctx), data)

    def head(self, outer: Any, x: Any, data: Any, ctx: Context) -> Any:
        """The loss of what the last stage ends with."""
        return as_output(self._cut(ctx).head(outer, x, _key(ctx), data))

    def stage(self, params: Any, x: Any, ctx: Context, gather: Gather | None = None) -> Any:
        """A stage's blocks, whose parameters ``gather`` makes of their shards."""
        cut = self._cut(ctx)
        arrays = cut.arguments(x, ctx.data)
        kinds = [(self.model.kind(index, block.call), _kind(block)) for index, block in enumerate(cut.blocks)]
        kind_of = [next(k for k, other in enumerate(kinds) if _equal(kind, other)) for kind in kinds]
        firsts = sorted(set(kind_of))
        groups = [[index for index, kind in enumerate(kind_of) if kind == first] for first in firsts]
        functions = [functools.partial(self._block, cut, arrays, members) for members in groups]
        stage = stage_of_layers(functions, [firsts.index(kind) for kind in kind_of], self.schedule)
        return dataclasses.replace(stage, gather=gather)(params, x, ctx)

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
            params = jax.tree.map(_shape, (self.outer, self.blocks))
            outer, blocks = jax.eval_shape(functools.partial(cast, dtype=self.dtype), params)
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


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
