"""Which of several functions a layer runs, and what they return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.jaxpr_equality import same_program
from jaxpipe.runtime.model import Context, Output, as_output
from jaxpipe.runtime.operations import merge, partition
from jaxpipe.runtime.outputs import shape_texts

Layer = Callable[[Any, Any, Context], Any]
"""``layer(params, x, ctx) -> y or Output``; a stage is one too."""


class Choice:
    """Functions of layers, of which each layer has one.

    Functions that compute the same (jaxprs of value and gradient compared) are one. Where several are left, a
    `jax.lax.switch` chooses by ``ctx.layer``.

    Args:
      functions: each is ``(params, x, ctx) -> y or Output``.
      function_of: the function of each layer, an index of ``functions``.
    """

    def __init__(self, functions: Sequence[Layer], function_of: Sequence[int]) -> None:
        self._functions, self._function_of = tuple(functions), tuple(function_of)
        self._alike = Alike(functions)

    def kinds(self, params: Any, x: Any, ctx: Context) -> tuple[int, ...]:
        """The function of each layer, the first of those that compute the same for arguments of these shapes.

        Raises:
          ValueError: functions return different structures, shapes or dtypes.
        """
        if len(self._functions) == 1:
            return self._function_of
        first, returns = self._alike(params, x, ctx)
        for index, other in enumerate(returns):
            if shape_texts(other) != shape_texts(returns[0]):
                layer, start = (self._function_of.index(function) for function in (index, 0))
                raise ValueError(
                    f"layer {layer} returns {shape_texts(other)}, but layer {start} returns "
                    f"{shape_texts(returns[0])}: all must return the same structure, shapes and dtypes"
                )
        return tuple(first[index] for index in self._function_of)

    def run(self, layers: Sequence[int], params: Any, x: Any, ctx: Context) -> Output:
        """What layer ``ctx.layer``, one of ``layers``, returns."""
        kinds = self.kinds(params, x, ctx)
        needed = sorted({kinds[layer] for layer in layers})
        branches = [functools.partial(call, self._functions[kind]) for kind in needed]
        if len(branches) == 1:
            return branches[0](params, x, ctx)
        chosen = [needed.index(kind) if kind in needed else 0 for kind in kinds]
        return jax.lax.switch(jnp.asarray(chosen, jnp.int32)[ctx.layer], branches, params, x, ctx)


class Alike:
    """Compares functions of layers for arguments of some shapes, once for all traces."""

    def __init__(self, functions: Sequence[Layer]) -> None:
        self._functions = tuple(functions)
        self._cached = functools.cache(self._compare)

    def __call__(self, params: Any, x: Any, ctx: Context) -> tuple[tuple[int, ...], tuple[Output, ...]]:
        """(for each function the first that computes the same; shapes of what each returns)."""
        leaves, tree = jax.tree.flatten((params, x, ctx))
        return self._cached(tree, tuple((np.shape(leaf), _dtype(leaf)) for leaf in leaves))

    def _compare(self, tree: Any, shapes: tuple[tuple[Any, Any], ...]) -> tuple[tuple[int, ...], tuple[Output, ...]]:
        arguments = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        if len(self._functions) == 1:
            return (0,), (jax.eval_shape(functools.partial(call, self._functions[0]), *arguments),)
        programs, returns = zip(*(_program(function, arguments) for function in self._functions), strict=True)
        texts = [shape_texts(output) for output in returns]
        firsts: list[int] = []
        for index, (program, text) in enumerate(zip(programs, texts, strict=True)):
            same = (
                i
                for i in sorted(set(firsts))
                if text == texts[i] and program and programs[i] and same_program(program, programs[i])
            )
            firsts.append(next(same, index))
        return tuple(firsts), returns


def shorten(output: Output) -> Any:
    """The value alone of an Output that has nothing else."""
    return output.value if output.aux_loss is None and not output.metrics else output


def call(layer: Layer, params: Any, x: Any, ctx: Context) -> Output:
    """What a layer returns, as an Output."""
    output = as_output(layer(params, x, ctx))
    return output._replace(metrics=dict(output.metrics))


def _program(layer: Layer, arguments: Any) -> tuple[Any, Output]:
    """(jaxpr of a layer and its gradient, in which no custom rule is left to run, or None; shapes of its Output)."""

    def run(params: Any, x: Any, ctx: Context) -> Any:
        diff, rest = partition((params, x))

        def of(diff: Any) -> Any:
            params, x = merge(diff, rest)
            return partition(call(layer, params, x, ctx))

        outs, pull, others = jax.vjp(of, diff, has_aux=True)
        return merge(outs, others), pull(jax.tree.map(jnp.ones_like, outs))

    try:
        program, (shapes, _) = jax.make_jaxpr(run, return_shape=True)(*arguments)
        return program, shapes
    except (NotImplementedError, TypeError, ValueError):
        # A function without a gradient, such as a callback in a program of inference, is like no other.
        return None, jax.eval_shape(functools.partial(call, layer), *arguments)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype


def check_like(x: Any, y: Any) -> None:
    """Raises ValueError unless what a layer returns is like its input."""
    given, returned = shape_texts(x), shape_texts(y)
    if given != returned:
        raise ValueError(
            f"the layer maps {given} to {returned}: input and output of a layer must have the same structure, "
            "shapes and dtypes; move what changes them into embed (before the first layer) or head (after the last)"
        )
