"""Flax NNX and Linen modules as pipeline stages, embeddings and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.api import stack_stages
from jaxpipe.runtime.model import Context
from jaxpipe.schedule.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class NNXFunction:
    """An NNX module as a pure function ``(params, *args) -> result``; made by `nnx_function`.

    Attributes:
      graphdef: the module's static part.
      params: its parameters, a pure dict of arrays.
      rest: its other constant arrays, the same in every call.
    """

    graphdef: Any
    params: Any
    rest: Any

    def __call__(self, params: Any, *args: Any, rngs: nnx.Rngs | None = None, **kwargs: Any) -> Any:
        """Calls the module with these parameters; ``rngs`` replaces its random streams."""
        module = self.merge(params)
        if rngs is not None:
            kwargs["rngs"] = rngs
        return module(*args, **kwargs)

    def merge(self, params: Any) -> Any:
        """The module with these parameters."""
        state = nnx.State(jax.tree.map(nnx.Param, params))
        return nnx.merge(self.graphdef, state, self.rest)


def nnx_function(module: nnx.Module) -> NNXFunction:
    """Splits an NNX module into parameters and a pure function of them.

    Parameters are its ``nnx.Param``, and variables whose class says ``constant = True``, that no call changes them.

    Raises:
      ValueError: if the module holds state that a call would change (batch statistics, caches): a pipeline runs
        microbatches in an order of its own, so nothing may pass from one to the next.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> function = nnx_function(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> sorted(function.params), function(function.params, jnp.ones((5, 2))).shape
    (['bias', 'kernel'], (5, 3))
    """
    graphdef, params, rng_state, rest = nnx.split(module, nnx.Any(nnx.Param, _is_constant), nnx.RngState, ...)
    kinds = sorted({type(leaf).__name__ for leaf in jax.tree.leaves(rest, is_leaf=_is_variable) if _is_variable(leaf)})
    if kinds:
        raise ValueError(
            f"{type(module).__name__} holds variables of kinds {kinds} besides nnx.Param: a pipeline stage is a pure "
            "function, so remove them, make them nnx.Param, or return their updates as metrics"
        )
    return NNXFunction(graphdef, nnx.to_pure_dict(params), rng_state)


def nnx_stages(
    make_stage: Callable[[nnx.Rngs], nnx.Module], schedule: Schedule, rngs: nnx.Rngs, *, uses_rngs: bool = False
) -> tuple[Callable[[Any, Any, Context], Any], Any]:
    """(stage function, stacked parameters) for `jaxpipe.value_and_grad`, one NNX module per stage.

    Args:
      make_stage: makes one stage's module; called once per stage, in the order of the forward pass. All stages
        must have the same structure. Its ``__call__(x)`` returns y or a `jaxpipe.Output`.
      schedule: gives the number of stages and their rows.
      rngs: for the modules' initialisation.
      uses_rngs: call the module as ``module(x, rngs=...)``, with streams "dropout" and "default" of the context's key.
    """
    functions = [nnx_function(make_stage(rngs)) for _ in range(schedule.num_stages)]
    first = functions[0]
    _check_same_structure([function.params for function in functions])

    def stage(params: Any, x: Any, ctx: Context) -> Any:
        return first(params, x, rngs=_rngs(ctx) if uses_rngs else None)

    return stage, stack_stages([function.params for function in functions], schedule)


def linen_stages(
    module: nn.Module, schedule: Schedule, rng: jax.Array, x: Any, *, uses_rngs: bool = False
) -> tuple[Callable[[Any, Any, Context], Any], Any]:
    """(stage function, stacked parameters) for `jaxpipe.value_and_grad`, one Linen module for all stages.

    Args:
      module: called as ``module.apply(variables, x)``; returns y or a `jaxpipe.Output`.
      schedule: gives the number of stages and their rows.
      rng: for initialisation, folded with the stage.
      x: an example input, arrays or ShapeDtypeStructs.
      uses_rngs: pass ``rngs={"dropout": key}`` of the context.

    Raises:
      ValueError: if the module has variable collections besides "params".
    """

    def init(key: jax.Array) -> Any:
        inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
        return module.init({"params": key, "dropout": key}, inputs)

    variables = [init(jax.random.fold_in(rng, stage)) for stage in range(schedule.num_stages)]
    others = sorted(set(variables[0]) - {"params"})
    if others:
        raise ValueError(
            f"{type(module).__name__} has variable collections {others} besides 'params': a pipeline stage is a pure "
            "function, so remove them or return their updates as metrics"
        )

    def stage(params: Any, x: Any, ctx: Context) -> Any:
        rngs = {"dropout": ctx.rng} if uses_rngs else None
        return module.apply({"params": params}, x, rngs=rngs)

    return stage, stack_stages([v["params"] for v in variables], schedule)


def split_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as possible, the longer stages first.

    >>> split_layers(10, 4)
    (3, 3, 2, 2)
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers for {num_stages} stages: use fewer stages or more layers")
    return tuple(num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages))


def layered_stages(
    layer: Callable[[Any, Any, Context], Any], layers: Sequence[Any], schedule: Schedule
) -> tuple[Callable[[Any, Any, Context], Any], Any]:
    """(stage function, stacked parameters) for layers whose number need not divide over the stages.

    Stages hold `split_layers` layers and scan over them. Shorter stages are padded with copies of their last layer
    that are computed and discarded: a pipeline waits for its longest stage, so this costs memory but no time. The
    gradients of the padding are exactly zero.

    Args:
      layer: ``layer(params, x, ctx) -> y``, y like x.
      layers: the parameters of each layer, in the order of the forward pass.
      schedule: gives the number of stages and their rows.
    """
    counts = split_layers(len(layers), schedule.num_stages)
    _check_same_structure(layers)
    longest = max(counts)
    starts = [sum(counts[:stage]) for stage in range(schedule.num_stages)]
    stages = [
        jax.tree.map(lambda *rows: jnp.stack(rows), *(layers[start + min(i, count - 1)] for i in range(longest)))
        for start, count in zip(starts, counts, strict=True)
    ]
    if len(set(counts)) == 1:

        def stage(params: Any, x: Any, ctx: Context) -> Any:
            return jax.lax.scan(lambda x, p: (layer(p, x, ctx), None), x, params)[0]

        return stage, stack_stages(stages, schedule)

    def padded_stage(params: Any, x: Any, ctx: Context) -> Any:
        count = jnp.asarray(counts, jnp.int32)[ctx.stage]

        def body(x: Any, inputs: Any) -> tuple[Any, None]:
            index, p = inputs
            y = layer(p, x, ctx)
            return jax.tree.map(lambda new, old: jnp.where(index < count, new, old), y, x), None

        return jax.lax.scan(body, x, (jnp.arange(longest, dtype=jnp.int32), params))[0]

    return padded_stage, stack_stages(stages, schedule)


def _rngs(ctx: Context) -> nnx.Rngs:
    if ctx.rng is None:
        raise ValueError("the stage uses rngs, but the step was called without a key: call step(params, batch, rng)")
    return nnx.Rngs(default=ctx.rng, dropout=ctx.rng)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _is_constant(path: Any, leaf: Any) -> bool:
    return _is_variable(leaf) and getattr(type(leaf), "constant", False) is True


def _check_same_structure(params: Sequence[Any]) -> None:
    def describe(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    for index, other in enumerate(params):
        if describe(other) != describe(params[0]):
            raise ValueError(
                f"parameters {index} have shapes {describe(other)}, parameters 0 {describe(params[0])}: all stages "
                "(or layers) must be alike; put what differs into embed or head"
            )
