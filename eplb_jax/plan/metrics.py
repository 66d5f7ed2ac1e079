"""What a placement is worth: how even the loads are, and what a change of plan moves."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Num

from eplb_jax.plan.arguments import check_loads
from eplb_jax.plan.placement import Array, Placement


def gpu_loads(
    placement: Placement, weight: Num[Array, "layers experts"], num_gpus: int
) -> Float[np.ndarray, "layers gpus"]:
    """Load of each GPU in float64, an expert's load shared evenly by its replicas; zero for dead GPUs.

    >>> gpu_loads(Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3), np.array([[4, 1, 3]]), 2)
    array([[3., 5.]])
    """
    phy2log, _, logcnt = (np.asarray(array) for array in placement)
    weight = check_loads(weight)
    if np.shape(weight) != logcnt.shape:
        raise ValueError(f"weight has shape {np.shape(weight)}, the placement is of {logcnt.shape} layers and experts")
    if num_gpus < 1 or placement.num_replicas % num_gpus:
        raise ValueError(f"{placement.num_replicas} replicas do not divide over num_gpus={num_gpus}")
    each = np.asarray(weight, np.float64) / logcnt
    loads = np.where(phy2log >= 0, np.take_along_axis(each, np.maximum(phy2log, 0), axis=1), 0.0)
    return loads.reshape(len(loads), num_gpus, -1).sum(-1)


def balancedness(
    placement: Placement, weight: Num[Array, "layers experts"], num_gpus: int, num_nodes: int = 1
) -> Float[np.ndarray, "layers nodes"]:
    """Mean over maximal load of a node's living GPUs, 1 for nodes without load; one node: of all GPUs.

    >>> balancedness(Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3), np.array([[4, 1, 3]]), 2)
    array([[0.8]])
    """
    loads = gpu_loads(placement, weight, num_gpus)
    if num_nodes < 1 or num_gpus % num_nodes:
        raise ValueError(f"num_gpus={num_gpus} do not divide over num_nodes={num_nodes}")
    alive = (np.asarray(placement.phy2log) >= 0).reshape(*loads.shape, -1).any(-1)
    loads, alive = (x.reshape(len(x), num_nodes, -1) for x in (loads, alive))
    mean, most = loads.sum(-1) / np.maximum(alive.sum(-1), 1), loads.max(-1)
    return np.where(most > 0, mean / np.where(most > 0, most, 1), 1.0)


def moved(old: Placement, new: Placement, num_gpus: int) -> Int[np.ndarray, " layers"]:
    """How many replicas must travel: experts of a GPU that it does not hold yet, once for each GPU.

    >>> one, two = (Placement.from_phy2log(np.array([x]), 3) for x in ([0, 1, 0, 2], [0, 2, 1, 0]))
    >>> moved(one, two, 2)
    array([2])
    """
    return arriving(old, new, num_gpus).sum(1)


def arriving(old: Placement, new: Placement, num_gpus: int) -> Int[np.ndarray, "layers gpus"]:
    """How many replicas each GPU must get: experts of the new plan that it does not hold yet."""
    before, after = _held(old, num_gpus), _held(new, num_gpus)
    if before.shape != after.shape:
        raise ValueError(f"placements of {before.shape} and {after.shape} [layers, GPUs, experts] cannot be compared")
    return (after & ~before).sum(2)


def moved_bytes(old: Placement, new: Placement, num_gpus: int, expert_bytes: int) -> int:
    """Bytes that travel altogether when an expert has so many."""
    return int(moved(old, new, num_gpus).sum()) * expert_bytes


def duplicates(placement: Placement, num_gpus: int) -> Int[np.ndarray, " layers"]:
    """Slots of each layer whose expert the same GPU holds in another slot already.

    >>> duplicates(Placement.from_phy2log(np.array([[0, 0, 1, 2]]), 3), 2)
    array([1])
    """
    return (np.asarray(placement.phy2log) >= 0).sum(1) - _held(placement, num_gpus).sum((1, 2))


def _held(placement: Placement, num_gpus: int) -> np.ndarray:
    """Whether each GPU holds each expert; bool [layers, GPUs, experts]."""
    phy2log = np.asarray(placement.phy2log)
    if num_gpus < 1 or phy2log.shape[1] % num_gpus:
        raise ValueError(f"{phy2log.shape[1]} replicas do not divide over num_gpus={num_gpus}")
    layers, slots = np.nonzero(phy2log >= 0)
    held = np.zeros((len(phy2log), num_gpus, placement.num_experts), bool)
    held[layers, slots // (phy2log.shape[1] // num_gpus), phy2log[layers, slots]] = True
    return held
