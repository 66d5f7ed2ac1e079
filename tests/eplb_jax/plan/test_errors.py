"""Wrong input is a ValueError with the values and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import balanced, elastic, no_duplicate, rebalance_experts, sticky
from eplb_jax.plan import bounds, metrics
from eplb_jax.plan.policies.registry import POLICIES

WEIGHT = np.ones((2, 12))
PLANNERS = [*POLICIES.values(), bounds.lower_bound]


@pytest.mark.parametrize("plan", PLANNERS, ids=lambda plan: plan.__name__)
@pytest.mark.parametrize(
    ("weight", "sizes", "message"),
    [
        (WEIGHT, (17, 4, 2, 8), "num_replicas=17 is not a multiple of num_gpus=8: take 16 or 24"),
        (WEIGHT, (13, 1, 1, 8), "num_replicas=13 is not a multiple of num_gpus=8: take 16,"),
        (WEIGHT, (8, 4, 2, 8), "num_replicas=8 is less than the 12 experts: each needs one, so ask for at least 16"),
        (-WEIGHT, (16, 4, 2, 8), r"24 values that are negative or not finite, the first is -1.0 at .* \[0, 0\]"),
        (np.where(np.arange(12) == 5, np.nan, WEIGHT), (16, 4, 2, 8), r"2 values .* first is nan at .* \[0, 5\]"),
        (WEIGHT * np.inf, (16, 4, 2, 8), "not finite"),
        (WEIGHT[0], (16, 4, 2, 8), r"shape \(12,\): it must be \[layers, experts\]"),
        (WEIGHT[:0], (16, 4, 2, 8), r"shape \(0, 12\)"),
        (WEIGHT, (16, 5, 5, 20), "num_replicas=16 is not a multiple of num_gpus=20"),
        (WEIGHT, (20, 5, 5, 20), "12 experts do not divide into num_groups=5"),
        (WEIGHT, (16, 4, 3, 8), "num_gpus=8 do not divide over num_nodes=3"),
        (WEIGHT, (16, 4, 0, 8), "num_nodes=0: it must be a positive int"),
        (WEIGHT, (16.0, 4, 2, 8), "num_replicas=16.0: it must be a positive int"),
    ],
)
def test_planners(plan, weight, sizes, message):
    with pytest.raises(ValueError, match=message):
        plan(weight, *sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eplb_jax.balanced_packing(WEIGHT, 5), "12 items do not divide over num_packs=5"),
        (lambda: eplb_jax.replicate_experts(WEIGHT, 11), "num_replicas=11 is less than the 12 experts"),
        (lambda: balanced(WEIGHT, 16, 1, 1, 8, tolerance=-1), "tolerance=-1"),
        (lambda: no_duplicate(WEIGHT, 16, 1, 1, 8, tolerance=float("nan")), "tolerance=nan"),
        (lambda: no_duplicate(WEIGHT, 32, 1, 1, 2), "take at most 24 replicas"),
        (lambda: sticky(WEIGHT, PLAN, 1, 1, 5), "num_replicas=16 is not a multiple of num_gpus=5"),
        (lambda: sticky(WEIGHT[:1], PLAN, 1, 1, 8), "previous placement is of 2 layers and 12 experts"),
        (lambda: sticky(WEIGHT, PLAN, 1, 1, 8, min_gain=-0.1), "min_gain=-0.1"),
        (lambda: elastic(WEIGHT, np.ones(8), 16, 1, 1), r"alive is float64 of shape \(8,\): it must be a bool"),
        (lambda: elastic(WEIGHT, np.arange(8) < 5, 16, 1, 1), "5 of 8 GPUs are alive and hold 10 replicas"),
        (lambda: elastic(WEIGHT, np.ones(8, bool), 24, 1, 1, previous=PLAN), "2 layers, 16 replicas and 12 experts"),
        (lambda: metrics.gpu_loads(PLAN, WEIGHT[:1], 8), r"weight has shape \(1, 12\)"),
        (lambda: metrics.gpu_loads(PLAN, WEIGHT, 5), "16 replicas do not divide over num_gpus=5"),
        (lambda: metrics.balancedness(PLAN, WEIGHT, 8, 3), "num_gpus=8 do not divide over num_nodes=3"),
        (lambda: metrics.moved(PLAN, eplb_jax.rebalance_experts(WEIGHT[:1], 16, 1, 1, 8), 8), "cannot be compared"),
    ],
)
def test_others(call, message):
    with pytest.raises(ValueError, match=message):
        call()


PLAN = eplb_jax.rebalance_experts(WEIGHT, 16, 1, 1, 8)


def test_a_placement_with_dead_slots_is_elastics():
    loads = np.array([[1, 9, 9, 1]])
    previous = elastic(loads, np.array([True, False, True]), 6, 1, 1)
    with pytest.raises(ValueError, match=r"slots of dead GPUs \(-1\): take elastic"):
        sticky(loads, previous, 1, 1, 3)


@pytest.mark.parametrize("policy", [rebalance_experts, balanced, no_duplicate])
def test_within_jit_all_experts_have_a_slot_whatever_the_loads(policy):
    """Nothing can be refused there."""
    loads = jnp.array([[1.0, 2.0, value, 4.0] for value in (np.nan, np.inf, -1.0)] + [[np.nan] * 4], jnp.float32)
    slots = np.asarray(jax.jit(lambda loads: policy(loads, 6, 1, 1, 2))(loads).phy2log)
    assert [sorted(set(row.tolist())) for row in slots] == [[0, 1, 2, 3]] * 4
