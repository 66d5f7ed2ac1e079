"""How even plans are: `balanced` and the lower bounds, against the best plan there is and DeepSeek's."""

import numpy as np
import pytest

import eplb_jax
from eplb_jax import balanced, balancedness, duplicates, gpu_loads, lower_bound, moved, moved_bytes, no_duplicate
from tests.cases import cases
from tests.eplb_jax.plan.optimum import best_load

SMALL = [(5, 8, 2), (5, 8, 4), (6, 9, 3), (4, 8, 4), (6, 6, 3)]
REAL = [(288, 8, 1, 8), (288, 8, 4, 32), (320, 8, 8, 64), (288, 8, 18, 144), (320, 8, 20, 160)]


def loads_of(kind, layers, experts, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "lognormal":
        return rng.lognormal(size=(layers, experts)).astype(np.float32)
    ranks = np.arange(1, experts + 1) ** -0.8
    return np.stack([rng.permutation(ranks * rng.uniform(0.8, 1.2, experts)) for _ in range(layers)]).astype(np.float32)


def heaviest(plan, weight, gpus):
    return gpu_loads(plan, weight, gpus).max(1)


@cases(("experts", "replicas", "gpus"), SMALL, quick=[(6, 9, 3)])
def test_close_to_the_best_plan(experts, replicas, gpus):
    """Bounds are below the optimum; the gap of `balanced` is at most half of DeepSeek's on average."""
    weight = loads_of("lognormal", 12, experts, seed=experts * replicas)
    best = np.array([best_load(w.astype(float).tolist(), replicas, gpus) for w in weight])
    for tight in (False, True):
        assert (lower_bound(weight, replicas, 1, 1, gpus, tight=tight) <= best * (1 + 1e-9)).all()
    ours = heaviest(balanced(weight, replicas, 1, 1, gpus), weight, gpus) - best
    theirs = heaviest(eplb_jax.rebalance_experts(weight, replicas, 1, 1, gpus), weight, gpus) - best
    assert (ours >= -1e-6 * best).all()
    assert (ours <= theirs + 1e-6 * best).all()
    assert ours.mean() <= theirs.mean() / 2 + 1e-6 * best.mean()


@cases("sizes", REAL, quick=[(288, 8, 1, 8)], ids=lambda sizes: f"{sizes[0]}@{sizes[3]}")
def test_no_layer_is_worse_than_deepseeks(sizes):
    weight = np.concatenate([loads_of(kind, 4, 256) for kind in ("lognormal", "zipf")])
    ours = heaviest(balanced(weight, *sizes), weight, sizes[3])
    theirs = heaviest(eplb_jax.rebalance_experts(weight, *sizes), weight, sizes[3])
    assert (ours <= theirs * (1 + 1e-6)).all()
    assert ours.mean() < theirs.mean()
    assert (lower_bound(weight, *sizes) <= ours * (1 + 1e-6)).all()


def test_two_slots_have_a_tighter_bound():
    weight = loads_of("zipf", 2, 32)
    simple, tight = (lower_bound(weight, 40, 1, 1, 20, tight=tight) for tight in (False, True))
    ours = heaviest(balanced(weight, 40, 1, 1, 20), weight, 20)
    assert (simple <= tight).all() and (simple < tight).any()
    assert (tight <= ours * (1 + 1e-6)).all()


def test_bounds_of_nodes():
    """Groups cannot leave their nodes: one heavy group makes one heavy node."""
    weight = np.array([[9, 9, 1, 1, 1, 1, 1, 1]])
    assert lower_bound(weight, 8, 4, 2, 4).tolist() == [(18 + 2) / 2]
    assert lower_bound(weight, 8, 2, 2, 4).tolist() == [(18 + 2) / 2]
    assert lower_bound(weight, 8, 1, 2, 4) == pytest.approx(10)  # the global policy: 9 and 1 at least
    assert lower_bound(np.zeros((1, 4)), 4, 1, 1, 2).tolist() == [0]
    assert lower_bound(np.zeros((1, 4)), 4, 1, 1, 2, tight=True).tolist() == [0]


@cases("gpus", [8, 72], quick=[8])
def test_no_duplicate_has_none_where_deepseeks_plan_has(gpus):
    weight = loads_of("zipf", 6, 64) ** 2
    assert duplicates(eplb_jax.rebalance_experts(weight, 144, 1, 1, gpus), gpus).sum() > 0
    plan = no_duplicate(weight, 144, 1, 1, gpus)
    plan.check(gpus)
    assert (duplicates(plan, gpus) == 0).all()


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] * (n > 0)) for n in range(12)])
def test_no_duplicate_for_many_shapes(seed):
    """Even where nearly every GPU must hold nearly every expert."""
    rng = np.random.default_rng(seed)
    nodes, experts, gpus = (int(rng.integers(1, top)) for top in (3, 7, 5))
    capacity = int(rng.integers(-(-experts // gpus), experts + 1))
    weight = rng.integers(0, 4, (2, nodes * experts)) ** 2
    plan = no_duplicate(weight, nodes * gpus * capacity, nodes, nodes, nodes * gpus)
    plan.check(nodes * gpus)
    assert (duplicates(plan, nodes * gpus) == 0).all()


def test_no_duplicate_spreads_spares_of_idle_layers():
    """TensorRT-LLM's case, [2, 2, 1, 1]; DeepSeek's plan gives all spares to the first expert."""
    idle = np.zeros((1, 4))
    assert no_duplicate(idle, 6, 1, 1, 2).logcnt.tolist() == [[2, 2, 1, 1]]
    assert eplb_jax.rebalance_experts(idle, 6, 1, 1, 2).logcnt.tolist() == [[3, 1, 1, 1]]


def test_metrics_of_a_plan_done_by_hand():
    plan = eplb_jax.Placement.from_phy2log(np.array([[0, 0, 1, 2], [0, 1, 2, 0]]), 3)
    weight = np.array([[6, 2, 2], [6, 2, 2]])
    assert gpu_loads(plan, weight, 2).tolist() == [[6, 4], [5, 5]]
    assert balancedness(plan, weight, 2).tolist() == [[5 / 6], [1]]
    assert balancedness(plan, weight, 4, 2).tolist() == [[1, 1], [5 / 6, 5 / 6]]
    assert duplicates(plan, 2).tolist() == [1, 0]
    other = eplb_jax.Placement.from_phy2log(np.array([[1, 2, 0, 0], [1, 0, 2, 0]]), 3)
    assert moved(plan, other, 2).tolist() == [3, 0]
    assert moved_bytes(plan, other, 2, expert_bytes=10) == 30


def test_dead_gpus_have_no_part_in_balancedness():
    plan = eplb_jax.Placement.from_phy2log(np.array([[0, 1, -1, -1, 1, 0]]), 2)
    assert gpu_loads(plan, np.array([[2, 2]]), 3).tolist() == [[2, 0, 2]]
    assert balancedness(plan, np.array([[2, 2]]), 3).tolist() == [[1]]
    assert balancedness(plan, np.zeros((1, 2)), 3, 3).tolist() == [[1, 1, 1]]
