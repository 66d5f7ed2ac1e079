"""As few moves as a wanted balance allows, from the placement that is there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads, to_float32
from eplb_jax.plan.cluster import Cluster, make_cluster
from eplb_jax.plan.exchanges import count_steps, exchange
from eplb_jax.plan.halves import plan_in_halves
from eplb_jax.plan.metrics import gpu_loads
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.policies.balanced import balanced
from eplb_jax.plan.repair import common_experts, heaviest_gpu, keep_slots, repack, replicas_moved
from eplb_jax.plan.search import largest_loads, slot_loads
from eplb_jax.plan.swaps import swap_pairs

MOST_REPACKED = 128
"""Slots of a node up to which GPUs are packed anew in search of fewer moves; beyond, that takes long and finds none."""

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
    """Changes a placement until its heaviest GPU is within ``tolerance`` of a fresh plan's, moving few replicas.

    Layers are independent. One that is good enough, or whose heaviest GPU would lose less than ``min_gain`` of its load
    in a fresh plan, keeps every slot. Elsewhere GPUs that are too heavy swap replicas with others of their node. Where
    that is not enough, or where many must, the plan with fewest moves is taken of three: those swaps; search by swaps
    and spare replicas that change hands; the fewest GPUs packed anew. Where none is even enough, it is the fresh plan,
    its GPUs numbered so that most replicas stay. Where a group of experts is on several nodes and should
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

    fresh = balanced(weight, previous.num_replicas, num_groups, num_nodes, num_gpus)
    before, best = (gpu_loads(placement, weight, num_gpus).max(1) for placement in (previous, fresh))
    target = best * (1 + tolerance)
    old, new = (np.asarray(placement.phy2log) for placement in (previous, fresh))
    whole = _groups_are_whole(old, cluster, weight.shape[1])
    change = ~whole | (before > target) & (before - best >= min_gain * before)
    if not change.any():
        return previous

    phy2log = old.copy()
    stay = change & whole
    if stay.any():
        start = np.where(whole[:, None], old, new)
        found, ended = _stay(weight, start, np.asarray(fresh.logcnt), np.where(stay, target, np.inf), cluster)
        phy2log[stay & ended] = found[stay & ended]
        change &= ~(stay & ended)
    moves = replicas_moved(old, phy2log, num_gpus)
    many = np.nonzero(change | (moves > MANY_MOVED * previous.num_replicas))[0]
    renumbered = _renumber(old[many], new[many], cluster)
    better = change[many] | (replicas_moved(old[many], renumbered, num_gpus) < moves[many])
    phy2log[many[better]] = renumbered[better]
    was, now = (slots.reshape(-1, cluster.replicas_per_gpu) for slots in (old, phy2log))
    other = (now != was).any(1)
    now[other] = keep_slots(was[other], now[other])
    return Placement.from_phy2log(now.reshape(old.shape), weight.shape[1])


def _stay(
    weight: np.ndarray, old: np.ndarray, counts: np.ndarray, target: np.ndarray, cluster: Cluster
) -> tuple[np.ndarray, np.ndarray]:
    """Plans [layers, replicas] that leave each node its experts, and which layers' are within target.

    Counts [layers, experts] are of a fresh plan. All layers are searched, those with an infinite target left as they
    are: arrays of the same shapes at every call compile once.
    """
    layers, num_nodes, gpus = len(weight), cluster.num_nodes, cluster.gpus_per_node
    held = old.reshape(layers * num_nodes, -1)
    ordered = np.sort(held, axis=1)  # a node's experts get numbers of their own, in this order
    first = np.diff(ordered, axis=1, prepend=-1) > 0
    ids = ordered[first].reshape(len(held), -1)
    number = np.empty(weight.shape, np.int32)
    rows = np.arange(layers)[:, None]
    own = np.tile(np.arange(ids.shape[1], dtype=np.int32), num_nodes)
    number[rows, ids.reshape(layers, -1)] = own
    nodes = number[rows, old].reshape(held.shape)
    loads, fresh = (np.take_along_axis(x, ids.reshape(layers, -1), 1).reshape(ids.shape) for x in (weight, counts))
    limit = np.repeat(target, num_nodes)
    # A little below the target, because these loads are float32.
    goal = (limit * (1 - 1e-6)).astype(np.float32)
    search = functools.partial(_search, num_nodes=num_nodes, num_gpus=gpus)
    swapped, exchanged, many = plan_in_halves(search, layers, loads, nodes, goal)

    def within(slots: np.ndarray) -> np.ndarray:
        return heaviest_gpu(loads, slots, gpus).reshape(layers, -1).max(1) <= target

    by_swaps, by_exchanges = within(swapped), within(exchanged)
    ended = by_swaps | by_exchanges
    shape = layers, num_nodes, -1
    plan = np.where(by_swaps[:, None], swapped.reshape(layers, -1), exchanged.reshape(layers, -1)).reshape(shape)
    exchanged, nodes, loads, fresh = (x.reshape(shape) for x in (exchanged, nodes, loads, fresh))
    for layer in np.nonzero(~by_swaps | many)[0]:
        choices, wanted = [plan[layer]] if ended[layer] else [], [fresh[layer]]
        if by_exchanges[layer]:
            choices.append(exchanged[layer])
            wanted.append(np.stack([np.bincount(slots, minlength=ids.shape[1]) for slots in exchanged[layer]]))
        if nodes.shape[2] > MOST_REPACKED:
            wanted = []
        repacked = (_repack_nodes(loads[layer], nodes[layer], w, target[layer], gpus) for w in wanted)
        choices += [slots for slots in repacked if slots is not None]
        if choices:
            flat = np.stack(choices).reshape(len(choices), -1)
            moves = replicas_moved(np.broadcast_to(nodes[layer].reshape(1, -1), flat.shape), flat, cluster.num_gpus)
            plan[layer], ended[layer] = choices[int(np.argmin(moves))], True
    named = np.take_along_axis(ids, plan.reshape(held.shape), axis=1)
    return named.reshape(layers, -1).astype(np.int32), ended


@functools.partial(jax.jit, static_argnames=("num_nodes", "num_gpus"))
def _search(
    weight: jax.Array, slots: jax.Array, goal: jax.Array, *, num_nodes: int, num_gpus: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slots by few swaps; where these are many or not enough, also by swaps and other counts; where they are many.

    Swaps are many where they are more than half of the GPUs: where little changed, few GPUs are too heavy.
    """
    swapped = swap_pairs(slot_loads(weight, slots), slots, goal, num_gpus=num_gpus, careful=True)
    layers = len(weight) // num_nodes
    many = (swapped != slots).reshape(layers, -1).sum(1) > num_nodes * num_gpus
    far = many | (largest_loads(weight, swapped, num_gpus) > goal).reshape(layers, -1).any(1)
    goal = jnp.where(jnp.repeat(far, num_nodes), goal, jnp.inf)
    steps = count_steps(slots.shape[1], num_gpus)
    return swapped, exchange(weight, slots, goal, layers=layers, num_gpus=num_gpus, steps=steps), many


def _repack_nodes(
    weight: np.ndarray, slots: np.ndarray, counts: np.ndarray, limit: float, num_gpus: int
) -> np.ndarray | None:
    """One layer's nodes [n, R], those that are too heavy with other counts and few GPUs packed anew; None: it fails."""
    if not ((counts.sum(1) == slots.shape[1]) & (counts.min(1) > 0)).all():
        return None
    plan = slots.copy()
    for i in np.nonzero(heaviest_gpu(weight, slots, num_gpus) > limit)[0]:
        found = repack(weight[i].astype(np.float64), slots[i], counts[i], limit, num_gpus)
        if found is None:
            return None
        plan[i] = found
    return plan


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
