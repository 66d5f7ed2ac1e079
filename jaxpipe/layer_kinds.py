"""A stage of layers of several kinds: each finds its parameters at places that are known before anything runs.

Stages that hold the same row of kinds are one kind of stage, with code of its own in the pipeline's program
(`jaxpipe.StageKinds`). There every layer's kind and slots are known: parameters are read where they are used, layers
alike run in a scan, no stage has padding, and the gradient of a parameter is made once for a whole stage.

Functions may still differ between stages of one row, by what they compute and not by their parameters. Layers that all
stages have alike at their start or end then run as they are, and what is left in the middle is one `jax.lax.switch`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.layer_choice import Alike, Layer, call, check_like, shorten
from jaxpipe.layer_split import unroll_of
from jaxpipe.layer_storage import LayerStorage
from jaxpipe.runtime.buffers import accumulation_dtype
from jaxpipe.runtime.fsdp import Gather
from jaxpipe.runtime.model import Context, Output
from jaxpipe.runtime.stage_kinds import StageKinds


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
      middle: of each stage the steps in between.
      others: zeros for the auxiliary loss and metrics of any layer.
    """

    start: tuple[_Step, ...]
    middle: Mapping[int, tuple[_Step, ...]]
    end: tuple[_Step, ...]
    others: Any


class KindStage:
    """The stage function of layers of several kinds.

    Args:
      functions: each is ``(params, x, ctx) -> y or Output``.
      function_of: the function of each layer, an index of ``functions``.
      storage: of the layers' parameters.
      stages: that it runs, which hold the same row of kinds.
    """

    def __init__(
        self,
        functions: Sequence[Layer],
        function_of: Sequence[int],
        storage: LayerStorage,
        stages: Sequence[int],
    ) -> None:
        self.storage = storage
        self._gather: Gather | None = None
        self._stages = stages
        self._functions, self._function_of = tuple(functions), tuple(function_of)
        used = [
            sorted({function for function, other in zip(function_of, storage.kind_of, strict=True) if other == kind})
            for kind in range(len(storage.structures))
        ]
        self._used = [(numbers, Alike([self._functions[number] for number in numbers])) for numbers in used]

    def run(self, params: Any, x: Any, ctx: Context, gather: Gather | None = None) -> Any:
        """The stage function.

        ``params`` are a stage's rows of what `LayerStorage.stack` makes, leaves ``[slots, ...]``; in a layer they are
        made by ``gather`` of its own.
        """
        gathering = copy.copy(self)
        gathering._gather = gather
        return gathering._run_stage(params, x, ctx)

    def _run_stage(self, params: Any, x: Any, ctx: Context) -> Any:
        leaves = self.storage.tree.flatten_up_to(params)
        plan = self._plan(leaves, x, ctx)
        starts, counts = self.storage.starts, self.storage.counts
        first, last = (
            jnp.asarray(values, jnp.int32)[ctx.stage]
            for values in (starts, [start + count - len(plan.end) for start, count in zip(starts, counts, strict=True)])
        )
        x, others = self._run_scanned(plan.start, plan.others, leaves, x, ctx, first)
        if any(plan.middle.values()):
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
            slots = [0] * len(self.storage.places[kind])
            params = self._params(kind, leaves, slots, _shape_of_row)
            params = jax.eval_shape(functools.partial(self._whole, kind), params)
            firsts, outputs = alike(params, x, inside)
            for number, first, output in zip(numbers, firsts, outputs, strict=True):
                first_of[kind, number] = numbers[first]
                returns[self._layer_with(kind, number)] = output
        steps = [
            _Step(kind, first_of[kind, function], self.storage.slots_of(layer))
            for layer, (kind, function) in enumerate(zip(self.storage.kind_of, self._function_of, strict=True))
        ]
        stages = [[steps[layer] for layer in self.storage.layers_of(stage)] for stage in self._stages]
        start = _alike(stages)
        end = _alike([stage[start:][::-1] for stage in stages])
        middle = {
            number: tuple(stage[start : len(stage) - end]) for number, stage in zip(self._stages, stages, strict=True)
        }
        return _Plan(tuple(stages[0][:start]), middle, tuple(stages[0][len(stages[0]) - end :]), _zeros(returns))

    def _layer_with(self, kind: int, function: int) -> int:
        return list(zip(self.storage.kind_of, self._function_of, strict=True)).index((kind, function))

    def _params(self, kind: int, leaves: Sequence[Any], slots: Sequence[Any], take: Callable[[Any, Any], Any]) -> Any:
        """The parameters of a layer of a kind, each leaf taken from its slot."""
        places = self.storage.places[kind]
        found = [take(leaves[place], slot) for place, slot in zip(places, slots, strict=True)]
        return jax.tree.unflatten(self.storage.structures[kind], found)

    def _whole(self, kind: int, params: Any) -> Any:
        """The parameters of a layer of a kind, of its shards."""
        if self._gather is None:
            return params
        leaves, structure = jax.tree.flatten(params)
        return jax.tree.unflatten(structure, self._gather.leaves(self.storage.places[kind], leaves))

    def _run(self, step: _Step, zeros: Any, params: Any, x: Any, ctx: Context) -> tuple[Any, Any]:
        """(y, auxiliary loss and metrics with those of other layers as zeros) of one layer."""
        output = call(self._functions[step.function], self._whole(step.kind, params), x, ctx)
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
            rows = jnp.arange(length, dtype=jnp.int32), params
            x, other = jax.lax.scan(body, x, rows, unroll=unroll_of(length))
            others.append(jax.tree.map(lambda leaf: leaf.sum(0, dtype=leaf.dtype), other))
        return x, others

    def _switch(self, plan: _Plan, leaves: Sequence[Any], x: Any, ctx: Context, first: Any) -> tuple[Any, Any]:
        """(y, auxiliary loss and metrics) of the layers in which stages differ.

        Branches are unrolled: what they keep for the backward pass is then alike from branch to branch, layer by layer,
        and shares its memory.
        """
        rows = list(dict.fromkeys(plan.middle.values()))
        read = sorted({place for row in rows for step in row for place in self.storage.places[step.kind]})

        def branch(row: Sequence[_Step], given: Sequence[Any], x: Any, ctx: Context, first: Any) -> tuple[Any, Any]:
            known = dict(zip(read, given, strict=True))
            every = [known.get(place) for place in range(len(leaves))]
            y, others = self._run_unrolled(row, plan.others, every, x, ctx, first)
            return y, _total(others or [jax.tree.map(_widened, plan.others)])

        row_of = [rows.index(plan.middle.get(stage, rows[0])) for stage in range(len(self.storage.counts))]
        index = jnp.asarray(row_of, jnp.int32)[ctx.stage]
        branches = [functools.partial(branch, row) for row in rows]
        return jax.lax.switch(index, branches, [leaves[place] for place in read], x, ctx, first)


class LayerStageKinds(StageKinds):
    """Stages of layers, one kind for each row of kinds of layers.

    Args:
      make: ``make(stages)`` returns the function of these stages, which hold the same row.
      storage: of the layers' parameters.
      function_of: of each layer what else tells rows apart.
    """

    def __init__(
        self, make: Callable[[Sequence[int]], Layer], storage: LayerStorage, function_of: Sequence[int]
    ) -> None:
        self.storage = storage
        groups: dict[Any, list[int]] = {}
        for stage in range(len(storage.counts)):
            layers = storage.layers_of(stage)
            row = tuple((storage.kind_of[layer], function_of[layer], storage.slots_of(layer)) for layer in layers)
            groups.setdefault(row, []).append(stage)
        rows = list(groups.values())
        kind_of = [next(k for k, row in enumerate(rows) if stage in row) for stage in range(len(storage.counts))]
        super().__init__([make(row) for row in rows], kind_of)


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
