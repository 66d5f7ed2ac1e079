"""DeepSeek's plans: golden ones, and equality with plain loops for any shape, ties, zeros and huge counts."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eplb_jax
from eplb_jax.plan.packing import divide_by_integers
from tests.cases import cases
from tests.eplb_jax.plan import specification

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "golden" / "eplb.json").read_text())
SIZES = ("num_replicas", "num_groups", "num_nodes", "num_gpus")
OTHERS = [
    # Computed by github.com/deepseek-ai/EPLB; loads and sizes are those of vLLM's tests.
    ([1, 1, 1, 1, 1, 1, 1, 1], (8, 2, 2, 4), [0, 2, 1, 3, 4, 6, 5, 7]),
    ([1000, 1, 1, 1, 1, 1, 1, 1], (12, 2, 2, 4), [0, 0, 3, 0, 1, 2, 6, 4, 4, 7, 5, 5]),
    ([100, 50, 200, 75, 150, 25, 300, 80], (12, 4, 2, 4), [6, 6, 7, 0, 6, 1, 2, 3, 4, 2, 4, 5]),
    ([10, 20, 30, 40, 50, 60], (8, 3, 2, 4), [3, 0, 2, 4, 5, 4, 5, 1]),
]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
@cases("convert", [np.array, jnp.array], quick=[np.array], ids=["numpy", "jax"])
def test_golden(case, convert):
    plan = eplb_jax.rebalance_experts(convert(case["weight"]), *(case[size] for size in SIZES))
    assert np.array_equal(plan.phy2log, case["phy2log"])
    assert np.array_equal(plan.logcnt, case["logcnt"])
    columns = np.shape(case["log2phy"])[-1]
    assert np.array_equal(plan.log2phy[..., :columns], case["log2phy"])
    assert (np.asarray(plan.log2phy)[..., columns:] == -1).all()
    plan.check(case["num_gpus"])


@pytest.mark.parametrize(("weight", "sizes", "phy2log"), OTHERS)
def test_plans_of_the_tests_of_others(weight, sizes, phy2log):
    assert eplb_jax.rebalance_experts(np.array([weight]), *sizes).phy2log.tolist() == [phy2log]


@pytest.mark.parametrize(
    ("weight", "replicas", "count"),
    [([1, 4, 2, 1], 8, [1, 4, 2, 1]), ([10, 5, 2, 15, 8], 9, [2, 1, 1, 3, 2]), ([5, 1, 1], 3, [1, 1, 1])],
)
def test_replication_of_the_tests_of_others(weight, replicas, count):
    """The first two are TensorRT-LLM's."""
    assert eplb_jax.replicate_experts(np.array([weight]), replicas)[2].tolist() == [count]


@st.composite
def problems(draw):
    """Loads [layers, experts] of every kind, and sizes that fit them: one shape, as each is compiled."""
    nodes = draw(st.sampled_from([1, 2, 3, 4]))
    gpus = nodes * draw(st.sampled_from([1, 2, 3, 5]))
    groups = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    experts = groups * draw(st.sampled_from([1, 2, 3, 8]))
    least = -(-experts // gpus)
    replicas = gpus * (least + draw(st.integers(0, 4)))
    layers = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    weights = {
        "real": rng.lognormal(size=(layers, experts)),
        "ties": rng.integers(0, 4, (layers, experts)),
        "zeros": rng.integers(0, 2, (layers, experts)) * rng.integers(0, 9, (layers, experts)),
        "huge": rng.integers(2**30, 2**62, (layers, experts)),
        "one": (np.arange(experts) == seed % experts) * np.full((layers, 1), 1e6),
        "equal": np.full((layers, experts), seed),
    }
    return weights, (replicas, groups, nodes, gpus)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_equal_to_plain_loops(problem):
    weights, (replicas, groups, nodes, gpus) = problem
    for kind, weight in weights.items():
        plan = eplb_jax.rebalance_experts(weight, replicas, groups, nodes, gpus)
        phy2log, log2phy, logcnt = plan
        for layer, load in enumerate(weight):
            slots, where, counts = specification.rebalance(load, replicas, groups, nodes, gpus)
            assert phy2log[layer].tolist() == slots, kind
            assert logcnt[layer].tolist() == counts, kind
            assert [[s for s in row if s >= 0] for row in log2phy[layer].tolist()] == where, kind
        # What follows from that, in words: every expert is somewhere, all slots are used, log2phy inverts phy2log.
        plan.check(gpus)
        assert (logcnt >= 1).all() and (logcnt.sum(1) == replicas).all()
        assert log2phy.shape[-1] == logcnt.max()


@settings(max_examples=6, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([2, 3, 7]))
def test_packing_and_replication_equal_plain_loops(problem, capacity):
    weights, (replicas, *_) = problem
    for kind, weight in weights.items():
        items = np.tile(weight, capacity)
        packs = items.shape[1] // capacity
        found, ranks = eplb_jax.balanced_packing(items, packs), eplb_jax.replicate_experts(weight, replicas)
        for layer, load in enumerate(items.astype(np.float32)):
            assert [x[layer].tolist() for x in found] == list(map(list, specification.pack(load, packs))), kind
        for layer, load in enumerate(weight.astype(np.float32)):
            assert [x[layer].tolist() for x in ranks] == list(map(list, specification.replicate(load, replicas))), kind


def test_division_by_integers_is_rounded_correctly():
    """GPUs divide float32 with an error; the integers that stand in for it there make no difference to NumPy's."""
    rng = np.random.default_rng(5)
    weight = np.concatenate([rng.lognormal(sigma=9, size=200_000), rng.integers(0, 2**31, 100_000)]).astype(np.float32)
    weight = np.concatenate([weight, np.float32([0, 1e-42, 1.2e-38, 3.4e38, np.inf, 1, 2**24 - 1, 2**23])])
    count = rng.integers(1, rng.choice([3, 20, 2**15], len(weight))).astype(np.int32)
    found = jax.jit(divide_by_integers)(weight, count)
    normal = (weight / count.astype(np.float32) > 1.2e-38) | (weight == 0)
    assert np.array_equal(np.asarray(found)[normal], (weight / count.astype(np.float32))[normal])


@pytest.mark.parametrize("sizes", [(288, 8, 4, 32), (288, 18, 18, 144), (320, 8, 8, 64), (512, 8, 1, 8)])
def test_equal_to_plain_loops_at_real_sizes(sizes):
    weight = np.random.default_rng(0).integers(0, 5000, (4, 256 if sizes[1] != 18 else 288))
    phy2log, _, logcnt = eplb_jax.rebalance_experts(weight, *sizes)
    for layer, load in enumerate(weight):
        slots, _, counts = specification.rebalance(load, *sizes)
        assert phy2log[layer].tolist() == slots and logcnt[layer].tolist() == counts


@cases("sizes", [(288, 8, 1, 8), (320, 8, 20, 160)], quick=[(288, 8, 1, 8)])
def test_devices_and_host_plan_alike(sizes):
    """Loads that are not integers, planned where JAX's arrays are: on a GPU, where there is one."""
    weight = (np.random.default_rng(6).lognormal(size=(58, 256)) * 1000).astype(np.float32)
    host, there = eplb_jax.rebalance_experts(weight, *sizes), eplb_jax.rebalance_experts(jnp.array(weight), *sizes)
    assert np.array_equal(host.phy2log, there.phy2log) and np.array_equal(host.logcnt, there.logcnt)


def test_more_experts_than_are_compared_with_each_other():
    """Long rows are sorted by XLA instead."""
    weight = np.random.default_rng(1).integers(0, 50, (2, 1024))
    phy2log = eplb_jax.rebalance_experts(weight, 1152, 1, 1, 64).phy2log
    assert [row.tolist() for row in phy2log] == [specification.rebalance(w, 1152, 1, 1, 64)[0] for w in weight]


def test_within_jit_as_on_the_host():
    weight = np.random.default_rng(2).lognormal(size=(3, 64)).astype(np.float32)
    traced = jax.jit(lambda w: eplb_jax.rebalance_experts(w, 80, 8, 4, 16))(weight)
    host = eplb_jax.rebalance_experts(weight, 80, 8, 4, 16)
    assert all(isinstance(array, jax.Array) for array in traced)
    assert all(isinstance(array, np.ndarray) for array in host)
    assert np.array_equal(traced.phy2log, host.phy2log) and np.array_equal(traced.logcnt, host.logcnt)
    assert traced.log2phy.shape == (3, 64, (80 - 64) // 4 + 1)
    traced.check(16)


def test_where_arrays_are_does_not_matter(x64):
    """Loads of any dtype become float32; arrays of JAX stay on their device."""
    weight = np.random.default_rng(3).integers(0, 9, (2, 32))
    plans = [
        eplb_jax.rebalance_experts(w, 40, 4, 2, 8) for w in (weight, jnp.array(weight), jnp.array(weight, jnp.int32))
    ]
    assert all(np.array_equal(plan.phy2log, plans[0].phy2log) for plan in plans)
    assert all(array.dtype == np.int32 for plan in plans for array in plan)
    assert plans[1].phy2log.devices() == jnp.array(weight).devices()


def test_layers_do_not_matter_to_each_other():
    weight = np.random.default_rng(4).integers(0, 99, (5, 48))
    together = eplb_jax.rebalance_experts(weight, 64, 6, 2, 8).phy2log
    alone = [eplb_jax.rebalance_experts(weight[i : i + 1], 64, 6, 2, 8).phy2log[0] for i in range(5)]
    assert np.array_equal(together, alone)
