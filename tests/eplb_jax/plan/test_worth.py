"""Whether a change of placement pays, against the same done by hand."""

import numpy as np
import pytest

from eplb_jax import Placement, balanced, gpu_loads, moved, worth_moving

COSTS = dict(seconds_per_token=2e-6, expert_bytes=50_000_000, bytes_per_second=5e10, steps=20)


def test_gain_and_cost_of_each_layer():
    """Layer 0 gets much lighter, layer 1 stays, layer 2 gets lighter by less than its replicas cost."""
    old = Placement.from_phy2log(np.tile([0, 1, 2, 3], (3, 1)), 4)
    new = Placement.from_phy2log(np.array([[0, 2, 1, 3], [0, 1, 2, 3], [0, 2, 1, 3]]), 4)
    step = np.array([[900, 900, 100, 100], [900, 900, 100, 100], [26, 26, 24, 25]])
    found = worth_moving(np.stack([step, step]), old, new, 2, **COSTS)
    np.testing.assert_allclose(found.saved, [800 * 2 * 20 * 2e-6, 0, 1 * 2 * 20 * 2e-6])
    np.testing.assert_allclose(found.cost, [1e-3, 0, 1e-3])  # one replica to each GPU
    assert found.pays.tolist() == [True, False, False]
    assert found.placement.phy2log.tolist() == [[0, 2, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_of_random_loads():
    """Each microbatch waits for its own heaviest GPU: the gain is not that of their sum."""
    rng = np.random.default_rng(0)
    loads = rng.integers(0, 900, (3, 4, 24))
    old, new = (balanced(rng.lognormal(size=(4, 24)), 32, 1, 1, 8) for _ in range(2))
    found = worth_moving(loads, old, new, 8, **COSTS)
    gains = [gpu_loads(old, step, 8).max(1) - gpu_loads(new, step, 8).max(1) for step in loads]
    np.testing.assert_allclose(found.saved, np.sum(gains, 0) * 20 * 2e-6)
    assert not np.allclose(found.saved, worth_moving(loads.sum(0), old, new, 8, **COSTS).saved)
    assert (found.cost * 50e9 / 50e6 * 8 >= moved(old, new, 8) - 1e-9).all()
    assert found.pays.tolist() == (found.saved > found.cost).tolist()
    same = worth_moving(loads, old, old, 8, **COSTS)
    assert not same.pays.any() and not same.cost.any() and np.array_equal(same.placement.phy2log, old.phy2log)


def test_what_is_refused():
    plan = balanced(np.ones((2, 4)), 4, 1, 1, 2)
    for loads, change, message in [
        (np.ones(4), {}, r"loads have shape \(4,\)"),
        (np.ones((0, 2, 4)), {}, "not empty"),
        (np.ones((3, 4)), {}, r"weight has shape \(3, 4\), the placement is of \(2, 4\)"),
        (np.ones((2, 4)), {"steps": 0}, "steps=0: it must be positive and finite"),
        (np.ones((2, 4)), {"bytes_per_second": np.nan}, "bytes_per_second=nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            worth_moving(loads, plan, plan, 2, **{**COSTS, **change})


def test_placements_of_unlike_sizes_are_refused():
    old, new = (Placement.from_phy2log(np.array([slots]), 2) for slots in ([0, 1], [0, 1, 1, 0]))
    costs = {"seconds_per_token": 1e-6, "expert_bytes": 1, "bytes_per_second": 1.0}
    with pytest.raises(ValueError, match="placements of 2 and 4 replicas: plan for as many"):
        worth_moving(np.ones((1, 2)), old, new, 2, **costs)


@pytest.mark.parametrize("num_gpus", [0, 3, 8])
def test_replicas_that_do_not_divide_over_gpus_are_refused(num_gpus):
    plan = Placement.from_phy2log(np.array([[0, 1, 2, 3]]), 4)
    with pytest.raises(ValueError, match=f"4 replicas do not divide over num_gpus={num_gpus}"):
        moved(plan, plan, num_gpus)
