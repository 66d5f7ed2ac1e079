"""Local search on a plan: who gets the spare replicas, and which GPU holds what.

Works on rows, one for each layer and node, all at once. E experts of a row, G GPUs of K slots, R = G K replicas; weight
[rows, E] is the load of each expert, slots [rows, R] the expert of each slot. A row's figure is the load of its
heaviest GPU; every step lowers it, or lowers one of several GPUs that are as heavy.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eplb_jax.plan.packing import divide, inverse, pack, take

GAIN = 1e-6
"""A step must lower a load by this share, so that rounding cannot make a circle of steps."""

DONORS, RECEIVERS = 8, 24
"""Experts that may lose a replica and experts that may gain one; `recount` tries all pairs."""

PATIENCE = 4
"""Steps that `recount` goes on without gain when it tries all experts; with more experts the time is not worth it."""


def counts_of(slots: jax.Array, experts: int) -> jax.Array:
    """Replicas of each expert [rows, E]."""
    rows = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((slots.shape[0], experts), jnp.int32).at[rows, slots].add(1)


def slot_loads(weight: jax.Array, slots: jax.Array) -> jax.Array:
    """Load of each slot [rows, R]; replicas of an expert share its load evenly."""
    return take(divide(weight, jnp.maximum(counts_of(slots, weight.shape[1]), 1)), slots)


def largest_loads(weight: jax.Array, slots: jax.Array, num_gpus: int) -> jax.Array:
    """Load of the heaviest GPU [rows]."""
    return slot_loads(weight, slots).reshape(slots.shape[0], num_gpus, -1).sum(-1).max(1)


def pack_slots(weight: jax.Array, slots: jax.Array, num_gpus: int) -> jax.Array:
    """The same replicas, packed greedily."""
    gpu, position = pack(slot_loads(weight, slots), num_gpus)
    return take(slots, inverse(gpu * (slots.shape[1] // num_gpus) + position))


@functools.partial(jax.jit, static_argnames=("num_gpus", "most", "steps"))
def recount(
    weight: jax.Array,
    slots: jax.Array,
    target: jax.Array,
    *,
    num_gpus: int,
    most: int | None = None,
    steps: int = 24,
) -> jax.Array:
    """Packs other replicas while the figure is above target: takes one from an expert, gives one to another.

    Which experts get the spares decides the most where GPUs have few slots: greedy replication lowers the heaviest
    replica, not the heaviest GPU. The best plan seen is kept, and up to `PATIENCE` steps in a row may be no better:
    where there are few experts, one exchange alone often helps nothing. With ``most``, no expert gets more replicas.
    """
    rows, experts = weight.shape
    patience = PATIENCE if experts <= RECEIVERS else 1

    def change(slots, counts, donor, receiver):
        """Load and expert of the slots when one of the donor's goes to the receiver."""
        given = jnp.argmax(slots == donor, axis=1)[:, None] == jnp.arange(slots.shape[1])
        after = jnp.where(given, receiver, slots)
        each = take(divide(weight, counts), after)
        poorer = divide(take(weight, donor), jnp.maximum(take(counts, donor) - 1, 1))
        richer = divide(take(weight, receiver), take(counts, receiver) + 1)
        return jnp.where(after == receiver, richer, jnp.where(after == donor, poorer, each)), after

    def step(state):
        slots, kept, best, last, idle, done = state
        counts = counts_of(slots, experts)
        spare = jnp.where(counts > 1, divide(weight, jnp.maximum(counts - 1, 1)), jnp.inf)
        donors = jnp.argsort(spare, axis=1)[:, :DONORS].astype(jnp.int32)
        receivers = _spread(jnp.argsort(-divide(weight, counts), axis=1).astype(jnp.int32))
        donors, receivers = (
            jnp.broadcast_to(x, (rows, donors.shape[1], receivers.shape[1])).reshape(rows, -1).T[..., None]
            for x in (donors[:, :, None], receivers[:, None, :])
        )

        def figure(pair):
            donor, receiver = pair
            possible = (take(counts, donor) > 1) & (donor != receiver) & (donor != last)
            if most is not None:
                possible &= take(counts, receiver) < most
            return jnp.where(possible[:, 0], _heaviest(change(slots, counts, donor, receiver)[0], num_gpus), jnp.inf)

        figures = jax.lax.map(figure, (donors, receivers))
        chosen = jnp.argmin(figures, axis=0)[None, :, None]
        donor, receiver = (jnp.take_along_axis(x, chosen, axis=0)[0] for x in (donors, receivers))
        going = (best > target) & (idle < patience) & jnp.isfinite(figures.min(0))
        slots = jnp.where(going[:, None], change(slots, counts, donor, receiver)[1], slots)
        better = going & (figures.min(0) < best * (1 - GAIN))
        kept = jnp.where(better[:, None], slots, kept)
        best = jnp.where(better, figures.min(0), best)
        return slots, kept, best, receiver, jnp.where(better, 0, jnp.where(going, idle + 1, patience)), done + 1

    start = _heaviest(slot_loads(weight, slots), num_gpus)
    idle = jnp.where(start > target, 0, patience).astype(jnp.int32)
    state = slots, slots, start, jnp.full((rows, 1), -1, jnp.int32), idle, jnp.int32(0)
    found = jax.lax.while_loop(lambda state: (state[4] < patience).any() & (state[5] < steps), step, state)[1]
    return pack_slots(weight, found, num_gpus)


def _spread(order: jax.Array) -> jax.Array:
    """A third of RECEIVERS from the head of an order, one from its tail, one in even steps between them."""
    experts = order.shape[1]
    if experts <= RECEIVERS:
        return order
    third = RECEIVERS // 3
    middle = jnp.linspace(third, experts - third - 1, third).astype(jnp.int32)
    return jnp.concatenate([order[:, :third], order[:, middle], order[:, experts - third :]], axis=1)


def _heaviest(loads: jax.Array, num_gpus: int) -> jax.Array:
    """Load of the heaviest GPU [rows] when slots of these loads [rows, R] are packed greedily."""
    gpu, _ = pack(loads, num_gpus)
    rows = jnp.arange(loads.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((loads.shape[0], num_gpus), jnp.float32).at[rows, gpu].add(loads).max(1)


@functools.partial(jax.jit, static_argnames=("num_gpus", "duplicates", "steps"))
def refine(
    weight: jax.Array,
    slots: jax.Array,
    target: jax.Array,
    *,
    num_gpus: int,
    duplicates: bool = True,
    steps: int = 400,
) -> jax.Array:
    """Relieves the heaviest GPU until it is within the row's target, or nothing helps.

    A step either swaps one of its replicas with another GPU's, or gives another copy of one of its experts a slot of an
    expert that has several. Without ``duplicates`` no step brings two replicas of an expert onto one GPU.
    """
    capacity = slots.shape[1] // num_gpus

    def step(state):
        slots, _, done = state
        after, better = jax.vmap(functools.partial(_improve, duplicates))(weight, slots, target)
        return after, better.any(), done + 1

    state = slots.reshape(-1, num_gpus, capacity), jnp.array(True), jnp.int32(0)
    state = jax.lax.while_loop(lambda state: state[1] & (state[2] < steps), step, state)
    return state[0].reshape(slots.shape)


class _Row(NamedTuple):
    """One row as the two kinds of step see it."""

    slots: jax.Array  # [G, K]
    loads: jax.Array  # [G, K]
    totals: jax.Array  # [G]
    heaviest: jax.Array  # which GPU
    held: jax.Array  # [R, G]: replicas of the slot's expert on each GPU; a float, because loads are multiplied by it


def _improve(duplicates: bool, weight: jax.Array, slots: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of one row: slots [G, K] after it, and whether it was worth taking."""
    capacity = slots.shape[1]
    flat = slots.reshape(-1)
    counts = counts_of(flat[None], weight.shape[0])[0]
    loads = divide(weight, jnp.maximum(counts, 1))[slots]
    totals = loads.sum(1)
    heaviest = jnp.argmax(totals)
    held = (slots[None] == flat[:, None, None]).sum(-1).astype(weight.dtype)
    row = _Row(slots, loads, totals, heaviest, held)

    swaps = _try_swaps(row, duplicates)
    moves = _try_moves(row, weight, counts, duplicates)
    swap, move = jnp.argmin(swaps), jnp.argmin(moves)
    mine, other = jnp.divmod(swap, flat.size)
    mine = heaviest * capacity + mine
    swapped = flat.at[mine].set(flat[other]).at[other].set(flat[mine])
    receiver, given = jnp.divmod(move, flat.size)
    after = jnp.where(moves.min() <= swaps.min(), flat.at[given].set(slots[heaviest, receiver]), swapped)
    best = jnp.minimum(moves.min(), swaps.min())
    better = (totals[heaviest] > target) & (best < totals[heaviest] * (1 - GAIN))
    return jnp.where(better, after, flat).reshape(slots.shape), better


def _try_swaps(row: _Row, duplicates: bool) -> jax.Array:
    """[K, R]: the heavier of the two GPUs after a slot of the heaviest GPU and another one change places."""
    gpus, capacity = row.slots.shape
    gpu = jnp.repeat(jnp.arange(gpus), capacity)
    drop = row.loads[row.heaviest][:, None] - row.loads.reshape(-1)
    figures = jnp.maximum(row.totals[row.heaviest] - drop, row.totals[gpu] + drop)
    possible = drop > 0
    if not duplicates:
        mine = row.heaviest * capacity + jnp.arange(capacity)
        possible &= (row.held[:, row.heaviest] == 0) & (row.held[mine][:, gpu] == 0)
    return jnp.where(possible, figures, jnp.inf)


def _try_moves(row: _Row, weight: jax.Array, counts: jax.Array, duplicates: bool) -> jax.Array:
    """[K, R]: the heaviest GPU that changes when a slot is given to an expert of the heaviest GPU."""
    gpus, capacity = row.slots.shape
    flat = row.slots.reshape(-1)
    gpu = jnp.repeat(jnp.arange(gpus), capacity)
    receivers = row.slots[row.heaviest]
    richer = divide(weight[receivers], counts[receivers] + 1)
    poorer = divide(weight[flat], jnp.maximum(counts[flat] - 1, 1))
    held_by = row.held[row.heaviest * capacity + jnp.arange(capacity)]  # [K, G]
    relief = (row.loads[row.heaviest] - richer)[:, None] * held_by
    burden = (poorer - row.loads.reshape(-1))[:, None] * row.held
    own = gpu[:, None] == jnp.arange(gpus)
    totals = row.totals + burden - relief[:, None] + jnp.where(own, richer[:, None, None] - poorer[:, None], 0.0)
    changed = (row.held > 0) | (held_by > 0)[:, None] | own
    possible = (counts[flat] > 1) & (flat != receivers[:, None])
    if not duplicates:
        possible &= held_by[:, gpu] == 0
    return jnp.where(possible, jnp.where(changed, totals, 0.0).max(-1), jnp.inf)
