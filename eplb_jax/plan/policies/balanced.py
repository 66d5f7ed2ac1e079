"""DeepSeek's plan, improved until it is close to the best there can be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads, check_sizes
from eplb_jax.plan.nodes import heaviest_of, join_rows, lightest_packing, make_rows, place_slots, spread_idle
from eplb_jax.plan.packing import call, replicate
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.search import largest_loads, pack_slots, recount, refine


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
    check_sizes(weight.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: it must be at least 0")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    phy2log = call(
        _plan,
        weight,
        num_replicas=num_replicas,
        num_groups=num_groups,
        num_nodes=num_nodes,
        num_gpus=num_gpus,
        tolerance=tolerance,
    )
    return place_slots(phy2log, weight.shape[1])


@functools.partial(jax.jit, static_argnames=("num_replicas", "num_groups", "num_nodes", "num_gpus"))
def _plan(
    weight: jax.Array, *, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, tolerance: float
) -> jax.Array:
    layers, gpus = len(weight), num_gpus // num_nodes
    rows = make_rows(weight, num_groups, num_nodes, num_gpus)
    start = pack_slots(rows.weight, replicate(rows.weight, num_replicas // num_nodes)[0], gpus)
    theirs = join_rows(rows, spread_idle(rows, start, gpus))[:layers]
    limit = heaviest_of(rows, start, gpus)[:layers]

    refined = refine(rows.weight, start, rows.target * (1 + tolerance), num_gpus=gpus)
    rows, refined, start = lightest_packing(rows, refined, layers, gpus, start)
    target = rows.target * (1 + tolerance)
    figures = largest_loads(rows.weight, refined, gpus)
    recounted = recount(rows.weight, start, jnp.where(figures <= target, jnp.inf, target), num_gpus=gpus)
    recounted = refine(rows.weight, recounted, target, num_gpus=gpus)
    better = largest_loads(rows.weight, recounted, gpus) < figures
    slots = jnp.where(better[:, None], recounted, refined)
    ours = join_rows(rows, spread_idle(rows, slots, gpus))

    # DeepSeek's plan is left only for one that is lighter in exact arithmetic too: float32 rounds each load, each
    # quotient, and each sum of a GPU's slots by half a unit.
    rounding = (num_replicas // num_gpus + 2) * float(jnp.finfo(jnp.float32).eps)
    lighter = heaviest_of(rows, slots, gpus) * (1 + 2 * rounding) < limit
    return jnp.where(lighter[:, None], ours, theirs)
