"""Every dispatcher gives the dense one's values and gradients."""

import dataclasses

import jax
import numpy as np
import pytest

from eplb_jax.moe.dispatchers import DISPATCHERS
from tests.eplb_jax.moe.test_layer import CONFIG, make_params, make_tokens, random_placement, sharded
from tests.plain import assert_trees_close


@pytest.mark.parametrize("ep", [2, 4, 8])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("name", [name for name in DISPATCHERS if name != "dense"])
def test_equals_dense(x64, name, ep, capacity_factor):
    if jax.device_count() < ep or (DISPATCHERS[name].gpu_only and jax.default_backend() != "gpu"):
        pytest.skip(f"{name} on {ep} devices, here are {jax.device_count()} of {jax.default_backend()}")
    check_equals_dense(name, ep, capacity_factor)


def check_equals_dense(name, ep, capacity_factor):
    params, (x, target) = make_params(), make_tokens()
    placement = random_placement(ep, 16, seed=ep)
    dense, other = (
        sharded(dataclasses.replace(CONFIG, exchange=kind, capacity_factor=capacity_factor), ep, placement, 8)
        for kind in ("dense", name)
    )
    (loss, (loads, dropped, y)), grads = other(params, x, target)
    (expected, (loads_dense, dropped_dense, y_dense)), grads_dense = dense(params, x, target)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(y, y_dense, rtol=1e-10, atol=1e-12)
    assert loads.tolist() == loads_dense.tolist() and int(dropped) == int(dropped_dense)
    assert_trees_close(grads, grads_dense, rtol=1e-10)
