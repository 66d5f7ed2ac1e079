"""Fully sharded data parallelism within a stage: parameters are shards, and whole only where they are used.

A rank's working copies stay shards. A stage gathers them where it uses them, layer by layer where it is made of layers:
in F, and again in I and W, since what is gathered is never stashed. The gradient of a gathered parameter is
reduce-scattered where it is made, so sums of gradients have the size of shards, too, and the reduction after the loop
leaves them alone.

All devices of a data-parallel group run the same operations at the same time, so these collectives wait for nobody
else. Sources: ZeRO-3, arXiv 1910.02054; FSDP, arXiv 2304.11277.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxpipe.params import Params, dtype_of
from jaxpipe.runtime.buffers import accumulation_dtype
from jaxpipe.runtime.model import Context, Model
from jaxpipe.runtime.stage_kinds import StageKinds
from jaxpipe.stage.fuse import GATHERED


@dataclasses.dataclass(frozen=True)
class StageOfLayers:
    """A stage function whose parameters are rows, one for each of its layers.

    Attributes:
      run: ``run(params, x, ctx, gather)``, which calls ``gather(row)`` for the parameters of a layer before it uses
        them; None: rows are whole.
      gather: that function.
      storage: where the layers' parameters stand in those of a stage, for who unstacks them; or None.
    """

    run: Callable[[Any, Any, Context, Gather | None], Any]
    gather: Gather | None = None
    storage: Any = None

    def __call__(self, params: Any, x: Any, ctx: Context) -> Any:
        """The stage."""
        return self.run(params, x, ctx, self.gather)


class Gather(NamedTuple):
    """Makes parameters of their shards.

    Attributes:
      shards: of each leaf.
      rows: leading dimensions that `Shard.dimension` counts and the leaves no longer have.
    """

    shards: Sequence[Shard | None]
    rows: int

    def __call__(self, tree: Any) -> Any:
        """The tree whole."""
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, self.leaves(range(len(leaves)), leaves))

    def leaves(self, places: Sequence[int], leaves: Sequence[Any]) -> list[Any]:
        """Leaves whole, which stand at these places among all."""
        shards = [self.shards[place] for place in places]
        return [
            leaf if shard is None else checkpoint_name(_gather(leaf, shard.axes, shard.dimension - self.rows), GATHERED)
            for leaf, shard in zip(leaves, shards, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Shard:
    """How a parameter is divided: its dimension, counted in the stacked leaf, over mesh axes."""

    axes: tuple[str, ...]
    dimension: int


class FullySharded(NamedTuple):
    """Parameters, or their gradients, divided over the axes of ``fsdp_axis`` or ``zero1_axis``.

    Attributes:
      specs: PartitionSpec of every one.
      shards: for stages and outer a list with a `Shard` or None for each leaf.
      whole: why parameters are not divided, by path.
    """

    specs: Params
    shards: Params
    whole: dict[str, str]

    def reductions(self, sharded: Params) -> Params:
        """How each gradient is summed, where ``sharded`` holds the manual axes that shard its parameter."""
        leaves, structure = jax.tree.flatten(sharded)
        shards = (*self.shards.stages, *self.shards.outer) or (None,) * len(leaves)
        return jax.tree.unflatten(structure, [Reduction(*pair) for pair in zip(leaves, shards, strict=True)])


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How the gradient of a parameter is summed over the manual axes that do not shard it.

    Attributes:
      sharded: those that do.
      scatter: how the sum is divided over some of the others, or None: it is whole on all devices.
    """

    sharded: frozenset[str]
    scatter: Shard | None

    def run(self, grad: jax.Array, axes: frozenset[str]) -> jax.Array:
        """The sum of a gradient over those of some axes that do not shard the parameter."""
        missing = axes - self.sharded
        if self.scatter is not None:
            over, dimension = self.scatter.axes, self.scatter.dimension
            grad = lax.psum_scatter(grad, over, scatter_dimension=dimension, tiled=True)
            missing -= {*over}
        return lax.psum(grad, tuple(sorted(missing))) if missing else grad


def shard_fully(
    specs: Params,
    params: Params,
    sizes: Mapping[str, int],
    axes: tuple[str, ...],
    min_shard_size: int,
    rows_of_stages: int,
) -> FullySharded:
    """Divides every parameter that can be divided over some axes.

    It is divided along its largest dimension, the first of equals, that its spec leaves whole and the axes divide.

    Args:
      specs: PartitionSpec of every leaf of params.
      params: the parameters, or their shapes and dtypes.
      sizes: of the mesh's axes.
      axes: those of ``fsdp_axis`` or ``zero1_axis``.
      min_shard_size: elements of the smallest parameter that is divided.
      rows_of_stages: leading dimensions of the stages' parameters that are not to be divided: the stages', and the
        layers' where each layer gathers its own.
    """
    if not axes:
        return FullySharded(specs, Params([], []), {})
    rows = {"stages": rows_of_stages, "outer": 0}
    found: dict[str, list[tuple[P, Shard | None]]] = {"stages": [], "outer": []}
    whole = {}
    for part, first in rows.items():
        leaves = jax.tree_util.tree_leaves_with_path(getattr(params, part))
        for (path, leaf), spec in zip(leaves, jax.tree.leaves(getattr(specs, part), is_leaf=_is_spec), strict=True):
            divided = _divide(leaf, spec, sizes, axes, min_shard_size, first)
            if isinstance(divided, str):
                whole[f".{part}{jax.tree_util.keystr(path)}"] = divided
                found[part].append((spec, None))
            else:
                found[part].append((_with_axes(spec, divided), divided))
    trees = [
        jax.tree.unflatten(jax.tree.structure(getattr(params, part)), [spec for spec, _ in found[part]])
        for part in rows
    ]
    return FullySharded(Params(*trees), Params(*([shard for _, shard in found[part]] for part in rows)), whole)


def _divide(
    leaf: Any, spec: P, sizes: Mapping[str, int], over: tuple[str, ...], min_shard_size: int, first: int
) -> Shard | str:
    """How a leaf is divided, or why it is not."""
    shape = jnp.shape(leaf)
    named = {name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,))}
    axes = tuple(axis for axis in over if axis not in named)
    count, size = math.prod(sizes[axis] for axis in axes), math.prod(shape[first:])
    dtype = dtype_of(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"it is {dtype}, not floating"
    if not axes:
        return f"its PartitionSpec {spec} names {list(over)} already"
    if size < min_shard_size:
        return f"its {size} elements are fewer than min_shard_size={min_shard_size}"
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    free = [d for d in range(first, len(shape)) if entries[d] in (None, ()) and shape[d] and shape[d] % count == 0]
    if not free:
        return f"of its shape {shape}, {spec} leaves no dimension from {first} on whole that {count} divides"
    return Shard(axes, max(free, key=lambda d: shape[d]))


def _with_axes(spec: P, shard: Shard) -> P:
    entries = [*spec, *(None,) * (shard.dimension + 1 - len(spec))]
    entries[shard.dimension] = shard.axes[0] if len(shard.axes) == 1 else shard.axes
    return P(*entries)


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def gather_where_used(model: Model, shards: Params) -> Model:
    """The model with functions that take shards of parameters and gather them."""
    stage, embed, head = model.stage, model.embed, model.head
    if any(shards.stages):
        rows = rows_of_stages(model)

        def gathering(stage: Callable[..., Any]) -> Callable[..., Any]:
            if rows == 2:
                assert isinstance(stage, StageOfLayers)
                return dataclasses.replace(stage, gather=Gather(shards.stages, rows))
            return functools.partial(_gathering_stage, stage, Gather(shards.stages, rows))

        stage = stage.map(gathering) if isinstance(stage, StageKinds) else gathering(stage)
    if any(shards.outer):
        gather = Gather(shards.outer, 0)
        embed = embed and functools.partial(_gathering_embed, embed, gather)
        head = head and functools.partial(_gathering_head, head, gather)
    return dataclasses.replace(model, stage=stage, embed=embed, head=head)


def gather_once(model: Model, shards: Params) -> Model:
    """The model whose parameters are made whole of shards once a step, for all microbatches."""
    return dataclasses.replace(model, whole=Gather((*shards.stages, *shards.outer), 0))


def rows_of_stages(model: Model) -> int:
    """Leading dimensions of stages' parameters that are not divided: the stages', and the layers' if these gather."""
    return 2 if all(isinstance(stage, StageOfLayers) for stage in model.stages) else 1


def _gathering_stage(stage: Callable[..., Any], gather: Gather, params: Any, x: Any, ctx: Context) -> Any:
    return stage(gather(params), x, ctx)


def _gathering_embed(embed: Callable[..., Any], gather: Gather, outer: Any, data: Any, ctx: Context) -> Any:
    return embed(gather(_after(outer, ctx)), data, ctx)


def _gathering_head(head: Callable[..., Any], gather: Gather, outer: Any, y: Any, data: Any, ctx: Context) -> Any:
    return head(gather(_after(outer, ctx)), y, data, ctx)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """The shards of all devices in one; its gradient is summed as all gradients are, in float32 at least."""
    return lax.all_gather(shard, axes, axis=dimension, tiled=True)


def _gather_forward(shard: jax.Array, axes: tuple[str, ...], dimension: int) -> tuple[jax.Array, None]:
    return lax.all_gather(shard, axes, axis=dimension, tiled=True), None


def _gather_backward(axes: tuple[str, ...], dimension: int, _: None, whole: jax.Array) -> tuple[jax.Array]:
    wide = whole.astype(accumulation_dtype(whole.dtype))
    return (lax.psum_scatter(wide, axes, scatter_dimension=dimension, tiled=True).astype(whole.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def tie(shards: Any, inputs: Any) -> tuple[Any, Any]:
    """(shards, inputs) behind one barrier, so that what is gathered is gathered where these inputs are there.

    Shards are the same in all steps. XLA would gather them once, before the loop, and keep them whole.
    """
    return lax.optimization_barrier((shards, inputs))


@jax.custom_vjp
def _after(outer: Any, ctx: Context) -> Any:
    """Outer parameters behind a barrier with what differs between microbatches."""
    return tie(outer, ctx.microbatch)[0]


def _after_forward(outer: Any, ctx: Context) -> tuple[Any, None]:
    return tie(outer, ctx.microbatch)[0], None


def _after_backward(_: None, outer: Any) -> tuple[Any, None]:
    return outer, None


_after.defvjp(_after_forward, _after_backward)
