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
from jaxpipe.params import Params, dtype_of
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
        return _map_stages(_gather, tree, source, target)
    ranks = mesh.shape[axis]

    def move(leaf: jax.Array, before: np.ndarray, after: np.ndarray, depths: tuple[int, int]) -> jax.Array:
        if len(before) % ranks:
            found = _gather(leaf, before, after, depths)
            return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, P(axis)))
        run = functools.partial(_Travels.plan(before, after, ranks).run, axis, depths)
        specs = {"in_specs": P(axis), "out_specs": P(axis)}
        return jax.shard_map(run, mesh=mesh, axis_names={axis}, check_vma=False, **specs)(leaf)

    run = functools.partial(_map_stages, move, source=source, target=target)
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
    """How all layers of a leaf reach the ranks that will have them.

    Attributes:
      rounds: of layers that travel at once.
      fill: ``[ranks][places]``: where a rank's places are filled from, which is another place in padding.
      slots: of a row of the result.
    """

    rounds: tuple[_Round, ...]
    fill: np.ndarray
    slots: int

    @classmethod
    def plan(cls, before: np.ndarray, after: np.ndarray, ranks: int) -> _Travels:
        """Each layer in the first round that has its two ranks free; tables as `Stacking.leaf_tables` makes them."""
        slots = after.shape[1]
        before, after = before.reshape(ranks, -1), after.reshape(ranks, -1)
        rounds: list[list[tuple[int, int, int, int]]] = []
        for layer in sorted({*after.flat} - {-1}):
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
        fill = [[place if at < 0 else list(row).index(at) for place, at in enumerate(row)] for row in after]
        return cls(tuple(found), np.asarray(fill, np.int32), slots)

    def run(self, axis: str, depths: tuple[int, int], leaf: jax.Array) -> jax.Array:
        """A rank's part of the restacked leaf, of its part of the leaf."""
        rank, own = jax.lax.axis_index(axis), leaf.shape[depths[0] :]
        parts = leaf.reshape(-1, *own)
        found = jnp.broadcast_to(parts[:1], (self.fill.shape[1], *own))
        for each in self.rounds:
            part = parts[jnp.asarray(each.take)[rank]]
            part = send(part, axis, each.pairs) if each.pairs else part
            found = found.at[jnp.asarray(each.put)[rank]].set(part, mode="drop")
        return found[jnp.asarray(self.fill)[rank]].reshape(-1, *[self.slots][: depths[1] - 1], *own)


def _gather(leaf: Any, before: np.ndarray, after: np.ndarray, depths: tuple[int, int]) -> Any:
    """A restacked leaf, all at once."""
    place = {layer: index for index, layer in reversed(list(enumerate(before.flat)))}
    flat = [place.get(layer, 0) for layer in after.flat]  # unused slots hold whatever is there
    rows, slots = np.divmod(np.asarray(flat).reshape(after.shape), before.shape[1])
    found = leaf[rows] if depths[0] == 1 else leaf[rows, slots]
    return found if depths[1] == 2 else found[:, 0]


def _abstract(tree: Any, source: Stacking, target: Stacking, mesh: Mesh, axis: str) -> Any:
    """Shapes of a restacked tree, with shardings on a mesh: rows over its axis, all other dimensions as they are."""
    ranks = mesh.shape[axis]

    def of_stages(leaf: Any, _: Any, after: np.ndarray, depths: tuple[int, int]) -> jax.ShapeDtypeStruct:
        own = np.shape(leaf)[depths[0] :]
        spec = [*_spec(leaf), *[None] * np.ndim(leaf)][depths[0] : np.ndim(leaf)]
        leading: list[Any] = [axis, None][: depths[1]]
        if len(after) % ranks:  # over a dimension of the layers' instead, or no device could hold its part
            leading[0] = None
            free = [i for i, size in enumerate(own) if spec[i] is None and size % ranks == 0]
            if free:
                spec[free[0]] = axis
        return _shaped(leaf, (*after.shape[: depths[1]], *own), P(*leading, *spec))

    def of_other(leaf: Any) -> jax.ShapeDtypeStruct:
        return _shaped(leaf, np.shape(leaf), _spec(leaf))

    def _shaped(leaf: Any, shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype_of(leaf), sharding=NamedSharding(mesh, spec))

    return _map_stages(of_stages, tree, source, target, of_other)


def _spec(leaf: Any) -> P:
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else P()


def _map_stages(
    function: Callable[[Any, np.ndarray, np.ndarray, tuple[int, int]], Any],
    tree: Any,
    source: Stacking,
    target: Stacking,
    others: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """``function(leaf, layers before, layers after, stacked dimensions)`` of the stages' leaves in a tree."""
    depths = source.depth, target.depth

    def convert(params: Params) -> Params:
        source.check(params)
        leaves, structure = jax.tree.flatten(params.stages)
        tables = zip(source.leaf_tables(params.stages), target.leaf_tables(params.stages), strict=True)
        found = [function(leaf, *both, depths) for leaf, both in zip(leaves, tables, strict=True)]
        return Params(jax.tree.unflatten(structure, found), jax.tree.map(others, params.outer))

    return map_params(convert, tree, others)


def _check_alike(source: Stacking, target: Stacking) -> None:
    kinds = [each.storage if each.mixed else None for each in (source, target)]
    alike = [kind and (kind.tree, kind.kind_of) for kind in kinds]
    if len(source.places) != len(target.places) or alike[0] != alike[1]:
        texts = [f"{len(kind.structures) if kind else 1} kinds" for kind in kinds]
        raise ValueError(
            f"{len(source.places)} layers of schedule {source.schedule.name!r}, of {texts[0]}, are to be stacked as "
            f"{len(target.places)} of {target.schedule.name!r}, of {texts[1]}: both have to be of the same model"
        )
