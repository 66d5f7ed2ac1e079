"""Never two replicas of an expert on one GPU, where the second is a wasted slot."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads
from eplb_jax.plan.cluster import Cluster, check_share, make_cluster
from eplb_jax.plan.nodes import Nodes, join_nodes, lightest_packing, pack_nodes, place_idle, place_slots
from eplb_jax.plan.packing import call, descending_ranks, inverse, ordered_bits, replicate, take
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.search import largest_loads, recount, refine, slot_loads


def no_duplicate(
    weight: Num[Array, "layers experts"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    tolerance: float = 1e-4,
) -> Placement:
    """Replicas of an expert on as many GPUs as it has replicas; without load, spares are spread evenly.

    Two replicas on one GPU share its time: the slot might as well be empty. DeepSeek's plan wastes 6% to 8% of its
    spare slots so. Local search then balances without bringing replicas together, and takes spares from one expert to
    give them to another where that lowers the heaviest GPU.

    Args:
      weight, num_replicas, num_groups, num_nodes, num_gpus: as in `rebalance_experts`.
      tolerance: search ends this close to the load that no plan can be below, as a share of it.

    Raises:
      ValueError: as `rebalance_experts`; more slots on a node than its experts times its GPUs.

    >>> import numpy as np
    >>> no_duplicate(np.array([[8, 3, 2, 0]]), 6, 1, 1, 2).phy2log
    array([[0, 2, 1, 0, 1, 3]], dtype=int32)
    """
    weight = check_loads(weight)
    num_experts = weight.shape[1]
    cluster = make_cluster(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    check_share("tolerance", tolerance)
    experts, gpus = num_experts // cluster.num_nodes, cluster.gpus_per_node
    if cluster.replicas_per_node > experts * gpus:
        raise ValueError(
            f"num_replicas={num_replicas} would put an expert on a GPU twice: {gpus} GPUs of a node hold its {experts} "
            f"experts at most {gpus} times each, so take at most {experts * gpus * cluster.num_nodes} replicas"
        )
    phy2log = call(_plan, weight, cluster=cluster, tolerance=tolerance)
    return place_slots(phy2log, num_experts)


@functools.partial(jax.jit, static_argnames="cluster")
def _plan(weight: jax.Array, *, cluster: Cluster, tolerance: float) -> jax.Array:
    layers, gpus = len(weight), cluster.gpus_per_node
    nodes = pack_nodes(weight, cluster)
    greedy = _search(nodes, replicate(nodes.weight, cluster.replicas_per_node, most=gpus)[0], tolerance, gpus)
    nodes, greedy = lightest_packing(nodes, greedy, layers, gpus)

    # Search gives slots to experts of the heaviest GPU only: others may need them more, packed anew.
    recounted = recount(nodes.weight, greedy, nodes.target * (1 + tolerance), num_gpus=gpus, most=gpus)
    recounted = _search(nodes, recounted, tolerance, gpus)
    better = largest_loads(nodes.weight, recounted, gpus) < largest_loads(nodes.weight, greedy, gpus)
    return join_nodes(nodes, place_idle(nodes, jnp.where(better[:, None], recounted, greedy), gpus))


def _search(nodes: Nodes, replicas: jax.Array, tolerance: float, gpus: int) -> jax.Array:
    """Slots with these replicas, packed apart, then improved."""
    loads = slot_loads(nodes.weight, replicas)
    order = inverse(descending_ranks(ordered_bits(loads)))
    slots = jax.vmap(functools.partial(_pack_apart, gpus))(take(loads, order), take(replicas, order))
    return refine(nodes.weight, slots, nodes.target * (1 + tolerance), num_gpus=gpus, duplicates=False)


class _Packed(NamedTuple):
    """What a node's GPUs hold so far.

    Attributes:
      slots: the expert of each slot, -1 for none; int32 [G, K].
      loads: of each slot [G, K].
      counts: slots of each GPU that are taken, its first ones; int32 [G].
    """

    slots: jax.Array
    loads: jax.Array
    counts: jax.Array


def _pack_apart(gpus: int, loads: jax.Array, experts: jax.Array) -> jax.Array:
    """Packs a node's replicas [R], heaviest first, each onto the lightest GPU with a free slot that lacks its expert.

    If all with a free slot have it, one of them takes another GPU's replica, and the new one takes the slot of that.
    This is always possible: of the replicas on a full GPU, all of different experts, one is new to a GPU that holds
    fewer.
    """
    capacity = loads.size // gpus
    empty = _Packed(
        jnp.full((gpus, capacity), -1, jnp.int32),
        jnp.zeros((gpus, capacity), loads.dtype),
        jnp.zeros(gpus, jnp.int32),
    )
    packed, _ = jax.lax.scan(lambda packed, item: (_pack_one(packed, *item), None), empty, (loads, experts))
    return packed.slots.reshape(-1)


def _pack_one(packed: _Packed, load: jax.Array, expert: jax.Array) -> _Packed:
    """The GPUs with one more replica."""
    slots, loads, counts = packed
    gpus, capacity = slots.shape
    gpu_ids, positions = jnp.arange(gpus, dtype=jnp.int32), jnp.arange(capacity, dtype=jnp.int32)
    totals = loads.sum(1)
    has = (slots == expert).any(1)
    is_open = counts < capacity
    lightest = jnp.argmin(jnp.where(is_open & ~has, totals, jnp.inf)).astype(jnp.int32)

    # Without such a GPU: the replica that leaves its slot to the new one and moves to the fallback GPU.
    fallback = jnp.argmin(jnp.where(is_open, totals, jnp.inf)).astype(jnp.int32)
    new_there = ~(slots[:, :, None] == slots[fallback]).any(-1)
    after = jnp.maximum(totals[fallback] + loads, (totals + load)[:, None] - loads)
    after = jnp.where(new_there & ~(has | is_open)[:, None], after, jnp.inf)
    gpu, position = jnp.divmod(jnp.argmin(after).astype(jnp.int32), capacity)
    moving, moving_load = slots[gpu, position], loads[gpu, position]

    direct = (is_open & ~has).any()
    target_gpu = jnp.where(direct, lightest, fallback)
    free = (gpu_ids == target_gpu)[:, None] & (positions == counts[target_gpu])
    left = ((gpu_ids == gpu)[:, None] & (positions == position)) & ~direct
    return _Packed(
        jnp.where(free, jnp.where(direct, expert, moving), jnp.where(left, expert, slots)),
        jnp.where(free, jnp.where(direct, load, moving_load), jnp.where(left, load, loads)),
        counts + free.any(1).astype(jnp.int32),
    )
