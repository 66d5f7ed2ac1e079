"""Weights in 8 bits with a scale for a block of 128 rows and 128 columns, as DeepSeek's files have them, on the host.

The last blocks are smaller where a matrix has no multiple of 128 rows or columns. A file's ``weight_scale_inv`` is what
numbers of 8 bits are multiplied by.

Source: github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md and inference/kernel.py (weight_dequant).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCK = 128
"""Rows and columns that share a scale."""

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
"""Of e4m3's finite numbers."""

VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
"""The numbers that the 256 bytes stand for: looking them up is several times faster than a cast."""


def dequantise(rows: np.ndarray, scales: np.ndarray, first: int = 0) -> np.ndarray:
    """Some rows of a matrix in float32.

    Args:
      rows: ``float8_e4m3fn[rows, columns]``.
      scales: float32, one a block of the whole matrix.
      first: the place of the first of the rows in the matrix.

    >>> dequantise(np.ones((2, 3), FP8), np.array([[2.0], [4.0]], np.float32), first=127).tolist()
    [[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]
    """
    found = VALUES[rows.view(np.uint8)]
    columns = rows.shape[1]
    place = 0
    while place < len(found):
        block = (first + place) // BLOCK
        end = min(len(found), (block + 1) * BLOCK - first)
        found[place:end] *= np.repeat(scales[block], BLOCK)[:columns]
        place = end
    return found


def quantise(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in 8 bits and its scales, by which the largest number of each block becomes e4m3's.

    Args:
      matrix: ``[rows, columns]``, of any floating-point dtype.

    Returns:
      ``float8_e4m3fn[rows, columns]`` and ``float32[ceil(rows / 128), ceil(columns / 128)]``.

    Raises:
      ValueError: numbers that are not finite.

    >>> numbers, scales = quantise(np.array([[1.0, -896.0]], np.float32))
    >>> numbers.astype(np.float32).tolist(), scales.tolist()
    ([[0.5, -448.0]], [[2.0]])
    """
    matrix = np.asarray(matrix, np.float32)
    rows, columns = matrix.shape
    numbers = np.empty(matrix.shape, FP8)
    scales = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    starts = np.arange(0, columns, BLOCK)
    for block in range(len(scales)):
        part = matrix[block * BLOCK : (block + 1) * BLOCK]
        largest = np.maximum.reduceat(np.abs(part).max(0), starts)
        if not np.isfinite(largest).all():
            raise ValueError("it holds numbers that are not finite, which have no scale")
        scale = largest / np.float32(LARGEST)
        scale[scale == 0] = 1
        scales[block] = scale
        # A scale of few bits, below float32's normal numbers, may be much too small.
        scaled = part / np.repeat(scale, BLOCK)[:columns]
        numbers[block * BLOCK : (block + 1) * BLOCK] = np.clip(scaled, -LARGEST, LARGEST, out=scaled)
    return numbers, scales
