"""DeepSeek's expert-parallel load balancer: loads of experts -> which slot of which GPU holds which expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads
from eplb_jax.plan.cluster import Cluster, make_cluster
from eplb_jax.plan.packing import call, divide, inverse, pack, replicate, take
from eplb_jax.plan.placement import Array, Placement, list_slots


def rebalance_experts(
    weight: Num[Array, "layers experts"], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """Replicates the experts with most load and places all replicas so that GPUs are loaded evenly.

    Where the nodes divide the groups of experts the policy is hierarchical: groups are packed onto nodes (so that
    group-limited routing stays within a node), experts are replicated within their node, replicas are packed onto the
    node's GPUs. Otherwise it is global: one group, one node.

    The result is DeepSeek's, bit for bit, wherever DeepSeek's is defined: it sorts by an unstable sort, which leaves
    ties among more than 16 items open. Here loads are float32, sorts are stable, of equal choices the first is taken,
    and loads of a group are added from first to last. A layer without load gives all spares to the first expert of a
    node, as there; `eplb_jax.balanced` spreads them.

    Args:
      weight: load of each expert, any estimate of its tokens. NumPy in, NumPy out, planned on the CPU; JAX arrays may
        be traced (the ints are static) and stay where they are.
      num_replicas: slots of a layer on all GPUs, a multiple of ``num_gpus``.
      num_groups: groups of experts, a divisor of their number.
      num_nodes: nodes, a divisor of ``num_gpus``; GPUs within one are joined by the fast network.
      num_gpus: GPUs on all nodes.

    Returns:
      The placement. ``log2phy`` has as many columns as any expert has replicas, or for JAX arrays, whose shapes cannot
      depend on values, as many as one could have: spare replicas of a node + 1.

    Raises:
      ValueError: sizes that do not fit each other; negative or non-finite loads; not two axes.

    Source: ``rebalance_experts`` of github.com/deepseek-ai/EPLB; the DeepSeek-V3 report, arXiv 2412.19437, 3.4.

    >>> weight = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]])
    >>> phy2log, log2phy, logcnt = rebalance_experts(weight, 16, 4, 2, 8)
    >>> phy2log
    array([[ 5,  6,  5,  7,  8,  4,  3,  4, 10,  9, 10,  2,  0,  1, 11,  1]],
          dtype=int32)
    """
    weight = check_loads(weight)
    num_experts = weight.shape[1]
    cluster = make_cluster(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    phy2log, rank, logcnt = call(_place_jit, weight, cluster=cluster)
    if isinstance(phy2log, jax.Array):
        most = (num_replicas - num_experts) // cluster.num_nodes + 1
        return Placement(phy2log, _list_slots_jit(phy2log, rank, num_experts, most), logcnt)
    layers = np.arange(len(phy2log))[:, None]
    log2phy = np.full((*logcnt.shape, logcnt.max()), -1, np.int32)
    log2phy[layers, phy2log, rank] = np.arange(num_replicas, dtype=np.int32)
    return Placement(phy2log, log2phy, logcnt)


def place(weight: jax.Array, cluster: Cluster) -> tuple[jax.Array, jax.Array, jax.Array]:
    """phy2log and replica rank [layers, replicas] and logcnt [layers, experts] by the hierarchical policy."""
    layers, num_experts = weight.shape
    num_nodes = cluster.num_nodes

    # Step 1: pack groups of experts onto nodes. Within a node experts have new numbers, mlog.
    mlog2log = experts_of_nodes(weight, cluster.num_groups, num_nodes)

    # Step 2: replicate experts within their node.
    of_node = take(weight, mlog2log).reshape(layers * num_nodes, num_experts // num_nodes)
    phy2mlog, rank, counts = replicate(of_node, cluster.replicas_per_node)

    # Step 3: pack replicas onto the GPUs of the node.
    gpu, slot = pack(take(divide(of_node, counts), phy2mlog), cluster.gpus_per_node)
    pphy2phy = inverse(gpu * cluster.replicas_per_gpu + slot)
    first = jnp.arange(0, num_experts, num_experts // num_nodes, dtype=jnp.int32)[:, None]
    pphy2mlog = take(phy2mlog, pphy2phy).reshape(layers, num_nodes, -1) + first
    phy2log = take(mlog2log, pphy2mlog.reshape(layers, cluster.num_replicas))
    rank = take(rank, pphy2phy).reshape(layers, cluster.num_replicas)
    return phy2log, rank, take(counts.reshape(layers, num_experts), inverse(mlog2log))


def experts_of_nodes(weight: jax.Array, num_groups: int, num_nodes: int) -> jax.Array:
    """The logical experts [layers, experts] of the first node, then of the second, ...: groups packed onto nodes."""
    layers, num_experts = weight.shape
    size = num_experts // num_groups
    node, position = pack(group_loads(weight, num_groups), num_nodes)
    group = inverse(node * (num_groups // num_nodes) + position)
    return (group[..., None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(layers, num_experts)


def group_loads(weight: jax.Array, num_groups: int) -> jax.Array:
    """Loads [layers, groups], added from first to last: the same on every backend."""
    experts = jnp.moveaxis(weight.reshape(weight.shape[0], num_groups, -1), -1, 0)
    start = jnp.zeros(experts.shape[1:], weight.dtype)
    return jax.lax.scan(lambda total, expert: (total + expert, None), start, experts, unroll=8)[0]


_place_jit = jax.jit(place, static_argnames="cluster")
_list_slots_jit = jax.jit(list_slots, static_argnums=(2, 3))
