"""The two searches that make plans even: what they promise of every node, for random loads and odd sizes."""

import numpy as np
import pytest

from eplb_jax.plan.exchanges import exchange
from eplb_jax.plan.search import largest_loads, slot_loads
from eplb_jax.plan.swaps import swap_pairs

NODES, EXPERTS = 12, 14


def nodes_of(gpus, capacity, seed=0):
    """Loads [NODES, EXPERTS] and slots of which none holds an expert twice, where that can be."""
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(size=(NODES, EXPERTS)).astype(np.float32)
    spare = gpus * capacity - EXPERTS
    slots = [np.r_[rng.permutation(EXPERTS), rng.permutation(EXPERTS)[:spare]] for _ in range(NODES)]
    return weight, np.stack(slots).astype(np.int32)


@pytest.mark.parametrize("gpus", [4, 5])
def test_swaps_even_out_and_keep_all_replicas(gpus):
    weight, slots = nodes_of(gpus, 5)
    loads, target = np.asarray(slot_loads(weight, slots)), np.zeros(NODES, np.float32)
    found = np.asarray(swap_pairs(loads, slots, target, num_gpus=gpus))
    assert np.array_equal(np.sort(found, 1), np.sort(slots, 1))
    before, after = (np.asarray(largest_loads(weight, x, gpus)) for x in (slots, found))
    mean = np.maximum(weight.sum(1) / gpus, loads.max(1))  # no division of these replicas is below either
    assert (after <= before).all() and (after / mean).mean() < 1.05 < (before / mean).mean() - 0.3
    alone = swap_pairs(loads[3:4], slots[3:4], target[:1], num_gpus=gpus)
    assert np.array_equal(alone, found[3:4])  # nodes do not depend on each other


def test_exchanges_change_counts_of_the_heaviest_node():
    """Layers of three nodes; only the lightest plan seen is kept, and every expert keeps a replica."""
    weight, slots = nodes_of(4, 5)
    target = np.zeros(NODES, np.float32)
    found = np.asarray(exchange(weight, slots, target, layers=4, num_gpus=4, steps=60))
    before, after = (np.asarray(largest_loads(weight, x, 4)).reshape(4, 3) for x in (slots, found))
    assert (after <= before * (1 + 1e-6)).all() and (after.max(1) < before.max(1) * 0.9).all()
    counts = np.stack([np.bincount(node, minlength=EXPERTS) for node in found])
    assert counts.min() == 1
    assert (counts != np.stack([np.bincount(node, minlength=EXPERTS) for node in slots])).any()
    alone = exchange(weight[3:6], slots[3:6], target[:3], layers=1, num_gpus=4, steps=60)
    assert np.array_equal(alone, found[3:6])


def test_exchanges_lighten_nodes_that_are_equally_heavy():
    """None of three nodes is heavier than the others, and each has to get lighter."""
    weight, slots = (np.repeat(x[::3], 3, axis=0) for x in nodes_of(4, 5))
    found = np.asarray(exchange(weight, slots, np.zeros(NODES, np.float32), layers=4, num_gpus=4, steps=60))
    before, after = (np.asarray(largest_loads(weight, x, 4)) for x in (slots, found))
    assert (after < before * 0.9).all()


def test_no_search_brings_replicas_together():
    weight, slots = nodes_of(5, 5)
    apart = np.stack([node.reshape(5, 5, order="F").reshape(-1) for node in np.sort(slots, 1)])  # neighbours are alike
    target, loads = np.zeros(NODES, np.float32), np.asarray(slot_loads(weight, apart))
    swapped = swap_pairs(loads, apart, target, num_gpus=5, duplicates=False)
    found = exchange(weight, swapped, target, layers=4, num_gpus=5, steps=60, duplicates=False)
    for slots in (apart, np.asarray(swapped), np.asarray(found)):
        assert all(len(set(gpu)) == 5 for node in slots.tolist() for gpu in np.reshape(node, (5, 5)).tolist())
    assert (np.asarray(largest_loads(weight, found, 5)) < np.asarray(largest_loads(weight, apart, 5))).all()
