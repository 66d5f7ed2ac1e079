"""How rows travel between the devices of the experts' axis: the table of dispatchers."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, Float, Int

from eplb_jax.moe import exchange


class Dispatcher(Protocol):
    """Carries rows to other devices and back; a line of `DISPATCHERS`.

    Block d of rows [ep, C, D] goes to device d of the axis, and block s of the result came from device s. The first
    ``counts[d]`` rows of block d are used; the others may come out as anything but are never read. Both functions are
    differentiable, and each may run where a pipeline's ranks do different things, so that it must speak to the devices
    of its axis alone.
    """

    @property
    def gpu_only(self) -> bool:
        """Whether it runs on GPUs alone."""
        ...

    def why_not(self, fp8: bool) -> str | None:
        """Why rows cannot travel so, with the remedy; None if they can."""
        ...

    def dispatch(
        self, rows: Float[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, fp8: bool
    ) -> Float[Array, "ep C D"]:
        """Rows to the devices that they are for; with ``fp8`` as 8-bit numbers with scales."""
        ...

    def combine(
        self, rows: Float[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, fp8: bool
    ) -> Float[Array, "ep C D"]:
        """Rows back to the devices that `dispatch` took them from, with the counts that it was given."""
        ...


class Dense:
    """An all-to-all of fixed size: the default, on every platform."""

    gpu_only = False

    def why_not(self, fp8: bool) -> str | None:
        """Nothing keeps rows from it."""
        del fp8
        return None

    def dispatch(
        self, rows: Float[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, fp8: bool
    ) -> Float[Array, "ep C D"]:
        """All rows, used or not."""
        del counts
        return exchange.all_to_all_fp8(rows, axis) if fp8 else exchange.all_to_all(rows, axis)

    def combine(
        self, rows: Float[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, fp8: bool
    ) -> Float[Array, "ep C D"]:
        """All rows; with ``fp8`` only the gradients travel in 8 bits."""
        del counts
        return exchange.all_to_all_fp8_back(rows, axis) if fp8 else exchange.all_to_all(rows, axis)


class Ragged:
    """`jax.lax.ragged_all_to_all`: used rows only, on GPUs only."""

    gpu_only = True

    def why_not(self, fp8: bool) -> str | None:
        """It carries no scales."""
        return "fp8 travels by the dense exchange only: choose exchange='dense' or fp8=False" if fp8 else None

    def dispatch(
        self, rows: Float[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, fp8: bool
    ) -> Float[Array, "ep C D"]:
        """The used rows; zeros in place of the others."""
        del fp8
        return exchange.all_to_all_ragged(rows, counts, axis)

    def combine(
        self, rows: Float[Array, "ep C D"], counts: Int[Array, " ep"], axis: str, fp8: bool
    ) -> Float[Array, "ep C D"]:
        """The rows that came, as many as each device sent."""
        del fp8
        return exchange.all_to_all_ragged(rows, exchange.all_to_all(counts, axis), axis)


DISPATCHERS: dict[str, Dispatcher] = {"dense": Dense(), "ragged": Ragged()}
"""By the name that `eplb_jax.MoEConfig` has for them, ``exchange``."""
