"""Local search on a layer's heaviest node: swaps, and slots that change their expert, good steps or the least bad.

A step takes a replica off the heaviest GPU, by a swap with another GPU's or by giving another copy of one of its
experts a slot of an expert that has several. The best step is taken even where it makes the node heavier, and the slots
that it touched then rest for some steps, so that the search leaves where it is and does not come back (a tabu search:
Glover, ORSA Journal on Computing 1, 1989). The lightest plan seen is kept.

L layers of n nodes, G GPUs of K slots, R = G K replicas of a node; within the loop the last axis is L.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eplb_jax.plan.packing import divide, take
from eplb_jax.plan.search import counts_of
from eplb_jax.plan.swaps import GAIN

SHORTEST_REST, RESTS = 5, 13
"""Slots that a step touched rest for 5 to 17 steps, in turn: no circle of steps has all of these lengths."""


STEPS, WORK = 200, 2**16
"""Steps of a search at most, and pairs of slots that all its steps compare at most."""


def count_steps(replicas: int, num_gpus: int) -> int:
    """How many steps a search of nodes of this size is worth."""
    return max(min(STEPS, WORK * num_gpus // replicas**2), 8)


class _HeldExperts(NamedTuple):
    """What slots hold; each [n, R, L], or [R, L] of one node.

    Attributes:
      slots: experts; int32.
      weight: the loads of these experts, all replicas together; float32.
      counts: their replicas; int32.
    """

    slots: jax.Array
    weight: jax.Array
    counts: jax.Array


class _TabuSearch(NamedTuple):
    """Where `exchange` is.

    Attributes:
      plan: after the last step.
      resting: the step from which on a slot may change again [n, R, L].
      kept: the lightest plan seen of each node.
      best: the load of its heaviest GPU [n, L].
      step: how many there were.
    """

    plan: _HeldExperts
    resting: jax.Array
    kept: _HeldExperts
    best: jax.Array
    step: jax.Array


class _Steps(NamedTuple):
    """All steps from one plan: the heavier GPU after each swap and each move; float32 [K, R, L] both."""

    swaps: jax.Array
    moves: jax.Array


@functools.partial(jax.jit, static_argnames=("layers", "num_gpus", "duplicates", "steps"))
def exchange(
    weight: jax.Array,
    slots: jax.Array,
    target: jax.Array,
    *,
    layers: int,
    num_gpus: int,
    steps: int,
    duplicates: bool = True,
) -> jax.Array:
    """The lightest slots [L n, R] found in so many steps of each layer; a layer's search ends within its target.

    A layer's steps are of its node that is heaviest in the plans kept. Its result does not depend on other layers.

    Args:
      weight: load of each expert of a node, float32 [L n, E].
      slots: the expert of each slot, int32 [L n, R].
      target: of each node; equal in all of a layer [L n].
      layers: L.
      num_gpus: of a node, G.
      steps: at most.
      duplicates: whether a step may bring two replicas of an expert onto one GPU.
    """
    experts, shape = weight.shape[1], (layers, -1, slots.shape[1])

    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(shape), 0, -1)

    plan = _HeldExperts(*map(split, (slots, take(weight, slots), take(counts_of(slots, experts), slots))))
    best = _totals(plan, num_gpus).max(-2)
    state = _TabuSearch(plan, jnp.zeros_like(plan.slots), plan, best, jnp.int32(0))
    target = target.reshape(layers, -1)[:, 0]

    def unfinished(state: _TabuSearch) -> jax.Array:
        return (state.best.max(0) > target).any() & (state.step < steps)

    step = functools.partial(_take_step, target, num_gpus, experts, duplicates)
    kept = jax.lax.while_loop(unfinished, step, state).kept
    return jnp.moveaxis(kept.slots, -1, 0).reshape(slots.shape)


def _totals(plan: _HeldExperts, num_gpus: int) -> jax.Array:
    """Load of each GPU [..., G, L]."""
    loads = divide(plan.weight, plan.counts)
    return loads.reshape(*loads.shape[:-2], num_gpus, -1, loads.shape[-1]).sum(-2)


def _take_step(target: jax.Array, num_gpus: int, experts: int, duplicates: bool, state: _TabuSearch) -> _TabuSearch:
    nodes, replicas, _ = state.resting.shape
    on = jnp.arange(nodes, dtype=jnp.int32)[:, None] == jnp.argmax(state.best, axis=0).astype(jnp.int32)
    best = state.best.max(0)

    def pick(array: jax.Array) -> jax.Array:
        return jnp.where(on[:, None], array, 0).sum(0, dtype=array.dtype)

    plan, rested = _HeldExperts(*map(pick, state.plan)), pick(state.resting) <= state.step
    totals = _totals(plan, num_gpus)
    heaviest = jnp.argmax(totals, axis=0).astype(jnp.int32)
    found, mine_rested = _all_steps(plan, totals, heaviest, rested, experts, duplicates)
    record = best * (1 - GAIN)  # what would be the lightest yet may be done to slots that rest, too
    swaps = jnp.where((rested & mine_rested[:, None]) | (found.swaps < record), found.swaps, jnp.inf)
    moves = jnp.where(rested | (found.moves < record), found.moves, jnp.inf)
    after = jnp.concatenate([swaps, moves]).reshape(-1, len(best))
    least = after.min(0)
    number = jnp.arange(len(after), dtype=jnp.int32)[:, None]
    chosen = jnp.where(after == least, number, len(after)).min(0)
    going = (best > target) & jnp.isfinite(least)

    # The slot of the heaviest GPU, the other slot, and what they hold.
    capacity = replicas // num_gpus
    slot_ids = jnp.arange(replicas, dtype=jnp.int32)[:, None]
    is_move = chosen >= capacity * replicas
    place, other = chosen // replicas % capacity, slot_ids == chosen % replicas
    one = slot_ids == heaviest * capacity + place

    def at(hit: jax.Array) -> _HeldExperts:
        return _HeldExperts(*(jnp.where(hit, array, 0).sum(0, dtype=array.dtype) for array in plan))

    expert, given = at(one), at(other)
    counts = jnp.where(plan.slots == expert.slots, plan.counts + 1, plan.counts)
    counts = jnp.where(plan.slots == given.slots, plan.counts - 1, counts)
    counts = jnp.where(is_move & going, counts, plan.counts)
    coming = expert._replace(counts=jnp.where(is_move, expert.counts + 1, expert.counts))
    to, back = other & going, one & going & ~is_move
    new = _HeldExperts(
        *(
            jnp.where(to, here, jnp.where(back, there, array))
            for here, there, array in zip(coming, given, (plan.slots, plan.weight, counts), strict=True)
        )
    )
    now = _totals(new, num_gpus).max(0)
    better = on & (now < record)

    def put(where: jax.Array, old: _HeldExperts) -> _HeldExperts:
        return _HeldExperts(*(jnp.where(where[:, None], array, before) for array, before in zip(new, old, strict=True)))

    until = state.step + 1 + SHORTEST_REST + state.step % RESTS
    resting = jnp.where(on[:, None] & (to | back), until, state.resting)
    kept, best_now = put(better, state.kept), jnp.where(better, now, state.best)
    return _TabuSearch(put(on, state.plan), resting, kept, best_now, state.step + 1)


def _all_steps(
    plan: _HeldExperts, totals: jax.Array, heaviest: jax.Array, rested: jax.Array, experts: int, duplicates: bool
) -> tuple[_Steps, jax.Array]:
    """All steps, and whether the slots of the heaviest GPU have rested.

    What a move does to GPUs that hold several replicas of the two experts is not exact: it decides only which step is
    taken.
    """
    num_gpus, layers = totals.shape
    hot = (jnp.arange(num_gpus, dtype=jnp.int32)[:, None] == heaviest)[:, None]
    most = totals.max(0)

    def of_heaviest(array: jax.Array) -> jax.Array:
        parts = array.reshape(num_gpus, -1, layers)
        return jnp.where(hot, parts, 0).sum(0, dtype=array.dtype)

    loads = divide(plan.weight, plan.counts)
    mine, mine_loads = _HeldExperts(*map(of_heaviest, plan)), of_heaviest(loads)
    capacity = len(mine_loads)
    gpu = jnp.repeat(jnp.arange(num_gpus, dtype=jnp.int32), capacity)[:, None]
    own, total = gpu == heaviest, jnp.repeat(totals, capacity, axis=0)
    same = mine.slots[:, None] == plan.slots

    drop = mine_loads[:, None] - loads
    swaps = jnp.maximum(most - drop, total + drop)
    possible_swap = ~own & ~same

    more = divide(mine.weight, mine.counts + 1)
    growth = divide(plan.weight, jnp.maximum(plan.counts - 1, 1)) - loads
    lane = jnp.arange(layers, dtype=jnp.int32)
    holders = jnp.zeros((experts, layers), jnp.float32).at[plan.slots, lane].max(total)
    others = holders.at[plan.slots, lane].get(mode="promise_in_bounds") + growth
    lighter = most - (mine_loads - more)
    there = jnp.where(own, lighter[:, None] + more[:, None] - loads, total + more[:, None] - loads)
    moves = jnp.maximum(jnp.maximum(lighter[:, None], there), others)
    possible_move = (plan.counts > 1) & ~same
    if not duplicates:
        has = jnp.repeat(same.reshape(capacity, num_gpus, capacity, layers).any(2), capacity, axis=1)
        on_heaviest = same.any(0)
        possible_swap &= ~has & ~on_heaviest
        possible_move &= ~has
    steps = _Steps(jnp.where(possible_swap, swaps, jnp.inf), jnp.where(possible_move, moves, jnp.inf))
    return steps, of_heaviest(rested.astype(jnp.int32)) > 0
