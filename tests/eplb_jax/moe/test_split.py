"""Tokens divided over replicas by load: as light as the placement allows, and the layer stays the same."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import MoEConfig, balanced
from eplb_jax.moe.replica import choose_replicas
from eplb_jax.moe.split import choose_by_load, split_tokens
from tests.eplb_jax.moe.dense import placement_of
from tests.eplb_jax.moe.test_layer import CONFIG, check, make_params, make_tokens, random_placement

GPUS, EXPERTS, SLOTS = 6, 20, 30


def least_heaviest(counts, phy2log, gpus):
    """The exact least load of the heaviest GPU: the most tokens, over its GPUs, that only one set of GPUs can take.

    (Hoffman's circulation theorem; all sets are tried.)
    """
    homes = [set((np.flatnonzero(phy2log == e) // (len(phy2log) // gpus)).tolist()) for e in range(len(counts))]
    best = 0.0
    for size in range(1, gpus + 1):
        for chosen in itertools.combinations(range(gpus), size):
            bound = sum(c for c, home in zip(counts.tolist(), homes, strict=True) if home <= set(chosen))
            best = max(best, bound / size)
    return best


def loads_of(kind, rng, placement):
    if kind == "drift":
        return rng.multinomial(60_000, rng.dirichlet(np.full(EXPERTS, 3.0)))
    if kind == "skewed":
        share = 1 / np.arange(1, EXPERTS + 1) ** 1.5
        return rng.multinomial(60_000, rng.permutation(share / share.sum()))
    # All tokens for the experts of one GPU: the worst that a router can do to a placement.
    counts = np.zeros(EXPERTS, int)
    for expert in np.unique(placement.phy2log[:5]):
        counts[expert] = rng.integers(0, 20_000)
    return counts


def by_slot(tokens, placement):
    out = np.zeros(placement.num_replicas, int)
    used = placement.log2phy >= 0
    out[placement.log2phy[used]] = np.asarray(tokens)[used]
    return out


@pytest.mark.parametrize("kind", ["drift", "skewed", "adversarial"])
def test_the_heaviest_gpu_is_nearly_as_light_as_it_can_be(kind):
    rng = np.random.default_rng(0)
    split, gaps = jax.jit(lambda counts, placement: split_tokens(counts, placement, GPUS)), []
    for _ in range(12):
        placement = balanced(rng.lognormal(size=(1, EXPERTS)), SLOTS, 1, 1, GPUS).padded().of_layer(0)
        counts = loads_of(kind, rng, placement).astype(np.int32)
        tokens = np.asarray(split(counts, placement))
        assert (tokens >= 0).all() and (tokens[placement.log2phy < 0] == 0).all()
        assert (tokens.sum(1) == counts).all()
        heaviest = by_slot(tokens, placement).reshape(GPUS, -1).sum(1).max()
        even = (counts / placement.logcnt)[placement.phy2log].reshape(GPUS, -1).sum(1).max()
        rounding = SLOTS / GPUS
        assert heaviest <= even + rounding
        best = least_heaviest(counts, placement.phy2log, GPUS)
        assert heaviest >= best - 1e-6
        gaps.append(max(heaviest - rounding - best, 0) / best)
    assert max(gaps) < 0.02 and np.mean(gaps) < 0.002


def test_no_tokens_and_dead_slots():
    placement = placement_of(np.array([0, 1, -1, -1, 1, 2]), 3)
    assert split_tokens(jnp.zeros(3, jnp.int32), placement, 3).sum() == 0
    assert by_slot(split_tokens(jnp.array([2, 6, 2]), placement, 3), placement).tolist() == [2, 3, 0, 0, 3, 2]


def test_of_one_device_all_replicas_do():
    placement = placement_of(np.array([0, 1, 0, 1]), 2)
    assert split_tokens(jnp.array([3, 0]), placement, 1).sum(1).tolist() == [3, 0]


@pytest.mark.parametrize("per_node", [1, 2, 6])
def test_devices_agree_and_tokens_stay_where_that_costs_nothing(per_node):
    """Each device picks for its own tokens; together replicas get what the division says, as many as can at home."""
    rng = np.random.default_rng(per_node)
    placement = placement_of(np.r_[rng.permutation(EXPERTS), rng.integers(0, EXPERTS, SLOTS - EXPERTS)], EXPERTS)
    share = rng.dirichlet(np.ones(EXPERTS))
    experts = rng.choice(EXPERTS, (GPUS, 300, 1), p=share).astype(np.int32)
    experts[2, ::7] = -1  # tokens that are masked
    counts = np.stack([np.bincount(own[own >= 0], minlength=EXPERTS) for own in experts]).astype(np.int32)
    pick = jax.jit(lambda own, device: choose_by_load(own, placement, jnp.asarray(counts), device, per_node))
    slots = np.stack([np.asarray(pick(own, jnp.int32(device))) for device, own in enumerate(experts)])
    assert np.array_equal(slots < 0, experts < 0)
    real = experts >= 0
    assert np.array_equal(placement.phy2log[slots[real]], experts[real])
    wanted = by_slot(split_tokens(jnp.asarray(counts.sum(0)), placement, GPUS), placement)
    assert np.bincount(slots[real], minlength=SLOTS).tolist() == wanted.tolist()

    home = np.broadcast_to(np.arange(GPUS)[:, None, None] // per_node, slots.shape)
    stayed = (slots[real] // (SLOTS // GPUS) // per_node == home[real]).sum()
    most = 0
    for expert in range(EXPERTS):
        room, own = np.zeros(GPUS // per_node, int), counts[:, expert].reshape(-1, per_node).sum(1)
        for slot in np.flatnonzero(placement.phy2log == expert):
            room[slot // (SLOTS // GPUS) // per_node] += wanted[slot]
        most += np.minimum(room, own).sum()
    assert stayed == most


@pytest.mark.parametrize("ep", [1, 4])
def test_the_layer_is_the_same_whichever_replica_is_taken(x64, ep):
    config = dataclasses.replace(CONFIG, replicas="split", devices_per_node=max(ep // 2, 1))
    check(config, ep, random_placement(ep, 16, seed=ep), make_params(), *make_tokens())


def test_what_is_refused():
    placement = placement_of(np.array([0, 1, 0, 1]), 2)
    with pytest.raises(ValueError, match=r"counts have shape \(3,\).*2 experts: give the counts of its experts"):
        split_tokens(jnp.zeros(3, jnp.int32), placement, 2)
    with pytest.raises(ValueError, match="4 slots do not divide over 3 devices"):
        split_tokens(jnp.zeros(2, jnp.int32), placement, 3)
    with pytest.raises(
        ValueError, match=r"counts have shape None: choice='split' needs them for all devices.*\(2, 2\)"
    ):
        choose_replicas(jnp.zeros((4, 1), jnp.int32), placement, choice="split", num_devices=2)
    with pytest.raises(ValueError, match="replicas='even': it must be one of"):
        MoEConfig(replicas="even")
