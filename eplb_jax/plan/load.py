"""What experts have to do: tokens counted inside the training step, remembered over steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from eplb_jax._jax import Tracer


def count_tokens(
    experts: Integer[Array | np.ndarray, "*tokens k"],
    num_experts: int,
    *,
    mask: Bool[Array | np.ndarray, "*tokens"] | Integer[Array | np.ndarray, "*tokens"] | None = None,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> Int[Array, " experts"]:
    """How many tokens each expert gets.

    Args:
      experts: the logical experts of each token, integers of any width, signed or not. Those out of range (-1 is usual
        for none) count nowhere.
      num_experts: how many there are.
      mask: which tokens count; padding should not. Bools, or integers that are zero for padding.
      axis_name: mesh axes, as in `jax.lax.psum`, over whose shards to sum. Name the axes that split the tokens.

    Returns:
      int32; exact up to 2**31 - 1 tokens.

    Raises:
      ValueError: no expert; ids that are not integers; a mask of another shape, or of floats.

    >>> count_tokens(jnp.array([[0, 2], [2, 1]]), 4).tolist()
    [1, 1, 2, 0]
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}: it must be at least 1")
    experts = _as_array(experts)
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ValueError(f"experts has dtype {experts.dtype}: it must hold the numbers of experts")
    limits = jnp.iinfo(experts.dtype)
    if limits.bits >= 32:  # what int32 may not hold is out of range, and stays so
        experts = experts.clip(max(-1, int(limits.min)), min(num_experts, int(limits.max)))
    experts = jnp.asarray(experts.astype(np.int32))
    if mask is not None:
        kept = _as_array(mask)
        if kept.shape != experts.shape[:-1]:
            raise ValueError(f"mask has shape {kept.shape}, the tokens have {experts.shape[:-1]}")
        if kept.dtype != np.bool_ and not jnp.issubdtype(kept.dtype, jnp.integer):
            raise ValueError(f"mask has dtype {kept.dtype}: it must be bool, True for tokens that count; compare first")
        experts = jnp.where(kept.astype(np.bool_)[..., None], experts, -1)
    # Comparing with every expert is what GPUs and CPUs do faster than adding where they must take turns.
    hit = experts.reshape(-1)[:, None] == jnp.arange(num_experts, dtype=jnp.int32)
    counts = hit.sum(0, dtype=jnp.int32)
    return counts if axis_name is None else jax.lax.psum(counts, axis_name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlidingWindow:
    """Counts of the last steps; a pytree, so part of a training state.

    Attributes:
      counts: a ring; float32, so that it holds shares as well as counts: these exactly up to 2**24 tokens of an expert
        in a step, beyond with a relative error of 6e-8.
      steps: updates so far; int32.

    >>> window = SlidingWindow.create(window=2, layers=1, experts=3)
    >>> for counts in ([[9, 9, 9]], [[1, 0, 2]], [[0, 1, 2]]):
    ...     window = window.update(jnp.array(counts))
    >>> window.loads().tolist()
    [[1.0, 1.0, 4.0]]
    """

    counts: Float[Array, "window layers experts"]
    steps: Int[Array, ""]

    @classmethod
    def create(cls, window: int, layers: int, experts: int) -> SlidingWindow:
        """Makes one without any update.

        Raises:
          ValueError: a size below 1.
        """
        if min(window, layers, experts) < 1:
            raise ValueError(f"window={window}, layers={layers}, experts={experts}: all must be at least 1")
        return cls(jnp.zeros((window, layers, experts), jnp.float32), jnp.zeros((), jnp.int32))

    def update(self, counts: Num[Array | np.ndarray, "layers experts"]) -> SlidingWindow:
        """Returns the window with the counts of one more step in place of the oldest; NaN stays until it leaves.

        Raises:
          ValueError: counts of another shape, or that are not numbers.
        """
        counts = _as_counts(counts, self.counts.shape[1:])
        place = self.steps % self.counts.shape[0]
        ring = jax.lax.dynamic_update_index_in_dim(self.counts.astype(jnp.float32), counts, place, 0)
        return SlidingWindow(ring, self.steps + 1)

    def loads(self) -> Float[Array, "layers experts"]:
        """Tokens of the window; float32, with no more error than its steps have however many they are."""
        total = self.counts.astype(jnp.float32)
        while len(total) > 1:  # in pairs: a sum far above 2**24 would not notice small counts
            if len(total) % 2:
                total = jnp.concatenate([total, jnp.zeros_like(total[:1])])
            total = total[::2] + total[1::2]
        return total[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """Exponential moving average of counts; a pytree, so part of a training state.

    Of NumPy's arrays where it is made ``on_host``: then no update waits for a device.

    Attributes:
      average: of all updates, weighted by their age; zeros before the first; float32.
      steps: updates so far; int32.
      decay: share of the average that an update leaves when many have been made, 0 <= decay < 1; static.

    >>> average = MovingAverage.create(decay=0.5, layers=1, experts=2)
    >>> for counts in ([[4, 0]], [[1, 3]]):
    ...     average = average.update(jnp.array(counts))
    >>> average.loads().tolist()
    [[2.0, 2.0]]
    """

    average: Float[Array | np.ndarray, "layers experts"]
    steps: Int[Array | np.ndarray, ""]
    decay: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, decay: float, layers: int, experts: int, *, on_host: bool = False) -> MovingAverage:
        """Makes one without any update, of JAX's arrays or, on the host, of NumPy's.

        Raises:
          ValueError: a size below 1, a decay out of [0, 1) or traced.
        """
        if min(layers, experts) < 1:
            raise ValueError(f"layers={layers}, experts={experts}: both must be at least 1")
        if isinstance(decay, Tracer):
            raise ValueError(f"decay={decay} is traced: it is static, so make the average outside of jit, with a float")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: it must be at least 0 and less than 1; 1 - 1/n remembers about n steps")
        xp = np if on_host else jnp
        return cls(xp.zeros((layers, experts), xp.float32), xp.zeros((), xp.int32), float(decay))

    def update(self, counts: Num[Array | np.ndarray, "layers experts"]) -> MovingAverage:
        """Returns the average with the counts of one more step.

        Raises:
          ValueError: counts of another shape, or that are not numbers.
        """
        counts = _as_array(counts)
        _check_counts(counts, self.average.shape)
        xp = jnp if isinstance(self.average, jax.Array) or isinstance(counts, jax.Array) else np
        counts, average, steps = xp.asarray(counts.astype(np.float32)), self.average.astype(np.float32), self.steps + 1
        # The newest of n updates has the share (1 - decay) / (1 - decay**n). Both differences are made without ever
        # rounding a decay near 1 to float32, and an average of equal counts stays what it is.
        growth = max(math.log(self.decay), -100.0) if self.decay else -100.0
        share = (1 - self.decay) / -xp.expm1(np.float32(growth) * steps.astype(np.float32))
        share = xp.where(steps == 1, np.float32(1), share.astype(np.float32))
        return MovingAverage(average + share * (counts - average), steps, self.decay)

    def loads(self) -> Float[Array | np.ndarray, "layers experts"]:
        """The average; zeros before the first update."""
        return self.average


def _as_array(array: Any) -> Any:
    """JAX's arrays as they are, others as NumPy's: made into JAX's, 64 bits might wrap around."""
    return array if isinstance(array, jax.Array) else np.asarray(array)


def _as_counts(counts: Any, shape: tuple[int, ...]) -> jax.Array:
    counts = _as_array(counts)
    _check_counts(counts, shape)
    return jnp.asarray(counts.astype(np.float32))


def _check_counts(counts: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless these are numbers of this shape."""
    if counts.shape != shape:
        raise ValueError(f"counts have shape {counts.shape}: they must be [layers, experts] = {shape}")
    if not jnp.issubdtype(counts.dtype, jnp.integer) and not jnp.issubdtype(counts.dtype, jnp.floating):
        raise ValueError(f"counts have dtype {counts.dtype}: they must be integers or floats")
