"""Which stage has which layer, and parameters from model order to rows of stages and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.flax import split_layers


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Layers over stages. All stages have as many slots as the longest one has layers.

    A slot without a layer has zeros for parameters: such a layer adds nothing to its input, and all gradients of it
    are zero. A pipeline waits for its longest stage, so it costs memory but no time.

    Attributes:
      counts: layers of each stage, in the order of the forward pass.
      storage_order: the stage in each row of stacked parameters.

    >>> Arrangement((2, 1), (1, 0)).places
    ((1, 0), (1, 1), (0, 0))
    """

    counts: tuple[int, ...]
    storage_order: tuple[int, ...]

    @classmethod
    def of(cls, layers: int, schedule: jaxpipe.schedule.Schedule) -> Arrangement:
        """Layers as evenly as possible over a schedule's stages.

        Raises:
          ValueError: fewer layers than stages.
        """
        return cls(split_layers(layers, schedule.num_stages), schedule.storage_order)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.counts)

    @property
    def slots(self) -> int:
        """Layers that a stage can hold."""
        return max(self.counts)

    @property
    def padded(self) -> bool:
        """Whether there are slots without layers."""
        return len(set(self.counts)) > 1

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(row, slot) of each layer."""
        rows = {stage: row for row, stage in enumerate(self.storage_order)}
        return tuple((rows[stage], slot) for stage, count in enumerate(self.counts) for slot in range(count))

    @property
    def layer_of(self) -> np.ndarray:
        """``int[rows, slots]``: the layer at each place, -1 for none."""
        layers = np.full((self.stages, self.slots), -1)
        for layer, place in enumerate(self.places):
            layers[place] = layer
        return layers

    def to_layers(self, stages: dict[str, Any]) -> Any:
        """Trees ``{"layer_0": [rows, ...], ...}`` of a stage's slots -> one tree of ``[layers, ...]``."""
        rows, slots = np.asarray(self.places).T

        def collect(*leaves: Any) -> Any:
            xp = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
            return xp.stack(leaves, 1)[rows, slots]

        return jax.tree.map(collect, *(stages[f"layer_{slot}"] for slot in range(self.slots)))

    def from_layers(self, layers: Any) -> dict[str, Any]:
        """The inverse of `to_layers`; places without a layer get zeros, or of integers the last layer's.

        Integers are a placement, whose values must be valid wherever they stand.
        """
        order = self.layer_of

        def place(leaf: Any, slot: int) -> Any:
            found, empty = leaf[order[:, slot]], order[:, slot] < 0
            if not empty.any() or not jnp.issubdtype(leaf.dtype, jnp.floating):
                return found
            xp = np if isinstance(leaf, np.ndarray) else jnp
            shape = (-1, *(1,) * (leaf.ndim - 1))
            return xp.where(empty.reshape(shape), xp.zeros((), leaf.dtype), found)

        return {
            f"layer_{slot}": jax.tree.map(lambda leaf, slot=slot: place(leaf, slot), layers)
            for slot in range(self.slots)
        }
