"""NNX models as pipelines: `from_nnx`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxpipe.cutting import BlockCall, call_block
from jaxpipe.nnx_function import NNXFunction, is_parameter, nnx_function, parameters_of
from jaxpipe.params import Params, check_same_structure
from jaxpipe.runtime.model import Context
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.whole import ParameterAnnotation, PipelinedModel, call_loss, choose, pipelined, stack_rows


def from_nnx(
    model: nnx.Module | Callable[[], nnx.Module],
    schedule: Schedule,
    mesh: Mesh,
    *,
    blocks: str,
    loss: Callable[[Any, Any], Any],
    specs: Params | None = None,
    trainable: Any = None,
    layer_costs: Sequence[float] | None = None,
    **options: Any,
) -> PipelinedModel:
    """Makes a pipeline of an NNX model and the loss function that it is trained with.

    Nothing of the model changes. ``loss`` is traced, and cut at the calls of the model's blocks: what comes before the
    first one is the embedding, what comes after the last one the head, and what blocks are called with besides
    activations (masks, positions, flags) reaches them:

    * Arrays made of the batch alone are made again in each stage. Those that take parameters or random numbers pass
      from stage to stage with the activations.
    * What blocks return besides activations (a router's balance loss, in a tuple) reaches the loss, for each block.
    * Dropout and other random streams of the model are seeded anew for each layer and microbatch from the step's key.
    * A parameter used before and after the blocks (tied embeddings) is one parameter.
    * `jax.checkpoint` or `nnx.remat` round a block's call is kept.
    * Blocks may be of several classes or configurations, with parameters of their own structures (dense layers, then
      experts; local and global attention in turn). `layered_stages` says how their parameters are stacked.

    Args:
      model: the model; or a function without arguments that makes it, which then runs under `jax.jit` so that each
        device makes its own parameters alone.
      schedule: from one of the builders.
      mesh: as for `jaxpipe.value_and_grad`.
      blocks: where the model keeps its blocks, "layers" or "decoder.layers": a list of modules, called one after the
        other, each with what the one before returned; or one module made by `nnx.vmap` and called in `nnx.scan`.
      loss: ``loss(model, batch)`` returns a scalar, the mean over its batch; or a scalar and a flat dict of metrics,
        which are summed over microbatches. It is called for one microbatch; and as ``loss(model, batch,
        step_inputs=...)`` where the step is given ``step_inputs``, see `jaxpipe.value_and_grad`.
      specs: as for `jaxpipe.value_and_grad`, where a block's parameters have the dimensions of stages and of layers
        before their own; None: as the model annotates them (`nnx.with_partitioning`), and whole where it does not.
      trainable: which parameters are trained, a filter of NNX: a type of variables such as `nnx.LoRAParam`, a function
        ``(path, variable) -> bool`` of a path in the model such as ``("layers", 3, "linear", "kernel")``, several in a
        tuple, `nnx.Not`. The others are frozen, as `jaxpipe.value_and_grad` says. It must say the same of all blocks.
        None: all are trained. `jaxpipe.Params` of bools may stand for it.
      layer_costs: what each block costs, to divide them over the stages by; see `split_layers`.
      **options: further arguments of `jaxpipe.value_and_grad`, such as ``data_axes``, ``compute_dtype``, ``weight``.

    Raises:
      ValueError: there are no such blocks, they share parameters, or the model changes state when it is called; when
        the step is traced, blocks that the loss does not call in a row.

    >>> import jaxpipe, optax
    >>> import jax.numpy as jnp
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
    parts, shapes = _NNXModel.of_any(model, tuple(blocks.split(".")), loss)
    made = isinstance(model, nnx.Module)
    make: Any = (lambda: model) if made else model
    if trainable is not None and not isinstance(trainable, Params):
        trainable = parts.mask(shapes, trainable)
    return pipelined(
        parts,
        make,
        schedule,
        mesh,
        made=made,
        specs=specs,
        trainable=trainable,
        layer_costs=layer_costs,
        options=options,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _NNXModel:
    """An NNX model and its blocks as functions; a `jaxpipe.whole.CutModel`.

    Attributes:
      function: of the whole model.
      functions: of each block.
      path: where the blocks are.
      random: the state of the model's random streams.
      user_loss: ``loss(model, data)``.
      specs: `ParameterAnnotation` of each parameter.
      stacked: whether the blocks are one module with a row for each, as `nnx.vmap` makes and `nnx.scan` calls it.
    """

    function: NNXFunction
    functions: tuple[NNXFunction, ...]
    path: tuple[str, ...]
    random: Any
    user_loss: Callable[[Any, Any], Any]
    specs: Any
    stacked: bool = False

    @classmethod
    def of_any(
        cls, model: nnx.Module | Callable[[], nnx.Module], path: tuple[str, ...], loss: Callable[..., Any]
    ) -> tuple[_NNXModel, nnx.Module]:
        """(the parts, the model) of a model, or of what makes one; the model then has shapes for arrays."""
        if isinstance(model, nnx.Module):
            return cls.of(model, path, loss), model
        if not callable(model):
            raise ValueError(f"from_nnx got a {type(model).__name__}: give an nnx.Module, or a function that makes one")
        shapes = _abstract(model)
        return cls.of(shapes, path, loss).with_state(model), shapes

    @classmethod
    def of(cls, model: nnx.Module, path: tuple[str, ...], loss: Callable[[Any, Any], Any]) -> _NNXModel:
        """The parts of a model, whose arrays may be abstract."""
        function, where = nnx_function(model), _blocks_of(model, path)
        random = nnx.split(model, nnx.RngState, ...)[1]
        specs = _annotations_of(model)
        if isinstance(where, nnx.Module):
            return cls(
                _without_arrays(function), _rows_of(where, ".".join(path)), path, random, loss, specs, stacked=True
            )
        functions = tuple(map(nnx_function, where))
        held = len(jax.tree.leaves(_take(function.params, path)[1]))
        if held != sum(len(jax.tree.leaves(block.params)) for block in functions):
            raise ValueError(
                f"the blocks in {'.'.join(path)} share parameters with each other or with the rest of the model, but "
                "each block trains its own: make a new module for each, or keep what all share outside of them"
            )
        return cls(_without_arrays(function), tuple(map(_without_arrays, functions)), path, random, loss, specs)

    def with_state(self, make: Callable[[], nnx.Module]) -> _NNXModel:
        """The same with the arrays that are no parameters, of a model that nobody has made yet."""

        def state() -> Any:
            model = make()
            made = type(self).of(model, self.path, self.user_loss)
            return [each.constants for each in (made.function, *made.functions)], made.random

        (first, *others), random = jax.jit(state)()
        functions = (dataclasses.replace(f, constants=c) for f, c in zip(self.functions, others, strict=True))
        function = dataclasses.replace(self.function, constants=first)
        return dataclasses.replace(self, function=function, functions=tuple(functions), random=random)

    @property
    def names(self) -> list[str]:
        """As the model says it."""
        return [f"{'.'.join(self.path)}[{index}]" for index in range(len(self.functions))]

    @property
    def outer(self) -> Any:
        """Parameters outside of the blocks."""
        return _take(self.function.params, self.path)[0]

    @property
    def blocks(self) -> Any:
        """The blocks' parameters."""
        return _take(self.function.params, self.path)[1] if self.stacked else [each.params for each in self.functions]

    @property
    def annotated(self) -> tuple[Any, Any]:
        """`ParameterAnnotation` of each parameter in (outer, blocks)."""
        outer, blocks = _take(self.specs, self.path)
        return outer, blocks if self.stacked else [blocks.get(index, {}) for index in range(len(self.functions))]

    def loss(self, outer: Any, blocks: Any, key: Any, data: Any, step_inputs: Any) -> Any:
        """The user's loss, each block an opaque equation."""
        outside = Context(np.int32(-1), np.int32(0), key, data, np.int32(-1))
        inside = Context.make(0, 0, key, data, num_stages=len(self.functions))

        def use(model: Any) -> Any:
            where = _blocks_of(model, self.path)
            modules = [where] if self.stacked else where
            for name, module, function in zip(self.names, modules, self.functions, strict=not self.stacked):
                module.__class__ = _standing_for(type(module))
                module._pipeline_block = _Stand(name, function, inside, _statics(module))
            return call_loss(self.user_loss, model, data, step_inputs=step_inputs)

        return self.function.apply(self._whole(outer, blocks), outside, use)

    def kind(self, index: int, call: BlockCall) -> Any:
        """The block's static part, and the shapes of its constants."""
        function = self.functions[index]
        shapes = [(np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in jax.tree.leaves(function.constants)]
        return function.graphdef, function.streams, jax.tree.structure(function.constants), shapes

    def run(
        self, call: BlockCall, members: Sequence[int], row: Any, params: Any, ctx: Context, args: Any, kwargs: Any
    ) -> Any:
        """Calls a block with its own constants."""
        functions = [self.functions[index] for index in members]
        columns = zip(*(jax.tree.leaves(function.constants) for function in functions), strict=True)
        constants = jax.tree.unflatten(
            jax.tree.structure(functions[0].constants), [choose(column, row) for column in columns]
        )
        return dataclasses.replace(functions[0], constants=constants).run(params, ctx, args, kwargs)

    def take(self, model: nnx.Module) -> tuple[Any, Any]:
        """(outer, blocks) of the parameters of a model like this one."""
        outer, blocks = _take(parameters_of(model), self.path)
        return outer, blocks if self.stacked else [blocks.get(index, {}) for index in range(len(self.functions))]

    def variant(self, model: Any, loss: Callable[..., Any] | None) -> _NNXModel:
        """The same with another model, parameters aside, or with another loss."""
        loss = loss or self.user_loss
        if model is None:
            return dataclasses.replace(self, user_loss=loss)
        parts = type(self).of_any(model, self.path, loss)[0]
        check_same_structure([self.function.params, parts.function.params])
        return parts

    def mask(self, model: nnx.Module, trainable: Any) -> tuple[Any, Any]:
        """Bools for (outer, blocks): what a filter says of each variable."""
        chosen: dict[Any, Any] = {}
        keep = nnx.filterlib.to_predicate(trainable)
        for path, variable in nnx.to_flat_state(nnx.state(model, is_parameter)):
            node = chosen
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = bool(keep(path, variable))
        outer, blocks = _take(chosen, self.path)
        return outer, blocks if self.stacked else [blocks.get(index, {}) for index in range(len(self.functions))]

    def put(self, outer: Any, blocks: Sequence[Any]) -> nnx.Module:
        """The model with these parameters, and everything else as it was."""
        return self.function.with_random(self._whole(outer, self._joined(blocks)), self.random)

    def put_state(self, outer: Any, blocks: Sequence[Any]) -> Any:
        """An `nnx.State` of the kinds of variables that are trained, each holding what there is for it."""
        return nnx.filter_state(self.function.state_of(self._whole(outer, self._joined(blocks))), nnx.Param)

    def _joined(self, blocks: Sequence[Any]) -> Any:
        return stack_rows(blocks) if self.stacked else blocks

    def _whole(self, outer: Any, blocks: Any) -> Any:
        return _put(outer, self.path, blocks if self.stacked else dict(enumerate(blocks)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Stand:
    """What a block needs to stand for itself; ``statics`` are those of its modules before the loss runs."""

    name: str
    function: NNXFunction
    ctx: Context
    statics: dict[str, Any]


def _statics(module: nnx.Module) -> dict[str, Any]:
    """The numbers, flags and texts that modules are made with, by path."""
    return {
        ".".join(map(str, (*path, name))): value
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Module)
        for name, value in vars(node).items()
        if isinstance(value, bool | int | float | str | None)
    }


def _check_unchanged(stand: _Stand, module: nnx.Module) -> None:
    """Raises ValueError where the loss has changed what a block is: the pipeline runs the block that was given."""
    now = _statics(module)
    for name in (*stand.statics, *now):
        before, after = stand.statics.get(name), now.get(name)
        if before != after:
            raise ValueError(
                f"the loss changes {name} of {stand.name} from {before} to {after} before it calls it, as eval() "
                "does: change the model before from_nnx, or evaluate with pipe.evaluation(model)"
            )


@functools.cache
def _standing_for(kind: type) -> type:
    """A subclass whose call is one opaque equation."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        stand: _Stand = self._pipeline_block
        _check_unchanged(stand, self)

        def run(params: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            return stand.function.run(params, stand.ctx, (x, *args), kwargs)

        return call_block(run, stand.name, parameters_of(self), args, kwargs)

    return type(kind)(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _abstract(make: Callable[[], nnx.Module]) -> nnx.Module:
    """The model with shapes in place of its variables' arrays; arrays that it holds without a variable are made."""

    def places(model: nnx.Module) -> list[tuple[nnx.Module, str]]:
        modules = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
        return [(each, name) for each in modules for name, value in vars(each).items() if isinstance(value, jax.Array)]

    model = nnx.eval_shape(make)
    arrays = jax.jit(lambda: [getattr(module, name) for module, name in places(make())])()
    for (module, name), array in zip(places(model), arrays, strict=True):
        vars(module)[name] = array
    return model


def _without_arrays(function: NNXFunction) -> NNXFunction:
    """The function with shapes for its parameters, which are then nobody's but the pipeline's."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), function.params)
    return dataclasses.replace(function, params=shapes)


def _annotations_of(model: nnx.Module) -> Any:
    """How the model annotates its parameters (`nnx.with_partitioning`); P() where it does not."""
    state = nnx.state(model, is_parameter)
    specs = dict(nnx.to_flat_state(nnx.get_partition_spec(state)))
    found = {
        path: variable.copy(
            ParameterAnnotation(specs[path].get_raw_value(), variable.get_metadata().get("by_hand", False))
        )
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.to_pure_dict(nnx.from_flat_state(found))


def _rows_of(module: nnx.Module, name: str) -> tuple[NNXFunction, ...]:
    """The functions of a module's rows."""
    function = nnx_function(module)
    arrays = [*jax.tree.leaves((function.params, function.constants)), *function.streams.values()]
    lengths = {leaf.shape[:1] for leaf in arrays}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"blocks={name!r} is a {type(module).__name__} whose arrays share no dimension of blocks: "
            "name a list of modules, or one module that nnx.vmap has made of many"
        )

    def row(index: int) -> NNXFunction:
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), function.params)
        constants = jax.tree.map(lambda leaf: leaf[index] if isinstance(leaf, jax.Array) else leaf, function.constants)
        streams = {path: keys.row() for path, keys in function.streams.items()}
        return dataclasses.replace(function, params=params, constants=constants, streams=streams)

    return tuple(map(row, range(lengths.pop()[0])))


def _blocks_of(model: Any, path: Sequence[str]) -> Any:
    """A list of the modules at a path, or the one module that is there."""
    where, name = model, ".".join(path)
    for part in path:
        if not hasattr(where, part):
            there = ", ".join(sorted(attribute for attribute in vars(where) if not attribute.startswith("_")))
            raise ValueError(f"blocks={name!r}: {type(where).__name__} has no {part}; it has {there}")
        where = getattr(where, part)
    if isinstance(where, nnx.Module) and not isinstance(where, nnx.List):
        return where
    if not isinstance(where, Sequence | nnx.List) or not len(where):
        raise ValueError(f"blocks={name!r} is a {type(where).__name__}: name a list of at least one module")
    for index, block in enumerate(where):
        if not isinstance(block, nnx.Module):
            raise ValueError(f"{name}[{index}] is a {type(block).__name__}: blocks are nnx.Modules")
    return list(where)


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
