"""Placements that change while a model trains: same losses, nothing compiled again, optimizer state where it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import eplb_jax
from eplb_jax import RebalanceConfig, SlidingWindow, decide, initial_placement, moe_layer, param_specs, working_copies
from tests.cases import cases
from tests.eplb_jax.moe.test_layer import CONFIG, EXPERTS, make_mesh, make_params, make_tokens, objective

EP = 4
REBALANCE = RebalanceConfig(24, 4, 2, EP, interval=3, min_gain=0.0)
SPECS = param_specs(CONFIG, "ep")


OPTIMIZER = optax.sgd(0.3, momentum=0.9)


@functools.cache
def make_step():
    """Masters by logical expert are trained; working copies are made, and their gradients summed, once a step."""
    mesh = make_mesh(EP)

    def body(params, placement, x, target):
        params = params._replace(experts=working_copies(params.experts, placement.phy2log, "ep"))
        y, stats = moe_layer(params, x, CONFIG, placement=placement, axis="ep", sequences=2)
        return jax.lax.pmean(objective(y, stats.balance_loss, target), "ep"), jax.lax.psum(stats.loads, "ep")

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(SPECS, P(), P("ep"), P("ep")), out_specs=(P(), P()))

    @jax.jit
    def step(params, moments, window, placement, x, target):
        (loss, loads), grads = jax.value_and_grad(mapped, has_aux=True)(params, placement, x, target)
        updates, moments = OPTIMIZER.update(grads, moments)
        return optax.apply_updates(params, updates), moments, window.update(loads[None]), loss

    return step


def shardings(specs):
    return jax.tree.map(lambda spec: NamedSharding(make_mesh(EP), spec), specs, is_leaf=lambda x: isinstance(x, P))


def run(placements):
    """Ten steps; placements by the step before which they are put in, or None: `decide` decides."""
    step = make_step()
    put = jax.jit(lambda *trees: trees, out_shardings=(shardings(SPECS), shardings(P())))
    params, window = put(make_params(), SlidingWindow.create(4, 1, EXPERTS))
    moments, losses, swaps = OPTIMIZER.init(params), [], 0
    placement = initial_placement(1, EXPERTS, REBALANCE)
    for i in range(10):
        if placements is None:
            decision = decide(i, window.loads(), placement, REBALANCE)
            if decision is not None and decision.changed:
                placement, swaps = decision.placement, swaps + 1
                assert decision.after > decision.before
        elif i in placements:
            placement, swaps = placements[i], swaps + 1
        layer = jax.tree.map(jnp.asarray, placement.of_layer(0))
        params, moments, window, loss = step(params, moments, window, layer, *make_tokens(seed=i))
        losses.append(float(loss))
    assert step._cache_size() == 1
    return losses, moments, swaps


@pytest.fixture
def plain(x64):
    return run({})


def random_placement(seed):
    rng = np.random.default_rng(seed)
    slots = rng.permutation(np.r_[np.arange(EXPERTS), rng.integers(0, EXPERTS, 24 - EXPERTS)])
    return eplb_jax.Placement.from_phy2log(slots[None], EXPERTS).padded()


@pytest.mark.parametrize("kind", [pytest.param("random", marks=pytest.mark.slow), "decided"])
def test_swaps_change_no_loss_and_compile_nothing(plain, kind):
    expected, expected_moments, _ = plain
    losses, moments, swaps = run({2: random_placement(0), 5: random_placement(1), 8: random_placement(2)}
                                 if kind == "random" else None)  # fmt: skip
    assert swaps == 3
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    assert len(set(losses)) == 10
    for found, want in zip(jax.tree.leaves(moments), jax.tree.leaves(expected_moments), strict=True):
        assert found.shape == want.shape
        np.testing.assert_allclose(found, want, rtol=1e-8, atol=1e-12 + 1e-10 * float(jnp.abs(want).max()))


def test_decisions_wait_for_the_interval_and_a_gain():
    config = dataclasses.replace(REBALANCE, interval=5, min_gain=0.1)
    start = initial_placement(2, EXPERTS, config)
    even, skewed = np.ones((2, EXPERTS)), np.ones((2, EXPERTS))
    skewed[1, 2:5] = 50
    assert [decide(step, skewed, start, config) is None for step in range(11)] == [s not in (5, 10) for s in range(11)]
    found = decide(5, even, start, config)
    assert found.placement is start and found.changed == found.moved == 0 and found.before == found.after
    found = decide(5, skewed, start, config)
    assert found.changed == 1
    assert np.array_equal(found.placement.phy2log[0], start.phy2log[0])
    assert found.placement.log2phy.shape == start.log2phy.shape
    assert decide(5, skewed, found.placement, config).changed == 0
    assert decide(5, skewed, start, dataclasses.replace(config, min_gain=0.9)).changed == 0


@cases("nodes", [1, 2], quick=[2])
def test_decisions_start_from_any_plan_and_keep_one_shape(tmp_path, nodes):
    """Plans are as wide as their busiest expert needs; another expert needs more one day."""
    config, even = RebalanceConfig(12, nodes, nodes, 4, interval=1), np.ones((1, 8))
    sizes = (12, nodes, nodes, 4)
    eplb_jax.save_placement(tmp_path / "plan.npz", eplb_jax.balanced(even, *sizes), num_gpus=4)
    starts = [policy(even, *sizes) for policy in (eplb_jax.balanced, eplb_jax.rebalance_experts)]
    starts += [eplb_jax.read_placement(tmp_path / "plan.npz"), starts[0].padded(), initial_placement(1, 8, config)]
    starts += [eplb_jax.rebalance_experts(jnp.asarray(even), *sizes), jax.tree.map(jnp.asarray, starts[0])]
    for start in starts:
        placement, widths = start, []
        for step, hot in ((1, 1.0), (2, 1.5), (3, 1000.0), (4, 1.0), (5, 1000.0)):
            found = decide(step, np.array([[hot, 1, 1, 1, 1, 1, 1, 1]]), placement, config)
            placement = found.placement
            placement.check(4)
            widths.append(placement.log2phy.shape)
        assert len(set(widths)) == 1
        assert start.log2phy.shape in (widths[0], (1, 8, 2), (1, 8, 5))
    with pytest.raises(ValueError, match="the placement has 12 replicas, the configuration 16"):
        decide(1, even, starts[0], dataclasses.replace(config, num_replicas=16))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"interval": 0}, "interval=0"), ({"min_gain": -1.0}, "min_gain=-1.0"), ({"tolerance": -0.1}, "tolerance=-0.1")],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(REBALANCE, **change)


def test_placements_of_too_many_replicas_are_not_cut():
    placement = eplb_jax.Placement.from_phy2log(np.array([[0, 1, 0, 0]]), 2)
    with pytest.raises(ValueError, match="3 columns: most=2 is too few"):
        placement.padded(2)
    with pytest.raises(ValueError, match="layer=1"):
        placement.of_layer(1)
