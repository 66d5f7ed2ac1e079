"""A stage of layers of several kinds: each finds its parameters at places that are known before anything runs.

Where all stages have a layer of the same kind at the same place, at their start or end, it runs without asking which
stage it is, and several alike run in a scan. What is left in the middle is one `jax.lax.switch` with a branch for each
row of kinds that occurs in a stage: in a branch every layer's kind and slots are known. So parameters are read where
they are used, no stage has padding, and the gradient of a parameter is made once for a whole stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.layer_choice import Alike, Layer, call, check_like, shorten
from jaxpipe.layer_storage import LayerStorage
from jaxpipe.runtime.buffers import accumulation_dtype
from jaxpipe.runtime.model import Context, Output


class _Step(NamedTuple):
    """One layer as a stage runs it; equal steps are the same program on the same rows of the stage's leaves.

    Attributes:
      kind: of its parameters.
      function: the first of those that compute the same.
      slots: of each of its leaves.
    """

    kind: int
    function: int
    slots: tuple[int, ...]


class _Plan(NamedTuple):
    """What all stages run, and what each.

    Attributes:
      start, end: steps of the first and last layers, the same in all stages.
      middle: ``[stages]``, the steps in between.
      others: zeros for the auxiliary loss and metrics of any layer.
    """

    start: tuple[_Step, ...]
    middle: tuple[tuple[_Step, ...], ...]
    end: tuple[_Step, ...]
    others: Any


class KindStage:
    """The stage function of layers of several kinds.

    Args:
      functions: each is ``(params, x, ctx) -> y or Output``.
      function_of: the function of each layer, an index of ``functions``.
      storage: of the layers' parameters.
    """

    def __init__(self, functions: Sequence[Layer], function_of: Sequence[int], storage: LayerStorage) -> None:
        self.storage = storage
        self._functions, self._function_of = tuple(functions), tuple(function_of)
        used = [
            sorted({function for function, other in zip(function_of, storage.kind_of, strict=True) if other == kind})
            for kind in range(len(storage.structures))
        ]
        self._used = [(numbers, Alike([self._functions[number] for number in numbers])) for numbers in used]

    def __call__(self, params: Any, x: Any, ctx: Context) -> Any:
        """Runs a stage; ``params`` are its rows of what `LayerStorage.stack` makes, leaves ``[slots, ...]``."""
        leaves = self.storage.tree.flatten_up_to(params)
        plan = self._plan(leaves, x, ctx)
        starts, counts = self.storage.starts, self.storage.counts
        first, last = (
            jnp.asarray(values, jnp.int32)[ctx.stage]
            for values in (starts, [start + count - len(plan.end) for start, count in zip(starts, counts, strict=True)])
        )
        x, others = self._run_scanned(plan.start, plan.others, leaves, x, ctx, first)
        if any(plan.middle):
            x, other = self._switch(plan, leaves, x, ctx, first + len(plan.start))
            others.append(other)
        x, more = self._run_scanned(plan.end, plan.others, leaves, x, ctx, last)
        return shorten(Output(x, *_total((*others, *more))))

    def _plan(self, leaves: Sequence[Any], x: Any, ctx: Context) -> _Plan:
        """What is to run for arguments of these shapes."""
        first_of: dict[tuple[int, int], int] = {}
        returns: dict[int, Output] = {}
        inside = ctx.at_layer(0)
        for kind, (numbers, alike) in enumerate(self._used):
            params = self._params(kind, leaves, [0] * len(self.storage.places[kind]), _shape_of_row)
            firsts, outputs = alike(params, x, inside)
            for number, first, output in zip(numbers, firsts, outputs, strict=True):
                first_of[kind, number] = numbers[first]
                returns[self._layer_with(kind, number)] = output
        steps = [
            _Step(kind, first_of[kind, function], self.storage.slots_of(layer))
            for layer, (kind, function) in enumerate(zip(self.storage.kind_of, self._function_of, strict=True))
        ]
        stages = [
            steps[start : start + count] for start, count in zip(self.storage.starts, self.storage.counts, strict=True)
        ]
        start = _alike(stages)
        end = _alike([stage[start:][::-1] for stage in stages])
        middle = tuple(tuple(stage[start : len(stage) - end]) for stage in stages)
        return _Plan(tuple(stages[0][:start]), middle, tuple(stages[0][len(stages[0]) - end :]), _zeros(returns))

    def _layer_with(self, kind: int, function: int) -> int:
        return list(zip(self.storage.kind_of, self._function_of, strict=True)).index((kind, function))

    def _params(self, kind: int, leaves: Sequence[Any], slots: Sequence[Any], take: Callable[[Any, Any], Any]) -> Any:
        """The parameters of a layer of a kind, each leaf taken from its slot."""
        places = self.storage.places[kind]
        found = [take(leaves[place], slot) for place, slot in zip(places, slots, strict=True)]
        return jax.tree.unflatten(self.storage.structures[kind], found)

    def _run(self, step: _Step, zeros: Any, params: Any, x: Any, ctx: Context) -> tuple[Any, Any]:
        """(y, auxiliary loss and metrics with those of other layers as zeros) of one layer."""
        output = call(self._functions[step.function], params, x, ctx)
        check_like(x, output.value)
        aux_loss, metrics = zeros
        aux_loss = aux_loss if output.aux_loss is None else output.aux_loss
        return output.value, jax.tree.map(_widened, (aux_loss, {**metrics, **output.metrics}))

    def _run_unrolled(
        self, steps: Sequence[_Step], zeros: Any, leaves: Sequence[Any], x: Any, ctx: Context, first: Any
    ) -> tuple[Any, list[Any]]:
        """(y, auxiliary losses and metrics) of layers ``first``, ``first + 1``, ..."""
        others = []
        for index, step in enumerate(steps):
            params = self._params(step.kind, leaves, step.slots, lambda leaf, slot: leaf[slot])
            x, other = self._run(step, zeros, params, x, ctx.at_layer(first + index))
            others.append(other)
        return x, others

    def _run_scanned(
        self, steps: Sequence[_Step], zeros: Any, leaves: Sequence[Any], x: Any, ctx: Context, first: Any
    ) -> tuple[Any, list[Any]]:
        """`_run_unrolled`, layers of one kind in neighbouring slots in a scan."""
        others = []
        for start, end in _runs(steps):
            step, length = steps[start], end - start
            if length == 1:
                x, other = self._run_unrolled([step], zeros, leaves, x, ctx, first + start)
                others.extend(other)
                continue

            def body(x: Any, row: Any, step: _Step = step, start: int = start) -> Any:
                index, params = row
                return self._run(step, zeros, params, x, ctx.at_layer(first + start + index))

            params = self._params(
                step.kind, leaves, step.slots, lambda leaf, slot, length=length: leaf[slot : slot + length]
            )
            x, other = jax.lax.scan(body, x, (jnp.arange(length, dtype=jnp.int32), params))
            others.append(jax.tree.map(lambda leaf: leaf.sum(0, dtype=leaf.dtype), other))
        return x, others

    def _switch(self, plan: _Plan, leaves: Sequence[Any], x: Any, ctx: Context, first: Any) -> tuple[Any, Any]:
        """(y, auxiliary loss and metrics) of the layers in which stages differ.

        Branches are unrolled: what they keep for the backward pass is then alike from branch to branch, layer by layer,
        and shares its memory.
        """
        rows = list(dict.fromkeys(plan.middle))
        read = sorted({place for row in rows for step in row for place in self.storage.places[step.kind]})

        def branch(row: Sequence[_Step], given: Sequence[Any], x: Any, ctx: Context, first: Any) -> tuple[Any, Any]:
            known = dict(zip(read, given, strict=True))
            every = [known.get(place) for place in range(len(leaves))]
            y, others = self._run_unrolled(row, plan.others, every, x, ctx, first)
            return y, _total(others or [jax.tree.map(_widened, plan.others)])

        index = jnp.asarray([rows.index(row) for row in plan.middle], jnp.int32)[ctx.stage]
        branches = [functools.partial(branch, row) for row in rows]
        return jax.lax.switch(index, branches, [leaves[place] for place in read], x, ctx, first)


def _alike(stages: Sequence[Sequence[_Step]]) -> int:
    """How many steps at the start are the same in all stages."""
    count = 0
    for steps in zip(*stages, strict=False):
        if len(set(steps)) > 1:
            break
        count += 1
    return count


def _runs(steps: Sequence[_Step]) -> list[tuple[int, int]]:
    """(start, end) of runs of layers that are alike, each in the slots that follow those of the one before."""
    found: list[tuple[int, int]] = []
    for index, step in enumerate(steps):
        before = steps[index - 1]._replace(slots=tuple(slot + 1 for slot in steps[index - 1].slots)) if index else None
        found[-1:] = [(found[-1][0], index + 1)] if step == before else [*found[-1:], (index, index + 1)]
    return found


def _zeros(returns: dict[int, Output]) -> Any:
    """(auxiliary loss, metrics) of zeros for all that layers return, by layer; what a layer lacks counts as zero.

    Raises:
      ValueError: layers return figures of one name and several shapes or dtypes.
    """
    found: dict[Any, tuple[int, Any]] = {}
    for layer, output in returns.items():
        for name, value in {None: output.aux_loss, **output.metrics}.items():
            if value is None:
                continue
            first, other = found.setdefault(name, (layer, value))
            if (value.shape, value.dtype) != (other.shape, other.dtype):
                what = "an auxiliary loss" if name is None else f"a metric {name!r}"
                raise ValueError(
                    f"layer {layer} returns {what} {value.dtype}{list(value.shape)}, but layer {first} "
                    f"{other.dtype}{list(other.shape)}: they are summed over layers, so give both one shape and dtype"
                )
    zeros = {name: jnp.zeros(value.shape, value.dtype) for name, (_, value) in found.items()}
    return zeros.pop(None, None), zeros


def _total(parts: Sequence[Any]) -> Any:
    """The sum of auxiliary losses and metrics."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).sum(0, dtype=leaves[0].dtype), *parts)


def _widened(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    return value.astype(accumulation_dtype(value.dtype))


def _shape_of_row(leaf: Any, _: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
