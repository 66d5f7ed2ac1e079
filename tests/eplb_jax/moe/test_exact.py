"""Devices with equally many tokens in every microbatch: the counts, and the layer of two is the plain one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import MoEConfig, init_moe, moe_layer, split_exactly
from eplb_jax.moe.exact import plan_gift
from tests.cases import cases
from tests.eplb_jax.moe.dense import placement_of
from tests.eplb_jax.moe.test_layer import CONFIG, check, make_mesh, make_params, make_tokens

ROUTER = dataclasses.replace(CONFIG.router, top_k=2)
EXACT = dataclasses.replace(CONFIG, router=ROUTER, exact=8, capacity_factor=1.0)
split = jax.jit(split_exactly, static_argnums=1, static_argnames=("masters", "most"))


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


def hard_loads(experts, devices, masters):
    """Many tokens of few experts, none, as many everywhere, one too few or too many, and random ones of any skew."""
    rng = np.random.default_rng(experts * devices)
    one, even, home = np.zeros(experts, int), np.full(experts, 7), np.arange(experts) // masters
    one[-1] = 2**31 - 1
    steps = 2 ** np.minimum(home, 20)  # each device has more than all before it
    cases = [one, one[::-1], np.zeros(experts, int), even, even + (home == 0), even - (home == 0), steps, steps[::-1]]
    cases += [even * (home % 2), np.where(home == devices // 2, 1000, 1), np.arange(experts), np.eye(experts)[0]]
    for spread in rng.uniform(0, 5, 60):
        share = np.exp(spread * rng.normal(size=experts))
        cases.append(rng.multinomial(rng.integers(1, 10**5), share / share.sum()))
    return np.stack(cases).astype(np.int32)


SIZES = [(8, 4, None), (256, 64, None), (30, 4, 8), (9, 2, 6), (64, 8, 16), (5, 5, None), (3, 1, None)]


@cases(("experts", "devices", "masters"), SIZES, quick=[(256, 64, None), (30, 4, 8), (5, 5, None)])
def test_every_device_has_its_share_and_gets_from_one_other(experts, devices, masters):
    """As many tokens as an even share has, all of them of its own experts or of those of one device."""
    counts = hard_loads(experts, devices, rows := masters or -(-experts // devices))
    found = jax.jit(jax.vmap(lambda each: split_exactly(each, devices, masters=masters)))(counts)
    giver, fetched, wanted = map(np.asarray, found)
    assert wanted.dtype == giver.dtype == fetched.dtype == np.int32
    assert (wanted >= 0).all()
    np.testing.assert_array_equal(wanted.sum(2, dtype=np.int64), counts)
    totals = counts.sum(1, dtype=np.int64)
    loads = wanted.sum(1, dtype=np.int64)
    np.testing.assert_array_equal(loads.max(1), -(-totals // devices))
    np.testing.assert_array_equal(loads.min(1), totals // devices)

    home = np.arange(experts) // rows
    for device in range(devices):
        away = wanted[:, :, device] * (home != device)
        assert (away[home != giver[:, device, None]] == 0).all()
        np.testing.assert_array_equal(away.any(1), giver[:, device] >= 0)
        listed = np.zeros((len(counts), experts + 1), bool)
        np.put_along_axis(listed, fetched[:, device], True, axis=1)  # -1 is the last column
        np.testing.assert_array_equal(listed[:, :-1], away > 0)
        assert ((fetched[:, device] >= 0).sum(1) == (away > 0).sum(1)).all(), "listed once"
    assert fetched.shape[2] == rows


def test_fullest_experts_are_given_first_and_few_experts_leave_a_difference():
    """By hand: device 1 lacks 4, and device 0 has 9 tokens of expert 1, 5 of expert 0, 4 too many."""
    counts = jnp.array([5, 9, 5, 1, 7, 3], jnp.int32)
    found = split(counts, 3)
    assert found.giver.tolist() == [-1, 0, -1] and found.fetched.tolist() == [[-1, -1], [1, -1], [-1, -1]]
    assert found.wanted.tolist() == [[5, 0, 0], [5, 4, 0], [0, 5, 0], [0, 1, 0], [0, 0, 7], [0, 0, 3]]
    counts = jnp.array([4, 6, 6, 0, 0, 0], jnp.int32)  # eight are to be given, six are of the fullest expert
    assert split(counts, 2).fetched.tolist() == [[-1] * 3, [1, 2, -1]]
    found = split(counts, 2, most=1)
    assert found.fetched.tolist() == [[-1], [1]] and found.wanted.sum(0).tolist() == [10, 6]


def test_with_fewer_experts_than_needed_no_device_is_heavier_than_without():
    counts = hard_loads(64, 8, 8)
    whole = jax.jit(jax.vmap(lambda each: split(each, 8)))(counts)
    home = counts.reshape(-1, 8, 8).sum(2, dtype=np.int64)
    for most in (1, 3):
        found = jax.jit(jax.vmap(lambda each, most=most: split(each, 8, most=most)))(counts)
        wanted = np.asarray(found.wanted)
        np.testing.assert_array_equal(wanted.sum(2, dtype=np.int64), counts)
        assert (wanted.sum(1, dtype=np.int64).max(1) <= home.max(1)).all()
        np.testing.assert_array_equal(found.fetched, whole.fetched[..., :most])
        enough = (np.asarray(whole.fetched)[..., most:] < 0).all((1, 2))
        assert 0 < enough.sum() < len(counts)
        np.testing.assert_array_equal(wanted[enough], np.asarray(whole.wanted)[enough])


def test_what_cannot_be_split_exactly_is_refused():
    counts = jnp.ones(8, jnp.int32)
    for wrong in (counts.reshape(2, 4), counts[:0]):
        with pytest.raises(ValueError, match="give a vector of one layer's tokens"):
            split_exactly(wrong, 2)
    with pytest.raises(ValueError, match=r"for 0 devices.*at least one device"):
        split_exactly(counts, 0)
    with pytest.raises(ValueError, match="masters=3 of 2 devices are fewer than 8 experts"):
        split_exactly(counts, 2, masters=3)
    for most in (0, 5):
        with pytest.raises(ValueError, match=f"most={most}: a device has 4 experts to give, so take 1 to 4"):
            split_exactly(counts, 2, most=most)


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
