"""Room for tokens from recent loads: enough for them, far below the worst case, and what goes beyond is counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import balanced, capacity_from, heaviest_by_split, init_moe, make_capacities, moe_layer, working_copies
from tests.eplb_jax.moe.test_layer import CONFIG, EXPERTS, ROUTER, TOKENS, WIDTH, make_mesh
from tests.eplb_jax.moe.test_split import least_heaviest

EP, SLOTS = 4, 24


def test_the_factor_is_what_the_heaviest_of_recent_steps_needed():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(EXPERTS), 2)
    plan = balanced(share, SLOTS, 1, 1, EP)
    loads = np.stack([[rng.multinomial(20_000, layer) for layer in share] for _ in range(5)])
    found = heaviest_by_split(loads, plan, EP)
    for step, layer in np.ndindex(5, 2):
        best = least_heaviest(loads[step, layer], plan.phy2log[layer], EP) / 5_000
        assert best - 1e-6 <= found[step, layer] <= best * 1.01 + SLOTS / EP / 5_000
    assert capacity_from(loads, plan, EP, margin=0.25) == pytest.approx(max(found.max(), 1) * 1.25)
    assert capacity_from(np.zeros_like(loads), plan, EP, margin=0.0) == 1


def test_tokens_beyond_the_room_are_counted():
    """A layer with the factor of its own loads drops nothing; of loads that change, choices are, and are counted."""
    params = init_moe(jax.random.key(0), CONFIG)
    x = jax.random.normal(jax.random.key(1), (EP * TOKENS * 4, WIDTH))

    def dropped(factor, shift):
        config = dataclasses.replace(CONFIG, replicas="split", capacity_factor=factor)

        def body(params, x):
            moved = params._replace(experts=working_copies(params.experts, placement.phy2log, "ep"))
            moved = moved._replace(bias=moved.bias.at[:2].add(shift))
            _, stats = moe_layer(moved, x, config, placement=placement, axis="ep")
            return jax.lax.psum(jnp.stack([stats.dropped, stats.loads.sum()]), "ep"), jax.lax.psum(stats.loads, "ep")

        specs = jax.tree.map(lambda _: P(), params)._replace(experts=jax.tree.map(lambda _: P("ep"), params.experts))
        run = jax.shard_map(body, mesh=make_mesh(EP), in_specs=(specs, P("ep")), out_specs=(P(), P()))
        (lost, total), loads = jax.jit(run)(params, x)
        return int(lost) / int(total), np.asarray(loads)

    placement = balanced(np.ones((1, EXPERTS)), SLOTS, 1, 1, EP).padded().of_layer(0)
    _, loads = dropped(None, 0.0)
    plan = balanced(loads[None], SLOTS, 1, 1, EP)
    placement = plan.padded().of_layer(0)
    factor = capacity_from(loads[None, None], plan, EP, margin=0.6)
    room, worst = (make_capacities(4 * TOKENS, ROUTER.top_k, EP, SLOTS // EP, f).rows for f in (factor, None))
    assert room < 0.6 * worst
    assert dropped(factor, 0.0)[0] == 0
    assert 0.02 < dropped(1.0, 5.0)[0] < 1
    assert dropped(None, 5.0)[0] == 0


def test_what_is_refused():
    plan = balanced(np.ones((2, 4)), 4, 1, 1, 2)
    for loads, margin, message in [
        (np.ones((1, 2, 4)), 0.1, "loads are float64"),
        (np.ones((2, 4), int), 0.1, r"shape \(2, 4\): they must be integers of \[steps, 2 layers, 4 experts\]"),
        (-np.ones((1, 2, 4), int), 0.1, "loads are -1 to -1"),
        (np.ones((1, 2, 4), int), -1.0, "margin=-1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            capacity_from(loads, plan, 2, margin=margin)
