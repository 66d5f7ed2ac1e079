"""Layers as stages: any number of layers, divided over the stages of a schedule."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.jaxpr_equality import same_program
from jaxpipe.params import check_same_structure, stack_stages, unstack_stages
from jaxpipe.runtime.buffers import accumulation_dtype
from jaxpipe.runtime.fsdp import Gather, StageOfLayers
from jaxpipe.runtime.model import Context, Output, as_output
from jaxpipe.runtime.operations import merge, partition
from jaxpipe.runtime.outputs import shape_texts
from jaxpipe.schedule.schedule import Schedule

Layer = Callable[[Any, Any, Context], Any]
"""``layer(params, x, ctx) -> y or Output``; a stage is one too."""


def split_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as possible, the longer stages first.

    >>> split_layers(10, 4)
    (3, 3, 2, 2)
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers for {num_stages} stages: use fewer stages or more layers")
    return tuple(num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages))


def layered_stages(layer: Layer, layers: Any, schedule: Schedule) -> tuple[Layer, Any]:
    """(stage function, stacked parameters) for layers whose number need not divide over the stages.

    Stages hold `split_layers` layers and scan over them. Shorter stages are padded: they run their last layer again,
    on the same input and with the same key, and discard what it returns. A pipeline waits for its longest stage, so
    this costs memory but no time. Gradients of the padding are exactly zero. Its auxiliary losses and metrics do not
    count, but a side effect such as `jax.debug.print` happens again.

    Args:
      layer: ``layer(params, x, ctx) -> y``, y like x, or a `jaxpipe.Output`, whose auxiliary losses and metrics are
        summed over layers. ``ctx.layer`` is the layer's index in the model, and ``ctx.rng`` its own key, whatever the
        number of stages; see `jaxpipe.Context` for the plain program.
      layers: the parameters of each layer in the order of the forward pass: a list or tuple of pytrees, or one pytree
        with leaves ``[num_layers, ...]``, as `jax.vmap` of an initializer and Flax's scans make it.
      schedule: gives the number of stages and their rows.

    Raises:
      ValueError: fewer layers than stages; layers whose parameters differ in structure, shape or dtype.

    >>> import jaxpipe
    >>> schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    >>> stage, stages = layered_stages(lambda w, x, ctx: x + jnp.tanh(x @ w), jnp.ones((5, 4, 4)), schedule)
    >>> stages.shape  # 3 layers and 2
    (2, 3, 4, 4)
    """
    return stages_of_mixed_layers((layer,), None, layers, schedule)


def stages_of_mixed_layers(
    functions: Sequence[Layer], function_of: Sequence[int] | None, layers: Any, schedule: Schedule
) -> tuple[Layer, Any]:
    """`layered_stages` of layers with functions of their own: layer i runs ``functions[function_of[i]]``.

    ``function_of`` is None where all run the only one.
    """
    stages, num_layers = stack_layers(layers, schedule)
    return stage_of_layers(functions, function_of or (0,) * num_layers, schedule), stages


def stack_layers(layers: Any, schedule: Schedule, order: str = "model") -> tuple[Any, int]:
    """(the stacked parameters of `layered_stages`, in rows of an order; the number of layers)."""
    num_layers, stack = _stacker(layers)
    rows = _layers_of_stages(split_layers(num_layers, schedule.num_stages))
    return stack_stages([stack(layers) for layers in rows], schedule, order), num_layers


def stage_of_layers(functions: Sequence[Layer], function_of: Sequence[int], schedule: Schedule) -> StageOfLayers:
    """The stage that scans over its layers, of parameters as `stack_layers` stacks them."""
    layers = _LayerStage(Choice(functions, function_of), split_layers(len(function_of), schedule.num_stages))
    return StageOfLayers(layers.run)


def _layers_of_stages(counts: Sequence[int]) -> list[list[int]]:
    """``[stages][slots]``: the layer in each slot; in padding the stage's last one again."""
    starts = [0, *itertools.accumulate(counts)][:-1]
    return [
        [start + min(slot, count - 1) for slot in range(max(counts))]
        for start, count in zip(starts, counts, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _LayerStage:
    """A stage of layers. All stages have as many slots for layers, the shorter ones padding in the last.

    Attributes:
      choice: the functions of all layers.
      counts: the layers of each stage.
    """

    choice: Choice
    counts: tuple[int, ...]

    @functools.cached_property
    def starts(self) -> list[int]:
        """The first layer of each stage."""
        return [0, *itertools.accumulate(self.counts)][:-1]

    @functools.cached_property
    def layers(self) -> list[list[int]]:
        """``[stages][slots]``: the layer in each slot."""
        return _layers_of_stages(self.counts)

    @property
    def padded(self) -> bool:
        """Whether some stages have padding."""
        return len(set(self.counts)) > 1

    def run(self, params: Any, x: Any, ctx: Context, gather: Gather | None = None) -> Any:
        """The stage function; leaves of ``params`` are ``[slots, ...]``, in a layer made by ``gather`` of its row."""
        start, count = (jnp.asarray(values, jnp.int32)[ctx.stage] for values in (self.starts, self.counts))
        run_slot = functools.partial(self._run_slot, ctx, start, count, gather)
        row = jax.tree.map(lambda leaf: leaf[0], params)
        kinds = self.choice.kinds(row if gather is None else gather(row), x, ctx.at_layer(start))
        members = [sorted(set(layers)) for layers in zip(*self.layers, strict=True)]  # of each slot, in all stages
        in_turn = len(set(kinds)) > 1 and all(len({kinds[i] for i in layers}) == 1 for layers in members)
        y, others = self._run_in_turn(run_slot, members, params, x) if in_turn else self._scan(run_slot, params, x)
        aux_loss, metrics = jax.tree.map(lambda leaf: leaf.sum(0, dtype=accumulation_dtype(leaf.dtype)), others)
        return shorten(Output(y, aux_loss, metrics))

    def _run_slot(
        self,
        ctx: Context,
        start: Any,
        count: Any,
        gather: Gather | None,
        x: Any,
        last: Any,
        slot: Any,
        params: Any,
        layers: Sequence[int],
    ) -> tuple[Any, Any, Any]:
        """(y, the layer's input, (auxiliary loss, metrics)) of a slot, which holds one of some layers.

        ``last`` is the input of the slot before. Padding computes the last layer on that layer's input: it need not be
        defined on its own output.
        """
        real = jnp.asarray(slot < count)
        params = params if gather is None else gather(params)
        given = _where(real, x, last) if self.padded else x
        output = self.choice.run(layers, params, given, ctx.at_layer(start + jnp.minimum(slot, count - 1)))
        y, others = output.value, (output.aux_loss, output.metrics)
        _check_like(x, y)
        if self.padded:
            y, others = _where(real, y, x), _where(real, others, jax.tree.map(jnp.zeros_like, others))
        return y, given, others

    def _run_in_turn(
        self, run_slot: Callable[..., Any], members: Sequence[Sequence[int]], params: Any, x: Any
    ) -> tuple[Any, Any]:
        """(y, auxiliary losses and metrics stacked) where functions differ but in all stages in the same way.

        Such as local and global attention in turn: nothing is left to decide when it runs.
        """
        last, parts = x, []
        for slot, layers in enumerate(members):
            row = jax.tree.map(lambda leaf, slot=slot: leaf[slot], params)
            x, last, part = run_slot(x, last, slot, row, layers)
            parts.append(part)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    def _scan(self, run_slot: Callable[..., Any], params: Any, x: Any) -> tuple[Any, Any]:
        """(y, auxiliary losses and metrics stacked), by one loop over the slots."""
        layers = range(sum(self.counts))

        def body(carry: Any, row: Any) -> Any:
            (x, last), (slot, params) = carry, row
            y, given, part = run_slot(x, last, slot, params, layers)
            return (y, given if self.padded else None), part

        carry = x, x if self.padded else None
        (y, _), others = jax.lax.scan(body, carry, (jnp.arange(max(self.counts), dtype=jnp.int32), params))
        return y, others


def unstack_layers(stacked: Any, num_layers: int, schedule: Schedule, order: str = "model") -> list[Any]:
    """The parameters (or gradients) of layers 0, 1, ... of the stages that `layered_stages` stacked, without padding.

    ``order`` is that of the rows, as in `jaxpipe.unstack_stages`.

    >>> import jaxpipe
    >>> schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    >>> _, stages = layered_stages(lambda w, x, ctx: x * w, jnp.arange(5.0), schedule)
    >>> [float(w) for w in unstack_layers(stages, 5, schedule)]
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    stages, counts = unstack_stages(stacked, schedule, order), split_layers(num_layers, schedule.num_stages)
    places = [(stage, slot) for stage, count in zip(stages, counts, strict=True) for slot in range(count)]
    return [jax.tree.map(lambda leaf, slot=slot: leaf[slot], stage) for stage, slot in places]


class Choice:
    """Functions of layers, of which each layer has one.

    Functions that compute the same (jaxprs of value and gradient compared) are one. Where several are left, a
    `jax.lax.switch` chooses by ``ctx.layer``; as a conditional it is not divided into input and weight gradients.

    Args:
      functions: each is ``(params, x, ctx) -> y or Output``.
      function_of: the function of each layer, an index of ``functions``.
    """

    def __init__(self, functions: Sequence[Layer], function_of: Sequence[int]) -> None:
        self._functions, self._function_of = tuple(functions), tuple(function_of)
        self._same = functools.cache(self._compare)

    def kinds(self, params: Any, x: Any, ctx: Context) -> tuple[int, ...]:
        """The function of each layer, the first of those that compute the same for arguments of these shapes.

        Raises:
          ValueError: functions return different structures, shapes or dtypes.
        """
        if len(self._functions) == 1:
            return self._function_of
        leaves, tree = jax.tree.flatten((params, x, ctx))
        first = self._same(tree, tuple((np.shape(leaf), jnp.asarray(leaf).dtype) for leaf in leaves))
        return tuple(first[index] for index in self._function_of)

    def run(self, layers: Sequence[int], params: Any, x: Any, ctx: Context) -> Output:
        """What layer ``ctx.layer``, one of ``layers``, returns."""
        kinds = self.kinds(params, x, ctx)
        needed = sorted({kinds[layer] for layer in layers})
        branches = [functools.partial(_call, self._functions[kind]) for kind in needed]
        if len(branches) == 1:
            return branches[0](params, x, ctx)
        chosen = [needed.index(kind) if kind in needed else 0 for kind in kinds]
        return jax.lax.switch(jnp.asarray(chosen, jnp.int32)[ctx.layer], branches, params, x, ctx)

    def _compare(self, tree: Any, shapes: tuple[tuple[Any, Any], ...]) -> tuple[int, ...]:
        """For each function the first that computes the same."""
        arguments = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        programs, returns = zip(*(_program(function, arguments) for function in self._functions), strict=True)
        for index, other in enumerate(returns):
            if shape_texts(other) != shape_texts(returns[0]):
                layer, first = (self._function_of.index(function) for function in (index, 0))
                raise ValueError(
                    f"layer {layer} returns {shape_texts(other)}, but layer {first} returns "
                    f"{shape_texts(returns[0])}: all must return the same structure, shapes and dtypes"
                )
        firsts: list[int] = []
        for index, program in enumerate(programs):
            same = (i for i in sorted(set(firsts)) if program and programs[i] and same_program(program, programs[i]))
            firsts.append(next(same, index))
        return tuple(firsts)


def shorten(output: Output) -> Any:
    """The value alone of an Output that has nothing else."""
    return output.value if output.aux_loss is None and not output.metrics else output


def _stacker(layers: Any) -> tuple[int, Callable[[Sequence[int]], Any]]:
    """(number of layers; a function that stacks the parameters of some)."""
    if isinstance(layers, list | tuple) and not hasattr(layers, "_fields"):
        if not layers:
            raise ValueError("there are no layers; give the parameters of at least one for each stage")
        check_same_structure(layers)
        return len(layers), lambda some: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[i] for i in some))
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    lengths = {np.shape(leaf)[:1] for _, leaf in leaves}
    if len(lengths) != 1 or () in lengths:
        shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
        raise ValueError(
            f"the stacked layers have leaves of shapes {shapes}: all need the number of layers as leading dimension; "
            "or give a list with one pytree a layer"
        )
    return lengths.pop()[0], lambda some: jax.tree.map(lambda leaf: leaf[np.asarray(some)], layers)


def _call(layer: Layer, params: Any, x: Any, ctx: Context) -> Output:
    output = as_output(layer(params, x, ctx))
    return output._replace(metrics=dict(output.metrics))


def _program(layer: Layer, arguments: Any) -> tuple[Any, Output]:
    """(jaxpr of a layer and its gradient, in which no custom rule is left to run, or None; shapes of its Output)."""

    def run(params: Any, x: Any, ctx: Context) -> Any:
        diff, rest = partition((params, x))

        def of(diff: Any) -> Any:
            params, x = merge(diff, rest)
            return partition(_call(layer, params, x, ctx))

        outs, pull, others = jax.vjp(of, diff, has_aux=True)
        return merge(outs, others), pull(jax.tree.map(jnp.ones_like, outs))

    try:
        program, (shapes, _) = jax.make_jaxpr(run, return_shape=True)(*arguments)
        return program, shapes
    except (NotImplementedError, TypeError, ValueError):
        # A function without a gradient, such as a callback in a program of inference, is like no other.
        return None, jax.eval_shape(functools.partial(_call, layer), *arguments)


def _where(condition: jax.Array, left: Any, right: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), left, right)


def _check_like(x: Any, y: Any) -> None:
    given, returned = shape_texts(x), shape_texts(y)
    if given != returned:
        raise ValueError(
            f"the layer maps {given} to {returned}: input and output of a layer must have the same structure, "
            "shapes and dtypes; move what changes them into embed (before the first layer) or head (after the last)"
        )
