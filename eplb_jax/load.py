"""What experts have to do: tokens counted inside the training step, remembered over steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def count_tokens(
    experts: Int[Array, "*tokens k"],
    num_experts: int,
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> Int[Array, " experts"]:
    """How many tokens each expert gets.

    Args:
      experts: the logical experts of each token. Those out of range (-1 is usual for none) count nowhere.
      num_experts: how many there are.
      mask: which tokens count; padding should not.
      axis_name: mesh axes, as in `jax.lax.psum`, over whose shards to sum. Name the axes that split the tokens.

    Returns:
      int32; exact up to 2**31 - 1 tokens.

    >>> count_tokens(jnp.array([[0, 2], [2, 1]]), 4).tolist()
    [1, 1, 2, 0]
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}: it must be at least 1")
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ValueError(f"experts has dtype {experts.dtype}: it must hold the numbers of experts")
    if mask is not None:
        if mask.shape != experts.shape[:-1]:
            raise ValueError(f"mask has shape {mask.shape}, the tokens have {experts.shape[:-1]}")
        experts = jnp.where(mask[..., None], experts, jnp.array(-1, experts.dtype))
    # Comparing with every expert is what GPUs and CPUs do faster than adding where they must take turns.
    hit = experts.reshape(-1)[:, None] == jnp.arange(num_experts, dtype=experts.dtype)
    counts = hit.sum(0, dtype=jnp.int32)
    return counts if axis_name is None else jax.lax.psum(counts, axis_name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """Counts of the last steps; a pytree, so part of a training state.

    Attributes:
      counts: a ring; int32.
      steps: updates so far; int32.

    >>> window = SlidingWindow.create(window=2, layers=1, experts=3)
    >>> for counts in ([[9, 9, 9]], [[1, 0, 2]], [[0, 1, 2]]):
    ...     window = window.update(jnp.array(counts))
    >>> window.loads().tolist()
    [[1.0, 1.0, 4.0]]
    """

    counts: Int[Array, "window layers experts"]
    steps: Int[Array, ""]

    @classmethod
    def create(cls, window: int, layers: int, experts: int) -> SlidingWindow:
        """An empty one.

        Raises:
          ValueError: a size below 1.
        """
        if min(window, layers, experts) < 1:
            raise ValueError(f"window={window}, layers={layers}, experts={experts}: all must be at least 1")
        return cls(jnp.zeros((window, layers, experts), jnp.int32), jnp.zeros((), jnp.int32))

    def update(self, counts: Int[Array, "layers experts"]) -> SlidingWindow:
        """With the counts of one more step in place of the oldest."""
        _check_counts(counts, self.counts.shape[1:])
        place = self.steps % self.counts.shape[0]
        ring = jax.lax.dynamic_update_index_in_dim(self.counts, counts.astype(jnp.int32), place, 0)
        return SlidingWindow(ring, self.steps + 1)

    def loads(self) -> Float[Array, "layers experts"]:
        """Tokens of the window; float32, so that long windows do not overflow."""
        return self.counts.astype(jnp.float32).sum(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """Exponential moving average of counts; a pytree, so part of a training state.

    Attributes:
      average: of all updates, the start at zero included; float32.
      steps: updates so far; int32.
      decay: share of the average that an update leaves, 0 <= decay < 1; static.

    >>> average = MovingAverage.create(decay=0.5, layers=1, experts=2)
    >>> for counts in ([[4, 0]], [[1, 3]]):
    ...     average = average.update(jnp.array(counts))
    >>> average.loads().tolist()
    [[2.0, 2.0]]
    """

    average: Float[Array, "layers experts"]
    steps: Int[Array, ""]
    decay: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, decay: float, layers: int, experts: int) -> MovingAverage:
        """An empty one.

        Raises:
          ValueError: a size below 1, a decay out of [0, 1).
        """
        if min(layers, experts) < 1:
            raise ValueError(f"layers={layers}, experts={experts}: both must be at least 1")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: it must be at least 0 and less than 1; 1 - 1/n remembers about n steps")
        return cls(jnp.zeros((layers, experts), jnp.float32), jnp.zeros((), jnp.int32), float(decay))

    def update(self, counts: Int[Array, "layers experts"]) -> MovingAverage:
        """With the counts of one more step."""
        _check_counts(counts, self.average.shape)
        average = self.decay * self.average + (1 - self.decay) * counts.astype(jnp.float32)
        return MovingAverage(average, self.steps + 1, self.decay)

    def loads(self) -> Float[Array, "layers experts"]:
        """The average without the zeros it began with; zeros before the first update."""
        steps = self.steps.astype(jnp.float32)
        seen = 1 - jnp.float32(self.decay) ** steps
        return self.average / jnp.where(self.steps > 0, seen, 1.0)


def _check_counts(counts: jax.Array | np.ndarray, shape: tuple[int, ...]) -> None:
    if counts.shape != shape:
        raise ValueError(f"counts have shape {counts.shape}: they must be [layers, experts] = {shape}")
