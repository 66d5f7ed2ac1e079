"""As few moves as a wanted balance allows, from the placement that is there."""

from __future__ import annotations

import numpy as np
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads, on_host, to_float32
from eplb_jax.plan.cluster import Cluster, make_cluster
from eplb_jax.plan.metrics import gpu_loads
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.policies.balanced import balanced
from eplb_jax.plan.repair import common_experts, repack, replicas_moved
from eplb_jax.plan.search import recount, refine


def sticky(
    weight: Num[Array, "layers experts"],
    previous: Placement,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    tolerance: float = 0.01,
    min_gain: float = 0.0,
) -> Placement:
    """Changes a placement until its heaviest GPU is within ``tolerance`` of a fresh plan's, moving few replicas.

    Layers are independent. One that is good enough, or whose heaviest GPU would lose less than ``min_gain`` of its load
    in a fresh plan, keeps every slot. Elsewhere the plan with the fewest moves is taken of three: local search within
    each node from the placement that is there; the fewest GPUs packed anew, after spare replicas changed hands; the
    fresh plan, its GPUs numbered so that most replicas stay. Where a group of experts is on several nodes and should
    not be, only the fresh plan is considered. An expert that stays on its GPU stays in its slot. A layer without load
    is good enough.

    Args:
      weight: as in `rebalance_experts`; this runs on the host, so not traced.
      previous: the placement so far.
      num_groups, num_nodes, num_gpus: as in `rebalance_experts`.
      tolerance: how much heavier the heaviest GPU may be than in `balanced`'s plan, as a share.
      min_gain: the share of its load that the heaviest GPU must lose, or the layer is left alone.

    Returns:
      The new placement, NumPy; replicas in the order of their slots.

    Raises:
      ValueError: as `rebalance_experts`; a placement of other layers or experts; a negative tolerance or gain.

    >>> previous = Placement.from_phy2log(np.array([[0, 1, 2, 3]]), 4)
    >>> sticky(np.array([[9, 9, 1, 1]]), previous, 1, 1, 2).phy2log
    array([[0, 2, 1, 3]], dtype=int32)
    >>> sticky(np.array([[9, 9, 1, 1]]), previous, 1, 1, 2, min_gain=0.5) is previous
    True
    """
    weight = check_loads(weight)
    weight = np.asarray(to_float32(np.asarray(weight)))
    cluster = make_cluster(weight.shape[1], previous.num_replicas, num_groups, num_nodes, num_gpus)
    if weight.shape != (previous.num_layers, previous.num_experts):
        raise ValueError(
            f"weight has shape {weight.shape}, the previous placement is of {previous.num_layers} layers and "
            f"{previous.num_experts} experts"
        )
    if not (tolerance >= 0 and min_gain >= 0):
        raise ValueError(f"tolerance={tolerance} and min_gain={min_gain}: both are shares of at least 0")
    previous.check(num_gpus)

    fresh = balanced(weight, previous.num_replicas, num_groups, num_nodes, num_gpus)
    before, best = (gpu_loads(placement, weight, num_gpus).max(1) for placement in (previous, fresh))
    target = best * (1 + tolerance)
    old, new, counts = (np.asarray(x) for x in (previous.phy2log, fresh.phy2log, fresh.logcnt))
    whole = np.array([_groups_are_whole(slots, cluster, weight.shape[1]) for slots in old])
    layers = np.nonzero(~whole | (before > target) & (before - best >= min_gain * before))[0]
    if not len(layers):
        return previous

    plans = {layer: [_renumber(old[layer], new[layer], cluster)] for layer in layers}
    layers = layers[whole[layers]]
    if len(layers):
        for found in _stay(weight[layers], old[layers], counts[layers], target[layers], cluster):
            for layer, slots in zip(layers, found, strict=True):
                if (slots >= 0).all():
                    plans[layer].append(slots)
    phy2log = old.copy()
    for layer, choices in plans.items():
        chosen = min(choices, key=lambda slots: replicas_moved(old[layer], slots, num_gpus))
        phy2log[layer] = _keep_slots(old[layer], chosen, num_gpus)
    return Placement.from_phy2log(phy2log, weight.shape[1])


def _stay(
    weight: np.ndarray, old: np.ndarray, counts: np.ndarray, target: np.ndarray, cluster: Cluster
) -> list[np.ndarray]:
    """Plans [layers, replicas] that leave each node its experts; -1 where there is none. Counts: of a fresh plan."""
    layers, num_nodes, gpus = len(weight), cluster.num_nodes, cluster.gpus_per_node
    held = old.reshape(layers * num_nodes, -1)
    ids = np.stack([np.unique(slots) for slots in held])  # a node's experts get numbers of their own
    nodes = np.stack([np.searchsorted(own, slots) for own, slots in zip(ids, held, strict=True)]).astype(np.int32)
    loads, fresh = (np.take_along_axis(np.repeat(x, num_nodes, axis=0), ids, axis=1) for x in (weight, counts))
    limit = np.repeat(target, num_nodes)
    with on_host():
        # A little below the target, because these loads are float32.
        goal = (limit * (1 - 1e-6)).astype(np.float32)
        refined = np.asarray(refine(loads, nodes, goal, num_gpus=gpus))
        recounted = np.asarray(recount(loads, nodes, goal, num_gpus=gpus))
    wanted = [np.stack([np.bincount(slots, minlength=loads.shape[1]) for slots in x]) for x in (refined, recounted)]

    plans = [np.where(_heaviest(loads, refined, gpus)[:, None] <= limit[:, None], refined, -1)]
    for choice in (*wanted, fresh):
        plan = np.full_like(nodes, -1)
        for i, slots in enumerate(nodes):
            if choice[i].sum() == len(slots) and choice[i].min() > 0:
                found = repack(loads[i].astype(np.float64), slots, choice[i], limit[i], gpus)
                plan[i] = plan[i] if found is None else found
        plans.append(plan)
    named = [np.where(plan >= 0, np.take_along_axis(ids, np.maximum(plan, 0), axis=1), -1) for plan in plans]
    return [plan.reshape(layers, -1).astype(np.int32) for plan in named]


def _heaviest(weight: np.ndarray, slots: np.ndarray, num_gpus: int) -> np.ndarray:
    return gpu_loads(Placement.from_phy2log(slots, weight.shape[1]), weight, num_gpus).max(1)


def _groups_are_whole(slots: np.ndarray, cluster: Cluster, num_experts: int) -> bool:
    """Whether each group of experts is on one node, and each node holds equally many."""
    size = num_experts // cluster.num_groups
    groups = [len(np.unique(node // size)) for node in slots.reshape(cluster.num_nodes, -1)]
    return groups == [cluster.num_groups // cluster.num_nodes] * cluster.num_nodes


def _renumber(old: np.ndarray, new: np.ndarray, cluster: Cluster) -> np.ndarray:
    """The new slots with nodes, and GPUs within them, numbered so that most replicas stay on their GPU."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - plans by other policies need no SciPy

    num_nodes, num_gpus, gpus_per_node = cluster.num_nodes, cluster.num_gpus, cluster.gpus_per_node
    common = common_experts(old.reshape(num_gpus, -1), new.reshape(num_gpus, -1))
    common = common.reshape(num_nodes, gpus_per_node, num_nodes, -1).swapaxes(1, 2)
    stays = [[linear_sum_assignment(block, maximize=True) for block in row] for row in common]
    gains = [[block[pairs].sum() for block, pairs in zip(*row, strict=True)] for row in zip(common, stays, strict=True)]
    new = new.reshape(num_nodes, gpus_per_node, -1)
    out = np.empty_like(new)
    for node, source in zip(*linear_sum_assignment(np.array(gains), maximize=True), strict=True):
        out[node] = new[source, stays[node][source][1]]
    return out.reshape(-1)


def _keep_slots(old: np.ndarray, new: np.ndarray, num_gpus: int) -> np.ndarray:
    """The new slots, each GPU's in an order that leaves experts in the slots that they had there."""
    out = np.empty_like(new).reshape(num_gpus, -1)
    for gpu, (before, after) in enumerate(zip(old.reshape(num_gpus, -1), new.reshape(num_gpus, -1), strict=True)):
        coming = list(after)
        kept = np.zeros(len(before), bool)
        for slot, expert in enumerate(before):
            if expert in coming:
                coming.remove(expert)
                out[gpu, slot], kept[slot] = expert, True
        out[gpu, ~kept] = coming
    return out.reshape(-1)
