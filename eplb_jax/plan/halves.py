"""Plans of many layers in two halves at once: layers do not depend on each other, and XLA's loops take one core."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from eplb_jax.plan.arguments import in_callers_width, on_host

MANY = 16
"""Layers from which on two halves are worth a thread."""

LANES = 8
"""Loads that a vector instruction takes. Halves are of a multiple: what is left of a row is taken one by one."""


def plan_in_halves(function: Callable[..., Any], layers: int, *arrays: np.ndarray) -> Any:
    """A jitted function's results, NumPy, as it would give them for all layers at once; on the CPU.

    Args:
      function: of arrays whose first axis is of as many rows as these have for half of the layers; its results are
        too, and none depends on other layers. Both halves have one shape, so it compiles once.
      layers: of the arrays.
      *arrays: a multiple of the layers along their first axis.
    """

    def plan(first: int, count: int) -> Any:
        parts = (array[first * len(array) // layers : (first + count) * len(array) // layers] for array in arrays)
        with on_host():
            return jax.tree.map(np.asarray, function(*parts))

    if layers < MANY:
        return plan(0, layers)
    half = -(-layers // (2 * LANES)) * LANES
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(in_callers_width(plan), layers - half, half)
        one, other = plan(0, half), second.result()
    again = 2 * half - layers  # layers that both halves have
    return jax.tree.map(lambda a, b: np.concatenate([a, b[again * len(b) // half :]]), one, other)
