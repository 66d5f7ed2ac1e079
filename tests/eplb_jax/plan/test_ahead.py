"""Plans made beside the steps: when they are used, that they are `decide`'s, and what they should be worth."""

import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import (
    MovingAverage,
    Placement,
    PlanAhead,
    Prices,
    RebalanceConfig,
    balanced,
    decide,
    gpu_loads,
    initial_placement,
    moved,
    no_duplicate,
    sticky,
)
from eplb_jax.plan.halves import plan_in_halves

CONFIG = RebalanceConfig(12, 1, 1, 2, interval=5, min_gain=0.0)
START = initial_placement(3, 8, CONFIG)
LOADS = np.random.default_rng(0).lognormal(size=(3, 8)).astype(np.float32) * 1000


def test_a_plan_is_used_after_its_lag_and_is_what_decide_finds():
    ahead = PlanAhead(lambda step, loads, placement: decide(step, loads, placement, CONFIG), lag=2)
    assert ahead.take(4) is None and ahead.pending is None
    ahead.begin(5, LOADS, START)
    assert ahead.take(5) is None and ahead.take(6) is None
    step, loads = ahead.pending
    assert step == 5 and loads is LOADS
    found = ahead.take(7)
    expected = decide(5, LOADS, START, CONFIG)
    assert found.step == 5 and found.seconds > 0 and found.waited >= 0
    np.testing.assert_array_equal(found.decision.placement.phy2log, expected.placement.phy2log)
    assert found.decision[1:] == expected[1:] and expected.changed
    assert ahead.take(8) is None and ahead.pending is None


def test_planning_keeps_nobody_waiting_before_its_plan_is_due():
    """The plan ends only when the step of its use has come; until then each call returns at once."""
    may_end, threads = threading.Event(), []

    def plan(step, loads, placement):
        threads.append(threading.current_thread())
        assert may_end.wait(60)
        return decide(step, loads, placement, CONFIG)

    ahead = PlanAhead(plan, lag=3)
    ahead.begin(5, LOADS, START)
    assert [ahead.take(step) for step in (5, 6, 7)] == [None] * 3
    may_end.set()
    assert ahead.take(8).decision.changed
    assert threads == [thread for thread in threads if thread is not threading.main_thread()]


def test_time_of_plans_counts_while_they_run_and_the_processors_when_they_end():
    begun, may_end = threading.Event(), threading.Event()

    def plan(step, loads, placement):
        if step == 10:
            raise ValueError("no plan")
        begun.set()
        assert may_end.wait(60)
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass

    ahead = PlanAhead(plan, lag=0)
    assert ahead.spent == (0, 0)
    ahead.begin(5, LOADS, START)
    assert begun.wait(60)
    first = ahead.spent
    time.sleep(0.02)
    second = ahead.spent
    assert second.seconds >= first.seconds + 0.02 and second.cpu_seconds == 0
    may_end.set()
    ahead.take(5)
    ended = ahead.spent
    assert 0.02 <= ended.cpu_seconds <= ended.seconds and ended.seconds > second.seconds
    assert ahead.spent == ended, "none runs"
    ahead.begin(10, LOADS, START)
    with pytest.raises(ValueError, match="no plan"):
        ahead.take(10)
    assert ahead.spent.seconds > ended.seconds, "one that fails counts, too"
    assert ahead.spent == ahead.spent


def test_there_is_one_plan_at_a_time_and_errors_arrive():
    ahead = PlanAhead(lambda step, loads, placement: decide(step, loads, placement, CONFIG), lag=0)
    assert ahead.begin(5, LOADS, START) and not ahead.begin(10, LOADS[:, ::-1], START)
    assert ahead.take(10).step == 5, "or plans that are begun more often than used would never be"
    ahead.begin(15, -LOADS, START)
    with pytest.raises(ValueError, match="negative or not finite"):
        ahead.take(15)
    with pytest.raises(ValueError, match="lag=-1"):
        PlanAhead(decide, lag=-1)


def test_the_first_plan_finds_all_compiled():
    calls = []
    ahead = PlanAhead(lambda *given: calls.append(given))
    ahead.warm(START, 5)
    assert ahead.take(1) is None
    ((step, loads, placement),) = calls
    assert step == 5 and loads.shape == (3, 8) and placement is START and len(np.unique(loads)) == loads.size


def test_a_first_plan_that_fails_is_told_once():
    def plan(*given):
        raise ValueError("nothing to plan")

    ahead = PlanAhead(plan)
    ahead.warm(START, 5)
    with pytest.raises(ValueError, match="nothing to plan"):
        ahead.take(1)
    assert ahead.take(2) is None


def test_decisions_say_what_they_save_and_cost():
    """Against sums by hand: seconds of the heaviest GPU, and of the GPU that gets most replicas."""
    prices = Prices(seconds_per_token=1e-6, expert_bytes=10**6, bytes_per_second=1e10)
    found = decide(5, LOADS, START, CONFIG, prices)
    before, after = (gpu_loads(plan, LOADS, 2).max(1) for plan in (START, found.placement))
    changed = (found.placement.phy2log != START.phy2log).any(1)
    assert found.saved == pytest.approx(5e-6 * (before - after)[changed].sum())
    slots = [plan.phy2log.reshape(3, 2, 6) for plan in (START, found.placement)]
    coming = [[len(set(new) - set(old)) for old, new in zip(*layer, strict=True)] for layer in zip(*slots, strict=True)]
    assert found.cost == pytest.approx(1e-4 * np.max(coming, axis=1)[changed].sum())
    assert found.left == 0 and decide(5, LOADS, START, CONFIG).saved is None


def test_only_layers_that_pay_change():
    loads = np.ones((3, 8)) * 100
    loads[0, 2:4] = 900  # much to win: both are on the first GPU alone
    loads[1, 2:4] = 130  # little
    paying = dataclasses.replace(CONFIG, must_pay=True)
    every = decide(5, loads, START, CONFIG)
    assert every.changed == 2
    prices = Prices(seconds_per_token=1e-6, expert_bytes=10**6, bytes_per_second=2e9)
    found = decide(5, loads, START, paying, prices)
    assert (found.changed, found.left) == (1, 1)
    assert found.saved > found.cost > 0
    np.testing.assert_array_equal(found.placement.phy2log[1:], START.phy2log[1:])
    np.testing.assert_array_equal(found.placement.phy2log[0], every.placement.phy2log[0])
    assert found.moved == moved(START, found.placement, 2)[0]
    dear = prices._replace(bytes_per_second=1.0)
    none = decide(5, loads, START, paying, dear)
    assert (none.changed, none.left, none.saved, none.cost) == (0, 2, 0.0, 0.0)
    np.testing.assert_array_equal(none.placement.phy2log, START.phy2log)
    with pytest.raises(ValueError, match="must_pay=True without prices"):
        decide(5, loads, START, paying)


@pytest.mark.parametrize(("layers", "half"), [(15, 15), (16, 8), (17, 16), (58, 32)])
def test_halves_give_what_all_layers_give(layers, half):
    """Also of an odd number of layers, and of arrays with several rows a layer; halves are of a multiple of eight."""

    @jax.jit
    def rank(loads, nodes):
        assert len(loads) == half and len(nodes) == 2 * len(loads)
        return jnp.argsort(loads, axis=1).astype(jnp.int32), nodes * 2

    rng = np.random.default_rng(layers)
    loads, nodes = rng.normal(size=(layers, 5)).astype(np.float32), rng.normal(size=(2 * layers, 3)).astype(np.float32)
    ranks, twice = plan_in_halves(rank, layers, loads, nodes)
    np.testing.assert_array_equal(ranks, np.argsort(loads, axis=1))
    np.testing.assert_array_equal(twice, 2 * nodes)


@pytest.mark.slow
def test_many_layers_have_the_plans_that_few_have():
    weight = np.random.default_rng(1).lognormal(size=(17, 16)).astype(np.float32)
    drifted = weight * np.exp(0.3 * np.random.default_rng(2).normal(size=weight.shape)).astype(np.float32)
    parts = [slice(0, 9), slice(8, 17)]
    plan = balanced(weight, 24, 4, 2, 4)
    whole, apart = sticky(drifted, plan, 4, 2, 4), no_duplicate(weight, 24, 4, 2, 4)
    for part in parts:
        start = Placement.from_phy2log(plan.phy2log[part], 16)
        np.testing.assert_array_equal(balanced(weight[part], 24, 4, 2, 4).phy2log, start.phy2log)
        np.testing.assert_array_equal(no_duplicate(weight[part], 24, 4, 2, 4).phy2log, apart.phy2log[part])
        np.testing.assert_array_equal(sticky(drifted[part], start, 4, 2, 4).phy2log, whole.phy2log[part])
    assert not np.array_equal(whole.phy2log, plan.phy2log)


def test_an_average_on_the_host_is_that_on_a_device():
    host, device = (MovingAverage.create(0.9, 3, 8, on_host=on_host) for on_host in (True, False))
    for seed in range(5):
        counts = np.random.default_rng(seed).integers(0, 1000, (3, 8))
        host, device = host.update(counts), device.update(counts)
        assert type(host.average) is np.ndarray and host.average.dtype == np.float32
        np.testing.assert_allclose(host.loads(), device.loads(), rtol=1e-6)
    assert int(host.steps) == int(device.steps) == 5


@pytest.mark.parametrize("wide", [False, True])
def test_a_plan_computes_in_the_width_of_who_begins_it(wide):
    """`jax.enable_x64` is a thread's own; the planning thread has that of the caller."""
    seen = []

    def plan(step, loads, placement):
        seen.append(jnp.result_type(float) == jnp.float64)

    ahead = PlanAhead(plan, lag=0)
    with jax.enable_x64(wide):
        ahead.begin(1, np.ones((1, 4)), None)
    assert ahead.take(1) is None
    assert seen == [wide]
