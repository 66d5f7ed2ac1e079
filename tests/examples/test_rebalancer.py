"""When the pretraining example plans for its experts: by steps alone, and never for two of them at once."""

import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining.rebalancer import Rebalancer

from eplb_jax import Decision, Planned, initial_placement

LAYERS, EXPERTS, STEPS = 3, 8, 12
LOADS = np.random.default_rng(0).integers(1, 1000, (STEPS + 1, LAYERS, EXPERTS))


class State:
    """Parameters that are a placement."""

    def __init__(self, params):
        self.params = params

    def _replace(self, params):
        return State(params)


def make_rebalancer(**options):
    moe = types.SimpleNamespace(router=types.SimpleNamespace(num_groups=1), fetched=None, width=2, hidden=4)
    config = types.SimpleNamespace(experts=EXPERTS, redundant=4, routed_layers=LAYERS, moe=moe)
    model = types.SimpleNamespace(
        config=config, dtype=jnp.float32, placements=lambda params: params, with_placements=lambda old, new: new
    )
    return Rebalancer(model, 2, min_gain=0.0, **options)


def run(interval, lag, saved=(), resumed=()):
    """(step, step of the plan, slots) wherever a run used a plan; loads are seen a step late, but before saving."""
    rebalancer, seen, used = make_rebalancer(interval=interval, lag=lag), 0, []
    state = State(initial_placement(LAYERS, EXPERTS, rebalancer.config))
    for step in range(1, STEPS + 1):
        now = step if step in saved else step - 1
        for past in range(seen + 1, now + 1):
            rebalancer.observe(LOADS[past], past)
        seen = now
        state = rebalancer.maybe_rebalance(state, step)
        if rebalancer.last is not None:
            used.append((step, rebalancer.last.step, state.params.phy2log.tolist()))
        if step in resumed:
            kept = rebalancer.state_dict()
            rebalancer = make_rebalancer(interval=interval, lag=lag)
            rebalancer.load_state_dict(kept)
    return used


@pytest.mark.parametrize(("interval", "lag"), [(1, 1), (1, 2), (1, 3), (2, 3), (3, 2), (3, 5)])
def test_runs_that_are_saved_and_resumed_use_the_same_plans(interval, lag):
    expected = run(interval, lag)
    assert expected and all(step == planned + lag for step, planned, _ in expected)
    for saved in ((3,), (4, 5), range(1, STEPS + 1)):
        assert run(interval, lag, saved) == expected
        assert run(interval, lag, saved, saved) == expected


def test_what_planning_took_is_told_once():
    rebalancer = make_rebalancer(interval=1, lag=1)
    state = State(initial_placement(LAYERS, EXPERTS, rebalancer.config))
    assert rebalancer.planning() == {}
    rebalancer.observe(LOADS[1], 1)
    state = rebalancer.maybe_rebalance(state, 1)
    rebalancer.maybe_rebalance(state, 2)  # waits for the plan
    told = rebalancer.planning()
    assert told["planning_seconds"] == pytest.approx(rebalancer.last.seconds, rel=0.1)
    assert told["planning_cpu_seconds"] > 0
    assert rebalancer.planning() == {}


def test_plans_say_what_they_save_of_a_run():
    """Ranks of a pipeline run their layers at once: what all layers save and cost together is shared by the ranks."""
    told = {}
    for ranks in (1, 4):
        rebalancer = make_rebalancer(interval=10, ranks=ranks, token_share=1e-3, bytes_per_second=1e10)
        decision = Decision(initial_placement(LAYERS, EXPERTS, rebalancer.config), 1, 2, 0.5, 1.0, 8.0, 4e-4)
        rebalancer.last = Planned(10, decision, 0.5, 0.0)
        told[ranks] = rebalancer.metrics()
    assert (told[1]["saved_seconds"], told[1]["move_seconds"]) == (8.0, 4e-4)
    assert (told[4]["saved_seconds"], told[4]["move_seconds"]) == (2.0, 1e-4)
