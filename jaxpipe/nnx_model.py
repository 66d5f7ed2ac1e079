"""A whole NNX model as a pipeline: cut at its blocks, trained with the loss function that it has, and put together again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxpipe import inputs
from jaxpipe.api import Pipeline, value_and_grad
from jaxpipe.cutting import Activations, Block, Cut, as_output, call_block, join_arguments, split_result
from jaxpipe.inputs import check_same_structure
from jaxpipe.layers import Layer, stack_layers, stage_of_layers, unstack_layers
from jaxpipe.nnx_function import NNXFunction, nnx_function, parameters_of
from jaxpipe.runtime.copies import cast
from jaxpipe.runtime.model import Context, Params
from jaxpipe.schedule.schedule import Schedule


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PipelinedNNX:
    """An NNX model as a pipeline; made by `from_nnx`. Called and jitted as what `jaxpipe.value_and_grad` returns.

    Attributes:
      pipeline: the step, ``pipeline(params, batch, rng) -> ((loss, aux), grads)``.
      params: the model's parameters where the step wants them: each stage's on its rank, in storage order.
      shardings: of the parameters, a tree like ``params``.
    """

    pipeline: Pipeline
    params: Params
    shardings: Params
    _parts: _Parts

    @property
    def __name__(self) -> str:
        """The pipeline's, which `jax.jit` names the compiled module by."""
        return self.pipeline.__name__

    def __repr__(self) -> str:
        return f"<jaxpipe.flax.PipelinedNNX {self._parts.function.name} in {self.pipeline!r}>"

    def __call__(self, params: Params, batch: Any, rng: jax.Array | None = None) -> Any:
        """((loss, aux), grads); see `jaxpipe.value_and_grad`."""
        return self.pipeline(params, batch, rng)

    def merge(self, params: Params) -> nnx.Module:
        """The model with these parameters in place."""
        return self._parts.merge(params, self.pipeline.program.schedule)

    def split(self, model: nnx.Module) -> Params:
        """The parameters of a model like the pipelined one, where the step wants them: the inverse of `merge`."""
        return jax.device_put(self._parts.split(model, self.pipeline.program.schedule), self.shardings)


def from_nnx(
    model: nnx.Module | Callable[[], nnx.Module],
    schedule: Schedule,
    mesh: Mesh,
    *,
    blocks: str,
    loss: Callable[[Any, Any], Any],
    specs: Params | None = None,
    **options: Any,
) -> PipelinedNNX:
    """Makes a pipeline of an NNX model and the loss function that it is trained with.

    Nothing of the model changes. ``loss`` is traced, and cut at the calls of the model's blocks: what comes before the
    first one is the embedding, what comes after the last one the head, and what blocks are called with besides
    activations (masks, positions, flags) reaches them:

    * Arrays made of the batch alone are made again in each stage. Those that take parameters or random numbers pass
      from stage to stage with the activations.
    * What blocks return besides activations (a router's balance loss, in a tuple) reaches the loss, for each block.
    * Dropout and other random streams of the model are seeded anew for each layer and microbatch from the step's key.
    * A parameter used before and after the blocks (tied embeddings) is one parameter.

    Args:
      model: the model; or a function without arguments that makes it, which then runs under `jax.jit` so that each
        device makes its own parameters alone.
      schedule: from one of the builders.
      mesh: as for `jaxpipe.value_and_grad`.
      blocks: where the model keeps its blocks, "layers" or "decoder.layers": a list of modules, called one after the
        other, each with what the one before returned.
      loss: ``loss(model, batch)`` returns a scalar, the mean over its batch; or a scalar and a flat dict of metrics,
        which are summed over microbatches. It is called for one microbatch.
      specs: as for `jaxpipe.value_and_grad`.
      **options: further arguments of `jaxpipe.value_and_grad`, such as ``data_axes``, ``compute_dtype``, ``weight``.

    Raises:
      ValueError: there are no such blocks, their parameters differ or are shared, or the model changes state when it
        is called; when the step is traced, blocks that the loss does not call in a row.

    >>> import jaxpipe, optax
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed = nnx.Embed(16, 8, rngs=rngs)
    ...         self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(5)])
    ...     def __call__(self, tokens):
    ...         x = self.embed(tokens)
    ...         for layer in self.layers:
    ...             x = layer(x)
    ...         return self.embed.attend(x)
    >>> def loss(model, batch):
    ...     return optax.softmax_cross_entropy_with_integer_labels(model(batch), batch).mean()
    >>> mesh, schedule = jaxpipe.make_mesh(pp=2), jaxpipe.schedule.build("1f1b", 2, 4)
    >>> pipe = from_nnx(Model(nnx.Rngs(0)), schedule, mesh, blocks="layers", loss=loss)
    >>> (value, aux), grads = jax.jit(pipe)(pipe.params, jnp.zeros((8, 3), jnp.int32))
    >>> pipe.merge(pipe.params).layers[4].kernel.shape
    (8, 8)
    """
    if isinstance(model, nnx.Module):
        abstract, make = model, None
    elif callable(model):
        abstract, make = nnx.eval_shape(model), model
    else:
        raise ValueError(f"from_nnx got a {type(model).__name__}: give an nnx.Module, or a function that makes one")
    parts = _Parts.of(abstract, make, blocks, loss)
    parts = dataclasses.replace(parts, dtype=options.get("compute_dtype"))
    pipeline = value_and_grad(
        functools.partial(parts.stage, schedule),
        schedule,
        mesh,
        embed=parts.embed,
        head=parts.head,
        specs=specs,
        order="storage",
        **options,
    )
    split = functools.partial(parts.split, schedule=schedule)
    shapes = jax.eval_shape(lambda: split(make())) if make else jax.eval_shape(lambda: split(model))
    found = inputs.broadcast_specs(pipeline.specs, shapes, pipeline.axes, mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), found, is_leaf=inputs.is_spec)
    if make is None:
        params = jax.device_put(split(model), shardings)
    else:
        params = jax.jit(lambda: split(make()), out_shardings=shardings)()
    return PipelinedNNX(pipeline, params, shardings, parts)


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """An NNX model and its blocks as functions.

    Attributes:
      function: of the whole model.
      blocks: of each block.
      path: where the blocks are.
      random: the state of the model's random streams.
      loss: the user's.
      dtype: of the working copies, or None.
    """

    function: NNXFunction
    blocks: tuple[NNXFunction, ...]
    path: tuple[str, ...]
    random: Any
    loss: Callable[[Any, Any], Any]
    dtype: Any = None

    @classmethod
    def of(cls, model: nnx.Module, make: Callable[[], nnx.Module] | None, where: str, loss: Any) -> _Parts:
        """The parts of a model, whose arrays may be abstract where there is a function that makes it."""
        path = tuple(where.split("."))
        modules = _blocks_of(model, path)
        function, blocks = nnx_function(model), tuple(map(nnx_function, modules))
        check_same_structure([block.params for block in blocks])
        held = len(jax.tree.leaves(_take(function.params, path)[1]))
        if held != sum(len(jax.tree.leaves(block.params)) for block in blocks):
            raise ValueError(
                f"the blocks in {where} share parameters with each other or with the rest of the model: each block "
                "trains its own"
            )
        random = nnx.split(model, nnx.RngState, ...)[1]
        if make is not None:

            def concrete() -> Any:
                made = make()
                parts = [nnx_function(module).constants for module in (made, *_blocks_of(made, path))]
                return parts, nnx.split(made, nnx.RngState, ...)[1]

            (first, *others), random = jax.jit(concrete)()
            function = dataclasses.replace(function, constants=first)
            blocks = tuple(
                dataclasses.replace(block, constants=constants) for block, constants in zip(blocks, others, strict=True)
            )
        return cls(function, blocks, path, random, loss)

    def split(self, model: nnx.Module, schedule: Schedule) -> Params:
        """The stacked parameters of a model, in storage order."""
        outer, rows = _take(parameters_of(model), self.path)
        layers = [rows[index] for index in range(len(self.blocks))]
        return Params(stack_layers(layers, schedule, "storage")[0], outer)

    def merge(self, params: Params, schedule: Schedule) -> nnx.Module:
        """The model with stacked parameters in place."""
        rows = unstack_layers(params.stages, len(self.blocks), schedule, "storage")
        leaves = jax.tree.leaves(_put(params.outer, self.path, dict(enumerate(rows))))
        variables = jax.tree.unflatten(self.function._variables, leaves)
        return nnx.merge(self.function.graphdef, variables, self.function.constants, self.random)

    def embed(self, outer: Any, data: Any, ctx: Context) -> Any:
        """`jaxpipe.value_and_grad`'s embed."""
        return self._cut(ctx).embed(outer, _key(ctx), data)

    def head(self, outer: Any, x: Any, data: Any, ctx: Context) -> Any:
        """`jaxpipe.value_and_grad`'s head."""
        return as_output(self._cut(ctx).head(outer, x, _key(ctx), data))

    def stage(self, schedule: Schedule, params: Any, x: Any, ctx: Context) -> Any:
        """`jaxpipe.value_and_grad`'s stage."""
        cut = self._cut(ctx)
        arrays = cut.arguments(x, ctx.data)
        kinds = [
            (block.graphdef, block.streams, call.call.statics, call.call.arguments, _described(block, call))
            for block, call in zip(self.blocks, cut.blocks, strict=True)
        ]
        firsts, kind_of = _distinct(kinds)
        members = [[index for index, kind in enumerate(kind_of) if kind == wanted] for wanted in range(len(firsts))]
        functions = [functools.partial(self._layer, cut, arrays, indices) for indices in members]
        return stage_of_layers(functions, kind_of, schedule)(params, x, ctx)

    def _layer(
        self, cut: Cut, arrays: Any, members: Sequence[int], params: Any, activations: Any, ctx: Context
    ) -> Any:
        """A layer of those that are alike but for arrays."""
        x = activations if cut.simple else activations.x
        call = cut.blocks[members[0]].call
        columns = zip(*(cut.blocks[index].arguments for index in members), strict=True)
        row = jnp.asarray([members.index(i) if i in members else 0 for i in range(len(self.blocks))], jnp.int32)
        given = [_row([arrays[value] for value in column], row[ctx.layer]) for column in columns]
        constants = [jax.tree.leaves(self.blocks[index].constants) for index in members]
        chosen = [_row(column, row[ctx.layer]) for column in zip(*constants, strict=True)]
        block = self.blocks[members[0]]
        block = dataclasses.replace(block, constants=jax.tree.unflatten(jax.tree.structure(block.constants), chosen))
        args, kwargs = join_arguments(call.arguments, call.statics, given)
        y, others = split_result(block.run(params, ctx, (x, *args), kwargs), x)
        if cut.simple:
            return y
        rows = (
            stacked.at[ctx.layer].set(value) for stacked, value in zip(activations.others, others, strict=True)
        )
        return Activations(y, activations.arguments, tuple(rows))

    def _cut(self, ctx: Context) -> Cut:
        """The loss in parts, for a microbatch."""
        outer, rows = _take(self.function.params, self.path)
        blocks = [rows[index] for index in range(len(self.blocks))]
        names = [f"{'.'.join(self.path)}[{index}]" for index in range(len(blocks))]
        count = len(blocks)

        def loss(params: Any, key: Any, data: Any) -> Any:
            outer, blocks = params
            whole = _put(outer, self.path, dict(enumerate(blocks)))
            local = Context(jnp.int32(-1), jnp.int32(0), key, data, jnp.int32(-1))
            shown = Context.make(0, 0, key, data, num_stages=count)

            def call(model: Any) -> Any:
                for index, module in enumerate(_blocks_of(model, self.path)):
                    module.__class__ = _standing_for(type(module))
                    module._pipeline_block = _Handle(self.blocks[index], names[index], shown)
                return self.loss(model, data)

            return self.function.apply(whole, local, call)

        params, key, data = jax.tree.map(_shape, (cast((outer, blocks), self.dtype), _key(ctx), ctx.data))
        return Cut(loss, params, key, data, names)


@dataclasses.dataclass(frozen=True, eq=False)
class _Handle:
    """What a block needs to stand for itself."""

    function: NNXFunction
    name: str
    ctx: Context


@functools.cache
def _standing_for(kind: type) -> type:
    """A subclass whose call is one opaque equation."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = self._pipeline_block
        params = parameters_of(self)

        def run(params: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            return handle.function.run(params, handle.ctx, (x, *args), kwargs)

        return call_block(run, handle.name, params, args, kwargs)

    return type(kind)(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})


def _key(ctx: Context) -> Any:
    """The key of what stands outside of the blocks: the embedding's, in the head too, which computes parts of it."""
    return None if ctx.rng is None else ctx.at_layer(-1).rng


def _blocks_of(model: Any, path: Sequence[str]) -> list[nnx.Module]:
    where = model
    for name in path:
        if not hasattr(where, name):
            raise ValueError(
                f"blocks={'.'.join(path)!r}: {type(where).__name__} has no {name}; it has "
                f"{', '.join(sorted(name for name in vars(where) if not name.startswith('_')))}"
            )
        where = getattr(where, name)
    if isinstance(where, nnx.Module) and not isinstance(where, Sequence | nnx.List):
        raise ValueError(f"blocks={'.'.join(path)!r} is a {type(where).__name__}: name a list of modules")
    blocks = list(where)
    for index, block in enumerate(blocks):
        if not isinstance(block, nnx.Module):
            raise ValueError(f"{'.'.join(path)}[{index}] is a {type(block).__name__}: blocks are nnx.Modules")
    if not blocks:
        raise ValueError(f"{'.'.join(path)} is empty: a pipeline needs at least one block for each stage")
    return blocks


def _take(params: Any, path: Sequence[str]) -> tuple[Any, Any]:
    """(the tree without what is at a path, what is there)."""
    name, *rest = path
    if not rest:
        return {key: value for key, value in params.items() if key != name}, params.get(name, {})
    inner, taken = _take(params.get(name, {}), rest)
    return {**params, name: inner}, taken


def _put(params: Any, path: Sequence[str], value: Any) -> Any:
    """The inverse of `_take`."""
    name, *rest = path
    return {**params, name: _put(params.get(name, {}), rest, value) if rest else value}


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)


def _described(block: NNXFunction, call: Block) -> Any:
    """Shapes and dtypes of a block's constants and further arguments."""
    avals = [value.aval for value in call.arguments]
    return [(np.shape(leaf), leaf.dtype) for leaf in (*jax.tree.leaves(block.constants), *avals)]


def _row(column: Sequence[Any], index: Any) -> Any:
    """One of several arrays alike, which are often one."""
    if all(other is column[0] for other in column):
        return column[0]
    return jnp.stack(column)[index]


def _distinct(definitions: Sequence[Any]) -> tuple[list[int], list[int]]:
    firsts: list[int] = []
    kinds = []
    for index, definition in enumerate(definitions):
        kind = next((k for k, first in enumerate(firsts) if definition == definitions[first]), len(firsts))
        if kind == len(firsts):
            firsts.append(index)
        kinds.append(kind)
    return firsts, kinds
