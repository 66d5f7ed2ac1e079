"""The search that fresh plans share: from packed replicas to plans that are close to the best.

As in `eplb_jax.plan.nodes`, L layers of n nodes each, N = L n, or twice as many where groups are packed in two ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from eplb_jax.plan.exchanges import count_steps, exchange
from eplb_jax.plan.nodes import Nodes, lightest_packing
from eplb_jax.plan.search import largest_loads, recount, slot_loads
from eplb_jax.plan.swaps import swap_pairs

CLOSE = 5e-3
"""Layers this much above their target, as a share of it, are packed anew with other replica counts."""

RECOUNTS, PAIR_RECOUNTS = 6, 24
"""Steps of that at most, for each packs many plans; where GPUs have two slots, plans are packed without a loop, and who
gets the spares decides the most."""

FEW = 4
"""Layers that are packed anew at once: most plans need none, others a few."""

Pack = Callable[[jax.Array, jax.Array], jax.Array]
"""Slots of nodes with these loads [N, E] and replicas [N, R]: a permutation of each node's replicas."""


def improve(
    nodes: Nodes,
    start: jax.Array,
    pack: Pack,
    *,
    layers: int,
    num_gpus: int,
    tolerance: float,
    most: int | None = None,
    duplicates: bool = True,
) -> tuple[Nodes, jax.Array]:
    """The nodes of each layer's better way to pack groups, and their slots [N, R].

    First replicas change places, in all nodes at once; then experts of each layer's heaviest node change their counts,
    too; layers that are far from their target are packed anew with other counts.

    Args:
      nodes: from `pack_nodes`.
      start: the expert of each slot, from `pack`, int32 [N, R].
      pack: how replicas get slots.
      layers: L.
      num_gpus: of a node.
      tolerance: as a share of the target, where the search ends.
      most: replicas of an expert.
      duplicates: whether a GPU may hold an expert twice.
    """
    swap = functools.partial(swap_pairs, num_gpus=num_gpus, duplicates=duplicates)
    slots = swap(slot_loads(nodes.weight, start), start, nodes.target * (1 + tolerance))
    nodes, slots, start = lightest_packing(nodes, slots, layers, num_gpus, start)
    weight, target = nodes.weight, nodes.target * (1 + tolerance)
    slots = exchange(
        weight,
        slots,
        target,
        layers=layers,
        num_gpus=num_gpus,
        steps=count_steps(slots.shape[1], num_gpus),
        duplicates=duplicates,
    )

    loads = largest_loads(weight, slots, num_gpus).reshape(layers, -1)
    nodes_of_layer = loads.shape[1]
    heaviest = jnp.argmax(loads, axis=1) + jnp.arange(layers) * nodes_of_layer
    far = loads.max(1) > target[heaviest] * (1 + CLOSE)

    recounts = PAIR_RECOUNTS if slots.shape[1] == 2 * num_gpus else RECOUNTS

    few = min(FEW, layers)
    far_first = jnp.argsort(~far, stable=True).astype(jnp.int32)

    def pack_anew(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, slots = state
        chosen = jax.lax.dynamic_slice_in_dim(far_first, done, few)  # the last ones may be some that were done
        node, limit = heaviest[chosen], loads.max(1)[chosen]
        own = weight[node]
        sought = jnp.where(far[chosen], target[node], jnp.inf)
        counted = recount(own, start[node], sought, num_gpus=num_gpus, most=most, steps=recounts)
        packed = pack(own, counted)
        found = swap(slot_loads(own, packed), packed, sought)
        better = largest_loads(own, found, num_gpus) < limit
        changed = jnp.where(better[:, None], found, slots[node])
        return done + few, slots.at[node].set(changed, unique_indices=True)

    number = far.sum(dtype=jnp.int32)
    _, slots = jax.lax.while_loop(lambda state: state[0] < number, pack_anew, (jnp.int32(0), slots))
    return nodes, slots
