"""Precision as data: how rows travel between devices and what products are made of; the table of recipes."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.blockwise import Blockwise
from eplb_jax.kernels.fp8 import BlocksOfE4M3
from eplb_jax.kernels.grouped_gemm.layout import ALIGN, FP8_ALIGN
from eplb_jax.kernels.quantise import GateGradients
from eplb_jax.kernels.registry import Backend
from eplb_jax.kernels.scaled import BLOCK, E4M3, ScaledMatrices, ScaledRows


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
class Arithmetic(Protocol):
    """How the operands of products become numbers of few bits with scales, and how these are multiplied. Static.

    `eplb_jax.kernels.blockwise.Blockwise` is one; another one is easiest as a subclass with some functions of its own.
    Numbers may be of any dtype that ``matmul`` and ``outer`` know, and scales any that `ScaledRows` and
    `ScaledMatrices` can hold. ``valid`` says how many rows of each block of 128 belong to a group; the others count as
    zeros in what is transposed.
    """

    def rows(self, x: Float[Array, "R K"], *, backend: Backend) -> ScaledRows:
        """Rows that are multiplied."""
        ...

    def gradient_rows(self, ct: Float[Array, "R K"], *, backend: Backend) -> ScaledRows:
        """Gradients of rows, which are multiplied for other gradients."""
        ...

    def columns(self, rows: ScaledRows, valid: Int[Array, " blocks"], *, backend: Backend) -> ScaledRows:
        """Rows of either kind transposed, as ``outer`` reads them: numbers [K, R]."""
        ...

    def weights(self, w: Float[Array, "G K N"], *, backend: Backend) -> tuple[ScaledMatrices, ScaledMatrices]:
        """Matrices for the product [G, N, K] and for its input gradient [G, K, N]."""
        ...

    def gate(
        self, hidden: Float[Array, "R FF"], weight: Float[Array, " R"], *, backend: Backend
    ) -> tuple[ScaledRows, ScaledRows]:
        """The weighted SwiGLU of ``hidden``, and ``hidden`` as it is kept for the backward pass."""
        ...

    def gate_backward(
        self,
        hidden: ScaledRows,
        weight: Float[Array, " R"],
        ct: Float[Array, "R F"],
        valid: Int[Array, " blocks"],
        *,
        backend: Backend,
    ) -> GateGradients:
        """The gradients of ``gate``'s arguments, and its result transposed."""
        ...

    def matmul(
        self, lhs: ScaledRows, rhs: ScaledMatrices, sizes: Int[Array, " G"], *, backend: Backend, dtype: DTypeLike
    ) -> Float[Array, "R N"]:
        """Each group's rows times its matrix transposed."""
        ...

    def outer(
        self, lhs: ScaledRows, dout: ScaledRows, sizes: Int[Array, " G"], *, backend: Backend, dtype: DTypeLike
    ) -> Float[Array, "G K N"]:
        """The weight gradient of each group's rows, which both operands have last."""
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the mixture-of-experts layer does with the precision of its numbers; a line of `RECIPES`.

    Attributes:
      name: what messages call it: its name in the table.
      arithmetic: makes all three products of the experts, routed and shared, with numbers of few bits. Dispatched rows
        then travel as its ``rows``, the gradients that the combine's transpose dispatches as its ``gradient_rows``, and
        both are multiplied as they arrive. Combined rows, and gradients of dispatched ones, travel as they are. None:
        products of the numbers that there are.
      kept: the dtype of what is kept of experts' inputs and of the gate's for the backward pass, and of what a divided
        backward pass keeps for weight gradients; None: that of the numbers that there are.
      gather: whether working copies of experts are made of numbers that are quantised already: the same values, fewer
        bytes to gather.
      encoding: how rows travel where products are made of plain numbers: dispatched ones, and the gradients that the
        combine's transpose dispatches; None: as they are.
      product_dtype: what plain numbers are cast to where routed experts multiply them; results are cast back. None: as
        they are.
      width_multiple, hidden_multiple: what the width, and that within an expert, must be a multiple of.

    Raises:
      ValueError: both an arithmetic and what is for plain products.

    >>> RECIPES["fp8"].align, RECIPES["bf16"].align
    (128, 8)
    """

    name: str
    arithmetic: Arithmetic | None = None
    kept: DTypeLike | None = None
    gather: bool = False
    encoding: Encoding | None = None
    product_dtype: DTypeLike | None = None
    width_multiple: int = 1
    hidden_multiple: int = 1

    def __post_init__(self) -> None:
        """Refuses what contradicts itself."""
        if self.arithmetic is not None and (self.encoding is not None or self.product_dtype is not None):
            raise ValueError(
                f"recipe {self.name}: encoding and product_dtype are for products of plain numbers; rows travel as its "
                "arithmetic makes them: leave both None"
            )
        if self.arithmetic is None and self.gather:
            raise ValueError(f"recipe {self.name}: gather=True needs an arithmetic, which quantises what is gathered")

    @property
    def align(self) -> int:
        """Groups of rows start at its multiples: scales along rows belong to one group."""
        return ALIGN if self.arithmetic is None else FP8_ALIGN

    def why_not(self, width: int, hidden: int) -> str | None:
        """Why a layer of these sizes cannot follow it, with the remedy; None if it can.

        >>> RECIPES["fp8"].why_not(256, 100)
        "fp8 needs hidden to be a multiple of 128, not 100: pad it, or take precision='bf16'"
        """
        sizes = (("width", width, self.width_multiple), ("hidden", hidden, self.hidden_multiple))
        for name, size, multiple in sizes:
            if size % multiple:
                return f"{self.name} needs {name} to be a multiple of {multiple}, not {size}: pad it, or take {_PLAIN}"
        return None

    def why_not_dtype(self, dtype: DTypeLike) -> str | None:
        """Why tokens of a dtype cannot follow it, with the remedy; None if they can.

        >>> RECIPES["fp8"].why_not_dtype(jnp.bfloat16) is None
        True
        """
        if self.arithmetic is None or jnp.dtype(dtype).name in ("bfloat16", "float32"):
            return None
        return f"{self.name} takes tokens of bfloat16 or float32, not {jnp.dtype(dtype).name}: cast x, or take {_PLAIN}"


_PLAIN = "precision='bf16'"

RECIPES: dict[str, Recipe] = {
    "bf16": Recipe("bf16"),
    "fp8": Recipe("fp8", Blockwise(), kept=E4M3, gather=True, width_multiple=BLOCK, hidden_multiple=BLOCK),
    "fp8_exchange": Recipe("fp8_exchange", encoding=BlocksOfE4M3(), width_multiple=BLOCK),
}
"""By the name that `eplb_jax.MoEConfig` has for them, ``precision``.

"bf16" leaves all numbers as they are, in bfloat16 where that is the dtype of parameters and tokens. "fp8" is
DeepSeek-V3's (arXiv 2412.19437, 3.3). "fp8_exchange" is what travels there, with products of the numbers that arrive.
"""
