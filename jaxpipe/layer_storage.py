"""Where the parameters of layers stand in the stacked parameters of stages, whatever their structures.

Layers of one kind (the same structure, shapes and dtypes) are rows of leaves ``[stages, slots, ...]`` in the structure
of a layer. Layers of several kinds are rows of the union of their leaves: a nested dict by the names along each leaf's
path. Kinds that have a leaf in common (the same path, shape and dtype) share one stacked leaf. Each leaf has as many
slots as a stage holds layers with this leaf, at most; in stages that hold fewer, the rest is unused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.params import stack_stages, unstack_stages
from jaxpipe.schedule.schedule import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStorage:
    """Where the leaves of each layer's parameters stand in those of a stage; made by `LayerStorage.of`.

    Attributes:
      counts: ``[stages]``, layers of each stage.
      kind_of: ``[layers]``, the kind of each layer's parameters.
      structures: ``[kinds]``, of a layer's parameters.
      tree: structure of a stage's parameters.
      places: ``[kinds]`` of ``[leaves of the kind]``, each leaf's number among a stage's leaves.
      slots: ``[leaves of a stage]`` of ``[layers]``, the slot of each layer in its stage; None without the leaf.
      by_cost: whether the counts follow from what layers cost.
    """

    counts: tuple[int, ...]
    kind_of: tuple[int, ...]
    structures: tuple[Any, ...]
    tree: Any
    places: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int | None, ...], ...]
    by_cost: bool = False

    @classmethod
    def of(cls, layers: Any, counts: Sequence[int], *, by_cost: bool = False) -> LayerStorage:
        """The storage of layers in stages of so many.

        Args:
          layers: the parameters of each, arrays or shapes: a list or tuple of pytrees, or one pytree of rows.
          counts: ``[stages]``, layers of each stage.
          by_cost: whether these follow from what layers cost.
        """
        if not is_sequence(layers):
            paths, structure = jax.tree_util.tree_flatten_with_path(layers)
            kind_of, structures, of_kinds = (0,) * sum(counts), (structure,), [[(path, None) for path, _ in paths]]
        else:
            kind_of, structures, of_kinds = _kinds(layers)
        tree, places, kinds_with = _union(structures, of_kinds)
        align = _Alignment(tuple(counts), kind_of)
        slots = {kinds: align.slots(kinds) for kinds in set(kinds_with)}
        slots_of_leaves = tuple(slots[kinds] for kinds in kinds_with)
        return cls(tuple(counts), kind_of, structures, tree, places, slots_of_leaves, by_cost)

    @property
    def mixed(self) -> bool:
        """Whether there are several kinds."""
        return len(self.structures) > 1

    @property
    def apart(self) -> bool:
        """Whether stages that hold other rows of layers are kinds of their own, and none is padded.

        Where all layers cost the same the longest stage sets the pace, and padding costs no time. Where costs divided
        them, a stage with fewer layers is as busy as the others.
        """
        return self.mixed or (self.by_cost and len(set(self.counts)) > 1)

    @property
    def starts(self) -> list[int]:
        """``[stages]``: the first layer of each."""
        return [0, *itertools.accumulate(self.counts)][:-1]

    def layers_of(self, stage: int) -> range:
        """The layers of a stage."""
        return range(self.starts[stage], self.starts[stage] + self.counts[stage])

    def slots_of(self, layer: int) -> tuple[int, ...]:
        """``[leaves of its kind]``: the slots in which a layer stands."""
        found = [self.slots[place][layer] for place in self.places[self.kind_of[layer]]]
        assert None not in found
        return tuple(slot for slot in found if slot is not None)

    def leaves_of(self, layer: int) -> list[tuple[Any, int, int]]:
        """(path within the layer, number among the leaves of a stage, slot) of each of a layer's leaves."""
        structure = self.structures[self.kind_of[layer]]
        named = jax.tree.unflatten(structure, range(structure.num_leaves))
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(named)]
        return list(zip(paths, self.places[self.kind_of[layer]], self.slots_of(layer), strict=True))

    def size(self, leaf: int) -> int:
        """The slots that a leaf of a stage has."""
        return 1 + max(slot for slot in self.slots[leaf] if slot is not None)

    def stack(self, layers: Any, schedule: Schedule, order: str = "model") -> Any:
        """The parameters of layers in the rows of an order, leaves ``[stages, slots, ...]``.

        Unused slots hold copies of another layer's, the last of the same stage where it has one.
        """
        rows = [self._rows(stage) for stage in range(len(self.counts))]
        if is_sequence(layers):
            flat = [jax.tree.leaves(layer) for layer in layers]
            number = [{place: i for i, place in enumerate(places)} for places in self.places]

            def leaf(place: int, layer: int) -> Any:
                return flat[layer][number[self.kind_of[layer]][place]]

            stages = [[jnp.stack([leaf(p, i) for i in row]) for p, row in enumerate(stage)] for stage in rows]
        else:
            leaves = jax.tree.leaves(layers)
            stages = [[leaf[np.asarray(row)] for leaf, row in zip(leaves, stage, strict=True)] for stage in rows]
        return stack_stages([jax.tree.unflatten(self.tree, stage) for stage in stages], schedule, order)

    def unstack(self, stacked: Any, schedule: Schedule, order: str = "model") -> list[Any]:
        """The inverse of `stack`: the parameters, or their gradients, of layers 0, 1, ...

        In place of a leaf there may be a node without leaves, as optimizers have it for what they do not update.
        """
        stages = [self.tree.flatten_up_to(stage) for stage in unstack_stages(self.checked(stacked), schedule, order)]
        found = []
        for stage, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            for layer in range(start, start + count):
                kind = self.kind_of[layer]
                leaves = [
                    jax.tree.map(lambda leaf, slot=slot: leaf[slot], stages[stage][place])
                    for place, slot in zip(self.places[kind], self.slots_of(layer), strict=True)
                ]
                found.append(jax.tree.unflatten(self.structures[kind], leaves))
        return found

    def checked(self, stacked: Any) -> Any:
        """The same; raises ValueError unless it has the structure of a stage's parameters, but for leaves left out."""
        try:
            fits = all(len(jax.tree.leaves(leaf)) <= 1 for leaf in self.tree.flatten_up_to(stacked))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"the stacked parameters have structure {jax.tree.structure(stacked)}, and those of these layers "
                f"{self.tree}: give the parameters that were stacked with this stage, or their gradients"
            )
        return stacked

    def _rows(self, stage: int) -> list[list[int]]:
        """``[leaves][slots]``: the layer that stands there."""
        own = self.layers_of(stage)
        found = []
        for leaf, slots in enumerate(self.slots):
            there = {slots[layer]: layer for layer in own if slots[layer] is not None}
            with_leaf = [layer for layer, slot in enumerate(slots) if slot is not None]
            unused = max(there.values(), default=with_leaf[0])
            found.append([there.get(slot, unused) for slot in range(self.size(leaf))])
        return found


def is_sequence(layers: Any) -> bool:
    """Whether this is one pytree for each layer, and not one of rows."""
    return isinstance(layers, list | tuple) and not hasattr(layers, "_fields")


_Leaf = tuple[tuple[Any, ...], Any]
"""The path of a leaf, and its shape and dtype."""


def _kinds(layers: Sequence[Any]) -> tuple[tuple[int, ...], tuple[Any, ...], list[list[_Leaf]]]:
    """(the kind of each layer, each kind's structure, each kind's leaves)."""
    found: list[tuple[Any, list[_Leaf]]] = []
    kind_of = []
    for layer in layers:
        leaves, structure = jax.tree_util.tree_flatten_with_path(layer)
        kind = structure, [(path, (np.shape(leaf), jnp.result_type(leaf))) for path, leaf in leaves]
        if kind not in found:
            found.append(kind)
        kind_of.append(found.index(kind))
    return tuple(kind_of), tuple(structure for structure, _ in found), [leaves for _, leaves in found]


def _union(
    structures: Sequence[Any], of_kinds: Sequence[Sequence[_Leaf]]
) -> tuple[Any, tuple[tuple[int, ...], ...], list[frozenset[int]]]:
    """(structure of a stage's parameters, the place of each kind's leaves in it, the kinds that have each leaf)."""
    if len(structures) == 1:
        count = len(of_kinds[0])
        return structures[0], (tuple(range(count)),), [frozenset({0})] * count
    kinds_with: dict[_Leaf, list[int]] = {}
    for kind, leaves in enumerate(of_kinds):
        for path, described in leaves:
            kinds_with.setdefault((tuple(map(_name, path)), described), []).append(kind)
    paths = [path for path, _ in kinds_with]
    inner = {path[:length] for path in paths for length in range(len(path))}

    def stored(path: tuple[Any, ...], kinds: Sequence[int]) -> tuple[Any, ...]:
        """The path of a stored leaf: the parameter's own, and the first kind where others have something else there."""
        return (*path, f"kind_{kinds[0]}") if path in inner or paths.count(path) > 1 else path

    keys = {stored(leaf[0], kinds): leaf for leaf, kinds in kinds_with.items()}
    taken = [path for path in keys if any(path[:length] in keys for length in range(len(path)))]
    if taken or len(keys) < len(kinds_with):
        raise ValueError(
            f"the layers name parameters kind_0, kind_1, ... ({[*taken, *keys][0]}), which is how parameters of one "
            "path and several shapes are told apart: rename them"
        )
    numbers, tree = jax.tree.flatten(_nest(keys))
    leaf_at = list(keys.values())
    place_of = {leaf_at[number]: place for place, number in enumerate(numbers)}
    places = (tuple(place_of[tuple(map(_name, path)), described] for path, described in kind) for kind in of_kinds)
    return tree, tuple(places), [frozenset(kinds_with[leaf_at[number]]) for number in numbers]


def _nest(paths: Mapping[tuple[Any, ...], Any]) -> Any:
    """A nested dict of the numbers of paths."""

    def nest(numbered: Mapping[tuple[Any, ...], int]) -> Any:
        if () in numbered:
            return numbered[()]
        groups: dict[Any, dict[tuple[Any, ...], int]] = {}
        for (name, *rest), number in numbered.items():
            groups.setdefault(name, {})[tuple(rest)] = number
        if len({type(name) for name in groups}) == 1:
            return {name: nest(group) for name, group in groups.items()}
        texts = {str(name): nest(group) for name, group in groups.items()}  # dicts sort their keys
        if len(texts) < len(groups):
            raise ValueError(f"layers of several kinds name parameters {list(groups)} in one place: rename them")
        return texts

    return nest({path: number for number, path in enumerate(paths)})


def _name(key: Any) -> Any:
    """What a key of a path is called in a nested dict."""
    return next((getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)), str(key))


@dataclasses.dataclass(frozen=True)
class _Alignment:
    """Slots, in the same place in all stages for layers at a stage's start, or end, that are of one kind in all.

    What runs such layers then finds their parameters without asking which stage it is.
    """

    counts: tuple[int, ...]
    kind_of: tuple[int, ...]

    def slots(self, kinds: frozenset[int]) -> tuple[int | None, ...]:
        """``[layers]``: slots for a leaf of these kinds."""
        stages = self._stages()
        from_end = self._from_end(stages)
        members = [[i for i in layers if self.kind_of[i] in kinds] for layers in stages]
        size = max(map(len, members))
        found: dict[int, int] = {}
        for layers, own in zip(stages, members, strict=True):
            last = set(layers[len(layers) - from_end :])
            found.update((i, size - len(own) + n if i in last else n) for n, i in enumerate(own))
        return tuple(found.get(layer) for layer in range(len(self.kind_of)))

    def _stages(self) -> list[range]:
        ends = list(itertools.accumulate(self.counts))
        return [range(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    def _from_end(self, stages: Sequence[range]) -> int:
        """The layers at the end of each stage that stand as far from the last slot in all."""
        kinds = [[self.kind_of[layer] for layer in layers] for layers in stages]
        shortest = min(self.counts)
        same = [len({row[i] for row in kinds}) == 1 for i in range(shortest)]
        start = same.index(False) if False in same else shortest
        same = [len({row[-1 - i] for row in kinds}) == 1 for i in range(shortest - start)]
        return same.index(False) if False in same else len(same)
