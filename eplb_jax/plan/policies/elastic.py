"""Plans for the GPUs that are alive."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Num

from eplb_jax.plan.arguments import check_loads, to_float32
from eplb_jax.plan.cluster import make_cluster
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.policies.balanced import balanced
from eplb_jax.plan.policies.sticky import sticky
from eplb_jax.plan.repair import held_by_gpus


def elastic(
    weight: Num[Array, "layers experts"],
    alive: Bool[Array, " gpus"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    *,
    previous: Placement | None = None,
    tolerance: float = 0.01,
) -> Placement:
    """A plan that leaves the slots of dead GPUs empty (-1), and every expert a replica on a living one.

    With a previous placement, few replicas move: experts that died with their GPUs take slots of experts that have
    several, empty slots of GPUs that came back get the experts that need them most, and `sticky` does the rest.
    Without one, or after it where that needs it, the living GPUs get a fresh `balanced` plan. Groups of experts stay on
    one node while all living nodes have equally many living GPUs and divide the groups; otherwise they are ignored. The
    experts of a layer without load count as equal.

    Args:
      weight: as in `rebalance_experts`; this runs on the host, so not traced.
      alive: whether each GPU is.
      num_replicas: slots of a layer on all GPUs, dead ones included.
      num_groups, num_nodes: as in `rebalance_experts`.
      previous: the placement so far, of any mask.
      tolerance: as in `sticky`.

    Raises:
      ValueError: as `rebalance_experts`; a mask of another type; living GPUs with fewer slots than experts.

    >>> weight = np.array([[4, 3, 2, 1]])
    >>> elastic(weight, np.array([True, False, True]), 6, 1, 1).phy2log
    array([[ 0,  3, -1, -1,  1,  2]], dtype=int32)
    """
    weight = check_loads(weight)
    weight = to_float32(np.asarray(weight))
    alive = np.asarray(alive)
    if alive.ndim != 1 or alive.dtype != np.bool_:
        raise ValueError(f"alive is {alive.dtype} of shape {alive.shape}: it must be a bool for each GPU")
    num_experts, num_gpus = weight.shape[1], alive.size
    capacity = make_cluster(num_experts, num_replicas, num_groups, num_nodes, num_gpus).replicas_per_gpu
    if alive.sum() * capacity < num_experts:
        raise ValueError(
            f"{alive.sum()} of {num_gpus} GPUs are alive and hold {alive.sum() * capacity} replicas: too few for the "
            f"{num_experts} experts; add GPUs, or plan with more replicas than num_replicas={num_replicas}"
        )
    groups, nodes = _living_nodes(alive, num_groups, num_nodes)
    living = np.repeat(alive, capacity)
    phy2log = np.full((len(weight), num_replicas), -1, np.int32)
    if previous is None:
        plan = balanced(weight, int(living.sum()), groups, nodes, int(alive.sum()))
    else:
        if (previous.num_layers, previous.num_replicas, previous.num_experts) != (*phy2log.shape, num_experts):
            raise ValueError(
                f"the previous placement is of {previous.num_layers} layers, {previous.num_replicas} replicas and "
                f"{previous.num_experts} experts, not of {len(weight)}, {num_replicas} and {num_experts}"
            )
        kept = np.asarray(previous.phy2log)[:, living]
        loads = np.where(weight.max(1, keepdims=True) > 0, weight, 1).astype(np.float64)  # no load: all alike
        start = Placement.from_phy2log(_fill(loads, kept, capacity), num_experts)
        plan = sticky(weight, start, groups, nodes, int(alive.sum()), tolerance=tolerance)
    phy2log[:, living] = plan.phy2log
    return Placement.from_phy2log(phy2log, num_experts)


def _living_nodes(alive: np.ndarray, num_groups: int, num_nodes: int) -> tuple[int, int]:
    """Groups and nodes that a plan for the living GPUs can have; 1, 1 is the global policy."""
    per_node = alive.reshape(num_nodes, -1).sum(1)
    per_node = per_node[per_node > 0]
    if len(set(per_node.tolist())) == 1 and num_groups % len(per_node) == 0:
        return num_groups, len(per_node)
    return 1, 1


def _fill(weight: np.ndarray, slots: np.ndarray, capacity: int) -> np.ndarray:
    """Slots [layers, R] of which none is empty (-1) and each expert has one; loads [layers, E]."""
    layers, experts = weight.shape
    slots = slots.copy()
    row = np.arange(layers)[:, None]
    counts = np.bincount((slots + 1 + row * (experts + 1)).reshape(-1), minlength=layers * (experts + 1))
    counts = counts.reshape(layers, -1)[:, 1:]
    missing = (counts == 0).sum(1)
    heaviest_first = np.lexsort((-weight, counts > 0))
    for i in range(missing.max()):
        some = np.nonzero(missing > i)[0]
        slots[some], counts[some] = _give_slot(
            weight[some], slots[some], counts[some], heaviest_first[some, i], capacity
        )
    empty = (slots < 0).sum(1)
    for i in range(empty.max()):
        some = np.nonzero(empty > i)[0]
        slots[some], counts[some] = _fill_first(weight[some], slots[some], counts[some], capacity)
    return slots


def _give_slot(
    weight: np.ndarray, slots: np.ndarray, counts: np.ndarray, expert: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slots and counts where each layer's expert [layers] has one: an empty slot, or one of an expert that has several.

    Of the slots that it may have it takes one on the GPU that is lightest without what the slot held.
    """
    layer = np.arange(len(weight))
    places = slots < 0
    full = np.logical_not(places.any(1))
    donor = np.argmin(np.where(counts > 1, weight / np.maximum(counts - 1, 1), np.inf), axis=1)
    counts[layer[full], donor[full]] -= 1
    places |= full[:, None] & (slots == donor[:, None])
    each = np.where(slots < 0, 0.0, np.take_along_axis(weight / np.maximum(counts, 1), np.maximum(slots, 0), axis=1))
    totals = np.repeat(each.reshape(len(weight), -1, capacity).sum(2), capacity, axis=1)
    slots[layer, np.argmin(np.where(places, totals - each, np.inf), axis=1)] = expert
    counts[layer, expert] = 1
    return slots, counts


def _fill_first(
    weight: np.ndarray, slots: np.ndarray, counts: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slots and counts where each layer's first empty slot has the expert whose replicas have the most load each.

    Of the experts that the GPU lacks, where it lacks any.
    """
    layer = np.arange(len(weight))
    place = np.argmax(slots < 0, axis=1)
    of_gpu = np.take_along_axis(slots.reshape(len(weight), -1, capacity), (place // capacity)[:, None, None], axis=1)
    new = ~held_by_gpus(of_gpu, weight.shape[1])[:, 0]
    expert = np.argmax(np.where(new | ~new.any(1, keepdims=True), weight / counts, -1.0), axis=1)
    slots[layer, place] = expert
    counts[layer, expert] += 1
    return slots, counts
