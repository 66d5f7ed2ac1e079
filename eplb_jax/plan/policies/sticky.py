"""As few moves as a wanted balance allows, from the placement that is there."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads, to_float32
from eplb_jax.plan.bounds import mean_bound
from eplb_jax.plan.cluster import Cluster, make_cluster
from eplb_jax.plan.exchanges import count_steps, exchange
from eplb_jax.plan.halves import plan_in_halves
from eplb_jax.plan.metrics import gpu_loads
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.policies.balanced import balanced
from eplb_jax.plan.repair import common_experts, heaviest_gpu, keep_slots, replicas_moved, swap_back

PAIR = 2
"""Slots of a GPU up to which plans are seldom close to the bound, so that the fresh plan is made at once."""

FEW = 16
"""Layers that get a fresh plan at once, where they are no more: of one number, so that it compiles once."""

MANY_MOVED = 0.5
"""A plan that moves a larger share of a layer's replicas is compared with the fresh plan, which may move fewer."""


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
    """Changes a placement until its heaviest GPU is within ``tolerance`` of the best, moving few replicas.

    Layers are independent. One within the tolerance of the best, or whose heaviest GPU would lose less than
    ``min_gain`` of its load, keeps every slot. Elsewhere, replicas of the heaviest GPU swap places with others of its
    node, and spare replicas change hands. The best is first the load that no plan can be below, the mean per GPU, and
    of the heaviest node. A layer that does not come close to it is compared with a fresh plan of `balanced`. Where the
    search does not come close to that either, the layer gets it, its GPUs numbered so that most replicas stay. Swaps
    that the balance does not need are taken back. Where a group of experts is on several nodes and should not be, only
    the fresh plan is considered. An expert that stays on its GPU stays in its slot. A layer without load is good
    enough.

    Args:
      weight: as in `rebalance_experts`; this runs on the host, so not traced.
      previous: the placement so far.
      num_groups, num_nodes, num_gpus: as in `rebalance_experts`.
      tolerance: how much heavier the heaviest GPU may be than the bound or `balanced`'s, as a share.
      min_gain: the share of its load that the heaviest GPU must lose, or the layer is left alone.

    Returns:
      The new placement, NumPy; replicas in the order of their slots.

    Raises:
      ValueError: as `rebalance_experts`; a placement of other layers or experts; a negative tolerance or gain.

    >>> previous = Placement.from_phy2log(np.array([[0, 1, 2, 3]]), 4)
    >>> sticky(np.array([[9, 9, 1, 1]]), previous, 1, 1, 2).phy2log
    array([[2, 1, 0, 3]], dtype=int32)
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
    if (np.asarray(previous.phy2log) < 0).any():
        raise ValueError(
            "the previous placement has slots of dead GPUs (-1): take elastic, which knows which are alive"
        )

    old = np.asarray(previous.phy2log)
    before = gpu_loads(previous, weight, num_gpus).max(1)
    bound = mean_bound(weight, cluster)
    whole = _groups_are_whole(old, cluster, weight.shape[1])

    def too_heavy(best: np.ndarray) -> np.ndarray:
        return ~whole | (before > best * (1 + tolerance)) & (before - best >= min_gain * before)

    def close_to(best: np.ndarray) -> np.ndarray:
        """The load that is close enough to the best and loses enough."""
        return np.minimum(best * (1 + tolerance), before * (1 - min_gain))

    left, phy2log, most = too_heavy(bound), old.copy(), close_to(bound)
    if not left.any():
        return previous
    # What is as close to the bound is as close to a fresh plan, which is not made. The search keeps the lightest plan
    # that it saw, so one for the fresh plan's load, which is larger, is worth it only where that was reached.
    reached = np.zeros(len(weight))
    if cluster.replicas_per_gpu > PAIR:
        found, reached = _search_near(weight, old, np.where(left & whole, most, np.inf), cluster)
        few = replicas_moved(old, found, num_gpus) <= MANY_MOVED * previous.num_replicas
        settled = left & whole & few & (reached <= most)
        phy2log[settled] = found[settled]
        left &= ~settled
    if left.any():
        some = np.nonzero(left)[0]
        some = np.resize(some, FEW) if len(some) <= FEW < len(weight) else np.arange(len(weight))
        best, new = np.full(len(weight), np.inf), old.copy()
        fresh = balanced(weight[some], previous.num_replicas, num_groups, num_nodes, num_gpus)
        best[some], new[some] = gpu_loads(fresh, weight[some], num_gpus).max(1), np.asarray(fresh.phy2log)
        left &= too_heavy(best)
        close = close_to(best)
        most = np.where(left, close, most)
        target = np.where(left & whole & (reached <= close), close, np.inf)
        ended = np.isfinite(target)
        if ended.any():
            found, after = _search_near(weight, old, target, cluster)
            ended &= after <= target
            phy2log[ended] = found[ended]
        many = replicas_moved(old, phy2log, num_gpus) > MANY_MOVED * previous.num_replicas
        many = np.nonzero(left & (~ended | many))[0]
        renumbered = _renumber(old[many], new[many], cluster)
        moves = replicas_moved(old[many], phy2log[many], num_gpus)
        better = ~ended[many] | (replicas_moved(old[many], renumbered, num_gpus) < moves)
        phy2log[many[better]] = renumbered[better]
    phy2log = swap_back(weight, old, phy2log, most, num_gpus, cluster.gpus_per_node)
    was, now = (slots.reshape(-1, cluster.replicas_per_gpu) for slots in (old, phy2log))
    changed = now != was
    if not changed.any():
        return previous
    again = changed[:, :, None] & (was[:, :, None] == now[:, None]) & changed[:, None]  # it left a slot for another
    other = again.any((1, 2))
    now[other] = keep_slots(was[other], now[other])
    return Placement.from_phy2log(phy2log, weight.shape[1])


def _search_near(
    weight: np.ndarray, old: np.ndarray, target: np.ndarray, cluster: Cluster
) -> tuple[np.ndarray, np.ndarray]:
    """Plans [layers, replicas] that leave each node its experts, and their heaviest GPUs [layers].

    Layers with an infinite target get any plan, and those where a node's mean is above the target stay as they are:
    arrays of the same shapes at every call compile once.
    """
    (layers, experts), num_nodes, gpus = weight.shape, cluster.num_nodes, cluster.gpus_per_node
    size = experts // num_nodes
    any_plan = np.arange(num_nodes)[:, None] * size + np.arange(cluster.replicas_per_node) % size
    held = np.where(np.isfinite(target)[:, None], old, any_plan.reshape(-1)).reshape(layers * num_nodes, -1)
    ordered = np.sort(held, axis=1)  # a node's experts get numbers of their own, in this order
    first = np.diff(ordered, axis=1, prepend=-1) > 0
    ids = ordered[first].reshape(len(held), -1)
    number = np.empty(weight.shape, np.int32)
    rows = np.arange(layers)[:, None]
    number[rows, ids.reshape(layers, -1)] = np.tile(np.arange(size, dtype=np.int32), num_nodes)
    nodes = number[rows, held.reshape(layers, -1)].reshape(held.shape)
    loads = np.take_along_axis(weight, ids.reshape(layers, -1), 1).reshape(ids.shape)
    reachable = loads.sum(1, dtype=np.float64).reshape(layers, -1).max(1) / gpus <= target
    # A little below the target, because these loads are float32.
    goal = np.where(reachable, target * (1 - 1e-6), np.inf)
    search = functools.partial(_search, num_nodes=num_nodes, num_gpus=gpus)
    slots = plan_in_halves(search, layers, loads, nodes, np.repeat(goal, num_nodes).astype(np.float32))
    after = heaviest_gpu(loads, slots, gpus).reshape(layers, -1).max(1)
    named = np.take_along_axis(ids, slots, axis=1)
    return named.reshape(layers, -1).astype(np.int32), after


@functools.partial(jax.jit, static_argnames=("num_nodes", "num_gpus"))
def _search(weight: jax.Array, slots: jax.Array, goal: jax.Array, *, num_nodes: int, num_gpus: int) -> jax.Array:
    layers, steps = len(weight) // num_nodes, count_steps(slots.shape[1], num_gpus)
    return exchange(weight, slots, goal, layers=layers, num_gpus=num_gpus, steps=steps)


def _groups_are_whole(slots: np.ndarray, cluster: Cluster, num_experts: int) -> np.ndarray:
    """Whether each group of experts is on one node, and each node holds equally many, in each layer [layers]."""
    layers, num_nodes, num_groups = len(slots), cluster.num_nodes, cluster.num_groups
    held = np.zeros((layers, num_nodes, num_groups), bool)
    groups = (slots // (num_experts // num_groups)).reshape(layers, num_nodes, -1)
    np.put_along_axis(held, groups, True, axis=2)
    return (held.sum(2) == num_groups // num_nodes).all(1)


def _renumber(old: np.ndarray, new: np.ndarray, cluster: Cluster) -> np.ndarray:
    """New slots [layers, R] with nodes, and GPUs within them, numbered so that most replicas stay on their GPU."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - plans by other policies need no SciPy

    num_nodes, gpus_per_node = cluster.num_nodes, cluster.gpus_per_node
    by_gpu = len(old), cluster.num_gpus, cluster.replicas_per_gpu
    common = common_experts(old.reshape(by_gpu), new.reshape(by_gpu))
    common = common.reshape(len(old), num_nodes, gpus_per_node, num_nodes, gpus_per_node).swapaxes(2, 3)
    places = new.reshape(len(old), num_nodes, gpus_per_node, cluster.replicas_per_gpu)
    out = np.empty_like(places)
    for layer, blocks in enumerate(common):
        stays = [[linear_sum_assignment(block, maximize=True) for block in row] for row in blocks]
        gains = [[b[pairs].sum() for b, pairs in zip(*row, strict=True)] for row in zip(blocks, stays, strict=True)]
        for node, source in zip(*linear_sum_assignment(np.array(gains), maximize=True), strict=True):
            out[layer, node] = places[layer, source, stays[node][source][1]]
    return out.reshape(new.shape)
