"""The ragged exchange gives the dense one's values and gradients; XLA has it on GPUs only."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.eplb_jax.moe.test_layer import CONFIG, make_params, make_tokens, random_placement, sharded
from tests.plain import assert_trees_close


@pytest.mark.parametrize("ep", [2, 4, 8])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_ragged_equals_dense(x64, ep, capacity_factor):
    if jax.default_backend() != "gpu" or jax.device_count() < ep:
        pytest.skip(f"{ep} GPUs are needed, here are {jax.device_count()} devices of {jax.default_backend()}")
    params, (x, target) = make_params(), make_tokens()
    placement = random_placement(ep, 16, seed=ep)
    dense, ragged = (
        sharded(dataclasses.replace(CONFIG, exchange=kind, capacity_factor=capacity_factor), ep, placement, 8)
        for kind in ("dense", "ragged")
    )
    (loss, (loads, dropped, y)), grads = ragged(params, x, target)
    (expected, (loads_dense, dropped_dense, y_dense)), grads_dense = dense(params, x, target)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(y, y_dense, rtol=1e-10, atol=1e-12)
    assert loads.tolist() == loads_dense.tolist() and int(dropped) == int(dropped_dense)
    assert_trees_close(grads, grads_dense, rtol=1e-10)
