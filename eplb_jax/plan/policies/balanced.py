"""DeepSeek's plan, improved until it is close to the best there can be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads
from eplb_jax.plan.cluster import Cluster, check_share, make_cluster
from eplb_jax.plan.improve import improve
from eplb_jax.plan.nodes import heaviest_of, join_nodes, pack_nodes, place_idle, place_slots
from eplb_jax.plan.packing import call_in_halves, replicate
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.search import pack_slots


def balanced(
    weight: Num[Array, "layers experts"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    tolerance: float = 1e-4,
) -> Placement:
    """As `rebalance_experts`, then local search on who gets the spare replicas and which GPU holds what.

    No layer's heaviest GPU gets heavier than in DeepSeek's plan: where search finds nothing lighter, the layer has that
    plan. Search ends within ``tolerance`` of the load that no plan can be below (the mean per GPU of the heaviest
    node), or where no step helps. A layer or node without load gets an even plan: replica counts that differ by one at
    most, replicas of an expert on different GPUs; DeepSeek's gives all spares to the first expert.

    Args:
      weight, num_replicas, num_groups, num_nodes, num_gpus: as in `rebalance_experts`.
      tolerance: as a share of the heaviest GPU's load.

    Raises:
      ValueError: as `rebalance_experts`; a negative tolerance.

    >>> import numpy as np
    >>> from eplb_jax.plan.metrics import gpu_loads
    >>> from eplb_jax.plan.rebalance import rebalance_experts
    >>> weight = np.array([[9, 8, 7, 3, 2, 1]])
    >>> [gpu_loads(policy(weight, 9, 1, 1, 3), weight, 3).tolist() for policy in (rebalance_experts, balanced)]
    [[[11.0, 10.0, 9.0]], [[10.0, 10.0, 10.0]]]
    """
    weight = check_loads(weight)
    cluster = make_cluster(weight.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    check_share("tolerance", tolerance)
    plan = functools.partial(_plan, cluster=cluster, tolerance=tolerance)
    phy2log = call_in_halves(plan, weight)
    return place_slots(phy2log, weight.shape[1])


@functools.partial(jax.jit, static_argnames="cluster")
def _plan(weight: jax.Array, *, cluster: Cluster, tolerance: float) -> jax.Array:
    layers, gpus = len(weight), cluster.gpus_per_node
    nodes = pack_nodes(weight, cluster)
    replicas = replicate(nodes.weight, cluster.replicas_per_node)[0]
    start = pack_slots(nodes.weight, replicas, gpus)
    theirs = join_nodes(nodes, place_idle(nodes, start, gpus))[:layers]
    limit = heaviest_of(nodes, start, gpus)[:layers]

    pack = functools.partial(pack_slots, num_gpus=gpus)
    nodes, slots = improve(nodes, start, pack, layers=layers, num_gpus=gpus, tolerance=tolerance)
    ours = join_nodes(nodes, place_idle(nodes, slots, gpus))

    # DeepSeek's plan is left only for one that is lighter in exact arithmetic too: float32 rounds each load, each
    # quotient, and each sum of a GPU's slots by half a unit.
    rounding = (cluster.replicas_per_gpu + 2) * float(jnp.finfo(jnp.float32).eps)
    lighter = heaviest_of(nodes, slots, gpus) * (1 + 2 * rounding) < limit
    return jnp.where(lighter[:, None], ours, theirs)
