"""The dtype that sums and routers use."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike


def wide(dtype: DTypeLike) -> DTypeLike:
    """float64 for float64, else float32.

    >>> wide(jnp.bfloat16)
    dtype('float32')
    """
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)
