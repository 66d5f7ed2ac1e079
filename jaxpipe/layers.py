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

from jaxpipe.layer_choice import Choice, Layer, check_like, shorten
from jaxpipe.layer_kinds import KindStage, LayerStageKinds
from jaxpipe.layer_split import split_layers, unroll_of
from jaxpipe.layer_storage import LayerStorage, is_sequence
from jaxpipe.params import unstack_stages
from jaxpipe.runtime.buffers import accumulation_dtype
from jaxpipe.runtime.fsdp import Gather, StageOfLayers
from jaxpipe.runtime.model import Context, Output
from jaxpipe.schedule.schedule import Schedule


def layered_stages(
    layer: Layer | Sequence[Layer], layers: Any, schedule: Schedule, *, layer_costs: Sequence[float] | None = None
) -> tuple[Layer, Any]:
    """(stage function, stacked parameters) for layers whose number need not divide over the stages.

    Stages hold `split_layers` layers. Up to 32 are written out one after the other: each then keeps what its backward
    pass needs least, where it is. More are a loop, which stacks all that its turns keep.

    Shorter stages are padded: they run their last layer again, on the same input and with the same key, and discard
    what it returns. A pipeline waits for its longest stage, so where layers cost the same, this costs memory but no
    time. Gradients of the padding are exactly zero. Its auxiliary losses and metrics do not count, but a side effect
    such as `jax.debug.print` happens again. With ``layer_costs`` no stage is padded: those that hold another number of
    layers are a kind of stages of their own, with code of its own in the pipeline's program (`jaxpipe.StageKinds`).

    Layers may be of several kinds, each with parameters of its own structure: dense layers, then experts. Their stacked
    parameters are a nested dict of all leaves by the layers' own paths, ``stages["mlp"]["router"]``; one that kinds
    have in common (path, shape and dtype) is one leaf. Where kinds have different things at one path, it is a dict with
    ``kind_0``, ``kind_1``, ... for these (numbered in the order of the layers), so a parameter's own path is the
    beginning of its path here. A leaf is ``[num_stages, slots, ...]`` with as many slots as a stage holds layers that
    have it, at most; stages that hold fewer have unused rows, with gradients of zero, since all devices store as much.
    Stages of such layers are not padded either: those with different rows of kinds are different kinds of stages.

    Args:
      layer: ``layer(params, x, ctx) -> y``, y like x, or a `jaxpipe.Output`, whose auxiliary losses and metrics are
        summed over layers. ``ctx.layer`` is the layer's index in the model, and ``ctx.rng`` its own key, whatever the
        number of stages; see `jaxpipe.Context` for the plain program. Or a list, a function for each layer.
      layers: the parameters of each layer in the order of the forward pass: a list or tuple of pytrees, or one pytree
        with leaves ``[num_layers, ...]``, as `jax.vmap` of an initializer and Flax's scans make it.
      schedule: gives the number of stages and their rows.
      layer_costs: what each layer costs, to divide them over the stages by; see `split_layers`.

    Raises:
      ValueError: fewer layers than stages; not one function, or one cost, for each layer.

    >>> import jaxpipe
    >>> schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    >>> stage, stages = layered_stages(lambda w, x, ctx: x + jnp.tanh(x @ w), jnp.ones((5, 4, 4)), schedule)
    >>> stages.shape  # 3 layers and 2
    (2, 3, 4, 4)
    >>> dense, gated = {"up": jnp.ones((4, 4))}, {"up": jnp.ones((4, 4)), "gate": jnp.ones((4, 4))}
    >>> def layer(w, x, ctx):
    ...     return x + jnp.tanh(x @ w["up"]) * (jax.nn.sigmoid(x @ w["gate"]) if "gate" in w else 1.0)
    >>> stage, stages = layered_stages(layer, [dense, gated, gated, gated, gated], schedule)
    >>> stages["up"].shape, stages["gate"].shape  # dense, gated and gated; gated and gated
    ((2, 3, 4, 4), (2, 2, 4, 4))
    """
    count = count_layers(layers)
    each = list(layer) if isinstance(layer, Sequence) else [layer] * count
    functions = list(dict.fromkeys(each))
    function_of = [functions.index(function) for function in each]
    return stages_of_mixed_layers(functions, function_of, layers, schedule, layer_costs)


def stages_of_mixed_layers(
    functions: Sequence[Layer],
    function_of: Sequence[int],
    layers: Any,
    schedule: Schedule,
    layer_costs: Sequence[float] | None = None,
) -> tuple[Layer, Any]:
    """`layered_stages` of layers with functions of their own: layer i runs ``functions[function_of[i]]``."""
    storage = store_layers(layers, schedule, layer_costs)
    return stage_of_layers(functions, function_of, storage), storage.stack(layers, schedule)


def store_layers(layers: Any, schedule: Schedule, layer_costs: Sequence[float] | None = None) -> LayerStorage:
    """Where the parameters of layers, arrays or shapes, stand in stacked stages."""
    counts = split_layers(count_layers(layers), schedule.num_stages, layer_costs)
    return LayerStorage.of(layers, counts, by_cost=layer_costs is not None)


def stage_of_layers(functions: Sequence[Layer], function_of: Sequence[int], storage: LayerStorage) -> Layer:
    """The stage function of layers, of parameters as a storage stacks them."""
    if len(function_of) != len(storage.kind_of):
        raise ValueError(f"{len(function_of)} functions for {len(storage.kind_of)} layers: give one for each, or one")
    if storage.apart:
        make = lambda stages: StageOfLayers(KindStage(functions, function_of, storage, stages).run)  # noqa: E731
        return LayerStageKinds(make, storage, function_of)
    return StageOfLayers(_LayerStage(Choice(functions, function_of), storage).run, storage=storage)


def unstack_layers(stacked: Any, layers: int | Layer, schedule: Schedule, order: str = "model") -> list[Any]:
    """The parameters (or gradients) of layers 0, 1, ... of the stages that `layered_stages` stacked, without padding.

    Args:
      stacked: what `layered_stages` and the like stacked, or its gradients.
      layers: the stage function that came with it; or the number of layers, where these are of one kind and divided
        without costs.
      schedule: gives the number of stages and their rows.
      order: that of the rows, as in `jaxpipe.unstack_stages`.

    Raises:
      ValueError: parameters of another structure or number of stages; a function that is not of layers.

    >>> import jaxpipe
    >>> schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    >>> stage, stages = layered_stages(lambda w, x, ctx: x * w, jnp.arange(5.0), schedule)
    >>> [float(w) for w in unstack_layers(stages, stage, schedule)]
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    storage = getattr(layers, "storage", None)
    if isinstance(storage, LayerStorage):
        return storage.unstack(stacked, schedule, order)
    if not isinstance(layers, int):
        raise ValueError(
            f"unstack_layers got {layers!r:.80}: give the number of layers, or the stage function that layered_stages, "
            "nnx_stages or linen_stages returned with these parameters"
        )
    stages, counts = unstack_stages(stacked, schedule, order), split_layers(layers, schedule.num_stages)
    places = [(stage, slot) for stage, count in zip(stages, counts, strict=True) for slot in range(count)]
    return [jax.tree.map(lambda leaf, slot=slot: leaf[slot], stage) for stage, slot in places]


def layers_of_stages(counts: Sequence[int]) -> list[list[int]]:
    """``[stages][slots]``: the layer in each slot; in padding the stage's last one again."""
    starts = [0, *itertools.accumulate(counts)][:-1]
    return [
        [start + min(slot, count - 1) for slot in range(max(counts))]
        for start, count in zip(starts, counts, strict=True)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _LayerStage:
    """The stage function of layers with parameters of one kind.

    All stages have as many slots for layers, the shorter ones padding in the last.

    Attributes:
      choice: the functions of all layers.
      storage: of their parameters.
    """

    choice: Choice
    storage: LayerStorage

    @property
    def counts(self) -> tuple[int, ...]:
        """The layers of each stage."""
        return self.storage.counts

    @functools.cached_property
    def layers(self) -> list[list[int]]:
        """``[stages][slots]``: the layer in each slot; in padding the stage's last one again."""
        return layers_of_stages(self.counts)

    @property
    def padded(self) -> bool:
        """Whether some stages have padding."""
        return len(set(self.counts)) > 1

    def run(self, params: Any, x: Any, ctx: Context, gather: Gather | None = None) -> Any:
        """The stage function; leaves of ``params`` are ``[slots, ...]``, in a layer made by ``gather`` of its row."""
        start, count = (jnp.asarray(values, jnp.int32)[ctx.stage] for values in (self.storage.starts, self.counts))
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
        check_like(x, y)
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
        rows = jnp.arange(max(self.counts), dtype=jnp.int32), params
        (y, _), others = jax.lax.scan(body, carry, rows, unroll=unroll_of(max(self.counts)))
        return y, others


def _where(condition: jax.Array, left: Any, right: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), left, right)


def count_layers(layers: Any) -> int:
    """The number of layers: of pytrees in a list or tuple, or of rows.

    Raises:
      ValueError: there are none; leaves of a pytree of rows have different leading dimensions.
    """
    if is_sequence(layers):
        if not layers:
            raise ValueError("there are no layers; give the parameters of at least one for each stage")
        return len(layers)
    leaves = jax.tree_util.tree_leaves_with_path(layers)
    lengths = {np.shape(leaf)[:1] for _, leaf in leaves}
    if len(lengths) != 1 or () in lengths:
        shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
        raise ValueError(
            f"the stacked layers have leaves of shapes {shapes}: all need the number of layers as leading dimension; "
            "or give a list with one pytree a layer"
        )
    return lengths.pop()[0]
