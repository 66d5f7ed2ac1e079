"""As few moves as a wanted balance allows, from the placement that is there."""

from __future__ import annotations

import numpy as np
from jaxtyping import Num
from scipy.optimize import linear_sum_assignment

from eplb_jax.arguments import check_loads, check_sizes, on_host
from eplb_jax.metrics import gpu_loads
from eplb_jax.placement import Array, Placement
from eplb_jax.policies.balanced import balanced
from eplb_jax.search import refine


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

    Layers are independent. One that is good enough, or whose heaviest GPU a fresh plan would relieve by less than
    ``min_gain``, keeps every slot. Elsewhere local search moves replicas within nodes. Where that does not suffice (a
    group of experts has to change nodes, say) the layer gets the fresh plan, its GPUs numbered so that most replicas
    stay. An expert that stays on its GPU stays in its slot.

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
    check_loads(weight)
    weight = np.asarray(weight, np.float32)
    check_sizes(weight.shape[1], previous.num_replicas, num_groups, num_nodes, num_gpus)
    if weight.shape != (previous.num_layers, previous.num_experts):
        raise ValueError(
            f"weight has shape {weight.shape}, the previous placement is of {previous.num_layers} layers and "
            f"{previous.num_experts} experts"
        )
    if not (tolerance >= 0 and min_gain >= 0):
        raise ValueError(f"tolerance={tolerance} and min_gain={min_gain}: both are shares of at least 0")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    previous.check(num_gpus)

    fresh = balanced(weight, previous.num_replicas, num_groups, num_nodes, num_gpus)
    before, best = (gpu_loads(placement, weight, num_gpus).max(1) for placement in (previous, fresh))
    target = best * (1 + tolerance)
    layers = np.nonzero((before > target) & (before - best >= min_gain * before))[0]
    if not len(layers):
        return previous
    slots = stay(weight[layers], np.asarray(previous.phy2log)[layers], target[layers], num_nodes, num_gpus)
    reached = gpu_loads(Placement.from_phy2log(slots, weight.shape[1]), weight[layers], num_gpus).max(1)
    old = np.asarray(previous.phy2log)
    phy2log = old.copy()
    for layer, found, heaviest in zip(layers, slots, reached, strict=True):
        if heaviest > target[layer] or not _groups_are_whole(found, num_groups, num_nodes, weight.shape[1]):
            found = _renumber(old[layer], np.asarray(fresh.phy2log)[layer], num_nodes, num_gpus)
        phy2log[layer] = _keep_slots(old[layer], found, num_gpus)
    return Placement.from_phy2log(phy2log, weight.shape[1])


def stay(weight: np.ndarray, slots: np.ndarray, target: np.ndarray, num_nodes: int, num_gpus: int) -> np.ndarray:
    """Slots [layers, replicas] after local search within nodes down to the target [layers]."""
    layers, experts = weight.shape
    rows = slots.reshape(layers * num_nodes, -1)
    with on_host():
        # A row's experts keep their numbers; those of other nodes have no slot in it.
        found = refine(
            np.repeat(weight, num_nodes, axis=0),
            rows,
            np.repeat(target, num_nodes).astype(np.float32),
            num_gpus=num_gpus // num_nodes,
        )
    return np.asarray(found).reshape(slots.shape)


def _groups_are_whole(slots: np.ndarray, num_groups: int, num_nodes: int, num_experts: int) -> bool:
    """Whether each group of experts is on one node."""
    groups = slots.reshape(num_nodes, -1) // (num_experts // num_groups)
    return sum(len(np.unique(node)) for node in groups) == num_groups


def _renumber(old: np.ndarray, new: np.ndarray, num_nodes: int, num_gpus: int) -> np.ndarray:
    """The new slots with nodes, and GPUs within them, numbered so that most replicas stay on their GPU."""
    experts = max(old.max(), new.max()) + 1
    held = [np.zeros((num_gpus, experts), np.int32) for _ in range(2)]
    for matrix, slots in zip(held, (old, new), strict=True):
        matrix[np.repeat(np.arange(num_gpus), len(slots) // num_gpus), slots] = 1
    common = (held[0] @ held[1].T).reshape(num_nodes, num_gpus // num_nodes, num_nodes, -1).swapaxes(1, 2)
    stays = [[linear_sum_assignment(block, maximize=True) for block in row] for row in common]
    gains = [[block[pairs].sum() for block, pairs in zip(*row, strict=True)] for row in zip(common, stays, strict=True)]
    new = new.reshape(num_nodes, num_gpus // num_nodes, -1)
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


