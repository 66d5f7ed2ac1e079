"""The nodes of all layers side by side, as policies work on them, and the way back to a Placement."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eplb_jax.plan.cluster import Cluster
from eplb_jax.plan.packing import take
from eplb_jax.plan.placement import Array, Placement, list_slots
from eplb_jax.plan.rebalance import experts_of_nodes, group_loads
from eplb_jax.plan.search import largest_loads
from eplb_jax.plan.swaps import swap_pairs


class Nodes(NamedTuple):
    """The experts of each layer's nodes, for P ways of packing groups onto nodes: one, or DeepSeek's and another.

    Attributes:
      experts: the logical experts of the first node, of the second, ...; int32 [P * layers, experts].
      weight: their loads; float32 [P * layers * nodes, experts / nodes].
      target: the load per GPU that none of a packing's plans can be below, its heaviest node's mean, for each of its
        nodes; float32 [P * layers * nodes].
    """

    experts: jax.Array
    weight: jax.Array
    target: jax.Array


def pack_nodes(weight: jax.Array, cluster: Cluster) -> Nodes:
    """Packs groups onto nodes as DeepSeek does and, where it may differ, better than greedily.

    Nodes of closer loads make closer GPUs only where there are enough spares. With few, the heaviest GPU has a heavy
    expert, and the light experts that share its node decide. So both packings are worth a search.
    """
    layers, num_experts = weight.shape
    num_groups, num_nodes = cluster.num_groups, cluster.num_nodes
    experts = experts_of_nodes(weight, num_groups, num_nodes)
    size = num_experts // num_groups
    if num_nodes > 1 and num_groups > 2 * num_nodes:  # one or two a node are packed best by greed
        loads = group_loads(weight, num_groups)
        packed = experts[:, ::size] // size
        groups = swap_pairs(take(loads, packed), packed, jnp.zeros(layers, weight.dtype), num_gpus=num_nodes)
        other = (groups[..., None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(layers, num_experts)
        experts, weight = jnp.concatenate([experts, other]), jnp.concatenate([weight, weight])
    of_nodes = take(weight, experts).reshape(-1, num_experts // num_nodes)
    means = of_nodes.sum(1).reshape(-1, num_nodes) * (num_nodes / cluster.num_gpus)
    return Nodes(experts, of_nodes, jnp.repeat(means.max(1), num_nodes))


def place_idle(nodes: Nodes, slots: jax.Array, num_gpus: int) -> jax.Array:
    """The slots, with an even plan for each node without load.

    Replicas of an expert go to GPUs in turn: counts differ by one at most, and no GPU has an expert twice unless
    there are more replicas of each than GPUs.
    """
    replicas, experts = slots.shape[1], nodes.weight.shape[1]
    counts = replicas // experts + (np.arange(experts) < replicas % experts)
    even = np.repeat(np.arange(experts, dtype=np.int32), counts).reshape(-1, num_gpus).T.reshape(-1)
    return jnp.where(nodes.weight.max(1, keepdims=True) > 0, slots, even)


def lightest_packing(nodes: Nodes, slots: jax.Array, layers: int, num_gpus: int, *others: jax.Array) -> Any:
    """Nodes and slots of each layer's packing whose heaviest GPU is lightest, and its part of the other arrays."""
    loads = heaviest_of(nodes, slots, num_gpus).reshape(-1, layers)
    chosen = jnp.argmin(loads, axis=0), jnp.arange(layers)

    def pick(array: jax.Array) -> jax.Array:
        shape = array.shape[1:]
        return array.reshape(len(loads), layers, -1, *shape)[chosen].reshape(-1, *shape)

    return jax.tree.map(pick, (nodes, slots, *others))


def heaviest_of(nodes: Nodes, slots: jax.Array, num_gpus: int) -> jax.Array:
    """Load of the heaviest GPU [P * layers], of all nodes."""
    return largest_loads(nodes.weight, slots, num_gpus).reshape(len(nodes.experts), -1).max(1)


def join_nodes(nodes: Nodes, slots: jax.Array) -> jax.Array:
    """phy2log [P * layers, replicas] of slots [P * layers * nodes, replicas / nodes] that number the node's experts."""
    layers, num_experts = nodes.experts.shape
    size = nodes.weight.shape[1]
    first = jnp.arange(0, num_experts, size, dtype=jnp.int32)[:, None]
    return take(nodes.experts, (slots.reshape(layers, num_experts // size, -1) + first).reshape(layers, -1))


def place_slots(phy2log: Array, num_experts: int) -> Placement:
    """The Placement of these slots, replicas in the order of slots; NumPy for NumPy."""
    if not isinstance(phy2log, jax.Array):
        return Placement.from_phy2log(np.asarray(phy2log), num_experts)
    slots = jnp.arange(phy2log.shape[1], dtype=jnp.int32)
    earlier = (phy2log[:, None, :] == phy2log[:, :, None]) & (slots[None, :] < slots[:, None])
    rank = earlier.astype(jnp.int32).sum(-1, dtype=jnp.int32)
    log2phy = list_slots(phy2log, rank, num_experts, phy2log.shape[1] - num_experts + 1)
    return Placement(phy2log, log2phy, (log2phy >= 0).astype(jnp.int32).sum(-1, dtype=jnp.int32))
