"""A whole model as a pipeline: its loss function cut at its blocks, whatever library the model is written in."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpipe import inputs
from jaxpipe.api import Pipeline, value_and_grad
from jaxpipe.arguments import check_specs_given, entry_axes
from jaxpipe.cutting import Activations, BlockCall, Cut, join_arguments, split_result
from jaxpipe.layer_kinds import KindStage, LayerStageKinds
from jaxpipe.layer_storage import LayerStorage
from jaxpipe.layers import stage_of_layers, store_layers
from jaxpipe.optimizer_state import map_params
from jaxpipe.params import Params
from jaxpipe.restacking import restore
from jaxpipe.runtime.copies import cast
from jaxpipe.runtime.fsdp import Gather, StageOfLayers
from jaxpipe.runtime.model import Context, Model, Output
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.stacking import Stacking


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

    def loss(self, outer: Any, blocks: Any, key: Any, data: Any, step_inputs: Any) -> Any:
        """The user's loss of a microbatch, blocks called through `jaxpipe.cutting.call_block`."""

    def kind(self, index: int, call: BlockCall) -> Any:
        """What is equal for blocks that run the same program but for arrays."""

    def run(
        self, call: BlockCall, members: Sequence[int], row: Any, params: Any, ctx: Context, args: Any, kwargs: Any
    ) -> Any:
        """Calls a block: the one of index ``members[row]`` among those of one kind."""

    def variant(self, model: Any, loss: Callable[..., Any] | None) -> CutModel:
        """The same with another model, or with another loss; None: as it is."""
        ...

    def take(self, model: Any, /) -> tuple[Any, Any]:
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
      trainable: whether each of them has a gradient, a tree of bools like ``params``; see `jaxpipe.floating_only`.
    """

    pipeline: Pipeline
    params: Params
    shardings: Params
    trainable: Params
    _model: CutModel
    _storage: LayerStorage

    @functools.cached_property
    def stacking(self) -> Stacking:
        """Where each block's parameters are, for masks, norms and optimizers by layer."""
        names = tuple(self._model.names)
        return Stacking(self.pipeline.program.schedule, len(names), "storage", names, self._storage)

    @property
    def __name__(self) -> str:
        """The pipeline's, which `jax.jit` names the compiled module by."""
        return self.pipeline.__name__

    def __repr__(self) -> str:
        return f"<jaxpipe.flax.PipelinedModel of {len(self._model.names)} blocks in {self.pipeline!r}>"

    def __call__(self, params: Params, batch: Any, rng: jax.Array | None = None, step_inputs: Any = None) -> Any:
        """((loss, aux), grads); see `jaxpipe.value_and_grad`."""
        return self.pipeline(params, batch, rng, step_inputs)

    def evaluate(self, params: Params, batch: Any, rng: jax.Array | None = None, step_inputs: Any = None) -> Any:
        """(loss, aux) without gradients, of the model and loss that are trained; see `evaluation`."""
        return self.pipeline.evaluate(params, batch, rng, step_inputs)

    def evaluation(self, model: Any = None, *, loss: Callable[..., Any] | None = None) -> Pipeline:
        """The loss and metrics alone: ``(params, batch, rng=None, step_inputs=None) -> (loss, aux)``.

        It runs on the same mesh with ``params`` as the step has them, so that a run needs no second copy of them. Make
        and jit it once, before the loop.

        Args:
          model: an NNX model that differs from the trained one in more than its parameters, such as one in ``eval()``,
            whose dropout is off; or a function that makes it. None: the trained one. Its own parameters are not used.
          loss: in place of the trained one, with its arguments; a Linen model is in evaluation as this calls it.

        Raises:
          ValueError: the model's parameters are not like those of the trained one.
        """
        if model is None and loss is None:
            return self.pipeline.evaluation
        variant, shapes = self._model.variant(model, loss), jax.tree.map(_shape, self.params)
        local = lambda: _local_shapes(variant, self._storage, self.pipeline, shapes)  # noqa: E731
        weight, prepare = self.pipeline.model.weight, self.pipeline.model.prepare
        parts = _Parts(variant, self._storage, self.pipeline.compute_dtype, prepare, local)
        functions = Model(parts.stages, parts.embed, parts.head, weight, prepare)
        return dataclasses.replace(self.pipeline, model=functions).evaluation

    def merge(self, params: Params) -> Any:
        """The model (of Linen, its parameters) with these parameters in place; gradients in the model's structure."""
        return self._model.put(params.outer, self._rows(params))

    def split(self, model: Any) -> Params:
        """The parameters of a model like the pipelined one, where the step wants them: the inverse of `merge`."""
        stacked = stack(self._model, self._storage, self.pipeline.program.schedule, model)
        return jax.device_put(stacked, self.shardings)

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
        return self._storage.unstack(params.stages, self.pipeline.program.schedule, "storage")


def stack(model: CutModel, storage: LayerStorage, schedule: Schedule, params: Any) -> Params:
    """The stacked parameters of a model, in storage order."""
    outer, blocks = model.take(params)
    return Params(storage.stack(blocks, schedule, "storage"), outer)


def pipelined(
    model: CutModel,
    make: Callable[[], Any],
    schedule: Schedule,
    mesh: Mesh,
    *,
    made: bool,
    specs: Params | None,
    trainable: Params | tuple[Any, Any] | None,
    layer_costs: Sequence[float] | None,
    options: Mapping[str, Any],
) -> PipelinedModel:
    """A model as a pipeline.

    Args:
      model: cut.
      make: gives the user's model, from which `CutModel.take` takes the parameters.
      schedule, mesh: as for `jaxpipe.value_and_grad`.
      made: whether the model has been made: its parameters are then moved, otherwise made in parts under `jax.jit`.
      trainable: as for `jaxpipe.value_and_grad`, or bools for (outer, blocks) as `CutModel.take` gives them.
      layer_costs: what each block costs, to divide them over stages by.
      specs, options: for `jaxpipe.value_and_grad`.
    """
    storage = store_layers(model.blocks, schedule, layer_costs)
    start = lambda: stack(model, storage, schedule, make())  # noqa: E731
    shapes = jax.eval_shape(start)
    local = lambda: _local_shapes(model, storage, pipeline, shapes)  # noqa: E731
    axis = options.get("axis", "pp")
    specs = _annotated_specs(model, storage, options, axis) if specs is None else check_specs_given(specs, axis)
    parts = _Parts(model, storage, options.get("compute_dtype"), options.get("prepare"), local)
    if trainable is not None and not isinstance(trainable, Params):
        outer, blocks = trainable
        trainable = Params(blocks if model.stacked else _common(blocks, storage, model.names, _refuse_mask), outer)
    pipeline = value_and_grad(
        parts.stages,
        schedule,
        mesh,
        embed=parts.embed,
        head=parts.head,
        specs=specs,
        order="storage",
        trainable=trainable,
        **options,
    )
    mask = pipeline.trainable_mask(shapes)
    shardings = pipeline.shardings(shapes)
    params = jax.device_put(start(), shardings) if made else jax.jit(start, out_shardings=shardings)()
    return PipelinedModel(pipeline, params, shardings, mask, model, storage)


def _common(
    trees: Sequence[Any], storage: LayerStorage, names: Sequence[str], refuse: Callable[[str, str, Any, str, Any], str]
) -> Any:
    """What is said of each stacked parameter, by a tree for each block like its parameters.

    Raises:
      ValueError: blocks whose parameters are rows of one array say different things; ``refuse`` makes the message.
    """
    found: dict[int, tuple[str, Any]] = {}
    for name, kind, tree in zip(names, storage.kind_of, trees, strict=True):
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=inputs.is_spec)
        for place, (path, value) in zip(storage.places[kind], leaves, strict=True):
            first, other = found.setdefault(place, (name, value))
            if value != other:
                raise ValueError(refuse(jax.tree_util.keystr(path), first, other, name, value))
    return jax.tree.unflatten(storage.tree, [found[place][1] for place in range(len(found))])


def _refuse_mask(path: str, first: str, choice: bool, name: str, other: bool) -> str:
    trained, frozen = (first, name) if choice else (name, first)
    return (
        f"trainable trains {path} of {trained} and freezes that of {frozen}, but one array holds both: train or freeze "
        "it in all blocks, and to hold some of them give the optimizer updates of zero there"
    )


def _local_shapes(model: CutModel, storage: LayerStorage, pipeline: Pipeline, shapes: Params) -> tuple[Any, Any]:
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
        rows = storage.unstack(stages, schedule, "storage")
        return stack_rows(rows) if model.stacked else rows

    return outer, jax.eval_shape(unstack, stages)


def _annotated_specs(model: CutModel, storage: LayerStorage, options: Mapping[str, Any], axis: str) -> Params:
    """The specs that the model's own annotations make."""
    fsdp = options.get("fsdp_axis") or ()
    divided = {fsdp} if isinstance(fsdp, str) else {*fsdp}
    outer, blocks = jax.tree.map(lambda annotation: annotation.without(divided), model.annotated)
    if model.stacked:
        block = jax.tree.map(lambda spec: P(*spec[1:]), blocks, is_leaf=inputs.is_spec)
    else:
        block = _common(blocks, storage, model.names, _refuse_specs)
    return Params(jax.tree.map(lambda spec: P(axis, None, *spec), block, is_leaf=inputs.is_spec), outer)


def _refuse_specs(path: str, first: str, spec: P, name: str, other: P) -> str:
    return (
        f"{name} annotates its parameter {path} with {other}, {first} with {spec}: blocks are stacked, so annotate all "
        "alike, or pass specs"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """A cut model as the functions of a pipeline.

    Attributes:
      model: cut.
      storage: of its blocks' parameters.
      dtype: of the working copies, or None.
      prepare: of `jaxpipe.value_and_grad`, or None.
      shapes: gives (outer, blocks) of a device's parameters.
    """

    model: CutModel
    storage: LayerStorage
    dtype: Any
    prepare: Callable[..., Any] | None
    shapes: Callable[[], tuple[Any, Any]]

    def embed(self, outer: Any, data: Any, ctx: Context) -> Any:
        """What the first stage starts with."""
        return self._cut(ctx).embed(outer, _key(ctx), (data, ctx.step_inputs))

    def head(self, outer: Any, x: Any, data: Any, ctx: Context) -> Any:
        """The loss of what the last stage ends with."""
        return as_output(self._cut(ctx).head(outer, x, _key(ctx), (data, ctx.step_inputs)))

    @property
    def stages(self) -> Callable[..., Any]:
        """The stage function; of blocks of several kinds, one for each row of kinds."""
        if not self.storage.apart:
            return StageOfLayers(self.stage)
        make = lambda stages: StageOfLayers(functools.partial(self.stage, stages=stages))  # noqa: E731
        return LayerStageKinds(make, self.storage, (0,) * len(self.storage.kind_of))

    def stage(
        self, params: Any, x: Any, ctx: Context, gather: Gather | None = None, *, stages: Sequence[int] | None = None
    ) -> Any:
        """A stage's blocks, whose parameters ``gather`` makes of their shards.

        ``stages`` are those with the same row of kinds of blocks; None: all have the same.
        """
        cut = self._cut(ctx)
        arrays = cut.arguments(x, (ctx.data, ctx.step_inputs))
        kinds = [(self.model.kind(index, block.call), _kind(block)) for index, block in enumerate(cut.blocks)]
        kind_of = [next(k for k, other in enumerate(kinds) if _equal(kind, other)) for kind in kinds]
        firsts = sorted(set(kind_of))
        groups = [[index for index, kind in enumerate(kind_of) if kind == first] for first in firsts]
        functions = [functools.partial(self._block, cut, arrays, members) for members in groups]
        function_of = [firsts.index(kind) for kind in kind_of]
        if stages is None:
            stage = stage_of_layers(functions, function_of, self.storage)
            assert isinstance(stage, StageOfLayers)
            return stage.run(params, x, ctx, gather)
        return KindStage(functions, function_of, self.storage, stages).run(params, x, ctx, gather)

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
        rows = list(x.others)
        for column, value in zip(cut.columns[members[0]], others, strict=True):
            rows[column] = rows[column].at[ctx.layer].set(value)
        return Activations(y, x.arguments, tuple(rows))

    def _cut(self, ctx: Context) -> Cut:
        leaves, structure = jax.tree.flatten((_key(ctx), (ctx.data, ctx.step_inputs)))
        return self._cut_for(structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))

    @functools.cached_property
    def _cut_for(self) -> Callable[[Any, Any], Cut]:
        """The loss cut for a key and data of some shapes: embed, stage and head, traced several times, share it."""

        def loss(outer: Any, blocks: Any, key: Any, inputs: Any) -> Any:
            return self.model.loss(outer, blocks, key, *inputs)

        @functools.lru_cache(maxsize=4)
        def cut(structure: Any, shapes: tuple[tuple[Any, Any], ...]) -> Cut:
            key, data = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
            outer, blocks = jax.eval_shape(functools.partial(cast, dtype=self.dtype), self.shapes())
            outer = outer if self.prepare is None else jax.eval_shape(self.prepare, outer)
            cut = Cut(loss, outer, blocks, key, data, self.model.names, stacked=self.model.stacked)
            _warn_of_wider_products(cut, self.dtype, self.model.names[0])
            return cut

        return cut


def stack_rows(blocks: Sequence[Any]) -> Any:
    """Parameters or gradients of blocks as rows; of what has no gradient, zeros of dtype float0."""

    def stacked(*leaves: Any) -> Any:
        return np.stack(leaves) if leaves[0].dtype == jax.dtypes.float0 else jnp.stack(leaves)

    return jax.tree.map(stacked, *blocks)


def _warn_of_wider_products(cut: Cut, dtype: Any, name: str) -> None:
    """Says so where blocks compute in a wider dtype than that of the working copies, which modules may ask for."""
    if dtype is None:
        return
    asked, wider = jnp.finfo(dtype), set()
    for value in cut.blocks[0].x:
        if jnp.issubdtype(value.aval.dtype, jnp.floating) and jnp.finfo(value.aval.dtype).bits > asked.bits:
            wider.add(value.aval.dtype.name)
    if wider:
        warnings.warn(
            f"compute_dtype is {asked.dtype.name}, but {name} is called with activations of "
            f"{', '.join(sorted(wider))}: modules that do not say otherwise then multiply in that dtype. Give the "
            f"model's modules (nnx.Embed first) dtype={asked.dtype.name}, or leave compute_dtype out",
            stacklevel=2,
        )


def choose(column: Sequence[Any], row: Any) -> Any:
    """One of several arrays alike, which are often one."""
    return column[0] if all(other is column[0] for other in column) else jnp.stack(column)[row]


def call_loss(loss: Callable[..., Any], *args: Any, step_inputs: Any) -> Any:
    """What a loss function returns, called with the step's inputs by name where there are any."""
    if step_inputs is None:
        return loss(*args)
    if not takes(loss, *args, step_inputs=step_inputs):
        raise ValueError(
            f"step_inputs are given, and the loss function takes {inspect.signature(loss)}: give it a parameter of the "
            "name step_inputs, or call the step without"
        )
    return loss(*args, step_inputs=step_inputs)


def takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called with these arguments; True where it does not say."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


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
