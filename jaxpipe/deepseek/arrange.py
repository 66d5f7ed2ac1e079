"""Which stage has which layers, and parameters from model order to rows of stages and back."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.deepseek.balance import balanced_counts, even_out_ranks
from jaxpipe.flax import split_layers


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Layers over stages. All stages have as many slots as the longest one has layers.

    A stage's layers of the model's first kind are in the first slots, all others in the last: so each kind of layer is
    in as few slots as can be, and what only such layers have takes as little memory as can be. A slot without a layer
    has zeros for parameters. Where all layers are of one kind, so are all stages, and a shorter one runs its empty
    slots: such a layer adds nothing to its input, and all gradients of it are zero. A pipeline waits for its longest
    stage, so it costs memory but no time.

    Attributes:
      counts: layers of each stage, in the order of the forward pass.
      storage_order: the stage in each row of stacked parameters.
      layer_kinds: the kind of each layer of the model.

    >>> shape = Arrangement((2, 1), (1, 0), ("dense", "moe", "moe"))
    >>> shape.places, shape.stage_kinds, shape.kind_of
    (((1, 0), (1, 1), (0, 1)), (('dense', 'moe'), ('moe',)), (0, 1))
    """

    counts: tuple[int, ...]
    storage_order: tuple[int, ...]
    layer_kinds: tuple[str, ...]

    @classmethod
    def of(
        cls,
        layer_kinds: Sequence[str],
        schedule: jaxpipe.schedule.Schedule,
        costs: Mapping[str, float] | None = None,
        last: float = 0.0,
        first: float = 0.0,
    ) -> Arrangement:
        """Layers over a schedule's stages so that the costliest stage, and the busiest rank, have as little as can be.

        Fewer layers than stages are in the first stages, one in each.

        Args:
          layer_kinds: of each layer, in the order of the forward pass.
          schedule: whose stages get the layers.
          costs: of a layer of each kind, in any unit; None: all cost the same, and longer stages come first.
          last, first: what else the last and the first stage cost, in the same unit.

        Raises:
          ValueError: no layers; costs that are not positive, of other kinds than the layers'.

        >>> schedule = jaxpipe.schedule.build("1f1b", 2, 4)
        >>> Arrangement.of(("dense", *("moe",) * 4), schedule, {"dense": 4.0, "moe": 1.0}).counts
        (1, 4)
        """
        stages, kinds = schedule.num_stages, tuple(layer_kinds)
        if 0 < len(kinds) < stages:
            # Of small models, such as tests have: the last stages hand on what they get.
            return cls((1,) * len(kinds) + (0,) * (stages - len(kinds)), schedule.storage_order, kinds)
        even = split_layers(len(kinds), stages)
        if costs is None:
            return cls(even, schedule.storage_order, kinds)
        counts = balanced_counts(kinds, stages, costs, last, first)
        counts = even_out_ranks(counts, kinds, costs, last, schedule.routes, first)
        return cls(counts, schedule.storage_order, kinds)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.counts)

    @property
    def slots(self) -> int:
        """Layers that a stage can hold."""
        return max(self.counts)

    @property
    def alike(self) -> bool:
        """Whether all layers are of one kind, so that all stages can be too."""
        return len(set(self.layer_kinds)) == 1

    @property
    def padded(self) -> bool:
        """Whether there are slots without layers."""
        return len(set(self.counts)) > 1

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The kinds of each stage's layers, stages in the order of the forward pass."""
        ends = itertools.accumulate(self.counts, initial=0)
        return tuple(self.layer_kinds[start:end] for start, end in itertools.pairwise(ends))

    @property
    def stage_kinds(self) -> tuple[tuple[str, ...], ...]:
        """What kinds of stages there are, each as the kinds of its layers."""
        return tuple(dict.fromkeys(self.rows))

    @property
    def kind_of(self) -> tuple[int, ...]:
        """Of each stage an index of `stage_kinds`."""
        return tuple(map(self.stage_kinds.index, self.rows))

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(row, slot) of each layer."""
        return tuple(self._places_of(None))

    @property
    def layer_of(self) -> np.ndarray:
        """``int[rows, slots]``: the layer at each place, -1 for none."""
        return self._layer_of(None)

    def stages_and_slots(self, kinds: Collection[str] | None = None) -> list[tuple[int, int]]:
        """(stage, slot) of each layer of some kinds, or of all, in the order of the forward pass."""
        every = ((stage, slot) for stage, row in enumerate(self.rows) for slot in self.slots_of_row(row))
        layers = zip(every, self.layer_kinds, strict=True)
        return [place for place, kind in layers if kinds is None or kind in kinds]

    def slots_of_row(self, row: Sequence[str]) -> tuple[int, ...]:
        """The slots of a stage's layers, given their kinds."""
        left = sum(kind == self.layer_kinds[0] for kind in row)
        return tuple(slot if slot < left else slot + self.slots - len(row) for slot in range(len(row)))

    def slots_of(self, kinds: Collection[str] | None = None) -> list[int]:
        """The slots in which some stage has a layer of these kinds."""
        return sorted({slot for _, slot in self.stages_and_slots(kinds)})

    def to_layers(self, stages: Mapping[str, Any], kinds: Collection[str] | None = None) -> Any:
        """Trees ``{"layer_0": [rows, ...], ...}`` of a stage's slots -> one tree of ``[layers, ...]``.

        Args:
          stages: a tree for each of `slots_of` these kinds.
          kinds: of the layers that are wanted; None: all.
        """
        used = self.slots_of(kinds)
        rows, slots = np.asarray([(row, used.index(slot)) for row, slot in self._places_of(kinds)]).T

        def collect(*leaves: Any) -> Any:
            xp = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
            return xp.stack(leaves, 1)[rows, slots]

        return jax.tree.map(collect, *(stages[f"layer_{slot}"] for slot in used))

    def from_layers(self, layers: Any, kinds: Collection[str] | None = None) -> dict[str, Any]:
        """The inverse of `to_layers`; places without a layer get zeros, or of integers the last layer's.

        Integers are a placement, whose values must be valid wherever they stand.
        """
        order = self._layer_of(kinds)

        def place(leaf: Any, slot: int) -> Any:
            found, empty = leaf[order[:, slot]], order[:, slot] < 0
            if not empty.any() or not jnp.issubdtype(leaf.dtype, jnp.floating):
                return found
            xp = np if isinstance(leaf, np.ndarray) else jnp
            shape = (-1, *(1,) * (leaf.ndim - 1))
            return xp.where(empty.reshape(shape), xp.zeros((), leaf.dtype), found)

        return {
            f"layer_{slot}": jax.tree.map(lambda leaf, slot=slot: place(leaf, slot), layers)
            for slot in self.slots_of(kinds)
        }

    def _layer_of(self, kinds: Collection[str] | None) -> np.ndarray:
        """`layer_of`, counting layers of some kinds alone."""
        layers = np.full((self.stages, self.slots), -1)
        for layer, place in enumerate(self._places_of(kinds)):
            layers[place] = layer
        return layers

    def _places_of(self, kinds: Collection[str] | None) -> list[tuple[int, int]]:
        """(row, slot) of each layer of some kinds."""
        row_of = {stage: row for row, stage in enumerate(self.storage_order)}
        return [(row_of[stage], slot) for stage, slot in self.stages_and_slots(kinds)]
