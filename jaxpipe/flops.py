"""FLOPs of matrix products, of plain shapes: two for each multiplication with its addition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Shape = Sequence[int]


def dot_flops(left: Shape, contracted: Iterable[int], result: Shape) -> int:
    """FLOPs of a product, of the left operand's shape, its summed dimensions, and the result's shape.

    >>> dot_flops((2, 3), [1], (2, 4))
    48
    """
    return 2 * math.prod(result) * math.prod(left[dimension] for dimension in contracted)


def convolution_flops(kernel: Shape, feature: int, result: Shape) -> int:
    """FLOPs of a convolution: each output is a sum over its window and the input features.

    Args:
      kernel: its shape.
      feature: which of its dimensions is that of the output features.
      result: the result's shape.

    >>> convolution_flops((3, 3, 4, 8), 3, (1, 10, 10, 8))
    57600
    """
    return 2 * math.prod(result) * math.prod(kernel) // kernel[feature]


def score_flops(scores: float, width: float, value: float, *, products: int = 2, causal: bool = True) -> float:
    """FLOPs of attention, of the number of scores: of heads times queries times keys of all sequences.

    Args:
      scores: how many.
      width: of a head's query and key.
      value: width of a head's value.
      products: 2 forward, 5 backward, each of the scores with one of the two widths.
      causal: whether a mask halves them.

    >>> score_flops(2 * 4 * 4, 8, 8)
    512.0
    """
    return scores * products * (width + value) * (0.5 if causal else 1.0)


def grouped_flops(shapes: Iterable[Shape]) -> float | None:
    """FLOPs of a product of rows ``[m, k]`` with one matrix ``[k, n]`` a group, told by its shapes; else None.

    Rows, results ``[m, n]`` and matrices ``[g, k, n]`` stand in whichever places, for gradients too. Every row counts,
    also rows of the capacity that no token uses.

    Args:
      shapes: of floating operands and results; those of fewer than two dimensions are passed over.

    >>> grouped_flops([(8, 2), (4, 2, 3), (4,), (8, 3)])
    96.0
    """
    found = [shape for shape in shapes if len(shape) > 1]
    rows, matrices = ([shape for shape in found if len(shape) == rank] for rank in (2, 3))
    if len(found) != len(rows) + len(matrices) or len(rows) != 2 or len(matrices) != 1:
        return None
    if rows[0][0] != rows[1][0] or sorted(matrices[0][1:]) != sorted(shape[1] for shape in rows):
        return None
    return 2.0 * rows[0][0] * math.prod(matrices[0][1:])


def multiplying_unit(width: float, *, highest: bool = False) -> str:
    """What multiplies numbers of a width in bytes, as `Chip.flops` names it.

    ``highest``: whether full precision was asked for; otherwise float32 is multiplied as TF32.

    >>> [multiplying_unit(width) for width in (1, 2, 4, 8)], multiplying_unit(4, highest=True)
    (['fp8', 'bf16', 'tf32', 'f64'], 'f32')
    """
    if width >= 8:
        return "f64"
    if width >= 4:
        return "f32" if highest else "tf32"
    return "bf16" if width >= 2 else "fp8"
