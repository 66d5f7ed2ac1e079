"""Too little capacity: drops are counted exactly, and the rest equals the dense loop with those choices masked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from eplb_jax import RouterConfig
from eplb_jax.moe.dispatch import make_capacities
from eplb_jax.moe.replica import choose_replicas
from tests.cases import cases
from tests.eplb_jax.moe import dense
from tests.eplb_jax.moe.test_dispatch import sizes_of
from tests.eplb_jax.moe.test_layer import CONFIG, make_params, make_tokens, objective, sharded
from tests.plain import assert_trees_close

EXPERTS, TOKENS, SEQUENCES = 8, 128, 4
SMALL = dataclasses.replace(CONFIG, router=RouterConfig(EXPERTS, 3, 4, 3, scale=1.5))
SKEWS = [0.0, 0.3, 10.0]
"""How much less each expert's bias is than that of the one before: none, some, only the first are chosen."""
CASES = [(1, 1.0, False), (2, 1.0, False), (2, 1.25, False), (4, 1.0, False), (4, 1.25, False), (4, 1.0, True)]


def keep(slots, ep, num_slots, capacities):
    """Which choices [T, k] of all devices' tokens fit; how many were dropped when sent, and when received."""
    kept, target = np.ones(slots.shape, bool), slots // num_slots
    for source in np.split(np.arange(len(slots)), ep):
        for device in range(ep):
            visitors = [token for token in source if device in target[token]]
            for token in visitors[capacities.exchange :]:
                kept[token, target[token] == device] = False
    unsent = int((~kept).sum())
    for device in range(ep):
        # Tokens of all devices are numbered in the order in which they are received.
        waiting = [np.argwhere(kept & (slots == device * num_slots + slot)).tolist() for slot in range(num_slots)]
        for places, size in zip(waiting, sizes_of([len(w) for w in waiting], capacities.rows), strict=True):
            for token, j in places[size:]:
                kept[token, j] = False
    return kept, unsent, int((~kept).sum()) - unsent


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def plain(params, x, target, chosen, kept):
    """As `tests.eplb_jax.moe.test_layer.plain`, compiled once for all choices."""
    y = dense.layer(params, x, SMALL, chosen, kept)
    scores = jax.nn.sigmoid(x @ params.router)
    p = (scores / scores.sum(-1, keepdims=True)).reshape(SEQUENCES, -1, EXPERTS).mean(1)
    f = jax.nn.one_hot(chosen, EXPERTS).sum(1).reshape(SEQUENCES, -1, EXPERTS).mean(1) * EXPERTS / chosen.shape[1]
    return objective(y, (f * p).sum(1).mean(), target), y


@cases(("ep", "factor", "spare"), CASES, quick=[(4, 1.25, False), (4, 1.0, True)])
def test_drops_are_counted_and_the_rest_is_dense(x64, ep, factor, spare):
    config = dataclasses.replace(SMALL, capacity_factor=factor)
    placement = None
    if spare:
        slots = np.random.default_rng(1).permutation([*range(EXPERTS), *[0] * 2, *range(2, EXPERTS)])
        placement = dense.placement_of(slots, EXPERTS)
    num_slots = (16 if spare else EXPERTS) // ep
    capacities = make_capacities(TOKENS // ep, config.router.top_k, ep, num_slots, factor)
    run, dropped = sharded(config, ep, placement, SEQUENCES), []
    for seed, skew in enumerate(SKEWS):
        params, (x, target) = make_params(config, seed, bias_scale=0.05), make_tokens(seed + 2, TOKENS)
        # By expert number where slots are: devices with the first experts overflow, others have capacity left.
        params = params._replace(bias=params.bias - skew * np.arange(EXPERTS))
        chosen = dense.choose(np.asarray(x @ params.router), np.asarray(params.bias), config.router)
        slots = chosen if placement is None else np.asarray(choose_replicas(jnp.asarray(chosen), placement))
        kept, unsent, unplaced = keep(slots, ep, num_slots, capacities)

        (loss, (loads, count, y)), grads = run(params, x, target)
        (expected, y_plain), grads_plain = plain(params, x, target, jnp.asarray(chosen), jnp.asarray(kept, x.dtype))
        assert int(count) == unsent + unplaced == (~kept).sum()
        assert loads.tolist() == np.bincount(chosen.ravel(), minlength=EXPERTS).tolist()  # chosen, not kept
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        np.testing.assert_allclose(y, y_plain, rtol=1e-10, atol=1e-12)
        assert_trees_close(grads, grads_plain, rtol=1e-10)
        dropped.append((unsent, unplaced))
    assert ep > 1 or not np.any(dropped)  # one device has capacity for all its choices
    assert ep == 1 or dropped[-1][1] > 0
    assert (dropped[-1][0] > 0) == (capacities.exchange < TOKENS // ep)
