"""Stacked parameters, and optimizer states of them, for another schedule: layers travel between ranks one by one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpipe._jax import Tracer
from jaxpipe.optimizer_state import map_params
from jaxpipe.params import Params
from jaxpipe.runtime.copies import send
from jaxpipe.stacking import Stacking


def restack(tree: Any, source: Stacking, target: Stacking, mesh: Mesh | None = None, *, axis: str = "pp") -> Any:
    """The same layers, stacked for another schedule, order or number of stages.

    Args:
      tree: `jaxpipe.Params`, or a tree that has such in it: an optimizer's state, a dict of both. What is not in the
        stages of one stays as it is.
      source: of the stages in ``tree``.
      target: of the result. Its padding repeats the last layer of its stage, as it does in new parameters.
      mesh: where the result is used: rows are sharded over ``axis``, and so have to be those of ``tree`` (where they
        divide). Each layer then travels once, from the rank that has it to the one that will, and no device ever holds
        more than its own layers and one that is under way. None: for arrays of NumPy, or of one device.
      axis: of the mesh, that rows are sharded over.

    Raises:
      ValueError: another number of layers; stages that are not stacked as ``source`` says.

    >>> import jaxpipe
    >>> plain, piped = (jaxpipe.schedule.build(*sizes) for sizes in (("1f1b", 1, 4), ("dualpipev", 2, 4)))
    >>> params = Params({"w": np.arange(5)[None]})
    >>> source, target = jaxpipe.Stacking(plain, 5), jaxpipe.Stacking(piped, 5, order="storage")
    >>> restack(params, source, target).stages["w"].tolist()  # the stage of layers 0 and 1 first
    [[0, 1], [4, 4], [2, 2], [3, 3]]
    """
    _check_alike(source, target)
    if mesh is None:
        return _map_stages(functools.partial(_gather, source, target), tree, source)
    travels = _Travels.plan(source, target, mesh.shape[axis]) if len(source.slots) % mesh.shape[axis] == 0 else None

    def move(leaf: jax.Array) -> jax.Array:
        if travels is None:
            return jax.lax.with_sharding_constraint(_gather(source, target, leaf), NamedSharding(mesh, P(axis)))
        run = functools.partial(travels.run, axis)
        specs = {"in_specs": P(axis), "out_specs": P(axis)}
        return jax.shard_map(run, mesh=mesh, axis_names={axis}, check_vma=False, **specs)(leaf)

    run = functools.partial(_map_stages, move, source=source)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        return run(tree)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, _abstract(tree, source, target, mesh, axis))
    return jax.jit(run, out_shardings=shardings)(tree)


def restore(
    read: Callable[[Any], Any],
    like: Any,
    source: Stacking,
    target: Stacking,
    mesh: Mesh,
    *,
    axis: str = "pp",
) -> Any:
    """Reads a checkpoint that another schedule, or another mesh, has written.

    Args:
      read: ``read(abstract)`` returns the arrays of the checkpoint for a tree of ShapeDtypeStructs with shardings, each
        process its own parts: ``lambda like: checkpointer.restore(path, like)`` with Orbax.
      like: parameters, an optimizer's state, or any tree with such, as this run has them; arrays, or ShapeDtypeStructs
        with shardings.
      source: of the parameters in the checkpoint.
      target: of this run's.
      mesh: of this run.
      axis: of the mesh, that rows are sharded over.

    Returns:
      a tree like ``like``, sharded so.

    Raises:
      ValueError: as `restack`.

    >>> import jaxpipe
    >>> mesh, schedule = jaxpipe.make_mesh(pp=2), jaxpipe.schedule.build("1f1b", 2, 4)
    >>> source = jaxpipe.Stacking(jaxpipe.schedule.build("dualpipev", 2, 4), 4, "storage")
    >>> like = jax.device_put(Params({"w": jnp.zeros((2, 2))}), NamedSharding(mesh, P("pp")))
    >>> def read(abstract):
    ...     return jax.tree.map(lambda leaf: jnp.asarray([[0.0], [3.0], [1.0], [2.0]]), abstract)
    >>> restore(read, like, source, jaxpipe.Stacking(schedule, 4), mesh).stages["w"].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    _check_alike(source, target)
    return restack(read(_abstract(like, target, source, mesh, axis)), source, target, mesh, axis=axis)


class _Round(NamedTuple):
    """Layers that travel at once, at most one from and to each rank.

    Attributes:
      pairs: (from, to) of those that leave their ranks; empty where all stay.
      take: for each rank which of its places, counted over rows and slots, the layer has.
      put: for each rank the place of the layer that arrives; out of range where none does.
    """

    pairs: tuple[tuple[int, int], ...]
    take: np.ndarray
    put: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Travels:
    """How all layers reach the ranks that will have them.

    Attributes:
      source, target: before and after.
      rounds: of layers that travel at once.
      fill: ``[ranks][places]``: where a rank's places are filled from, which is another place in padding.
    """

    source: Stacking
    target: Stacking
    rounds: tuple[_Round, ...]
    fill: np.ndarray

    @classmethod
    def plan(cls, source: Stacking, target: Stacking, ranks: int) -> _Travels:
        """Each layer in the first round that has its two ranks free."""
        before, after = (_layers(each).reshape(ranks, -1) for each in (source, target))
        rounds: list[list[tuple[int, int, int, int]]] = []
        for layer in range(len(source.places)):
            sender, take = (int(index[0]) for index in np.nonzero(before == layer))
            receiver, put = (int(index[0]) for index in np.nonzero(after == layer))
            fits = (
                members
                for members in rounds
                if (members[0][0] == members[0][2]) == (sender == receiver)
                and all(sender != other[0] and receiver != other[2] for other in members)
            )
            members = next(fits, None)
            if members is None:
                rounds.append(members := [])
            members.append((sender, take, receiver, put))
        found = []
        for members in rounds:
            takes, puts = np.zeros(ranks, np.int32), np.full(ranks, after.shape[1], np.int32)
            for sender, take, receiver, put in members:
                takes[sender], puts[receiver] = take, put
            pairs = tuple((sender, receiver) for sender, _, receiver, _ in members if sender != receiver)
            found.append(_Round(pairs, takes, puts))
        fill = np.stack([[list(row).index(layer) for layer in row] for row in after]).astype(np.int32)
        return cls(source, target, tuple(found), fill)

    def run(self, axis: str, leaf: jax.Array) -> jax.Array:
        """A rank's part of the restacked leaf, of its part of the leaf."""
        rank, own = jax.lax.axis_index(axis), leaf.shape[self.source.depth :]
        parts = leaf.reshape(-1, *own)
        found = jnp.broadcast_to(parts[:1], (self.fill.shape[1], *own))
        for each in self.rounds:
            part = parts[jnp.asarray(each.take)[rank]]
            part = send(part, axis, each.pairs) if each.pairs else part
            found = found.at[jnp.asarray(each.put)[rank]].set(part, mode="drop")
        rows = len(self.target.slots) // len(self.fill)
        return found[jnp.asarray(self.fill)[rank]].reshape(rows, *_leading(self.target)[1:], *own)


def _gather(source: Stacking, target: Stacking, leaf: Any) -> Any:
    """A restacked leaf, all at once."""
    places = np.asarray(source.places)[_layers(target)]  # [rows, slots, depth]
    index = tuple(np.moveaxis(places, -1, 0))
    found = leaf[index]
    return found if target.depth == 2 else found[:, 0]


def _abstract(tree: Any, source: Stacking, target: Stacking, mesh: Mesh, axis: str) -> Any:
    """Shapes of a restacked tree, with shardings on a mesh: rows over its axis, all other dimensions as they are."""
    ranks = mesh.shape[axis]

    def of_stages(leaf: Any) -> jax.ShapeDtypeStruct:
        own = np.shape(leaf)[source.depth :]
        spec = [*_spec(leaf), *[None] * np.ndim(leaf)][source.depth : np.ndim(leaf)]
        leading: list[Any] = [axis, None][: target.depth]
        if len(target.slots) % ranks:  # over a dimension of the layers' instead, or no device could hold its part
            leading[0] = None
            free = [i for i, size in enumerate(own) if spec[i] is None and size % ranks == 0]
            if free:
                spec[free[0]] = axis
        return _shaped(leaf, (*_leading(target), *own), P(*leading, *spec))

    def of_other(leaf: Any) -> jax.ShapeDtypeStruct:
        return _shaped(leaf, np.shape(leaf), _spec(leaf))

    def _shaped(leaf: Any, shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def convert(params: Params) -> Params:
        source.check(params)
        return Params(jax.tree.map(of_stages, params.stages), jax.tree.map(of_other, params.outer))

    return map_params(convert, tree, of_other)


def _spec(leaf: Any) -> P:
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else P()


def _layers(stacking: Stacking) -> np.ndarray:
    """``[rows, slots]``: the layer in each; padding has the layer before it again."""
    return np.asarray(stacking.slots)


def _leading(stacking: Stacking) -> tuple[int, ...]:
    return _layers(stacking).shape[: stacking.depth]


def _map_stages(function: Callable[[Any], Any], tree: Any, source: Stacking) -> Any:
    def convert(params: Params) -> Params:
        source.check(params)
        return Params(jax.tree.map(function, params.stages), params.outer)

    return map_params(convert, tree)


def _check_alike(source: Stacking, target: Stacking) -> None:
    if source.mixed or target.mixed:
        raise ValueError(
            "layers of several kinds have parameters of several structures, which cannot travel one by one between "
            "stackings: take the model from the one pipeline with merge, and give it to the other with split"
        )
    if len(source.places) != len(target.places):
        raise ValueError(
            f"{len(source.places)} layers of schedule {source.schedule.name!r} are to be stacked as "
            f"{len(target.places)} of {target.schedule.name!r}: both have to be of the same model"
        )
