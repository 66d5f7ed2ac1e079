"""The stage of peers.py for SpectraX, which finds classes again by the names of their modules."""

from __future__ import annotations

import importlib
from typing import Any

import jax.numpy as jnp

spectrax: Any = importlib.import_module("spectrax")
nn: Any = importlib.import_module("spectrax.nn")


class Stage(spectrax.Module):
    """Residual layers of two matrices each."""

    def __init__(self, width: int, layers: int, rngs: Any):
        super().__init__()
        self.layers = layers
        for name in (f"{part}{i}" for i in range(layers) for part in "ab"):
            setattr(self, name, nn.Linear(width, width, use_bias=False, rngs=rngs))

    def forward(self, x: Any) -> Any:
        """``[rows, width]`` to the same."""
        for i in range(self.layers):
            x = x + getattr(self, f"b{i}")(jnp.tanh(getattr(self, f"a{i}")(x)))
        return x
