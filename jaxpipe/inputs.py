"""What a pipeline is given, checked before anything is compiled: parameters, their PartitionSpecs, and the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.sharding import PartitionSpec as P

from jaxpipe._jax import Tracer
from jaxpipe.arguments import check_names, entry_axes, to_spec
from jaxpipe.params import Params, check_rows
from jaxpipe.runtime.options import Axes
from jaxpipe.schedule.schedule import Schedule


def check_params(params: Any, schedule: Schedule) -> None:
    """Raises ValueError unless params are Params with a row for each stage."""
    if not isinstance(params, Params):
        raise ValueError(f"params is a {type(params).__name__}; pass jaxpipe.Params(stages=..., outer=...)")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _check_array(leaf, f"params{jax.tree_util.keystr(path)}")
    check_rows(params.stages, schedule, "params.stages")


def _check_array(leaf: Any, name: str) -> None:
    """Raises ValueError unless a leaf is a number, or an array of a dtype that JAX knows."""
    dtype = getattr(leaf, "dtype", None)
    known = isinstance(leaf, bool | int | float | complex) if dtype is None else hasattr(leaf, "shape")
    if not known or getattr(dtype, "kind", "") in ("O", "U", "S", "M", "m"):
        kind = type(leaf).__name__ if dtype is None else f"{type(leaf).__name__} of {dtype}"
        raise ValueError(f"{name} is {leaf!r:.80}, a {kind}: pass a pytree of arrays; keep what is no array outside")


def broadcast_specs(specs: Params, params: Params, axes: Axes, mesh: Any) -> Params:
    """A PartitionSpec for every leaf of params.

    Args:
      specs: a prefix of params with PartitionSpecs or NamedShardings; None stands for the default, rows of stages over
        the pipeline axis and other parameters whole. A tree without leaves needs none, and may have one.
      params: the parameters.
      axes: those handled by hand.
      mesh: the pipeline's mesh.

    Raises:
      ValueError: specs and params do not match, or a spec does not fit its parameter.
    """

    def is_leaf(node: Any) -> bool:
        return node is None or isinstance(node, P | Sharding)

    given = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_leaf):
        name = f"specs{jax.tree_util.keystr(path)}"
        default = P(axes.pipeline) if path[:1] == (jax.tree_util.GetAttrKey("stages"),) else P()
        given[tuple(map(str, path))] = default if spec is None else to_spec(spec, mesh, name)
        check_names(given[tuple(map(str, path))], mesh, name)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    everything = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: not jax.tree.leaves(node))
    for path in given:
        if not any(tuple(map(str, place))[: len(path)] == path for place, _ in everything):
            raise ValueError(f"specs{''.join(path)} is for no parameter: there are {_names(leaves)}")
    found = []
    for path, leaf in leaves:
        place = tuple(map(str, path))
        spec = next((given[place[:length]] for length in range(len(place) + 1) if place[:length] in given), None)
        if spec is None:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has no PartitionSpec: specs must be a tree like params, or a "
                f"prefix of it, and has {[''.join(path) for path in given]}"
            )
        _check_fits(spec, np.shape(leaf), axes, f"params{jax.tree_util.keystr(path)}")
        found.append(spec)
    return jax.tree.unflatten(tree, found)


def _names(leaves: Sequence[tuple[Any, Any]]) -> str:
    """The paths of some leaves."""
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def _check_fits(spec: P, shape: tuple[int, ...], axes: Axes, name: str) -> None:
    """Raises ValueError unless an array can be divided as a spec says, evenly over axes handled by hand."""
    if len(spec) > len(shape):
        raise ValueError(f"{name} has shape {shape}, but its PartitionSpec {spec} is for {len(spec)} dimensions")
    for size, entry in zip(shape, spec, strict=False):
        sizes = {axis: axes.sizes[axis] for axis in axes_of(P(entry)) & axes.names}
        if size % math.prod(sizes.values()):
            raise ValueError(
                f"{name} has shape {shape}, of which {spec} divides {size} over {sizes}: make it a multiple of "
                f"{math.prod(sizes.values())}, padded if need be, or divide another dimension"
            )


def check_specs(specs: Params, axes: Axes, *, shared_ends: bool) -> None:
    """Raises ValueError unless stages are sharded by rows, and other parameters so that the ranks that use them can."""
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


def refuse_sharded_by_compiler(specs: Params, batch_spec: P, axes: Axes, mesh: Any, *, shared_ends: bool) -> None:
    """Raises ValueError where the compiler would divide both the batch and a parameter over one axis.

    It gathers such a parameter and scatters its gradient as it likes, partly with permutes, which know no groups: all
    ranks of the pipeline have to run them together, while each runs a branch of its own.
    """
    divided = {name for name in axes_of(batch_spec) - axes.names if mesh.shape[name] > 1}
    parts = {"stages": specs.stages} if shared_ends else {"stages": specs.stages, "outer": specs.outer}
    for part, tree in parts.items() if axes.sizes[axes.pipeline] > 1 else ():
        for path, spec in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec):
            for name in sorted(axes_of(spec) & divided):
                dimension = next(i for i, entry in enumerate(spec) if name in axes_of(P(entry)))
                raise ValueError(
                    f"specs.{part}{jax.tree_util.keystr(path)} is {spec} and batch_spec {batch_spec}: both leave "
                    f"{name!r} to the compiler, which would move parts of the parameter between devices while pipeline "
                    f"ranks run different stages, and wait for ever. Leave {name!r} out of the parameter's spec, and "
                    f"pass data_axes={(*axes.data, name)!r} and fsdp_axis={name!r}: the pipeline then divides and "
                    "gathers it. Or gather it by hand: with the same data_axes and spec, and where the parameter is "
                    f"used jax.lax.all_gather(parameter, {name!r}, axis={dimension - (part == 'stages')}, tiled=True)"
                )


def check_batch(batch: Any, count: int, axes: Axes, spec: P, *, padded: bool = False) -> int:
    """The number of examples.

    ``padded``: the batch will be padded, so its size need not divide.

    Raises:
      ValueError: not all leaves are ``[B, ...]``, or they do not divide into microbatches and shards.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("the batch has no arrays; pass a pytree whose leaves have the batch as leading dimension")
    for path, leaf in leaves:
        _check_array(leaf, f"batch{jax.tree_util.keystr(path)}")
        if not np.shape(leaf):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} is {leaf!r:.80}, without a leading (batch) dimension: pass a "
                "pytree of arrays [B, ...]; lists of numbers are made arrays with np.asarray, and a value that is the "
                "same in all microbatches goes into params.outer"
            )
    leading = {np.shape(leaf)[0] for _, leaf in leaves}
    if len(leading) != 1:
        shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
        raise ValueError(f"the batch's leaves have shapes {shapes}: all need the same leading (batch) dimension")
    (size,) = leading
    sizes = {axis: axes.sizes[axis] for axis in axes.data}
    shards = math.prod(sizes.values())
    multiple = count * shards
    if size == 0 or (size % multiple and not padded):
        near = sorted({max(size // multiple, 1) * multiple, (size // multiple + 1) * multiple})
        raise ValueError(
            f"a batch of {size} does not divide into {count} microbatches on each of {shards} data-parallel "
            f"shards {sizes}: use a multiple of {multiple}, such as {' or '.join(map(str, near))}, or let the pipeline "
            "pad batches with examples that do not count (example_mask=, or jaxpipe.pad_batch)"
        )
    size_of_microbatch = -(-size // multiple) * shards
    for path, leaf in leaves:
        shape = (size_of_microbatch, *np.shape(leaf)[1:])
        _check_fits(spec, shape, axes, f"a microbatch of batch{jax.tree_util.keystr(path)}")
    return size


def split_batch(batch: Any, count: int, axes: Axes) -> Any:
    """Leaves ``[B, ...]`` -> ``[count, B / count, ...]``: microbatches, each contiguous on each data shard."""
    shards = math.prod(axes.sizes[axis] for axis in axes.data)

    def split(leaf: jax.Array) -> jax.Array:
        size, rest = leaf.shape[0] // (count * shards), leaf.shape[1:]
        return leaf.reshape(shards, count, size, *rest).swapaxes(0, 1).reshape(count, shards * size, *rest)

    return jax.tree.map(lambda leaf: split(jnp.asarray(leaf)), batch)


def check_key(rng: Any) -> None:
    """Raises ValueError unless this is None or one key, typed or raw."""
    if rng is None:
        return
    array = isinstance(rng, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    typed = array and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if not array or len(rng.shape) != 1 - typed or not (typed or rng.dtype == np.uint32):
        raise ValueError(f"rng is {rng!r:.80}: pass one key, such as jax.random.key(0), or None")


def as_step_inputs(step_inputs: Any) -> Any:
    """Numbers and arrays as arrays; raises ValueError where there is something else."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(step_inputs):
        _check_array(leaf, f"step_inputs{jax.tree_util.keystr(path)}")
    return jax.tree.map(jnp.asarray, step_inputs)


def check_surroundings(mesh: Any, arrays: Any) -> None:
    """Raises ValueError where JAX was told to use another mesh than the pipeline's, or arrays are on another."""
    around, own = jax.sharding.get_abstract_mesh(), mesh.abstract_mesh
    if around.shape and around != own:
        kinds = dict(zip(around.axis_names, map(str, around.axis_types), strict=True))
        raise ValueError(
            f"the pipeline is called where the mesh is {kinds}, of sizes {dict(around.shape)}, and runs on its own, of "
            f"sizes {dict(mesh.shape)} and Auto axes: call it outside of jax.set_mesh and jax.shard_map, or under "
            "jax.set_mesh of its own mesh"
        )
    concrete = isinstance(mesh, Mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        if concrete and isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed:
            found, wanted = leaf.sharding.device_set, set(mesh.devices.flat)
            if found != wanted:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is on devices {sorted(d.id for d in found)}, and the pipeline runs "
                    f"on {sorted(d.id for d in wanted)}: place it with jax.device_put(array, NamedSharding(mesh, spec))"
                )
        there = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if there is not None and there.shape and dict(there.shape) != dict(mesh.shape):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is on a mesh of {dict(there.shape)} with Explicit axes, and the "
                f"pipeline on one of {dict(mesh.shape)}: move it there with jax.device_put and a NamedSharding"
            )


def is_spec(node: Any) -> bool:
    """Whether a node of a tree is a PartitionSpec."""
    return isinstance(node, P)


def manual_part(manual: frozenset[str], spec: P) -> P:
    """A PartitionSpec with all axes but the manual ones left out."""

    def keep(entry: Any) -> Any:
        names = tuple(name for name in entry_axes(entry) if name in manual)
        return names if len(names) > 1 else (names[0] if names else None)

    return P(*(keep(entry) for entry in spec))


def axes_of(spec: P) -> frozenset[str]:
    """The mesh axes that a PartitionSpec names."""
    return frozenset(name for entry in spec for name in entry_axes(entry))


def without_trailing(spec: P) -> P:
    """The spec without entries of None at its end.

    >>> tuple(without_trailing(P("pp", None, "ep", None)))
    ('pp', None, 'ep')
    """
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)
