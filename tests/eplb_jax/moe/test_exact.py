"""Two devices with equally many tokens in every microbatch: the counts, and the layer is the plain one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import MoEConfig, init_moe, moe_layer
from eplb_jax.moe.exact import plan_gift
from tests.eplb_jax.moe.dense import placement_of
from tests.eplb_jax.moe.test_layer import CONFIG, check, make_mesh, make_params, make_tokens

ROUTER = dataclasses.replace(CONFIG.router, top_k=2)
EXACT = dataclasses.replace(CONFIG, router=ROUTER, exact=8, capacity_factor=1.0)


def test_both_devices_get_as_many_tokens():
    """Any loads, also with masters that hold no expert; each slot holds what its tokens chose."""
    rng = np.random.default_rng(0)
    plan = jax.jit(plan_gift, static_argnums=(1, 2))
    for experts, masters in [(32, 16), (30, 16), (2, 1)]:
        for _ in range(40):
            share = rng.permutation(1 / np.arange(1, experts + 1) ** rng.uniform(0, 3))
            counts = rng.multinomial(rng.integers(1, 5000), share / share.sum()).astype(np.int32)
            gift = jax.tree.map(np.asarray, plan(counts, masters, masters))
            assert (gift.wanted >= 0).all() and (gift.wanted.sum(1) == counts).all()
            slots, table = gift.placement.phy2log, gift.placement.log2phy
            loads, expert = np.zeros(len(slots), int), np.repeat(np.arange(experts), 2).reshape(-1, 2)
            loads[table[table >= 0]] = gift.wanted[table >= 0]
            assert (slots[table[table >= 0]] == expert[table >= 0]).all() and (gift.wanted[table < 0] == 0).all()
            first, second = loads.reshape(2, -1).sum(1)
            assert abs(first - second) == counts.sum() % 2
            assert (slots >= 0).sum() == (table >= 0).sum()


def test_few_experts_leave_a_difference_and_fullest_go_first():
    gift = plan_gift(jnp.array([6, 1, 7, 0, 0, 0], jnp.int32), 3, 1)  # half of the difference is 7
    assert gift.wanted.tolist() == [[6, 0], [1, 0], [0, 7], [0, 0], [0, 0], [0, 0]]
    gift = plan_gift(jnp.array([2, 0, 0, 6, 5, 5], jnp.int32), 3, 1)  # half of it is 7, and one expert has 6
    assert gift.giver == 1
    assert gift.wanted.tolist() == [[2, 0], [0, 0], [0, 0], [0, 6], [5, 0], [5, 0]]


def test_the_layer_is_the_plain_one_and_drops_nothing(x64):
    """Output and gradients in float64, with room for the even share alone where one device's experts get more."""
    check(EXACT, 2, None, make_params(bias_scale=3.0), *make_tokens())


@pytest.mark.slow
def test_one_device_needs_no_gift(x64):
    check(dataclasses.replace(EXACT, capacity_factor=None), 1, None, make_params(), *make_tokens())


def test_what_is_refused():
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=rf"exact={wrong}: it must be an integer of at least 1, experts, or None"):
            dataclasses.replace(CONFIG, exact=wrong)
    with pytest.raises(ValueError, match="precision='nonsense': it must be one of"):
        MoEConfig(exact=2, precision="nonsense")
    with pytest.raises(ValueError, match=r"exact=2 with precision='fp8'.*take precision='bf16'"):
        MoEConfig(width=128, hidden=128, exact=2, precision="fp8")
    params = init_moe(jax.random.key(0), CONFIG)

    def call(ep, config, placement=None):
        spec = P("ep")
        function = functools.partial(moe_layer, config=config, placement=placement, axis="ep")
        specs = jax.tree.map(lambda _: P(), params)._replace(experts=jax.tree.map(lambda _: spec, params.experts))
        mapped = jax.shard_map(function, mesh=make_mesh(ep), in_specs=(specs, spec), out_specs=(spec, P()))
        return mapped(params, jnp.ones((8, 8)))

    with pytest.raises(ValueError, match=r"exact=8 on 4 devices: who gives to whom is data.*take ep=2"):
        call(4, EXACT)
    with pytest.raises(ValueError, match="exact=9: a device has 8 masters"):
        call(2, dataclasses.replace(EXACT, exact=9))
    with pytest.raises(ValueError, match="exact=8 and a placement"):
        call(2, EXACT, placement_of(np.arange(16), 16))
