"""How even the loads could be at best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Num

from eplb_jax.plan.arguments import check_loads
from eplb_jax.plan.cluster import Cluster, make_cluster
from eplb_jax.plan.placement import Array

ROUNDING = 1e-12
"""Comparisons of loads forgive this share, so that rounding never makes a bound too high."""


def lower_bound(
    weight: Num[Array, "layers experts"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    tight: bool = False,
) -> Float[np.ndarray, " layers"]:
    """A load that the heaviest GPU of no plan can be below, in float64.

    The largest of three: the mean of all GPUs; the mean of the heaviest node's, if groups were packed as well as they
    can be; and the fractional optimum of replication. For that, with the heaviest GPU at load T, an expert of load w
    needs at least w / (T - s) replicas, s being what the GPU's other slots hold at least, and there must be enough.

    Args:
      weight, num_replicas, num_groups, num_nodes, num_gpus: as in `rebalance_experts`.
      tight: where GPUs have two slots, solve a linear program instead of the last, which takes a second or so a layer.

    Raises:
      ValueError: as `rebalance_experts`.

    >>> lower_bound(np.array([[8, 1, 1, 0]]), 6, 1, 1, 2)
    array([5.])
    """
    weight = check_loads(weight)
    weight = np.asarray(weight, np.float64)
    cluster = make_cluster(weight.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    means = mean_bound(weight, cluster).tolist()
    return np.array([_bound_layer(w, mean, cluster, tight) for w, mean in zip(weight, means, strict=True)])


def mean_bound(weight: np.ndarray, cluster: Cluster) -> np.ndarray:
    """The larger of two means [layers], as `lower_bound` has them: of all GPUs, and of the heaviest node's."""
    num_groups, num_nodes, num_gpus = cluster.num_groups, cluster.num_nodes, cluster.num_gpus
    groups = weight.reshape(len(weight), num_groups, -1).sum(2, dtype=np.float64)
    loads = -np.sort(-groups, axis=1)
    if num_groups == 2 * num_nodes:  # the best pairs are the heaviest with the lightest, and so on
        node = (loads[:, :num_nodes] + loads[:, : num_nodes - 1 : -1]).max(1)
    else:  # the heaviest, at best with the lightest
        node = loads[:, np.r_[0, num_groups - num_groups // num_nodes + 1 : num_groups]].sum(1)
    return np.maximum(groups.sum(1) / num_gpus, node * num_nodes / num_gpus)


def _bound_layer(weight: np.ndarray, mean: float, cluster: Cluster, tight: bool) -> float:
    num_groups, num_nodes = cluster.num_groups, cluster.num_nodes
    if num_nodes > 1 and num_groups > num_nodes:  # any experts could share a node
        return mean
    replicas, gpus = cluster.replicas_per_node, cluster.gpus_per_node
    return max(mean, *(_bound_node(node, replicas, gpus, tight) for node in weight.reshape(num_nodes, -1)))


def _bound_node(weight: np.ndarray, num_replicas: int, num_gpus: int, tight: bool) -> float:
    """The least load at which there are replicas enough."""
    low, high = weight.sum() / num_gpus, weight.sum()
    low = _bisect(lambda load: _too_many(load, weight, num_replicas, num_gpus), low, high, 48)
    if not (tight and num_replicas == 2 * num_gpus):
        return low
    return _bisect(lambda load: _cannot_pair(load, weight, num_replicas), low, min(high, 2 * low), 14)


def _bisect(impossible: Callable[[float], bool], low: float, high: float, steps: int) -> float:
    """The largest load found impossible, or low."""
    for _ in range(steps if impossible(low) else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if impossible(middle) else (low, middle)
    return low


def _too_many(load: float, weight: np.ndarray, num_replicas: int, num_gpus: int) -> bool:
    """Whether GPUs of at most this load need more replicas than there are."""
    others = num_replicas // num_gpus - 1
    least = 0.0
    while True:
        if load <= least:
            return load < least or weight.max() > 0
        needed = np.maximum(np.ceil(weight / (load - least) * (1 - ROUNDING)), 1).astype(int)
        spare = num_replicas - needed.sum()
        if spare < 0:
            return True
        # The lightest that the other slots of a GPU can be: all spares given to each of the lightest experts.
        smallest = np.sort(np.repeat(weight / (needed + spare), np.minimum(needed + spare, max(others, 1))))
        now = smallest[:others].sum()
        if now <= least * (1 + ROUNDING):
            return False
        least = now


def _cannot_pair(load: float, weight: np.ndarray, num_replicas: int) -> bool:
    """Whether no fractional choice of replica counts allows GPUs of two slots and at most this load.

    Replicas can be paired if and only if, for each x above load / 2, those of at least x are no more than those of at
    most load - x (Hall's theorem). Each expert has one unknown for each possible count: the share of that choice.
    """
    from scipy import sparse  # noqa: PLC0415 - plans need no SciPy
    from scipy.optimize import linprog  # noqa: PLC0415

    if load <= 0:
        return weight.max() > 0
    needed = np.maximum(np.ceil(weight / load * (1 - ROUNDING)), 1).astype(int)
    spare = num_replicas - needed.sum()
    if spare < 0:
        return True
    counts = (needed[:, None] + np.arange(spare + 1)).reshape(-1)
    expert = np.repeat(np.arange(len(weight)), spare + 1)
    each = weight[expert] / counts
    limits = np.unique(each[each > load / 2])[:, None]
    more = counts * (each >= limits) - counts * (each <= load - limits + ROUNDING * load)
    one = sparse.csr_matrix((np.ones(len(each)), (expert, np.arange(len(each)))))
    found = linprog(
        np.zeros(len(each)),
        A_ub=sparse.csr_matrix(more) if len(more) else None,
        b_ub=np.zeros(len(more)) if len(more) else None,
        A_eq=sparse.vstack([one, sparse.csr_matrix(counts[None])]),
        b_eq=np.append(np.ones(len(weight)), num_replicas),
        method="highs",
    )
    return found.status == 2
