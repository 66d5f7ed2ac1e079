"""The one check that all builders make of their arguments."""

from __future__ import annotations

import operator
from typing import Any


def at_least(schedule: str, name: str, value: Any, minimum: int) -> int:
    """The value as an int: integers of NumPy and JAX are too.

    Raises:
      ValueError: it is not an integer of at least ``minimum``.

    >>> import numpy as np
    >>> at_least("1f1b", "num_ranks", np.int64(4), 1)
    4
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise ValueError(f"{schedule} with {name}={value!r}: it must be an integer of at least {minimum}")
    return number
