"""Who gets the spare replicas: other counts, tried by packing the replicas anew; and the loads of a plan.

All nodes of all layers are searched at once. A node has E experts and G GPUs of K slots, R = G K replicas in all;
weight [nodes, E] is the load of each expert, slots [nodes, R] the expert of each slot. What counts is the load of a
node's heaviest GPU: every step lowers it, or lowers one of several GPUs that are as heavy.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eplb_jax.plan.packing import divide, inverse, pack, take
from eplb_jax.plan.swaps import GAIN

DONORS, RECEIVERS = 8, 24
"""Experts that may lose a replica and experts that may gain one; `recount` tries all pairs."""

PATIENCE = 4
"""Steps that `recount` goes on without gain when it tries all experts; with more experts the time is not worth it."""


def counts_of(slots: jax.Array, experts: int) -> jax.Array:
    """Replicas of each expert [nodes, E]."""
    node = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((slots.shape[0], experts), jnp.int32).at[node, slots].add(1)


def slot_loads(weight: jax.Array, slots: jax.Array) -> jax.Array:
    """Load of each slot [nodes, R]; replicas of an expert share its load evenly."""
    return take(divide(weight, jnp.maximum(counts_of(slots, weight.shape[1]), 1)), slots)


def largest_loads(weight: jax.Array, slots: jax.Array, num_gpus: int) -> jax.Array:
    """Load of the heaviest GPU [nodes]."""
    return slot_loads(weight, slots).reshape(slots.shape[0], num_gpus, -1).sum(-1).max(1)


def pack_slots(weight: jax.Array, slots: jax.Array, num_gpus: int) -> jax.Array:
    """The same replicas, packed greedily."""
    gpu, position = pack(slot_loads(weight, slots), num_gpus)
    return take(slots, inverse(gpu * (slots.shape[1] // num_gpus) + position))


class _Exchanges(NamedTuple):
    """Where `recount` is; each node goes on until it is idle for too long.

    Attributes:
      slots: the expert of each slot after the last step [nodes, R].
      kept: the best slots seen [nodes, R].
      best: the load of their heaviest GPU [nodes].
      received: the expert that the last step gave a replica, which keeps it for a step; -1 at first [nodes, 1].
      idle: steps in a row that were no better; as many as the patience where a node has ended [nodes].
      steps: taken so far.
    """

    slots: jax.Array
    kept: jax.Array
    best: jax.Array
    received: jax.Array
    idle: jax.Array
    steps: jax.Array


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
    """Packs other replicas while the heaviest GPU is above target: takes one from an expert, gives one to another.

    Which experts get the spares decides the most where GPUs have few slots: greedy replication lowers the heaviest
    replica, not the heaviest GPU. The best plan seen is kept, and up to `PATIENCE` steps in a row may be no better:
    where there are few experts, one exchange alone often helps nothing. With ``most``, no expert gets more replicas.
    """
    nodes, experts = weight.shape
    patience = PATIENCE if experts <= RECEIVERS else 1
    start = _packed_heaviest(slot_loads(weight, slots), num_gpus)
    idle = jnp.where(start > target, 0, patience).astype(jnp.int32)
    state = _Exchanges(slots, slots, start, jnp.full((nodes, 1), -1, jnp.int32), idle, jnp.int32(0))

    def unfinished(state: _Exchanges) -> jax.Array:
        return (state.idle < patience).any() & (state.steps < steps)

    step = functools.partial(_exchange_one, weight, target, num_gpus, most, patience)
    return pack_slots(weight, jax.lax.while_loop(unfinished, step, state).kept, num_gpus)


def _exchange_one(
    weight: jax.Array, target: jax.Array, num_gpus: int, most: int | None, patience: int, state: _Exchanges
) -> _Exchanges:
    """A step of `recount`: makes the best of all exchanges of one replica, better than before or not."""
    slots, best = state.slots, state.best
    counts = counts_of(slots, weight.shape[1])
    donors, receivers = _candidates(weight, counts)

    def give(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        donor, receiver = pair
        possible = (take(counts, donor) > 1) & (donor != receiver) & (donor != state.received)
        if most is not None:
            possible &= take(counts, receiver) < most
        return possible[:, 0], _give(weight, slots, counts, donor, receiver)[0]

    possible, loads = jax.vmap(give)((donors, receivers))
    packed = _packed_heaviest(loads.reshape(-1, slots.shape[1]), num_gpus).reshape(possible.shape)
    heaviest = jnp.where(possible, packed, jnp.inf)
    chosen = jnp.argmin(heaviest, axis=0)[None, :, None]
    donor, receiver = (jnp.take_along_axis(x, chosen, axis=0)[0] for x in (donors, receivers))
    going = (best > target) & (state.idle < patience) & jnp.isfinite(heaviest.min(0))
    slots = jnp.where(going[:, None], _give(weight, slots, counts, donor, receiver)[1], slots)
    better = going & (heaviest.min(0) < best * (1 - GAIN))
    return _Exchanges(
        slots=slots,
        kept=jnp.where(better[:, None], slots, state.kept),
        best=jnp.where(better, heaviest.min(0), best),
        received=receiver,
        idle=jnp.where(better, 0, jnp.where(going, state.idle + 1, patience)),
        steps=state.steps + 1,
    )


def _candidates(weight: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each pair of an expert that may lose a replica and one that may gain it; both [pairs, nodes, 1].

    Those that lose one are the experts whose other replicas would have the least load, those that gain one the experts
    of the heaviest replicas, and some of the others.
    """
    spare = jnp.where(counts > 1, divide(weight, jnp.maximum(counts - 1, 1)), jnp.inf)
    donors = jnp.argsort(spare, axis=1)[:, :DONORS].astype(jnp.int32)
    receivers = _select_receivers(jnp.argsort(-divide(weight, counts), axis=1).astype(jnp.int32))
    shape = weight.shape[0], donors.shape[1], receivers.shape[1]
    pairs = donors[:, :, None], receivers[:, None, :]
    donors, receivers = (jnp.broadcast_to(x, shape).reshape(shape[0], -1).T[..., None] for x in pairs)
    return donors, receivers


def _give(
    weight: jax.Array, slots: jax.Array, counts: jax.Array, donor: jax.Array, receiver: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Load and expert of the slots [nodes, R] when one of the donor's [nodes, 1] goes to the receiver [nodes, 1]."""
    given = jnp.argmax(slots == donor, axis=1)[:, None] == jnp.arange(slots.shape[1])
    after = jnp.where(given, receiver, slots)
    each = take(divide(weight, counts), after)
    fewer = divide(take(weight, donor), jnp.maximum(take(counts, donor) - 1, 1))
    more = divide(take(weight, receiver), take(counts, receiver) + 1)
    return jnp.where(after == receiver, more, jnp.where(after == donor, fewer, each)), after


def _select_receivers(order: jax.Array) -> jax.Array:
    """A third of RECEIVERS from the head of an order, one from its tail, one in even steps between them."""
    experts = order.shape[1]
    if experts <= RECEIVERS:
        return order
    third = RECEIVERS // 3
    middle = jnp.linspace(third, experts - third - 1, third).astype(jnp.int32)
    return jnp.concatenate([order[:, :third], order[:, middle], order[:, experts - third :]], axis=1)


def _packed_heaviest(loads: jax.Array, num_gpus: int) -> jax.Array:
    """Load of the heaviest GPU [nodes] when slots of these loads [nodes, R] are packed greedily."""
    gpu, _ = pack(loads, num_gpus)
    node = jnp.arange(loads.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((loads.shape[0], num_gpus), jnp.float32).at[node, gpu].add(loads).max(1)
