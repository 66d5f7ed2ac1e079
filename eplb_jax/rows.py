"""A layer's nodes as rows of their own: what policies work on, and the way back to a Placement."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eplb_jax.packing import take
from eplb_jax.placement import Array, Placement, list_slots
from eplb_jax.rebalance import experts_of_nodes, group_loads
from eplb_jax.search import refine


class Rows(NamedTuple):
    """The experts of each layer's nodes.

    Attributes:
      experts: the logical experts of the first node, of the second, ...; int32 [layers, experts].
      weight: their loads; float32 [layers * nodes, experts / nodes].
      target: the load per GPU that none of a layer's plans can be below, its heaviest node's mean, for each of its
        nodes; float32 [layers * nodes].
    """

    experts: jax.Array
    weight: jax.Array
    target: jax.Array


def make_rows(weight: jax.Array, num_groups: int, num_nodes: int, num_gpus: int) -> Rows:
    """Groups packed onto nodes, better than greedily; globally, if the nodes do not divide the groups."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers, num_experts = weight.shape
    experts = experts_of_nodes(weight, num_groups, num_nodes)
    size = num_experts // num_groups
    if num_nodes > 1 and num_groups > 2 * num_nodes:  # one or two a node are packed best by greed
        loads = group_loads(weight, num_groups)
        groups = refine(loads, experts[:, ::size] // size, jnp.zeros(layers, weight.dtype), num_gpus=num_nodes)
        experts = (groups[..., None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(layers, num_experts)
    of_nodes = take(weight, experts).reshape(layers * num_nodes, num_experts // num_nodes)
    means = of_nodes.sum(1).reshape(layers, num_nodes) * (num_nodes / num_gpus)
    return Rows(experts, of_nodes, jnp.repeat(means.max(1), num_nodes))


def join_rows(experts: jax.Array, slots: jax.Array) -> jax.Array:
    """phy2log [layers, replicas] of slots [layers * nodes, replicas / nodes] that number the row's experts."""
    layers, num_experts = experts.shape
    nodes = slots.shape[0] // layers
    first = jnp.arange(0, num_experts, num_experts // nodes, dtype=jnp.int32)[:, None]
    return take(experts, (slots.reshape(layers, nodes, -1) + first).reshape(layers, -1))


def place_slots(phy2log: Array, num_experts: int) -> Placement:
    """The Placement of these slots, replicas in the order of slots; NumPy for NumPy."""
    if not isinstance(phy2log, jax.Array):
        return Placement.from_phy2log(np.asarray(phy2log), num_experts)
    slots = jnp.arange(phy2log.shape[1], dtype=jnp.int32)
    earlier = (phy2log[:, None, :] == phy2log[:, :, None]) & (slots[None, :] < slots[:, None])
    rank = earlier.astype(jnp.int32).sum(-1, dtype=jnp.int32)
    log2phy = list_slots(phy2log, rank, num_experts, phy2log.shape[1] - num_experts + 1)
    return Placement(phy2log, log2phy, (log2phy >= 0).astype(jnp.int32).sum(-1, dtype=jnp.int32))
