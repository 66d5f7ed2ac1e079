"""Our own kernels for Hopper GPUs (H100, H200), in Pallas' Mosaic dialect: the backend "mosaic"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eplb_jax.kernels import gate_mosaic, permute, quantise_mosaic, swiglu
from eplb_jax.kernels.backend import Target, current_target
from eplb_jax.kernels.fp8_gemm import mosaic as fp8_mosaic
from eplb_jax.kernels.grouped_gemm import mosaic
from eplb_jax.kernels.latent_attention import mosaic as latent_mosaic


class Hopper:
    """A `eplb_jax.kernels.backend.KernelBackend`."""

    platform = "cuda"

    def why_not(self, task: str, device: Target, *operands: Any) -> str | None:
        """The device, dtype or shape that the kernels are not for; None if they do the task.

        >>> Hopper().why_not("grouped_matmul", Target("cpu", "cpu", 132, False))
        "the device is 'cpu', no Hopper GPU"
        """
        if not device.hopper:
            return f"the device is {device.kind!r}, no Hopper GPU"
        reasons = {
            "grouped_matmul": mosaic.why_not,
            "scaled_matmul": fp8_mosaic.why_not,
            "scaled_outer": fp8_mosaic.why_not,
            "move_rows": permute.why_not,
            "gate_gradient": swiglu.why_not,
            "quantise": quantise_mosaic.why_not,
            "scaled_gate": quantise_mosaic.why_not,
            "attend_latents": latent_mosaic.why_not,
        }
        return reasons[task](*operands)

    def kernel(self, name: str) -> Callable[..., Any]:
        """The function of an operation, for the GPU that the program in hand is for."""
        products = {
            "matmul": mosaic.matmul,
            "outer": mosaic.outer,
            "added_outer": mosaic.added_outer,
            "scaled_matmul": fp8_mosaic.matmul,
            "scaled_outer": fp8_mosaic.outer,
            "attend_latents": latent_mosaic.attend_latents,
            "added_scaled_outer": fp8_mosaic.added_outer,
        }
        if name in products:
            return products[name]
        kernels = {
            "copy_rows": permute.copy_rows,
            "add_rows": permute.add_rows,
            "gated_backward": swiglu.gated_backward,
            "quantise_rows": quantise_mosaic.quantise_rows,
            "quantise": quantise_mosaic.quantise,
            "columns_of": quantise_mosaic.columns_of,
            "quantise_weights": quantise_mosaic.quantise_weights,
            "gate": gate_mosaic.gate,
            "gate_backward": gate_mosaic.gate_backward,
        }
        return lambda *operands, **static: kernels[name](*operands, cores=current_target().cores, **static)
