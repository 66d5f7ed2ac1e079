"""What a stage keeps of a microbatch within a budget of bytes: the price of a byte at which the choice fits.

Keeping a value takes bytes of as many slots as the schedule has microbatches in flight, and computing it again takes
time. With a price for each byte both are seconds, and a minimum cut chooses (`jaxpipe.stage.residuals`). The budget is
met by raising the price, as Lagrange's multiplier is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxpipe.stage.stage import SplitStage

_LOWEST, _HIGHEST = 1e-18, 1.0
"""Seconds of a byte of a slot that are next to nothing, and so many that only bytes count."""

_STEPS = 14
"""Halvings of the logarithm of the price."""


class Slots(NamedTuple):
    """How many slots a schedule has for what a stage keeps.

    Attributes:
      stash: of what only the input gradient needs.
      weight: of what the weight gradient needs.
      cross: of what the input's half hands to the weights' half; 0 where no weight gradient is apart.
      apart: share of the microbatches whose weight gradient runs apart from the input gradient.
      copied: whether a value is copied into its slot and out of it; else it is kept where it was made.
    """

    stash: int = 1
    weight: int = 1
    cross: int = 1
    apart: float = 1.0
    copied: bool = True

    @property
    def microbatches(self) -> int:
        """For how many microbatches there is room."""
        return max(self.stash, self.weight)

    def nbytes(self, stash: Sequence[Any], weight: Sequence[Any], cross: Sequence[Any]) -> int:
        """Bytes of all slots, of the shapes and dtypes that one of each holds.

        >>> import jax
        >>> number, row = jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((8,), "int8")
        >>> Slots(3, 2, 1).nbytes([number], [number, row], [row])
        44
        """
        counts = zip((self.stash, self.weight, self.cross), (stash, weight, cross), strict=True)
        return sum(count * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) for count, leaves in counts)


class Division(NamedTuple):
    """Stages divided at one price.

    Attributes:
      splits: the stages.
      nbytes: of all slots.
      seconds: to compute again, and to copy into slots and out of them, for a microbatch of each stage.
      price: seconds of a byte of a slot.
    """

    splits: tuple[SplitStage, ...]
    nbytes: int
    seconds: float
    price: float


def fit(budget: int, slots: Slots, divide_at: Callable[[float], Division]) -> Division:
    """The choice of least time that fits.

    Args:
      budget: bytes of a microbatch and stage; all slots together may take as much times `Slots.microbatches`.
      slots: of the schedule.
      divide_at: the choice at a price, in seconds of a byte and slot.

    Raises:
      ValueError: no choice takes so few bytes; it tells the fewest.
    """
    most = budget * slots.microbatches
    found = divide_at(0.0)
    if found.nbytes <= most:
        return found
    found = divide_at(_HIGHEST)
    if found.nbytes > most:
        raise ValueError(
            f"stash={budget:,} bytes of a microbatch and stage are too few: the least that works, with all computed "
            f"again that can be, is {-(-found.nbytes // slots.microbatches):,} for each of {slots.microbatches} slots"
        )
    low, high = math.log2(_LOWEST), math.log2(_HIGHEST)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        other = divide_at(2.0**middle)
        if other.nbytes > most:
            low = middle
        else:
            high = middle
            found = min(found, other, key=lambda choice: choice.seconds)
    return found
