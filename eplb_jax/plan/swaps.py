"""Local search that needs no other replica counts: pairs of GPUs exchange a replica, all pairs of a round at once.

N nodes, G GPUs of K slots, R = G K replicas; within the loop the last axis is N, so that one operation of all nodes is
a few vector instructions. In a tournament of G - 1 rounds (the circle method) each GPU meets each other once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

GAIN = 1e-6
"""A step must lower a load by this share, so that rounding cannot make a circle of steps."""

TOURNAMENTS = 2
"""Of as many rounds at most are the exchanges: more gain little."""


class _Rounds(NamedTuple):
    """Where `swap_pairs` is.

    Attributes:
      loads: of each slot [G, K, N].
      slots: their experts [G, K, N].
      active: nodes that are above target and have not been idle for a tournament [N].
      idle: rounds in a row without a swap [N].
      round: how many there were.
    """

    loads: jax.Array
    slots: jax.Array
    active: jax.Array
    idle: jax.Array
    round: jax.Array


@functools.partial(jax.jit, static_argnames=("num_gpus", "duplicates"))
def swap_pairs(
    loads: jax.Array,
    slots: jax.Array,
    target: jax.Array,
    *,
    num_gpus: int,
    duplicates: bool = True,
) -> jax.Array:
    """Slots [N, R] after swaps that each make the heavier GPU of a pair lighter, until all are within target.

    Each pair makes the swap after which its heavier GPU is lightest. No node's heaviest GPU ever gets heavier, and a
    node's result does not depend on the other nodes.

    Args:
      loads: of each slot, float32 [N, R].
      slots: the expert of each slot, int32 [N, R].
      target: of each node [N].
      num_gpus: G, a divisor of R.
      duplicates: whether a swap may bring two replicas of an expert onto one GPU.
    """
    if num_gpus == 1:
        return slots
    players = num_gpus + num_gpus % 2
    shape = num_gpus, slots.shape[1] // num_gpus, len(slots)
    loads = loads.T.reshape(shape)
    active = loads.sum(1).max(0) > target
    state = _Rounds(loads, slots.T.reshape(shape), active, jnp.zeros(len(slots), jnp.int32), jnp.int32(0))
    most = TOURNAMENTS * (players - 1)
    step = functools.partial(_play_round, target, duplicates)
    state = jax.lax.while_loop(lambda state: state.active.any() & (state.round < most), step, state)
    return state.slots.reshape(-1, len(slots)).T


def _play_round(target: jax.Array, duplicates: bool, state: _Rounds) -> _Rounds:
    num_gpus, capacity, _ = state.loads.shape
    rounds = num_gpus - 1 + num_gpus % 2
    half = (rounds + 1) // 2
    # Player 0 stays, the others go round; with an odd number of GPUs the last player is none, and who meets it waits.
    circle = 1 + (jnp.arange(rounds, dtype=jnp.int32) + state.round % rounds) % rounds
    order = jnp.concatenate([jnp.zeros(1, jnp.int32), circle])
    left, right = order[:half], order[half:][::-1]
    playing = ((left < num_gpus) & (right < num_gpus))[:, None] & state.active
    loads, slots = ((array[left], array[right]) for array in (state.loads, state.slots))
    totals = loads[0].sum(1), loads[1].sum(1)
    now = jnp.maximum(*totals)
    drop = loads[0][:, :, None] - loads[1][:, None]
    after = jnp.maximum(totals[0][:, None, None] - drop, totals[1][:, None, None] + drop)
    if not duplicates:
        same = slots[0][:, :, None] == slots[1][:, None]
        after = jnp.where(same.any(2, keepdims=True) | same.any(1, keepdims=True), jnp.inf, after)
    after = after.reshape(half, capacity * capacity, -1)
    best = after.min(1)
    pair = jnp.arange(capacity * capacity, dtype=jnp.int32)[:, None]
    chosen = jnp.where(after == best[:, None], pair, capacity * capacity).min(1)
    swap = playing & (best < now * (1 - GAIN))
    position = jnp.arange(capacity, dtype=jnp.int32)[:, None]
    hits = [swap[:, None] & (position == index[:, None]) for index in (chosen // capacity, chosen % capacity)]

    def exchange(pair: tuple[jax.Array, jax.Array], whole: jax.Array) -> jax.Array:
        given = [jnp.where(hit, array, 0).sum(1, dtype=array.dtype) for hit, array in zip(hits, pair, strict=True)]
        after = [jnp.where(hits[i], given[1 - i][:, None], pair[i]) for i in range(2)]
        index = jnp.concatenate([left, right])
        return whole.at[index].set(jnp.concatenate(after), mode="drop", unique_indices=True)

    new = exchange(loads, state.loads)
    idle = jnp.where(swap.any(0), 0, state.idle + 1)
    active = state.active & (new.sum(1).max(0) > target) & (idle < rounds)
    return _Rounds(new, exchange(slots, state.slots), active, idle, state.round + 1)
