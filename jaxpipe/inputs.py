"""What a pipeline is given, checked before anything is compiled: parameters, their PartitionSpecs, and the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxpipe.runtime.execute import Axes
from jaxpipe.runtime.model import Params
from jaxpipe.schedule.schedule import Schedule


def check_params(params: Any, schedule: Schedule) -> None:
    """Raises ValueError unless params are Params with a row for each stage."""
    if not isinstance(params, Params):
        raise ValueError(f"params is a {type(params).__name__}; pass jaxpipe.Params(stages=..., outer=...)")
    check_rows(params.stages, schedule, "params.stages")


def check_rows(stages: Any, schedule: Schedule, name: str) -> None:
    """Raises ValueError unless all leaves are ``[num_stages, ...]``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(stages):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != schedule.num_stages:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but schedule {schedule.name!r} has "
                f"{schedule.num_stages} stages: stack the parameters of all stages in rows, "
                f"[{schedule.num_stages}, ...], with jaxpipe.stack_stages"
            )


def check_alike(stages: Sequence[Any], schedule: Schedule) -> None:
    """Raises ValueError unless there is one tree for each stage, all of the same structure, shapes and dtypes."""
    if len(stages) != schedule.num_stages:
        raise ValueError(f"{len(stages)} stages for schedule {schedule.name!r}, which has {schedule.num_stages}")
    first = _describe(stages[0])
    for index, stage in enumerate(stages):
        other = _describe(stage)
        if other != first:
            differing = {path: other.get(path) for path in {**first, **other} if first.get(path) != other.get(path)}
            raise ValueError(
                f"the parameters of stage {index} have {differing}, those of stage 0 "
                f"{ {path: first.get(path) for path in differing} }: all stages must be alike; put what differs into "
                "embed or head"
            )


def _describe(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf, by path."""
    return {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_specs(specs: Params, axes: Axes, *, shared_ends: bool) -> None:
    """Raises ValueError unless stages are sharded by rows, and other parameters as those who run them need."""
    for path, spec in jax.tree_util.tree_leaves_with_path(specs.stages, is_leaf=is_spec):
        if not spec or spec[0] != axes.pipeline:
            raise ValueError(
                f"specs.stages{jax.tree_util.keystr(path)} is {spec}: a stage parameter's PartitionSpec must "
                f"start with {axes.pipeline!r}, the axis its rows are sharded over"
            )
    for path, spec in jax.tree_util.tree_leaves_with_path(specs.outer, is_leaf=is_spec):
        if axes.pipeline in axes_of(spec) and not shared_ends:
            raise ValueError(
                f"specs.outer{jax.tree_util.keystr(path)} is {spec}, but each pipeline rank that runs embed or "
                f"head needs the whole parameter: pass shared_ends=True, and all ranks of {axes.pipeline!r} "
                "run them together, each with its shard; or shard it over another axis"
            )


def split_batch(batch: Any, count: int, axes: Axes) -> Any:
    """Leaves ``[B, ...]`` -> ``[count, B / count, ...]``: microbatches, each contiguous on each data shard."""
    sizes = [axes.sizes[axis] for axis in axes.data]
    shards = math.prod(sizes)
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("the batch has no arrays; pass a pytree whose leaves have the batch as leading dimension")
    rows = {np.shape(leaf)[:1] for _, leaf in leaves}
    if len(rows) != 1 or () in rows:
        shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
        raise ValueError(f"the batch's leaves have shapes {shapes}: all need the same leading (batch) dimension")
    (size,) = rows.pop()
    if size == 0 or size % (count * shards):
        raise ValueError(
            f"a batch of {size} does not divide into {count} microbatches on each of {shards} data-parallel "
            f"shards {dict(zip(axes.data, sizes, strict=True))}: use a multiple of {count * shards}"
        )

    def split(leaf: jax.Array) -> jax.Array:
        rest = leaf.shape[1:]
        micro = leaf.reshape(shards, count, size // (count * shards), *rest).swapaxes(0, 1)
        return micro.reshape(count, size // count, *rest)

    return jax.tree.map(lambda leaf: split(jnp.asarray(leaf)), batch)


def is_spec(node: Any) -> bool:
    """Whether a node of a tree is a PartitionSpec."""
    return isinstance(node, P)


def broadcast_spec(spec: P, tree: Any) -> Any:
    """The spec at every leaf of a subtree."""
    return jax.tree.map(lambda _: spec, tree)


def manual_part(manual: frozenset[str], spec: P) -> P:
    """A PartitionSpec with the compiler's axes left out."""

    def keep(entry: Any) -> Any:
        names = tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name in manual)
        return names if len(names) > 1 else (names[0] if names else None)

    return P(*(keep(entry) for entry in spec))


def axes_of(spec: P) -> frozenset[str]:
    """The mesh axes that a PartitionSpec names."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    return frozenset(name for entry in entries for name in entry if name is not None)
