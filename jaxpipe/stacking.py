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

    Raises:
      ValueError: an unknown order, fewer layers than stages, another number of names than layers.

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

    def __post_init__(self) -> None:
        """Checks what is given, and names the layers."""
        stage_of_rows(self.schedule, self.order)
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
            _join(name, path): (f".stages{key(path)}", place)
            for name, place in zip(self.names, self.places, strict=True)
            for path, _ in stages
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
        stages, outer = (
            {dotted(path): _squares(leaf, depth) for path, leaf in jax.tree_util.tree_leaves_with_path(part)
             if is_floating(leaf)}
            for part, depth in ((tree.stages, self.depth), (tree.outer, 0))
        )  # fmt: skip
        found: dict[str, Any] = {}
        for name, place in zip(self.names, self.places, strict=True):
            found.update(_named(name, {path: squares[place] for path, squares in stages.items()}, each))
        found.update(outer if each else _named("outer", outer, each))
        return {name: jnp.sqrt(square) for name, square in found.items()}

    def global_norm(self, tree: Params) -> jax.Array:
        """The norm of the plain model's tree: padding does not count, nor what is not floating."""
        return jnp.sqrt(_sum([norm**2 for norm in self.norms(tree).values()]))

    def without_padding(self, tree: Params) -> Params:
        """The same with zeros in padding, for sums over whole leaves."""
        first = np.zeros((len(self.slots), len(self.slots[0])), bool)
        for place in self.places:
            first[(*place, 0)[:2]] = True
        if self.depth == 1 or first.all():
            return tree

        def zero(leaf: Any, ndim: int) -> Any:
            return jnp.where(first.reshape(first.shape + (1,) * ndim), leaf, jnp.zeros_like(leaf))

        return Params(self._map(lambda leaf, n: zero(leaf, n) if is_floating(leaf) else leaf, tree).stages, tree.outer)

    def check(self, tree: Any) -> None:
        """Raises ValueError unless this is Params whose stages are stacked so."""
        if not isinstance(tree, Params):
            raise ValueError(f"got a {type(tree).__name__}: give jaxpipe.Params, or gradients or updates in their form")
        leading = (len(self.slots), len(self.slots[0]))[: self.depth]
        wanted = ", ".join(map(str, leading))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree.stages):
            if np.shape(leaf)[: self.depth] != leading:
                raise ValueError(
                    f"stages{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but {len(self.places)} layers of "
                    f"schedule {self.schedule.name!r} are stacked in leaves [{wanted}, ...]: give the schedule that "
                    "the parameters are stacked for, and num_layers where stages hold several layers"
                )

    def _map(self, function: Callable[[Any, int], Any], tree: Params) -> Params:
        """``function(leaf, its own dimensions)`` of every leaf."""
        self.check(tree)
        stages = jax.tree.map(lambda leaf: function(leaf, np.ndim(leaf) - self.depth), tree.stages)
        return Params(stages, jax.tree.map(lambda leaf: function(leaf, np.ndim(leaf)), tree.outer))


def trainable_mask(params: Any, frozen: Callable[[str], bool] | None = None) -> Any:
    """Of each leaf whether it is trained: it is floating, and ``frozen`` does not say otherwise.

    Args:
      params: `jaxpipe.Params`, or any tree.
      frozen: ``frozen(path)`` of a leaf's path with dots, as in "stages.attention.query.kernel" or "outer.embed".

    >>> params = Params({"w": jnp.ones(2), "lora": jnp.ones(2), "placement": jnp.arange(2)}, None)
    >>> trainable_mask(params, frozen=lambda path: "lora" not in path)
    Params(stages={'lora': True, 'placement': False, 'w': False}, outer=None)
    """

    def trained(path: Any, leaf: Any) -> bool:
        return is_floating(leaf) and not (frozen is not None and frozen(dotted(path)))

    return jax.tree_util.tree_map_with_path(trained, params)


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
