"""Plans for the GPUs that are alive."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Num

from eplb_jax.plan.arguments import check_loads, to_float32
from eplb_jax.plan.cluster import make_cluster
from eplb_jax.plan.halves import plan_in_halves
from eplb_jax.plan.packing import divide
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.policies.balanced import balanced
from eplb_jax.plan.policies.sticky import sticky

WORTH_GIVING = 0.7
"""A replica is given to another expert where those that are left get at most this share of that one's load each."""


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
        held = np.asarray(previous.phy2log)
        kept = held[:, living]
        changed = np.logical_or((held[:, ~living] >= 0).any(1), (kept < 0).any(1))
        loads = np.where(weight.max(1, keepdims=True) > 0, weight, np.float32(1))  # no load: all alike
        start = plan_in_halves(functools.partial(_fill, capacity=capacity), len(weight), loads, kept, changed)
        start = Placement.from_phy2log(start, num_experts)
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


@functools.partial(jax.jit, static_argnames="capacity")
def _fill(weight: jax.Array, slots: jax.Array, changed: jax.Array, *, capacity: int) -> jax.Array:
    return jax.vmap(functools.partial(_fill_layer, capacity))(weight, slots, changed)


def _fill_layer(capacity: int, weight: jax.Array, slots: jax.Array, changed: jax.Array) -> jax.Array:
    """A layer's slots [R], none empty (-1), with each expert of loads [E] at least once, and spares where they matter.

    One slot after the other goes to the expert that has none, or else the heaviest replicas: an empty one, or else one
    of the expert whose other replicas are light enough. Of these it is one on a GPU that lacks the expert, the lightest
    without what the slot held. Where no GPU died or came back, not ``changed``, spares stay where they are: `sticky`
    knows whether that is good enough.
    """
    index = jnp.arange(len(weight), dtype=jnp.int32)

    def choose(counts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        missing = counts == 0
        lost = missing.any()
        wanted = jnp.where(lost, jnp.where(missing, weight, -1), divide(weight, jnp.maximum(counts, 1)))
        left = jnp.where(counts > 1, divide(weight, jnp.maximum(counts - 1, 1)), jnp.inf)
        needed = lost | (changed & (left.min() < WORTH_GIVING * wanted.max()))
        return jnp.argmax(wanted), jnp.argmin(left), needed

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        slots, counts = state
        return (slots < 0).any() | choose(counts)[2]

    def give(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slots, counts = state
        expert, donor = choose(counts)[:2]
        empty = slots < 0
        places = jnp.where(empty.any(), empty, slots == donor)
        counts = counts - ((index == donor) & ~empty.any()).astype(jnp.int32)
        each = jnp.where(empty, 0, divide(weight, jnp.maximum(counts, 1))[jnp.maximum(slots, 0)])
        by_gpu = each.reshape(-1, capacity)
        without = (by_gpu.sum(1, keepdims=True) - by_gpu).reshape(-1)
        lacks = jnp.repeat(~(slots == expert).reshape(-1, capacity).any(1), capacity)
        places = jnp.where((places & lacks).any(), places & lacks, places)
        place = jnp.argmin(jnp.where(places, without, jnp.inf))
        there = jnp.arange(len(slots), dtype=jnp.int32) == place
        return jnp.where(there, expert.astype(jnp.int32), slots), counts + (index == expert).astype(jnp.int32)

    counts = jnp.zeros(len(weight), jnp.int32).at[jnp.where(slots < 0, len(weight), slots)].add(1, mode="drop")
    return jax.lax.while_loop(unfinished, give, (slots, counts))[0]
