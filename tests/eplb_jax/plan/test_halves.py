"""Plans of many layers in two halves are those of all at once."""

import jax
import numpy as np
import pytest

from eplb_jax.plan.halves import plan_in_halves


@pytest.mark.parametrize("layers", [1, 16, 17, 33])
@pytest.mark.parametrize("wide", [False, True])
def test_both_halves_compute_as_their_caller_does(layers, wide):
    """Rows stay in their order, and in as many bits as the caller's, in the thread as well."""
    rows = np.arange(2 * layers * 3, dtype=np.float64).reshape(2 * layers, 3) + 2.0**-40
    with jax.enable_x64(wide):
        found = plan_in_halves(jax.jit(lambda rows: rows + 1), layers, rows)
        expected = np.asarray(jax.jit(lambda rows: rows + 1)(rows))
    assert found.dtype == expected.dtype == (np.float64 if wide else np.float32)
    np.testing.assert_array_equal(found, expected)
