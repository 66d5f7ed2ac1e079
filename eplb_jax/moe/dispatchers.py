"""How rows travel between the devices of the experts' axis: the table of dispatchers."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from jaxtyping import Array, Int, Num

from eplb_jax.kernels.recipe import Recipe
from eplb_jax.moe import exchange


class Dispatcher(Protocol):
    """Carries rows to other devices and back; a line of `DISPATCHERS`.

    Block d of rows [ep, C, D] goes to device d of the axis, and block s of the result came from device s. The first
    ``counts[d]`` rows of block d are used; the others may come out as anything but are never read. Rows are of any
    dtype: those in 8 bits travel as integers, their scales beside them, each by a recipe that leaves them as they are.
    Both functions are differentiable, and each may run where a pipeline's ranks do different things, so that it must
    speak to the devices of its axis alone.
    """

    @property
    def gpu_only(self) -> bool:
        """Whether it runs on GPUs alone."""
        ...

    def why_not(self, recipe: Recipe) -> str | None:
        """Why rows cannot travel so by a recipe, with the remedy; None if they can."""
        ...

    def dispatch(
        self, rows: Num[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, recipe: Recipe
    ) -> Num[Array, "ep C D"]:
        """Rows to the devices that they are for, encoded as the recipe says."""
        ...

    def combine(
        self, rows: Num[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, recipe: Recipe
    ) -> Num[Array, "ep C D"]:
        """Rows back to the devices that `dispatch` took them from, with the counts that it was given."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """An all-to-all of fixed size: the default, on every platform.

    Attributes:
      groups: devices of the axis that exchange rows with each other alone; None: all.
    """

    groups: exchange.Groups | None = None

    @property
    def gpu_only(self) -> bool:
        """It runs everywhere."""
        return False

    def why_not(self, recipe: Recipe) -> str | None:
        """Nothing keeps rows from it."""
        del recipe
        return None

    def dispatch(
        self, rows: Num[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, recipe: Recipe
    ) -> Num[Array, "ep C D"]:
        """All rows, used or not."""
        del counts
        if recipe.encoding is None:
            return exchange.all_to_all(rows, axis, self.groups)
        return exchange.all_to_all_encoded(rows, axis, recipe.encoding, self.groups)

    def combine(
        self, rows: Num[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, recipe: Recipe
    ) -> Num[Array, "ep C D"]:
        """All rows as they are; their gradients encoded."""
        del counts
        if recipe.encoding is None:
            return exchange.all_to_all(rows, axis, self.groups)
        return exchange.all_to_all_encoded_back(rows, axis, recipe.encoding, self.groups)


class Ragged:
    """`jax.lax.ragged_all_to_all`: used rows only, on GPUs only."""

    gpu_only = True

    def why_not(self, recipe: Recipe) -> str | None:
        """It carries rows alone, nothing that belongs to them."""
        if recipe.encoding is None:
            return None
        return f"{recipe.name} travels by the dense exchange only: choose exchange='dense' or precision='bf16'"

    def dispatch(
        self, rows: Num[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, recipe: Recipe
    ) -> Num[Array, "ep C D"]:
        """The used rows; zeros in place of the others."""
        del recipe
        return exchange.all_to_all_ragged(rows, counts, axis)

    def combine(
        self, rows: Num[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, recipe: Recipe
    ) -> Num[Array, "ep C D"]:
        """The rows that came, as many as each device sent."""
        del recipe
        return exchange.all_to_all_ragged(rows, exchange.all_to_all(counts, axis), axis)


DISPATCHERS: dict[str, Dispatcher] = {"dense": Dense(), "ragged": Ragged()}
"""By the name that `eplb_jax.MoEConfig` has for them, ``exchange``."""

NODES = "nodes"
"""What ``exchange`` is called where rows travel by nodes; see `eplb_jax.moe.levels`."""
