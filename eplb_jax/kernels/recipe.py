"""Precision as data: how rows travel between devices and what products are made of; the table of recipes."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eplb_jax.kernels.fp8 import Fp8


@runtime_checkable
class Encoding(Protocol):
    """What travels between devices in place of rows. Static: hashable, the same whenever a program is traced."""

    def encode(self, rows: Float[Array, "*rows D"]) -> tuple[jax.Array, ...]:
        """Arrays [*rows, ...] of any dtypes and last axes, which travel one by one."""
        ...

    def decode(self, parts: tuple[jax.Array, ...], dtype: DTypeLike) -> Float[Array, "*rows D"]:
        """The rows, in the dtype that they had, from what `encode` made of them."""
        ...


@runtime_checkable
class Recipe(Protocol):
    """What the mixture-of-experts layer does with the precision of its numbers; a line of `RECIPES`."""

    @property
    def name(self) -> str:
        """What messages call it: its name in the table."""
        ...

    @property
    def encoding(self) -> Encoding | None:
        """How dispatched rows travel, and the gradients that the combine's transpose dispatches; None: as they are.

        Combined rows, and the gradients of dispatched ones, travel as they are.
        """
        ...

    def why_not(self, width: int) -> str | None:
        """Why a layer of this width cannot follow it, with the remedy; None if it can."""
        ...

    def product_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype in which the routed experts multiply rows and matrices of this one; results are cast back."""
        ...


class Bf16:
    """Rows travel and are multiplied as they are: in bfloat16, where that is the dtype of parameters and tokens."""

    name = "bf16"
    encoding = None

    def why_not(self, width: int) -> str | None:
        """Every width will do."""
        del width
        return None

    def product_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """As the rows are."""
        return dtype


RECIPES: dict[str, Recipe] = {"bf16": Bf16(), "fp8": Fp8()}
"""By the name that `eplb_jax.MoEConfig` has for them, ``precision``."""
