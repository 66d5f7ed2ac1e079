"""Flax NNX and Linen models as pipelines, and their modules as stages, embeddings and heads.

What `__all__` names is public; all else here is internal and may change without notice.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx

from jaxpipe.jaxpr_equality import same
from jaxpipe.layer_choice import Choice, Layer, shorten
from jaxpipe.layer_split import split_layers
from jaxpipe.layers import layered_stages, stages_of_mixed_layers, store_layers, unstack_layers
from jaxpipe.linen_model import from_linen
from jaxpipe.nnx_function import NNXFunction, dotted, fold_name, make_rngs, nnx_function
from jaxpipe.nnx_model import from_nnx
from jaxpipe.params import stack_stages
from jaxpipe.runtime.model import Context
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.whole import PipelinedModel

__all__ = [
    "NNXFunction",
    "PipelinedModel",
    "from_linen",
    "from_nnx",
    "layered_stages",
    "linen_stages",
    "nnx_function",
    "nnx_stages",
    "split_layers",
    "unstack_layers",
]

Arguments = Callable[[Context], "tuple[Any, ...] | Mapping[str, Any]"]
"""A module's further arguments of a microbatch: positional ones as a tuple, or keywords as a dict."""


def nnx_stages(
    make_stage: Callable[[nnx.Rngs], nnx.Module] | Sequence[Callable[[nnx.Rngs], nnx.Module]],
    schedule: Schedule,
    rngs: nnx.Rngs,
    *,
    num_layers: int | None = None,
    layer_costs: Sequence[float] | None = None,
    arguments: Arguments | None = None,
    uses_rngs: bool | Sequence[str] = False,
) -> tuple[Layer, Any]:
    """(stage function, stacked parameters) for `jaxpipe.value_and_grad`, one NNX module per stage or per layer.

    What a module holds:

    * `nnx.Param` and its subclasses are parameters, and so are variables whose class says ``pipeline_parameter = True``
      (see `nnx_function`). Each belongs to one module. Modules may have parameters of different structures and shapes,
      which are then stacked as `layered_stages` says.
    * Other arrays and variables are constants: a causal mask, a rotary table. They may differ between stages, each of
      which then gets its own. State that a call changes is refused.
    * Random streams (``nnx.Dropout(rate, rngs=rngs)``) are seeded anew for each layer and microbatch, each stream from
      its place in the module and the context's key, so all are independent. A module in ``eval()`` needs no key.
    * Everything else (a layer's index, a window, an activation function) is static and may differ too. Where the
      stages' programs then differ, they run under a `jax.lax.switch`, which is divided into input and weight gradients
      branch by branch, and keeps as much of a microbatch as the kind that keeps most. Two kinds of layers in turn need
      no switch if each stage holds equally many of both (``num_layers``), and numbers that differ need none if they are
      arrays.

    Args:
      make_stage: makes one stage's module, or one layer's; called once per stage or layer, in the order of the forward
        pass. Its ``__call__(x)`` returns y or a `jaxpipe.Output`. Or a list, a function for each stage or layer.
      schedule: gives the number of stages and their rows.
      rngs: for the modules' initialisation.
      num_layers: spread so many modules over the stages as `layered_stages` does; None: one module per stage.
      layer_costs: what each layer costs, to divide them by, as `split_layers` does; with ``num_layers``.
      arguments: ``arguments(ctx)`` returns what the module is called with after x, a dict of keywords or a tuple:
        arrays of the microbatch (``ctx.data["mask"]``) or made of it, and Python values (``deterministic=False``).
      uses_rngs: call the module with ``rngs=``, an `nnx.Rngs` with the streams "default" and "dropout", or "default"
        and these.

    Raises:
      ValueError: modules that share a parameter; state that calls change; when the step is traced, random numbers
        without a key.

    >>> import jaxpipe
    >>> class Layer(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.linear, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
    ...     def __call__(self, x, mask):
    ...         return x + self.dropout(jnp.tanh(self.linear(x))) * mask[:, None]
    >>> schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    >>> mask = lambda ctx: (ctx.data["mask"],)
    >>> stage, stages = nnx_stages(Layer, schedule, nnx.Rngs(0), num_layers=5, arguments=mask)
    >>> stages["linear"]["kernel"].shape  # 3 layers and 2
    (2, 3, 4, 4)
    """
    count = schedule.num_stages if num_layers is None else num_layers
    makers = list(make_stage) if isinstance(make_stage, Sequence) else [make_stage] * count
    if any(isinstance(make, nnx.Module) or not callable(make) for make in makers) or not isinstance(rngs, nnx.Rngs):
        raise ValueError(
            f"nnx_stages got a {type(make_stage).__name__} and a {type(rngs).__name__}: pass a function of nnx.Rngs "
            "that makes one stage's module, such as its class, and nnx.Rngs(seed)"
        )
    if len(makers) != count:
        raise ValueError(f"{len(makers)} functions for {count} stages or layers: give one for each, or one for all")
    modules = [make(rngs) for make in makers]
    for module in modules:
        if not isinstance(module, nnx.Module):
            raise ValueError(f"make_stage returned a {type(module).__name__}: return an nnx.Module, one for each call")
    _check_not_shared(modules)
    functions = [nnx_function(module) for module in modules]
    params = [function.params for function in functions]
    group_of, constants = _constants_of([function.constants for function in functions])
    definitions, definition_of = _distinct(
        [(function.graphdef, function.streams, group) for function, group in zip(functions, group_of, strict=True)]
    )

    def call(index: int, params: Any, x: Any, ctx: Context) -> Any:
        function = dataclasses.replace(functions[index], constants=constants[group_of[index]](ctx.layer))
        args, kwargs = _arguments(arguments, ctx)
        if uses_rngs:
            _check_takes_rngs(modules[index])
            kwargs["rngs"] = make_rngs(ctx, ("default", *_names(uses_rngs)), function.name)
        return function.run(params, ctx, (x, *args), kwargs)

    layers = [functools.partial(call, index) for index in definitions]
    return _stages(layers, definition_of, params, schedule, num_layers, layer_costs)


def linen_stages(
    module: nn.Module | Sequence[nn.Module],
    schedule: Schedule,
    rng: jax.Array,
    x: Any,
    *,
    num_layers: int | None = None,
    layer_costs: Sequence[float] | None = None,
    arguments: Arguments | None = None,
    data: Any = None,
    uses_rngs: bool | Sequence[str] = False,
) -> tuple[Layer, Any]:
    """(stage function, stacked parameters) for `jaxpipe.value_and_grad`, one Linen module for all stages or layers.

    Boxes of metadata (`nn.with_partitioning`) are taken off the parameters: a pipeline shards as ``specs`` says.

    Args:
      module: called as ``module.apply(variables, x)``; returns y or a `jaxpipe.Output`. Or a list, one for each stage
        or layer; those that differ run as in `nnx_stages`.
      schedule: gives the number of stages and their rows.
      rng: for initialisation, folded with the stage or layer.
      x: an example input, arrays or ShapeDtypeStructs.
      num_layers: spread so many layers over the stages as `layered_stages` does; None: one module per stage.
      layer_costs: what each layer costs, as in `nnx_stages`.
      arguments: ``arguments(ctx)`` returns what the module is called with after x, as in `nnx_stages`.
      data: an example microbatch for ``arguments``, arrays or ShapeDtypeStructs.
      uses_rngs: pass keys of the context for "dropout" and whatever else the module asks for, or for these names.

    Raises:
      ValueError: variable collections besides "params"; when the step is traced, random numbers without a key.
    """
    count = schedule.num_stages if num_layers is None else num_layers
    modules = list(module) if isinstance(module, Sequence) else [module] * count
    _check_linen(modules, count, {"x": x, "data": data})
    names = _names(uses_rngs)
    params = _init_linen(modules, rng, x, data, arguments, names)
    definitions, definition_of = _distinct(modules)
    layers = [functools.partial(_apply_linen, modules[index], arguments, names) for index in definitions]
    return _stages(layers, definition_of, params, schedule, num_layers, layer_costs)


def _check_linen(modules: Sequence[Any], count: int, examples: Mapping[str, Any]) -> None:
    """Raises ValueError unless there are as many Linen modules as stages or layers, and examples are arrays."""
    for each in modules:
        if not isinstance(each, nn.Module):
            name = each.__name__ if isinstance(each, type) else type(each).__name__
            raise ValueError(f"linen_stages got {name}, not an instance of a Linen module: pass {name}(...), say")
    for path, leaf in jax.tree_util.tree_leaves_with_path(examples):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is {leaf!r:.60}: give an example as arrays or ShapeDtypeStructs, such "
                "as jax.ShapeDtypeStruct((2, 8), jnp.float32)"
            )
    if len(modules) != count:
        raise ValueError(f"{len(modules)} modules for {count} stages or layers: give one for each, or one for all")


def _init_linen(
    modules: Sequence[nn.Module], rng: jax.Array, x: Any, data: Any, arguments: Arguments | None, names: Sequence[str]
) -> list[Any]:
    """The parameters of each module, without boxes."""

    def init(index: int) -> Any:
        inputs, example = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (x, data))
        key = jax.random.fold_in(rng, index)
        args, kwargs = _arguments(arguments, Context.make(index, 0, key, example, num_stages=len(modules)))
        keys = {name: fold_name(key, name) for name in {"dropout", *names}}
        return modules[index].init({**keys, "params": key}, inputs, *args, **kwargs)

    variables = [init(index) for index in range(len(modules))]
    for module, each in zip(modules, variables, strict=True):
        others = sorted(set(each) - {"params"})
        if others:
            raise ValueError(
                f"{type(module).__name__} has variable collections {others} besides 'params': a pipeline stage is a "
                "pure function, so remove them or return their updates as metrics"
            )
    return [nn.unbox(each.get("params", {})) for each in variables]


def _apply_linen(
    module: nn.Module, arguments: Arguments | None, names: Sequence[str], params: Any, x: Any, ctx: Context
) -> Any:
    """Calls a module in a pipeline, with keys of the context for these names."""
    keys = {} if ctx.rng is None else {name: fold_name(ctx.rng, name) for name in names}
    args, kwargs = _arguments(arguments, ctx)
    try:
        return module.apply({"params": params}, x, *args, rngs=keys, **kwargs)
    except errors.InvalidRngError as error:
        keyless = names and ctx.rng is None
        remedy = "call step(params, batch, rng)" if keyless else "pass uses_rngs=True, or all streams' names"
        raise ValueError(
            f"{type(module).__name__} draws random numbers without a key: {remedy}; or make it deterministic ({error})"
        ) from error


def _stages(
    functions: Sequence[Layer],
    function_of: Sequence[int],
    params: Sequence[Any],
    schedule: Schedule,
    layers: int | None,
    layer_costs: Sequence[float] | None,
) -> tuple[Layer, Any]:
    """(stage function, stacked parameters) of modules with functions of their own."""
    if layers is None and layer_costs is not None:
        raise ValueError("layer_costs divides layers over stages: pass num_layers too, the number of them")
    if layers is not None or store_layers(params, schedule).mixed:
        return stages_of_mixed_layers(functions, function_of, params, schedule, layer_costs)
    choice = Choice(functions, function_of)

    def stage(params: Any, x: Any, ctx: Context) -> Any:
        ctx = ctx._replace(layer=ctx.stage)
        return shorten(choice.run(range(len(function_of)), params, x, ctx))

    return stage, stack_stages(params, schedule)


def _arguments(arguments: Arguments | None, ctx: Context) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = () if arguments is None else arguments(ctx)
    if isinstance(given, Mapping):
        return (), dict(given)
    if not isinstance(given, tuple):
        raise ValueError(
            f"arguments(ctx) returned a {type(given).__name__}: return a tuple of what follows x in the module's call, "
            "(mask,), or a dict of keywords, {'mask': mask}"
        )
    return given, {}


def _constants_of(trees: Sequence[Any]) -> tuple[list[int], list[Callable[[Any], Any]]]:
    """(the group of each layer's constants, alike in structure and shapes; for each group what makes them of a layer).

    What is equal in a whole group is closed over once. The rest is stacked, and each layer takes its row.
    """
    flat = [jax.tree.flatten(tree) for tree in trees]
    alike = [(structure, [_describe(leaf) for leaf in leaves]) for leaves, structure in flat]
    firsts, group_of = _distinct(alike)

    def of_group(group: int) -> Callable[[Any], Any]:
        members = [index for index, other in enumerate(group_of) if other == group]
        columns = list(zip(*(flat[index][0] for index in members), strict=True))
        row_of = np.asarray([members.index(index) if index in members else 0 for index in range(len(trees))], np.int32)
        equal = [all(same(leaf, column[0]) for leaf in column) for column in columns]
        kept = [column[0] if once else jnp.stack(column) for column, once in zip(columns, equal, strict=True)]

        def of_layer(layer: Any) -> Any:
            leaves = [
                leaf if once else leaf[jnp.asarray(row_of)[layer]] for leaf, once in zip(kept, equal, strict=True)
            ]
            return jax.tree.unflatten(flat[firsts[group]][1], leaves)

        return of_layer

    return group_of, [of_group(group) for group in range(len(firsts))]


def _describe(leaf: Any) -> Any:
    """What constants must have in common to be stacked; Python numbers must be equal."""
    if not hasattr(leaf, "dtype"):
        return leaf
    return type(leaf) is np.ndarray, leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)


def _names(uses_rngs: bool | Sequence[str]) -> tuple[str, ...]:
    """The streams to pass. Where Linen has no stream of the name asked for, it draws from "params"."""
    if isinstance(uses_rngs, str):
        return (uses_rngs,)
    if isinstance(uses_rngs, bool):
        return ("dropout", "params") if uses_rngs else ()
    return tuple(uses_rngs)


def _distinct(definitions: Sequence[Any]) -> tuple[list[int], list[int]]:
    """(index of the first of each kind of definition; the kind of each)."""
    firsts: list[int] = []
    kinds = []
    for index, definition in enumerate(definitions):
        kind = next((k for k, first in enumerate(firsts) if _equal(definition, definitions[first])), len(firsts))
        if kind == len(firsts):
            firsts.append(index)
        kinds.append(kind)
    return firsts, kinds


def _equal(a: Any, b: Any) -> bool:
    """Whether definitions are equal; False where nobody can tell, as of static arrays."""
    try:
        return bool(a == b)
    except (TypeError, ValueError):
        return False


def _check_takes_rngs(module: nnx.Module) -> None:
    parameters = inspect.signature(type(module).__call__).parameters
    if "rngs" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"{type(module).__name__}.__call__{tuple(parameters)} takes no rngs: leave uses_rngs out; streams that the "
            "module holds, as nnx.Dropout(rate, rngs=rngs) does, are seeded in any case"
        )


def _check_not_shared(modules: Sequence[nnx.Module]) -> None:
    owners: dict[int, tuple[int, str]] = {}
    for index, module in enumerate(modules):
        for path, node in nnx.iter_graph(module):
            if not isinstance(node, nnx.Param):
                continue
            name = dotted(path)
            first, place = owners.setdefault(id(node), (index, name))
            if first != index:
                raise ValueError(
                    f"module {index} shares its parameter {name} with module {first} ({place}), but each stage or "
                    "layer trains its own: make a new module in each call, or keep what all share in outer"
                )
