"""What peers_gpu.py runs on both sides: the sizes of the dense model, and numbers that JAX and PyTorch agree on.

Weights and batch come from a hash of each element's place and of a seed, in arithmetic that is exact on either side:
nothing has to be stored or sent.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

HEAD = 128
"""Width of an attention head, as in chunks.py."""
ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
"""Shifts and factors of a hash of 32 bits, "lowbias32" of https://github.com/skeeto/hash-prospector."""


def shapes(width: int) -> dict[str, tuple[int, int]]:
    """The matrices of a layer, inputs times outputs.

    >>> shapes(64)["up"]
    (64, 512)
    """
    return {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 8 * width), "down": (4 * width, width)}


def spread(inputs: int) -> float:
    """Half the range of a matrix's numbers, whose standard deviation is 0.5 / sqrt(inputs)."""
    return 0.5 * (3 / inputs) ** 0.5


def seed(layer: int, name: str) -> int:
    """The seed of a layer's matrix, or of ``seed(0, "batch")``."""
    return zlib.crc32(f"{layer} {name}".encode())


def mix(values: Any) -> Any:
    """The hash of uint32 of NumPy or JAX."""
    for shift, factor in ROUNDS:
        values = values ^ (values >> np.uint32(shift))
        values = values * np.uint32(factor)
    return values


def numbers(places: Any, seed: Any, scale: float) -> Any:
    """float32 of NumPy or JAX, uniform within -scale and scale.

    Args:
      places: uint32, of each element among those of its array.
      seed: uint32.

    >>> numbers(np.arange(3, dtype=np.uint32), np.uint32(seed(0, "batch")), 1.0).tolist()
    [-0.5893884897232056, -0.3126654624938965, -0.11442708969116211]
    """
    unit = (mix(mix(places) ^ seed) >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return unit * np.float32(scale)
