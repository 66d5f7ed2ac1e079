"""The arithmetic of the recipe "fp8": e4m3 everywhere, a scale for 128 numbers of a row and for 128 x 128 weights."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eplb_jax.kernels import quantise
from eplb_jax.kernels.fp8_gemm.interface import scaled_matmul, scaled_outer
from eplb_jax.kernels.quantise import GateGradients
from eplb_jax.kernels.registry import Backend
from eplb_jax.kernels.scaled import ScaledMatrices, ScaledRows, quantise_rows


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """A `eplb_jax.kernels.recipe.Arithmetic`.

    Rows are quantised where there are fewest of them, tokens before they are copied to their experts' rows, and
    transposed where a weight gradient reads them.

    Attributes:
      power_of_two: whether scales are powers of two: then transposing rounds only what becomes subnormal.

    Source: the DeepSeek-V3 report, arXiv 2412.19437, 3.3.2 and 3.3.3.
    """

    power_of_two: bool = True

    def rows(self, x: Float[Array, "R K"], *, backend: Backend) -> ScaledRows:
        """A scale for 128 numbers of a row."""
        del backend  # tokens are few, and XLA's fusion reads them once
        return quantise_rows(x, power_of_two=self.power_of_two)

    def gradient_rows(self, ct: Float[Array, "R K"], *, backend: Backend) -> ScaledRows:
        """As `rows`."""
        return self.rows(ct, backend=backend)

    def columns(self, rows: ScaledRows, valid: Int[Array, " blocks"], *, backend: Backend) -> ScaledRows:
        """A scale for 128 rows of a column."""
        return quantise.columns_of(rows, valid, power_of_two=self.power_of_two, backend=_casts(backend))

    def weights(self, w: Float[Array, "G K N"], *, backend: Backend) -> tuple[ScaledMatrices, ScaledMatrices]:
        """The same numbers in both layouts."""
        return quantise.quantise_weights(w, power_of_two=self.power_of_two, backend=_casts(backend))

    def gate(
        self, hidden: Float[Array, "R FF"], weight: Float[Array, " R"], *, backend: Backend
    ) -> tuple[ScaledRows, ScaledRows]:
        """The result is made of ``hidden`` before it is rounded."""
        return quantise.gate(hidden, weight, power_of_two=self.power_of_two, backend=_casts(backend))

    def gate_backward(
        self,
        hidden: ScaledRows,
        weight: Float[Array, " R"],
        ct: Float[Array, "R F"],
        valid: Int[Array, " blocks"],
        *,
        backend: Backend,
    ) -> GateGradients:
        """Of ``hidden`` as it is kept."""
        return quantise.gate_backward(
            hidden, weight, ct, valid, power_of_two=self.power_of_two, backend=_casts(backend)
        )

    def matmul(
        self,
        lhs: ScaledRows,
        rhs: ScaledMatrices,
        sizes: Int[Array, " G"],
        *,
        backend: Backend,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> Float[Array, "R N"]:
        """Sums of 128 are scaled and added in float32."""
        return scaled_matmul(lhs, rhs, sizes, backend=backend, dtype=dtype)

    def outer(
        self,
        lhs: ScaledRows,
        dout: ScaledRows,
        sizes: Int[Array, " G"],
        *,
        backend: Backend,
        dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "G K N"]:
        """Likewise."""
        return scaled_outer(lhs, dout, sizes, backend=backend, dtype=dtype)


def _casts(backend: Backend) -> Backend:
    """Who quantises: "mosaic" insists on the products alone."""
    return "xla" if backend == "xla" else "auto"
