"""Which layers each stage holds: consecutive ones, as evenly as their number or their costs allow."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

MOST_UNROLLED = 32
"""Layers of a stage: more are a loop."""


def unroll_of(count: int) -> int:
    """How many turns of a scan over the layers of a stage are written out: all up to `MOST_UNROLLED`, else none.

    A loop keeps everything that its turns share with the backward pass in stacks, which are filled with zeros first,
    written, and read row by row; written out, layers keep what is needed least, where it is. The price is code: a stage
    of ten layers compiles in about the time that the plain model takes.
    """
    return count if count <= MOST_UNROLLED else 1


def split_layers(num_layers: int, num_stages: int, costs: Sequence[float] | None = None) -> tuple[int, ...]:
    """Layers of each stage, as even as possible, the longer stages first.

    With costs the most expensive stage is as cheap as it can be. Of the divisions that reach this, the most even one is
    taken (the least sum of squares of the stages' costs), then the one with longer stages first.

    Args:
      num_layers: at least ``num_stages``; each stage holds consecutive layers, one or more.
      num_stages: in the order of the forward pass.
      costs: ``[num_layers]`` positive numbers of any unit, such as measured milliseconds; None: all equal.

    Raises:
      ValueError: fewer layers than stages; costs that are not one positive, finite number for each layer.

    >>> split_layers(10, 4)
    (3, 3, 2, 2)
    >>> split_layers(10, 4, [1, 1, 1, 3, 3, 3, 3, 3, 3, 3])
    (4, 2, 2, 2)
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers for {num_stages} stages: use fewer stages or more layers")
    if costs is None:
        return tuple(num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages))
    return _balance(_exact(costs, num_layers), num_stages)


def _exact(costs: Sequence[float], num_layers: int) -> list[int]:
    """Costs as integers in the same proportions, so that equal sums are found equal."""
    given = [float(cost) for cost in costs]
    if len(given) != num_layers:
        raise ValueError(f"{len(given)} costs for {num_layers} layers: give one for each layer, in their order")
    for layer, cost in enumerate(given):
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(f"layer {layer} costs {cost}: costs are positive, finite numbers")
    fractions = [Fraction(cost) for cost in given]
    unit = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * unit) for fraction in fractions]


def _balance(costs: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Layers of each stage: the dearest stage first, then the sum of squares, then longer stages first."""
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    limit = _least_limit(costs, num_stages)

    @functools.cache
    def squares(start: int, stages: int) -> int | None:
        """The least sum of squares of layers from ``start`` on in so many stages; None where they do not fit."""
        if stages == 0:
            return 0 if start == len(costs) else None
        found = [total for end in ends(start, stages) if (total := with_first(start, end, stages)) is not None]
        return min(found, default=None)

    def ends(start: int, stages: int) -> range:
        last = len(costs) - stages + 1
        fitting = next((end for end in range(start + 1, last + 1) if sums[end] - sums[start] > limit), last + 1)
        return range(start + 1, fitting)

    def with_first(start: int, end: int, stages: int) -> int | None:
        rest = squares(end, stages - 1)
        return None if rest is None else rest + (sums[end] - sums[start]) ** 2

    # From the last stage to the first, so that no recursion is deeper than one step.
    for stages in range(1, num_stages):
        for start in range(len(costs)):
            squares(start, stages)
    counts, start = [], 0
    for stages in range(num_stages, 0, -1):
        best = squares(start, stages)
        end = max(end for end in ends(start, stages) if with_first(start, end, stages) == best)
        counts.append(end - start)
        start = end
    return tuple(counts)


def _least_limit(costs: Sequence[int], num_stages: int) -> int:
    """What the dearest stage costs at least, each stage with a layer or more."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        stages, filled = 1, 0
        for cost in costs:
            stages, filled = (stages, filled + cost) if filled + cost <= middle else (stages + 1, cost)
        low, high = (low, middle) if stages <= num_stages else (middle + 1, high)
    return low
