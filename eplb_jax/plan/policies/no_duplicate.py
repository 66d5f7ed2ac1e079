"""Never two replicas of an expert on one GPU, where the second is a wasted slot."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads, check_sizes
from eplb_jax.plan.nodes import Rows, join_rows, lightest_packing, make_rows, place_slots, spread_idle
from eplb_jax.plan.packing import bits, call, inverse, places, replicate, take
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.search import largest_loads, recount, refine, slot_loads


def no_duplicate(
    weight: Num[Array, "layers experts"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    tolerance: float = 1e-4,
) -> Placement:
    """Replicas of an expert on as many GPUs as it has replicas; without load, spares are spread evenly.

    Two replicas on one GPU share its time: the slot might as well be empty. DeepSeek's plan wastes 6% to 8% of its
    spare slots so. Local search then balances without bringing replicas together, and takes spares from one expert to
    give them to another where that lowers the heaviest GPU.

    Args:
      weight, num_replicas, num_groups, num_nodes, num_gpus: as in `rebalance_experts`.
      tolerance: search ends this close to the load that no plan can be below, as a share of it.

    Raises:
      ValueError: as `rebalance_experts`; more slots on a node than its experts times its GPUs.

    >>> import numpy as np
    >>> no_duplicate(np.array([[8, 3, 2, 0]]), 6, 1, 1, 2).phy2log
    array([[0, 2, 1, 0, 1, 3]], dtype=int32)
    """
    weight = check_loads(weight)
    num_experts = weight.shape[1]
    check_sizes(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}: it must be at least 0")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    experts, gpus = num_experts // num_nodes, num_gpus // num_nodes
    if num_replicas // num_nodes > experts * gpus:
        raise ValueError(
            f"num_replicas={num_replicas} would put an expert on a GPU twice: {gpus} GPUs of a node hold its {experts} "
            f"experts at most {gpus} times each, so take at most {experts * gpus * num_nodes} replicas"
        )
    phy2log = call(
        _plan,
        weight,
        num_replicas=num_replicas,
        num_groups=num_groups,
        num_nodes=num_nodes,
        num_gpus=num_gpus,
        tolerance=tolerance,
    )
    return place_slots(phy2log, num_experts)


@functools.partial(jax.jit, static_argnames=("num_replicas", "num_groups", "num_nodes", "num_gpus"))
def _plan(
    weight: jax.Array, *, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, tolerance: float
) -> jax.Array:
    layers, gpus = len(weight), num_gpus // num_nodes
    rows = make_rows(weight, num_groups, num_nodes, num_gpus)
    greedy = _search(rows, replicate(rows.weight, num_replicas // num_nodes, most=gpus)[0], tolerance, gpus)
    rows, greedy = lightest_packing(rows, greedy, layers, gpus)

    # Search gives slots to experts of the heaviest GPU only: others may need them more, packed anew.
    recounted = recount(rows.weight, greedy, rows.target * (1 + tolerance), num_gpus=gpus, most=gpus)
    recounted = _search(rows, recounted, tolerance, gpus)
    better = largest_loads(rows.weight, recounted, gpus) < largest_loads(rows.weight, greedy, gpus)
    return join_rows(rows, spread_idle(rows, jnp.where(better[:, None], recounted, greedy), gpus))


def _search(rows: Rows, replicas: jax.Array, tolerance: float, gpus: int) -> jax.Array:
    """Slots with these replicas, packed apart, then improved."""
    loads = slot_loads(rows.weight, replicas)
    order = inverse(places(bits(loads)))
    slots = jax.vmap(functools.partial(_pack_apart, gpus))(take(loads, order), take(replicas, order))
    return refine(rows.weight, slots, rows.target * (1 + tolerance), num_gpus=gpus, duplicates=False)


def _pack_apart(gpus: int, loads: jax.Array, experts: jax.Array) -> jax.Array:
    """Packs a row's replicas [R], heaviest first, each onto the lightest GPU with room that lacks its expert.

    If all with room have it, one of them takes another GPU's replica, which makes room there. That is always possible:
    of the replicas on a full GPU, all of different experts, one is new to a GPU that holds fewer.
    """
    capacity = loads.size // gpus
    gpu_ids, positions = jnp.arange(gpus, dtype=jnp.int32), jnp.arange(capacity, dtype=jnp.int32)

    def step(state, item):
        slots, held, counts = state  # [G, K], [G, K], [G]
        load, expert = item
        totals = held.sum(1)
        has = (slots == expert).any(1)
        is_open = counts < capacity
        lightest = jnp.argmin(jnp.where(is_open & ~has, totals, jnp.inf)).astype(jnp.int32)

        fallback = jnp.argmin(jnp.where(is_open, totals, jnp.inf)).astype(jnp.int32)
        new_there = ~(slots[:, :, None] == slots[fallback]).any(-1)
        after = jnp.maximum(totals[fallback] + held, (totals + load)[:, None] - held)
        after = jnp.where(new_there & ~(has | is_open)[:, None], after, jnp.inf)
        gpu, position = jnp.divmod(jnp.argmin(after).astype(jnp.int32), capacity)

        direct = (is_open & ~has).any()
        target_gpu = jnp.where(direct, lightest, fallback)
        into = (gpu_ids == target_gpu)[:, None] & (positions == counts[target_gpu])
        swap = ((gpu_ids == gpu)[:, None] & (positions == position)) & ~direct
        mover, mover_load = slots[gpu, position], held[gpu, position]
        slots = jnp.where(into, jnp.where(direct, expert, mover), jnp.where(swap, expert, slots))
        held = jnp.where(into, jnp.where(direct, load, mover_load), jnp.where(swap, load, held))
        return (slots, held, counts + into.any(1).astype(jnp.int32)), None

    empty = (
        jnp.full((gpus, capacity), -1, jnp.int32),
        jnp.zeros((gpus, capacity), loads.dtype),
        jnp.zeros(gpus, jnp.int32),
    )
    (slots, _, _), _ = jax.lax.scan(step, empty, (loads, experts))
    return slots.reshape(-1)
