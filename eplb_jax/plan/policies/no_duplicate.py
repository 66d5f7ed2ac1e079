"""Never two replicas of an expert on one GPU, where the second is a wasted slot."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads
from eplb_jax.plan.cluster import Cluster, check_share, make_cluster
from eplb_jax.plan.improve import improve
from eplb_jax.plan.nodes import join_nodes, pack_nodes, place_idle, place_slots
from eplb_jax.plan.packing import call_in_halves, descending_ranks, inverse, ordered_bits, replicate, take
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.search import slot_loads


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
    plan = functools.partial(_plan, cluster=cluster, tolerance=tolerance)
    phy2log = call_in_halves(plan, weight)
    return place_slots(phy2log, num_experts)


@functools.partial(jax.jit, static_argnames="cluster")
def _plan(weight: jax.Array, *, cluster: Cluster, tolerance: float) -> jax.Array:
    layers, gpus = len(weight), cluster.gpus_per_node
    nodes = pack_nodes(weight, cluster)
    replicas = replicate(nodes.weight, cluster.replicas_per_node, most=gpus)[0]
    pack = functools.partial(_pack_apart, gpus)
    start = pack(nodes.weight, replicas)
    nodes, slots = improve(
        nodes, start, pack, layers=layers, num_gpus=gpus, tolerance=tolerance, most=gpus, duplicates=False
    )
    return join_nodes(nodes, place_idle(nodes, slots, gpus))


class _Packed(NamedTuple):
    """What a node's GPUs hold so far; the last axis is that of nodes, N.

    Attributes:
      slots: the expert of each slot, -1 for none; int32 [G, K, N].
      loads: of each slot [G, K, N].
      counts: slots of each GPU that are taken, its first ones; int32 [G, N].
      totals: load of each GPU [G, N].
      holds: whether each GPU has the expert whose replicas are being packed [G, N].
    """

    slots: jax.Array
    loads: jax.Array
    counts: jax.Array
    totals: jax.Array
    holds: jax.Array


class _Replica(NamedTuple):
    """The next replica of each node; all [N].

    Attributes:
      load: what it carries.
      expert: whose it is; int32.
      first: whether it is the expert's first.
    """

    load: jax.Array
    expert: jax.Array
    first: jax.Array


class _Place(NamedTuple):
    """Where the next replica goes, and which other one makes room for it.

    Attributes:
      gpu: whose next free slot is filled [N].
      left: where the replica is that moves there, for which the new one comes: GPU and position [N] each; out of bounds
        where the new one itself takes the free slot.
    """

    gpu: jax.Array
    left: tuple[jax.Array, jax.Array]


def _pack_apart(gpus: int, weight: jax.Array, replicas: jax.Array) -> jax.Array:
    """Packs nodes' replicas [N, R], heaviest first, each onto the lightest GPU with a free slot that lacks its expert.

    If all with a free slot have it, one of them takes another GPU's replica, and the new one takes the slot of that.
    This is always possible: of the replicas on a full GPU, all of different experts, one is new to a GPU that holds
    fewer. Replicas of an expert come one after the other.
    """
    replicas = jnp.sort(replicas, axis=1)  # so that equal loads are in the order of experts
    loads = slot_loads(weight, replicas)
    order = inverse(descending_ranks(ordered_bits(loads)))
    nodes, capacity = len(loads), loads.shape[1] // gpus
    empty = _Packed(
        slots=jnp.full((gpus, capacity, nodes), -1, jnp.int32),
        loads=jnp.zeros((gpus, capacity, nodes), loads.dtype),
        counts=jnp.zeros((gpus, nodes), jnp.int32),
        totals=jnp.zeros((gpus, nodes), loads.dtype),
        holds=jnp.zeros((gpus, nodes), bool),
    )
    experts = take(replicas, order).T
    first = jnp.concatenate([jnp.ones((1, nodes), bool), experts[1:] != experts[:-1]])
    items = _Replica(take(loads, order).T, experts, first)
    packed, _ = jax.lax.scan(lambda packed, item: (_pack_one(packed, item), None), empty, items)
    return packed.slots.reshape(-1, nodes).T


def _pack_one(packed: _Packed, item: _Replica) -> _Packed:
    """The GPUs with one more replica of each node."""
    packed = packed._replace(holds=packed.holds & ~item.first)
    gpus, capacity, nodes = packed.slots.shape
    lightest = jnp.where((packed.counts < capacity) & ~packed.holds, packed.totals, jnp.inf)
    direct = jnp.isfinite(lightest).any(0)
    nowhere = jnp.full(nodes, gpus, jnp.int32), jnp.zeros(nodes, jnp.int32)
    easy = _Place(_first_least(lightest), nowhere)
    place = jax.lax.cond(direct.all(), lambda: easy, functools.partial(_make_room, packed, item, easy, direct))

    node = jnp.arange(nodes, dtype=jnp.int32)
    to, left = (place.gpu, packed.counts[place.gpu, node], node), (*place.left, node)
    expert, load = (
        jnp.where(direct, new, array.at[left].get(mode="clip"))
        for new, array in ((item.expert, packed.slots), (item.load, packed.loads))
    )
    gpu_ids = jnp.arange(gpus, dtype=jnp.int32)[:, None]
    here, there = gpu_ids == place.gpu, gpu_ids == place.left[0]
    return _Packed(
        slots=packed.slots.at[to].set(expert).at[left].set(item.expert, mode="drop"),
        loads=packed.loads.at[to].set(load).at[left].set(item.load, mode="drop"),
        counts=packed.counts + here.astype(jnp.int32),
        totals=packed.totals + jnp.where(here, load, jnp.where(there, item.load - load, 0)),
        holds=packed.holds | jnp.where(direct, here, there),
    )


def _make_room(packed: _Packed, item: _Replica, easy: _Place, direct: jax.Array) -> _Place:
    """The place where no GPU with a free slot lacks the expert: another GPU's replica goes to the lightest of them."""
    gpus, capacity, _ = packed.slots.shape
    totals, is_open = packed.totals, packed.counts < capacity
    fallback = _first_least(jnp.where(is_open, totals, jnp.inf))
    there = (jnp.arange(gpus, dtype=jnp.int32)[:, None] == fallback)[:, None]
    held, total = jnp.where(there, packed.slots, 0).sum(0, dtype=jnp.int32), jnp.where(there[:, 0], totals, 0).sum(0)
    new_there = ~(packed.slots[:, :, None] == held).any(2)
    after = jnp.maximum(total + packed.loads, (totals + item.load)[:, None] - packed.loads)
    after = jnp.where(new_there & ~(packed.holds | is_open)[:, None], after, jnp.inf)
    chosen = _first_least(after.reshape(gpus * capacity, -1))
    gpu, position = jnp.where(direct, gpus, chosen // capacity), jnp.where(direct, 0, chosen % capacity)
    return _Place(jnp.where(direct, easy.gpu, fallback), (gpu, position))


def _first_least(values: jax.Array) -> jax.Array:
    """The first index of the least value along the first axis; int32."""
    return jnp.argmin(values, axis=0).astype(jnp.int32)
