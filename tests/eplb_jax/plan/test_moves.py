"""Policies that start from a placement: `sticky` moves little, `elastic` copes with GPUs that die and return."""

import itertools
import sys

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import eplb_jax
from eplb_jax import (
    Placement,
    RebalanceConfig,
    balanced,
    duplicates,
    elastic,
    gpu_loads,
    initial_placement,
    moved,
    sticky,
)
from eplb_jax.plan.cluster import Cluster
from eplb_jax.plan.policies.sticky import _renumber
from eplb_jax.plan.repair import common_experts, replicas_moved, swap_back
from tests.eplb_jax.plan.test_balance import heaviest, loads_of

LAYERS, EXPERTS = 8, 64
FLAT, GROUPED = (80, 1, 1, 8), (80, 8, 4, 8)
"""Replicas, groups, nodes and GPUs of most tests here, whose plans and searches are then the same programs."""


def drift(weight, seed, share=0.05):
    noise = np.random.default_rng(seed).normal(size=weight.shape)
    return (weight * np.exp(share * noise)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("lognormal", GROUPED),
        pytest.param("lognormal", (72, 4, 4, 8), marks=pytest.mark.slow),
        pytest.param("zipf", (80, 8, 2, 16), marks=pytest.mark.slow),
        pytest.param("lognormal", (80, 8, 5, 40), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sticky_is_nearly_as_even_and_moves_little(kind, sizes):
    weight, gpus = loads_of(kind, LAYERS, EXPERTS), sizes[3]
    plan, ours, fresh = balanced(weight, *sizes), 0, 0
    for step in range(3):
        weight = drift(weight, step)
        new, best = sticky(weight, plan, *sizes[1:]), balanced(weight, *sizes)
        new.check(gpus)
        limit = heaviest(best, weight, gpus) * 1.01
        assert (heaviest(new, weight, gpus) <= limit * (1 + 1e-6)).all()
        # What is close enough to the mean is close enough, so that of swaps for less than that none may be left.
        for layer, mean in enumerate(weight.sum(1) / gpus * 1.01 * (1 - 1e-6)):
            slots = (np.asarray(x.phy2log)[layer].reshape(gpus, -1) for x in (plan, new))
            assert not needless_swaps(*slots, weight[layer], min(mean, limit[layer]), sizes[2])
        ours, fresh = ours + moved(plan, new, gpus).sum(), fresh + moved(plan, best, gpus).sum()
        plan = new
    assert ours < fresh / 2  # of few experts; examples/benchmarks/balance.py has the figures of real sizes


def test_sticky_leaves_what_is_good_enough():
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    plan = balanced(weight, *FLAT)
    assert sticky(weight, plan, 1, 1, 8) is plan
    worse = weight.copy()
    worse[1, plan.phy2log[1, 0]] *= 3
    assert sticky(worse, plan, 1, 1, 8, min_gain=0.9) is plan
    new = sticky(worse, plan, 1, 1, 8)
    assert np.flatnonzero(moved(plan, new, 8)).tolist() == [1]
    assert np.array_equal(np.delete(new.phy2log, 1, 0), np.delete(plan.phy2log, 1, 0))


def test_sticky_gains_what_it_must_where_it_moves_anything():
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    plan = balanced(weight, *GROUPED)
    new = drift(weight, 1, 0.25)
    before, least = heaviest(plan, new, 8), 0.1
    after = sticky(new, plan, *GROUPED[1:], tolerance=0.05, min_gain=least)
    changed = (after.phy2log != plan.phy2log).any(1)
    assert changed.any() and not changed.all()
    assert ((before - heaviest(after, new, 8))[changed] >= least * before[changed] * (1 - 1e-6)).all()


def test_sticky_keeps_the_slots_of_what_stays():
    weight = loads_of("zipf", LAYERS, EXPERTS)
    plan = balanced(weight, *GROUPED)
    new = sticky(drift(weight, 1, 0.3), plan, *GROUPED[1:])
    for old, now in zip(plan.phy2log.reshape(-1, 10), new.phy2log.reshape(-1, 10), strict=True):
        for slot, expert in enumerate(now):
            assert old[slot] == expert or expert not in old or (now == expert).sum() > 1


def test_sticky_keeps_groups_on_nodes():
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    plan = balanced(weight, *GROUPED)
    new = sticky(drift(weight, 2, 0.5), plan, *GROUPED[1:])
    groups = new.phy2log.reshape(LAYERS, 4, 20) // 8
    assert all(len(np.unique(node)) == 2 for layer in groups for node in layer)


def test_sticky_makes_whole_groups_of_a_placement_that_had_none():
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    plan = sticky(weight, balanced(weight, *FLAT), *GROUPED[1:], tolerance=0.0)
    assert all(len(np.unique(node // 8)) == 2 for node in plan.phy2log.reshape(-1, 20))


def test_elastic_uses_living_gpus_only():
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    alive = ~np.isin(np.arange(10), [1, 3])  # both of the first node
    plan = elastic(weight, alive, 100, 4, 2)
    plan.check(10)
    assert ((plan.phy2log.reshape(LAYERS, 10, 10) == -1).all(-1) == ~alive).all()
    assert (gpu_loads(plan, weight, 10)[:, ~alive] == 0).all()
    same = balanced(weight, *FLAT)
    assert np.allclose(heaviest(plan, weight, 10), heaviest(same, weight, 8))


def test_elastic_keeps_nodes_that_lost_equally_many():
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    alive = ~np.isin(np.arange(12), [0, 4, 8, 11])  # each of four nodes has lost one of three
    groups = elastic(weight, alive, 120, 8, 4).phy2log.reshape(LAYERS, 4, 30) // 8
    assert all(len(np.unique(node[node >= 0])) == 2 for layer in groups for node in layer)


def survived(weight, before, alive, *sizes, most):
    """`elastic`'s plan, nearly as even as a fresh one, of whose moves it makes less than this share."""
    after = elastic(weight, alive, *sizes, previous=before)
    after.check(len(alive))
    fresh = elastic(weight, alive, *sizes)
    assert (heaviest(after, weight, len(alive)) <= heaviest(fresh, weight, len(alive)) * 1.01 * (1 + 1e-6)).all()
    assert moved(before, after, len(alive)).sum() < moved(before, fresh, len(alive)).sum() * most
    return after


def test_elastic_restores_the_lost_and_leaves_the_rest():
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    before = balanced(weight, *FLAT)
    alive = np.arange(8) != 5
    after = survived(weight, before, alive, 80, 1, 1, most=1 / 3)

    back = elastic(weight, np.ones(8, bool), 80, 1, 1, previous=after)
    back.check(8)
    assert (back.phy2log >= 0).all()
    assert (heaviest(back, weight, 8) <= heaviest(before, weight, 8) * 1.01 * (1 + 1e-6)).all()


def test_elastic_moves_nothing_for_gpus_that_stay():
    """The plan is what `balanced` makes of these loads, and spares of light experts were worth little to it."""
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    plan = balanced(weight, *FLAT)
    assert (elastic(weight, np.ones(8, bool), 80, 1, 1, previous=plan).phy2log == plan.phy2log).all()


def test_fresh_plans_are_made_only_for_layers_that_search_does_not_bring_near_the_bound(monkeypatch):
    """And they are those that each layer would have alone."""
    module, planned = sys.modules[sticky.__module__], []

    def record(weight, *sizes):
        planned.append(len(weight))
        return balanced(weight, *sizes)

    monkeypatch.setattr(module, "balanced", record)
    weight, few = loads_of("lognormal", 20, EXPERTS), module.FEW
    plans = [balanced(rows, 66, 1, 1, 6).phy2log for rows in (weight[:few], weight[-few:])]  # by the program of a few
    plan = Placement.from_phy2log(np.concatenate([plans[0], plans[1][few - 20 :]]), EXPERTS)
    new = drift(weight, 3)
    near = sticky(new, plan, 1, 1, 6)
    assert not planned
    assert (heaviest(near, new, 6) <= new.sum(1, dtype=np.float64) / 6 * 1.01 * (1 + 1e-6)).all()

    new[[2, 7], 0] = new[[2, 7]].sum(1) * 50  # no plan is near the mean: 6 GPUs, and an expert has 3 replicas at most
    mixed = sticky(new, plan, 1, 1, 6)
    assert planned == [few]
    others = np.delete(np.arange(20), [2, 7])
    np.testing.assert_array_equal(mixed.phy2log[others], near.phy2log[others])
    for layer in (2, 7):
        alone = Placement.from_phy2log(np.tile(plan.phy2log[layer], (few, 1)), EXPERTS)
        one = sticky(np.tile(new[layer], (few, 1)), alone, 1, 1, 6)
        np.testing.assert_array_equal(mixed.phy2log[layer], one.phy2log[0])


def test_elastic_gives_spares_to_experts_of_heavy_nodes():
    """Each node had its own spares; when GPUs die, experts of a node with ten times the load need nearly all."""
    weight = loads_of("lognormal", LAYERS, EXPERTS)
    weight[:, :32] *= 10
    before = balanced(weight, 100, 2, 2, 10)
    alive = ~np.isin(np.arange(10), [1, 3])
    survived(weight, before, alive, 100, 2, 2, most=0.8)


def test_elastic_with_no_spare_but_enough():
    """As many living slots as experts: each has one."""
    plan = elastic(np.array([[4, 3, 2, 1]]), np.array([True, False, True]), 6, 1, 1)
    assert sorted(plan.phy2log[0].tolist()) == [-1, -1, 0, 1, 2, 3]


def test_placements_that_are_none():
    for phy2log, message in [
        ([[0, 1, 1]], "1 experts have no slot, the first is expert 2 of layer 0"),
        ([[0, 1, 3]], "holds experts 0 to 3: there are 3"),
        ([0, 1, 2], r"shape \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            Placement.from_phy2log(np.array(phy2log), 3)
    good = Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3)
    with pytest.raises(ValueError, match="4 replicas do not divide over 3 GPUs"):
        good.check(3)
    with pytest.raises(ValueError, match="as many slots as logcnt says"):
        Placement(good.phy2log, good.log2phy, np.array([[1, 2, 1]])).check(2)
    with pytest.raises(ValueError, match=r"does not list the slots of phy2log; first at \[layer, slot\] \[\[0, 1\]\]"):
        Placement(np.array([[0, 2, 0, 1]]), good.log2phy, good.logcnt).check(2)
    assert (good.num_layers, good.num_replicas, good.num_experts) == (1, 4, 3)
    assert [array.shape for array in good] == [(1, 4), (1, 3, 2), (1, 3)]


def test_a_placement_is_a_pytree():
    plan = eplb_jax.rebalance_experts(np.ones((1, 4)), 6, 1, 1, 2)
    assert isinstance(jax.tree.map(np.negative, plan), Placement)
    assert len(jax.tree.leaves(plan)) == 3


@pytest.mark.parametrize("sizes", [(320, 8, 8, 64), (288, 8, 4, 32), (320, 1, 1, 64), (96, 1, 1, 4), (64, 4, 4, 4)])
def test_training_starts_with_experts_at_home(sizes):
    """As even as any plan, no slot wasted, groups whole; and each GPU's first slots are of the masters that it has."""
    experts, (_, groups, nodes, gpus) = 256 if sizes[0] > 96 else 64, sizes
    start = initial_placement(2, experts, RebalanceConfig(*sizes))
    start.check(gpus)
    slots = start.phy2log.reshape(2, gpus, -1)
    own = experts // gpus
    assert np.array_equal(slots[..., :own].reshape(2, -1), np.tile(np.arange(experts), (2, 1)))
    even = np.ones((2, experts))
    np.testing.assert_allclose(gpu_loads(start, even, gpus), experts / gpus, rtol=1e-12)
    assert not duplicates(start, gpus).any()
    if groups > 1:
        assert (slots.reshape(2, nodes, -1) // (experts // nodes) == np.arange(nodes)[:, None]).all()


def test_no_gpu_starts_with_an_expert_twice_while_others_are_free():
    """Three GPUs of two experts each, and as many spares as the others have experts."""
    found = initial_placement(1, 6, RebalanceConfig(18, 1, 1, 3)).phy2log.reshape(3, 6)
    np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(6), (3, 1)))


def stays(old, new):
    """Experts of each new GPU that the old one of the same number holds, all together; [GPUs, slots] both."""
    return sum(len(set(one.tolist()) & set(other.tolist())) for one, other in zip(old, new, strict=True))


def renumbered_by_loops(old, new, nodes):
    """One layer's new GPUs [nodes, GPUs, slots], numbered by the assignment of SciPy: of GPUs, then of nodes."""
    gains, gpus = np.zeros((nodes, nodes), int), {}
    for node in range(nodes):
        for source in range(nodes):
            common = np.array([[len(set(a.tolist()) & set(b.tolist())) for b in new[source]] for a in old[node]])
            rows, columns = linear_sum_assignment(common, maximize=True)
            gains[node, source], gpus[node, source] = common[rows, columns].sum(), columns
    _, sources = linear_sum_assignment(gains, maximize=True)
    return np.stack([new[source][gpus[node, source]] for node, source in enumerate(sources)])


@pytest.mark.parametrize(("nodes", "gpus", "capacity", "experts"), [(1, 5, 3, 9), (3, 2, 4, 12), (2, 3, 2, 40)])
def test_gpus_of_a_fresh_plan_are_numbered_so_that_most_stays(nodes, gpus, capacity, experts):
    """As the plain loop does, for random placements with duplicates; no other numbering keeps more."""
    cluster = Cluster(nodes * gpus * capacity, nodes, nodes, nodes * gpus)
    rng = np.random.default_rng(nodes)
    old, new = rng.integers(0, experts, (2, 20, nodes * gpus * capacity), np.int32)
    found = _renumber(old, new, cluster).reshape(20, nodes, gpus, capacity)
    shape = nodes, gpus, capacity
    for was, fresh, now in zip(old.reshape(20, *shape), new.reshape(20, *shape), found, strict=True):
        np.testing.assert_array_equal(now, renumbered_by_loops(was, fresh, nodes))
        best = max(
            sum(
                max(stays(was[i], fresh[source][list(order)]) for order in itertools.permutations(range(gpus)))
                for i, source in enumerate(sources)
            )
            for sources in itertools.permutations(range(nodes))
        )
        assert sum(map(stays, was, now)) == best


def needless_swaps(old, new, weight, most, nodes):
    """Pairs of slots of a node that could swap what is new to their GPUs: it comes back, and no GPU is above most."""
    each = weight / np.maximum(np.bincount(new.reshape(-1), minlength=len(weight)), 1)
    gpus, found = len(new), []
    for a, b in itertools.combinations(np.ndindex(new.shape), 2):
        g, h = a[0], b[0]
        if g == h or g // (gpus // nodes) != h // (gpus // nodes):
            continue
        count = lambda slots, gpu, expert: (slots[gpu] == expert).sum()  # noqa: E731
        surplus = [count(new, gpu, new[at]) > count(old, gpu, new[at]) for gpu, at in ((g, a), (h, b))]
        back = [count(new, gpu, new[at]) < count(old, gpu, new[at]) for gpu, at in ((h, a), (g, b))]
        swapped = new.copy()
        swapped[a], swapped[b] = new[b], new[a]
        if all(surplus) and any(back) and each[swapped[[g, h]]].sum(1).max() <= most:
            found.append((a, b))
    return found


@pytest.mark.parametrize(("nodes", "gpus", "capacity", "experts"), [(1, 6, 2, 9), (2, 6, 3, 7), (1, 3, 5, 20)])
def test_swaps_that_balance_does_not_need_are_taken_back(nodes, gpus, capacity, experts):
    rng = np.random.default_rng(gpus)
    rows, replicas = 24, gpus * capacity
    weight = rng.uniform(1, 9, (rows, experts)).astype(np.float32)
    old = rng.integers(0, experts, (rows, replicas), np.int32)
    new, by_node = old.copy(), replicas // nodes
    for row in range(1, rows):  # swaps within nodes, and slots that change their expert
        for _ in range(row):
            first = rng.integers(replicas)
            second = first // by_node * by_node + rng.integers(by_node)
            new[row, [first, second]] = new[row, [second, first]]
        new[row, rng.integers(replicas)] = rng.integers(experts)
    shape = rows, gpus, capacity
    each = np.stack([w / np.maximum(np.bincount(x, minlength=experts), 1) for w, x in zip(weight, new, strict=True)])
    before = np.take_along_axis(each, new, 1).reshape(shape).sum(2)
    most = before.max(1) * rng.uniform(0.6, 1.5, rows)
    out = swap_back(weight, old, new, most, gpus, gpus // nodes)
    after = np.take_along_axis(each, out, 1).reshape(shape).sum(2)
    np.testing.assert_array_equal(out[0], old[0])
    np.testing.assert_array_equal(*(np.sort(x.reshape(rows, nodes, -1)) for x in (new, out)))
    assert (after <= np.maximum(most[:, None] * (1 + 1e-6), before)).all()
    assert (replicas_moved(old, out, gpus) <= replicas_moved(old, new, gpus)).all()
    assert replicas_moved(old, out, gpus).sum() < replicas_moved(old, new, gpus).sum()
    for row in range(rows):
        slots = (x[row].reshape(gpus, capacity) for x in (old, out))
        assert not needless_swaps(*slots, weight[row], most[row] * (1 - 1e-6), nodes)
        alone = (x[row : row + 1] for x in (weight, old, new, most))
        np.testing.assert_array_equal(swap_back(*alone, gpus, gpus // nodes)[0], out[row])


@pytest.mark.parametrize(("gpus", "capacity", "experts"), [(1, 4, 5), (4, 3, 6), (3, 5, 40)])
def test_what_gpus_have_in_common_and_what_moves(gpus, capacity, experts):
    """As sets of experts tell, with slots that hold none."""
    rng = np.random.default_rng(gpus)
    old, new = rng.integers(-1, experts, (2, 8, gpus * capacity), np.int32)
    by_gpu = [[[set(gpu.tolist()) - {-1} for gpu in row.reshape(gpus, -1)] for row in x] for x in (old, new)]
    common = [[[len(a & b) for b in after] for a in before] for before, after in zip(*by_gpu, strict=True)]
    shape = 8, gpus, capacity
    np.testing.assert_array_equal(common_experts(old.reshape(shape), new.reshape(shape)), common)
    arrived = [
        sum(len(b - a) for a, b in zip(before, after, strict=True)) for before, after in zip(*by_gpu, strict=True)
    ]
    np.testing.assert_array_equal(replicas_moved(old, new, gpus), arrived)
