"""Local search on a layer's heaviest node: swaps, and slots that change their expert, good steps or the least bad.

A step takes a replica off the heaviest GPU, by a swap with another GPU's or by giving another copy of one of its
experts a slot of an expert that has several. The best step is taken even where it makes the node heavier, and the slots
that it touched then rest for some steps, so that the search leaves where it is and does not come back (a tabu search:
Glover, ORSA Journal on Computing 1, 1989). The lightest plan seen is kept.

L layers of n nodes, G GPUs of K slots, R = G K replicas of a node; within the loop the last axis is L. A step
reads what all slots hold once or twice and keeps no table of the K R steps that it chooses from: XLA makes one loop.
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

STEPS, WORK = 400, 2**17
"""Steps of a search at most, and pairs of slots that all its steps compare at most."""

EXACT = 128
"""Slots of a node up to which all moves are compared with what the others that hold the donor have after them; beyond,
that takes as long as all else, and only the best move is."""

PHASE = 8
"""Steps of each layer's heaviest node before the next is looked for."""


def count_steps(replicas: int, num_gpus: int) -> int:
    """How many steps a search of nodes of this size is worth."""
    return max(min(STEPS, WORK * num_gpus // replicas**2), 8)


class _HeldExperts(NamedTuple):
    """What slots hold; each [n, R, L], or [R, L] of one node of each layer.

    Attributes:
      slots: experts; int32.
      weight: the loads of these experts, all replicas together; float32.
      counts: their replicas; int32.
    """

    slots: jax.Array
    weight: jax.Array
    counts: jax.Array


class _TabuSearch(NamedTuple):
    """Where `exchange` is, of all nodes or of one node of each layer.

    Attributes:
      plan: after the last step.
      resting: the step from which on a slot may change again [n, R, L].
      kept: the slots of the lightest plan seen of each node [n, R, L].
      best: the load of its heaviest GPU [n, L].
      step: how many there were.
    """

    plan: _HeldExperts
    resting: jax.Array
    kept: jax.Array
    best: jax.Array
    step: jax.Array


class _ExchangeStep(NamedTuple):
    """What may be the next step of each layer; all [L].

    Attributes:
      after: the heavier GPU after it; infinity where none is possible.
      place: which slot of the heaviest GPU.
      other: the slot that it swaps with, or that it gives a replica to.
    """

    after: jax.Array
    place: jax.Array
    other: jax.Array


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

    A layer's steps are of the node that is heaviest in the plans kept, until it is not, for up to `PHASE` of them. Its
    result does not depend on other layers.

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
    nodes = len(plan.slots)
    best = jax.vmap(lambda plan: _totals(divide(plan.weight, plan.counts), num_gpus).max(0))(plan)
    state = _TabuSearch(plan, jnp.zeros_like(plan.slots), plan.slots, best, jnp.int32(0))
    target = target.reshape(layers, -1)[:, 0]
    step = functools.partial(_take_step, num_gpus, experts, duplicates)
    layer = jnp.arange(layers, dtype=jnp.int32)
    ids = jnp.arange(nodes, dtype=jnp.int32)[:, None]

    def unfinished(state: _TabuSearch) -> jax.Array:
        return (state.best.max(0) > target).any() & (state.step < steps)

    def search_node(state: _TabuSearch) -> _TabuSearch:
        node = jnp.argmax(state.best, axis=0).astype(jnp.int32)
        on = ids == node
        most = state.best.max(0)
        # The node's search ends where another one is heavier; at first that may be as heavy. Where all are light,
        # it does not begin.
        second = jnp.where(on, 0, state.best).max(0) * (1 - GAIN)
        goal = jnp.where(most > target, jnp.maximum(target, second), jnp.inf)
        end = jnp.minimum(state.step + (PHASE if nodes > 1 else steps), steps)

        def pick(array: jax.Array) -> jax.Array:
            return array.at[node, :, layer].get(mode="promise_in_bounds").T

        def put(array: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(on[:, None], new, array)

        plan, resting, kept = jax.tree.map(pick, state[:3])
        one = _TabuSearch(plan, resting, kept, most, state.step)
        one = jax.lax.while_loop(
            lambda one: (one.best > goal).any() & (one.step < end), functools.partial(step, goal), one
        )
        # Steps that no layer needed count, too: else how many a layer has would depend on the others.
        plan, resting, kept = jax.tree.map(put, state[:3], one[:3])
        return _TabuSearch(plan, resting, kept, jnp.where(on, one.best, state.best), end)

    kept = jax.lax.while_loop(unfinished, search_node, state).kept
    return jnp.moveaxis(kept, -1, 0).reshape(slots.shape)


def _totals(loads: jax.Array, num_gpus: int) -> jax.Array:
    """Load of each GPU [G, L] of slots' loads [R, L]."""
    return loads.reshape(num_gpus, -1, loads.shape[1]).sum(1)


def _spread(of_gpu: jax.Array, capacity: int) -> jax.Array:
    """Each GPU's value [G, L] for all of its slots [R, L]."""
    num_gpus, layers = of_gpu.shape
    return jnp.broadcast_to(of_gpu[:, None], (num_gpus, capacity, layers)).reshape(-1, layers)


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    """Each layer's values [..., L] at its indices [..., L] of the first axis."""
    layer = jnp.arange(array.shape[1], dtype=jnp.int32)
    return array.at[index, layer].get(mode="promise_in_bounds")


def _first_least(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least of each layer's values [fewer than 2**24, L] and its first index, int32; both [L]."""
    least = values.min(0)
    index = jnp.arange(len(values), dtype=jnp.float32)[:, None]  # XLA's CPU code reduces floats faster than integers
    return least, jnp.where(values == least, index, jnp.float32(len(values) - 1)).min(0).astype(jnp.int32)


def _take_step(num_gpus: int, experts: int, duplicates: bool, goal: jax.Array, state: _TabuSearch) -> _TabuSearch:
    plan, resting, kept, best, number = state
    capacity = len(resting) // num_gpus
    totals = _totals(divide(plan.weight, plan.counts), num_gpus)
    heaviest = _first_least(-totals)[1]
    record = best * (1 - GAIN)  # what would be the lightest yet may be done to slots that rest, too
    swap, move = _best_steps(plan, totals, heaviest, resting <= number, record, experts, duplicates)
    is_move = jnp.maximum(move.after, goal) <= jnp.maximum(swap.after, goal)  # a swap carries two replicas
    is_move &= jnp.isfinite(move.after)
    step = _ExchangeStep(*(jnp.where(is_move, *pair) for pair in zip(move, swap, strict=True)))
    going = (best > goal) & jnp.isfinite(step.after)

    # The slot of the heaviest GPU, the other slot, and what they hold.
    ids = jnp.arange(len(resting), dtype=jnp.int32)[:, None]
    mine = heaviest * capacity + step.place
    expert, given = (_HeldExperts(*(_at(array, index) for array in plan)) for index in (mine, step.other))
    counts = jnp.where(plan.slots == expert.slots, plan.counts + 1, plan.counts)
    counts = jnp.where(plan.slots == given.slots, plan.counts - 1, counts)
    counts = jnp.where(is_move & going, counts, plan.counts)
    coming = expert._replace(counts=jnp.where(is_move, expert.counts + 1, expert.counts))
    to, back = (ids == step.other) & going, (ids == mine) & going & ~is_move
    new = _HeldExperts(
        *(
            jnp.where(to, here, jnp.where(back, there, array))
            for here, there, array in zip(coming, given, (plan.slots, plan.weight, counts), strict=True)
        )
    )
    now = _totals(divide(new.weight, new.counts), num_gpus).max(0)
    better = now < record
    until = number + 1 + SHORTEST_REST + number % RESTS
    return _TabuSearch(
        plan=new,
        resting=jnp.where(to | back, until, resting),
        kept=jnp.where(better, new.slots, kept),
        best=jnp.where(better, now, best),
        step=number + 1,
    )


def _best_steps(
    plan: _HeldExperts,
    totals: jax.Array,
    heaviest: jax.Array,
    rested: jax.Array,
    record: jax.Array,
    experts: int,
    duplicates: bool,
) -> tuple[_ExchangeStep, _ExchangeStep]:
    """The best swap and the best move of each layer.

    What a move does to GPUs that hold several replicas of the two experts is not exact: it decides only which step is
    taken.
    """
    num_gpus, layers = totals.shape
    replicas = len(rested)
    capacity = replicas // num_gpus
    rows = heaviest * capacity + jnp.arange(capacity, dtype=jnp.int32)[:, None]
    mine = _HeldExperts(*(_at(array, rows) for array in plan))
    mine_rested = _at(rested, rows)
    loads, mine_loads, mine_more = (
        divide(plan.weight, plan.counts),
        divide(mine.weight, mine.counts),
        divide(mine.weight, mine.counts + 1),
    )
    most, total = totals.max(0), _spread(totals, capacity)
    own = jnp.arange(replicas, dtype=jnp.int32)[:, None] // capacity == heaviest
    growth = divide(plan.weight, jnp.maximum(plan.counts - 1, 1)) - loads
    others_after = total + growth
    if replicas <= EXACT:
        layer = jnp.arange(layers, dtype=jnp.int32)
        holders = jnp.zeros((experts, layers), jnp.float32).at[plan.slots, layer].max(total)
        others_after = _at(holders, plan.slots) + growth
    same = [plan.slots == mine.slots[k] for k in range(capacity)]
    others, several = ~own, plan.counts > 1
    if not duplicates:
        others &= ~functools.reduce(jnp.logical_or, same)

    # One slot of the heaviest GPU after the other: the best for each slot of the others, and whose it is.
    swaps = moves = jnp.full((replicas, layers), jnp.inf, jnp.float32)
    swap_places = move_places = jnp.zeros((replicas, layers), jnp.int32)
    for k in range(capacity):
        drop = mine_loads[k] - loads
        swap = jnp.maximum(most - drop, total + drop)
        lighter = most - (mine_loads[k] - mine_more[k])
        there = jnp.where(own, lighter, total) + mine_more[k] - loads
        move = jnp.maximum(jnp.maximum(lighter, there), others_after)
        possible_swap, possible_move = others & ~same[k], several & ~same[k]
        if not duplicates:
            by_gpu = same[k].reshape(num_gpus, capacity, layers)
            lacks = ~_spread(functools.reduce(jnp.logical_or, [by_gpu[:, i] for i in range(capacity)]), capacity)
            possible_swap, possible_move = possible_swap & lacks, possible_move & lacks
        possible_swap &= (rested & mine_rested[k]) | (swap < record)
        possible_move &= rested | (move < record)
        swap, move = jnp.where(possible_swap, swap, jnp.inf), jnp.where(possible_move, move, jnp.inf)
        swap_places, move_places = jnp.where(swap < swaps, k, swap_places), jnp.where(move < moves, k, move_places)
        swaps, moves = jnp.minimum(swaps, swap), jnp.minimum(moves, move)

    after, other = _first_least(swaps)
    best_swap = _ExchangeStep(after, _at(swap_places, other), other)
    after, other = _first_least(moves)
    if replicas > EXACT:
        holder = jnp.where(plan.slots == _at(plan.slots, other), total, 0).max(0)
        after = jnp.maximum(after, holder + _at(growth, other))
        after = jnp.where(_at(rested, other) | (after < record), after, jnp.inf)
    return best_swap, _ExchangeStep(after, _at(move_places, other), other)
