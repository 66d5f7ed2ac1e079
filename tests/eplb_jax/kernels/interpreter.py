"""The interpreter of Mosaic kernels for GPUs, where JAX has it."""

import pytest

from eplb_jax import _jax


def interpreted(**parameters):
    """`eplb_jax._jax.interpreted`; skips the test where JAX has no interpreter."""
    try:
        return _jax.interpreted(**parameters)
    except NotImplementedError as error:
        pytest.skip(str(error))
