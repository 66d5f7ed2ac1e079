"""Where each layer of a model stands in stacked parameters: masks, names and norms for optimizers and logs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.layer_split import split_layers
from jaxpipe.layer_storage import LayerStorage
from jaxpipe.layers import layers_of_stages
from jaxpipe.params import Params, stage_of_rows
from jaxpipe.runtime.buffers import accumulation_dtype
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.trainable import is_floating


@dataclasses.dataclass(frozen=True)
class Stacking:
    """How the stages of a `jaxpipe.Params` are stacked: which row, and which slot in it, holds which layer.

    Whatever treats a leaf as one parameter of one layer is wrong on stacked ones: a norm's scale ``[width]`` is
    ``[stages, width]`` or ``[stages, slots, width]`` there, and "matrices decay" decays it. What this class offers
    counts a leaf's own dimensions alone, and leaves padding out.

    Padding: where stages have unequally many layers, the shorter ones repeat their last layer in further slots. Its
    gradients are exactly zero, so clipping by the global norm of gradients is right as it is. Weight decay shrinks
    padding like all else, which no loss ever sees; only norms of parameters or updates would count it, and `norms` and
    `global_norm` do not.

    Attributes:
      schedule: that the parameters are stacked for.
      num_layers: layers in all, in leaves ``[stages, slots, ...]``, as `jaxpipe.flax.layered_stages`,
        ``nnx_stages(..., num_layers=...)`` and ``from_nnx`` stack them; None: a stage is one layer, ``[stages, ...]``.
      order: of the rows, "model" or "storage", as the pipeline's.
      names: of the layers; by default ``layers[0]``, ...
      storage: needed where layers are of several kinds or divided by costs: ``stage.storage`` of the stage function
        that `jaxpipe.flax.layered_stages` and the like returned with the parameters.

    Raises:
      ValueError: an unknown order, fewer layers than stages, another number of names than layers, or of layers than in
        the storage.

    >>> import jaxpipe, optax
    >>> stacking = Stacking(jaxpipe.schedule.build("1f1b", 2, 4), num_layers=5)
    >>> params = Params({"kernel": jnp.ones((2, 3, 4, 4)), "scale": jnp.ones((2, 3, 4))}, {"table": jnp.ones((9, 4))})
    >>> stacking.weight_decay_mask(params)
    Params(stages={'kernel': True, 'scale': False}, outer={'table': True})
    >>> optimizer = optax.adamw(1e-3, weight_decay=0.1, mask=stacking.weight_decay_mask)
    >>> [name for name in stacking.norms(params)]
    ['layers[0]', 'layers[1]', 'layers[2]', 'layers[3]', 'layers[4]', 'outer']
    """

    schedule: Schedule
    num_layers: int | None = None
    order: str = "model"
    names: tuple[str, ...] = ()
    storage: LayerStorage | None = None

    def __post_init__(self) -> None:
        """Checks what is given, and names the layers."""
        stage_of_rows(self.schedule, self.order)
        if self.storage is not None:
            stored, stages = len(self.storage.kind_of), len(self.storage.counts)
            object.__setattr__(self, "num_layers", stored if self.num_layers is None else self.num_layers)
            if (self.num_layers, self.schedule.num_stages) != (stored, stages):
                raise ValueError(
                    f"a storage of {stored} layers in {stages} stages for {self.num_layers} layers in the "
                    f"{self.schedule.num_stages} of schedule {self.schedule.name!r}: give those that it was made for"
                )
        count = len(self.places)
        object.__setattr__(self, "names", tuple(self.names) or tuple(f"layers[{i}]" for i in range(count)))
        if len(self.names) != count:
            raise ValueError(f"{len(self.names)} names for {count} layers: give one for each")

    @property
    def depth(self) -> int:
        """Stacked dimensions that a leaf of the stages has before its own: 1, or 2 with slots."""
        return 1 if self.num_layers is None else 2

    @functools.cached_property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """``[rows][slots]``: the layer in each; in padding the row's last layer again."""
        stages = self.schedule.num_stages
        counts = (1,) * stages if self.num_layers is None else split_layers(self.num_layers, stages)
        counts = counts if self.storage is None else self.storage.counts
        layers = layers_of_stages(counts)
        return tuple(tuple(layers[stage]) for stage in stage_of_rows(self.schedule, self.order))

    @functools.cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """For each layer in the order of the forward pass its index in a stacked leaf: (row,), or (row, slot)."""
        found: dict[int, tuple[int, ...]] = {}
        for row, layers in enumerate(self.slots):
            for slot, layer in enumerate(layers):
                found.setdefault(layer, (row, slot)[: self.depth])
        return tuple(found[layer] for layer in sorted(found))

    @property
    def mixed(self) -> bool:
        """Whether layers have parameters of several structures, and leaves slots of their own."""
        return self.storage is not None and self.storage.mixed

    def weight_decay_mask(self, params: Params) -> Params:
        """For optax's ``mask=``: True where a parameter decays, that is, where a layer's has two dimensions or more.

        Experts ``[experts, in, out]`` and embeddings decay; norms, biases and whatever is not floating do not.
        """
        return self._map(lambda leaf, ndim: is_floating(leaf) and ndim >= 2, params)

    def by_layer(self, tree: Params) -> dict[str, Any]:
        """The stages' leaves layer by layer, without padding, by the layers' names; and what is outside as "outer".

        Args:
          tree: parameters, gradients or updates.

        >>> import jaxpipe
        >>> stacking = Stacking(jaxpipe.schedule.build("1f1b", 2, 4), names=("first", "second"))
        >>> stacking.by_layer(Params({"w": np.arange(2)}))["second"]["w"].item()
        1
        """
        self.check(tree)
        if self.storage is not None and self.storage.mixed:
            found = self.storage.unstack(tree.stages, self.schedule, self.order)
            return {**dict(zip(self.names, found, strict=True)), "outer": tree.outer}
        layers = {
            name: jax.tree.map(lambda leaf, place=place: leaf[place], tree.stages)
            for name, place in zip(self.names, self.places, strict=True)
        }
        return {**layers, "outer": tree.outer}

    def paths(self, params: Params) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of each parameter of the plain model: the key path of the stacked leaf that holds it, and its index there.

        >>> import jaxpipe
        >>> stacking = Stacking(jaxpipe.schedule.build("dualpipev", 2, 4), num_layers=5, order="storage")
        >>> paths = stacking.paths(Params({"norm": {"scale": jnp.ones((4, 2, 8))}}, {"table": jnp.ones((9, 8))}))
        >>> paths["layers[4].norm.scale"], paths["table"]
        ((".stages['norm']['scale']", (1, 0)), (".outer['table']", ()))
        """
        self.check(params)
        key = jax.tree_util.keystr
        stages, outer = (jax.tree_util.tree_leaves_with_path(tree) for tree in params)
        found = {
            _join(name, own): (f".stages{key(stages[leaf][0])}", place)
            for name, leaves in zip(self.names, self._leaves_of_layers(params.stages), strict=True)
            for own, leaf, place in leaves
        }
        return {**found, **{dotted(path): (f".outer{key(path)}", ()) for path, _ in outer}}

    def norms(self, tree: Params, *, each: bool = False) -> dict[str, jax.Array]:
        """The norm of each layer's parameters, gradients or updates, and of what is "outer"; for logs, under jit too.

        Args:
          tree: integers and other leaves that are not floating do not count.
          each: the norm of each parameter, named as by `paths`, instead of each layer.

        Returns:
          scalars, float32 or what is wider in the tree.
        """
        self.check(tree)
        squares = [_squares(leaf, self.depth) if is_floating(leaf) else None for leaf in jax.tree.leaves(tree.stages)]
        found: dict[str, Any] = {}
        for name, leaves in zip(self.names, self._leaves_of_layers(tree.stages), strict=True):
            own = {dotted(path): square[place] for path, leaf, place in leaves if (square := squares[leaf]) is not None}
            found.update(_named(name, own, each))
        leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree.outer) if is_floating(leaf)]
        outer = {dotted(path): _squares(leaf, 0) for path, leaf in leaves}
        found.update(outer if each else _named("outer", outer, each))
        return {name: jnp.sqrt(square) for name, square in found.items()}

    def global_norm(self, tree: Params) -> jax.Array:
        """The norm of the plain model's tree: padding does not count, nor what is not floating."""
        return jnp.sqrt(_sum([norm**2 for norm in self.norms(tree).values()]))

    def without_padding(self, tree: Params) -> Params:
        """The same with zeros in padding, for sums over whole leaves."""
        leaves, structure = jax.tree.flatten(tree.stages)
        used = [np.zeros(leading, bool) for leading in self._leading(tree.stages)]
        for layer in self._leaves_of_layers(tree.stages):
            for _, leaf, place in layer:
                used[leaf][place] = True

        def without(leaf: Any, used: np.ndarray) -> Any:
            if used.all() or not is_floating(leaf):
                return leaf
            mask = used.reshape(used.shape + (1,) * (np.ndim(leaf) - self.depth))
            return jnp.where(mask, leaf, jnp.zeros_like(leaf))

        return Params(jax.tree.unflatten(structure, map(without, leaves, used)), tree.outer)

    def check(self, tree: Any) -> None:
        """Raises ValueError unless this is Params whose stages are stacked so."""
        if not isinstance(tree, Params):
            raise ValueError(f"got a {type(tree).__name__}: give jaxpipe.Params, or gradients or updates in their form")
        leaves = jax.tree_util.tree_leaves_with_path(tree.stages)
        for (path, leaf), leading in zip(leaves, self._leading(tree.stages), strict=True):
            if np.shape(leaf)[: self.depth] != leading:
                wanted = ", ".join(map(str, leading))
                raise ValueError(
                    f"stages{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but {len(self.places)} layers of "
                    f"schedule {self.schedule.name!r} are stacked in leaves [{wanted}, ...]: give the schedule that "
                    "the parameters are stacked for, num_layers where stages hold several layers, and storage where "
                    "these are of several kinds or divided by costs"
                )

    def leaf_tables(self, stages: Any) -> list[np.ndarray]:
        """For each leaf of the stages, ``[rows, slots]``: the layer there; again the last in padding; -1 where unused.

        Args:
          stages: parameters, gradients or what an optimizer keeps of them; some leaves may be left out.

        >>> import jaxpipe
        >>> stacking = Stacking(jaxpipe.schedule.build("1f1b", 2, 4), num_layers=3)
        >>> stacking.leaf_tables({"w": jnp.ones((2, 2, 4))})[0].tolist()
        [[0, 1], [2, 2]]
        """
        if self.storage is None or not self.storage.mixed:
            return [np.asarray(self.slots)] * len(jax.tree.leaves(stages))
        tables = []
        for leaf in self._present(stages):
            table = np.full((len(self.slots), self.storage.size(leaf)), -1)
            for layer, slot in enumerate(self.storage.slots[leaf]):
                if slot is not None:
                    table[self.places[layer][0], slot] = layer
            tables.append(table)
        return tables

    def _present(self, stages: Any) -> list[int]:
        """The numbers that leaves of stages with layers of several kinds have among all such leaves."""
        assert self.storage is not None
        leaves = self.storage.tree.flatten_up_to(self.storage.checked(stages))
        return [leaf for leaf, node in enumerate(leaves) if jax.tree.leaves(node)]

    def _leading(self, stages: Any) -> list[tuple[int, ...]]:
        """The stacked dimensions of each leaf."""
        return [table.shape[: self.depth] for table in self.leaf_tables(stages)]

    def _leaves_of_layers(self, stages: Any) -> list[list[tuple[Any, int, tuple[int, ...]]]]:
        """For each layer its leaves: (path within the layer, number of the stacked leaf, index there)."""
        if self.storage is None or not self.storage.mixed:
            paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(stages)]
            return [[(path, leaf, place) for leaf, path in enumerate(paths)] for place in self.places]
        number = {leaf: index for index, leaf in enumerate(self._present(stages))}
        return [
            [(path, number[leaf], (row, slot)) for path, leaf, slot in self.storage.leaves_of(layer) if leaf in number]
            for layer, (row, _) in enumerate(self.places)
        ]

    def _map(self, function: Callable[[Any, int], Any], tree: Params) -> Params:
        """``function(leaf, its own dimensions)`` of every leaf."""
        self.check(tree)
        stages = jax.tree.map(lambda leaf: function(leaf, np.ndim(leaf) - self.depth), tree.stages)
        return Params(stages, jax.tree.map(lambda leaf: function(leaf, np.ndim(leaf)), tree.outer))


def _squares(leaf: Any, depth: int) -> jax.Array:
    """Sums of squares over a leaf's own dimensions, at least float32."""
    wide = jnp.abs(leaf)
    wide = wide.astype(accumulation_dtype(wide.dtype))
    return jnp.sum(wide * wide, axis=tuple(range(depth, leaf.ndim)))


def _named(name: str, squares: Mapping[str, jax.Array], each: bool) -> dict[str, jax.Array]:
    """A name's sum, or its parts under names of their own."""
    if each:
        return {f"{name}.{path}": square for path, square in squares.items()}
    return {name: _sum(list(squares.values()))} if squares else {}


def _sum(squares: Sequence[jax.Array]) -> jax.Array:
    """A sum in the widest dtype."""
    dtype = np.result_type(np.float32, *(square.dtype for square in squares))
    return functools.reduce(jnp.add, (square.astype(dtype) for square in squares), jnp.zeros((), dtype))


def dotted(path: Any) -> str:
    """A key path as text: "stages.attention.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _join(name: str, path: Any) -> str:
    text = dotted(path)
    return f"{name}.{text}" if name and text else name or text
