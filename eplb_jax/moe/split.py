"""Tokens to replicas by load, within the step: each expert's tokens are divided so that the heaviest device is light.

How many tokens of each expert there are on all devices is known once all have routed theirs. The division then solves
``min max_d load(d)`` over how many of an expert's tokens each of its replicas gets. The loads whose sum of squares is
least also have the least maximum (a division is a point of a base polytope: Fujishige, Mathematics of Operations
Research 5, 1980), and a quadratic program with simplexes for constraints is what a few accelerated projected gradient
steps (FISTA: Beck and Teboulle, SIAM Journal on Imaging Sciences 2, 2009) solve with a few thousand numbers.

E logical experts, X most replicas of one, P slots of all devices, T tokens, k choices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from eplb_jax.plan.placement import Placement

ITERATIONS = 20
"""Gradient steps: the heaviest device is then within 0.1% of the least load there is on average.

Where 64 devices in a chain share experts, 3% were seen: a step moves tokens no further than to a neighbour.
"""


def split_tokens(counts: Int[Array, " E"], placement: Placement, num_devices: int) -> Int[Array, "E X"]:
    """How many of each expert's tokens go to each of its replicas, in the order of ``placement.log2phy``; int32.

    The heaviest device is nearly as light as this placement allows, and never heavier than when each replica of an
    expert gets equally many, but for less than a token a slot that rounding may add.

    Args:
      counts: tokens of each expert, of all devices; below 2**24.
      placement: of one layer, `Placement.of_layer`.
      num_devices: that the slots divide over.

    Raises:
      ValueError: a placement of several layers or other experts; slots that do not divide over the devices.

    >>> import numpy as np
    >>> placement = Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3).of_layer(0)  # expert 0 is on both devices
    >>> split_tokens(jnp.array([6, 5, 1]), placement, 2).tolist()
    [[1, 5], [5, 0], [1, 0]]
    """
    slots = placement.phy2log.shape[-1]
    if placement.phy2log.ndim != 1 or counts.shape != placement.logcnt.shape:
        raise ValueError(
            f"counts have shape {counts.shape}, the placement phy2log of shape {placement.phy2log.shape} and "
            f"{placement.num_experts} experts: give the counts of its experts, and one layer, placement.of_layer(i)"
        )
    if num_devices < 1 or slots % num_devices:
        raise ValueError(f"{slots} slots do not divide over {num_devices} devices")
    table, replicas = jnp.asarray(placement.log2phy, jnp.int32), jnp.asarray(placement.logcnt, jnp.int32)
    counts = counts.astype(jnp.int32)
    by_slot = _divide(counts, jnp.asarray(placement.phy2log, jnp.int32), replicas, num_devices)
    shares = jnp.where(table >= 0, by_slot.at[jnp.maximum(table, 0)].get(mode="promise_in_bounds"), 0)
    return _round(shares, counts, replicas)


def _divide(counts: jax.Array, phy2log: jax.Array, replicas: jax.Array, num_devices: int) -> jax.Array:
    """The division in fractions, float32 [P].

    A step is linear but for its last comparison with zero, so the steps share one matrix of the replicas of experts
    that have several: a step is one kernel on a GPU, and there is no loop.
    """
    slots = len(phy2log)
    expert = jnp.maximum(phy2log, 0)
    tokens, copies = counts.astype(jnp.float32)[expert], replicas[expert]
    even = jnp.where(phy2log >= 0, tokens / jnp.maximum(copies, 1).astype(jnp.float32), 0)
    most = min(2 * (slots - len(counts)), slots)  # experts of r > 1 replicas have r of them and r - 1 spares
    if most < 1 or num_devices == 1:
        return even

    def by_device(values: jax.Array) -> jax.Array:
        return values.reshape(num_devices, -1).sum(1)

    divisible = (phy2log >= 0) & (copies > 1)
    number = jnp.cumsum(divisible.astype(jnp.int32), dtype=jnp.int32)
    index = (number <= jnp.arange(most, dtype=jnp.int32)[:, None]).sum(1, dtype=jnp.int32)
    used, index = index < slots, jnp.minimum(index, slots - 1)
    device = index // (slots // num_devices)

    def same(values: jax.Array) -> jax.Array:
        return ((values[:, None] == values) & used[:, None] & used).astype(jnp.float32)

    # A gradient step of each replica is as long as the divisible replicas that share its device allow. Then each
    # expert's sum is again what it must be, as far as shares stay positive; later steps do the rest.
    on_device, of_expert = same(device), same(expert[index])
    length = jnp.where(used, 1 / jnp.maximum(on_device.sum(1), 1), 0)
    part = jnp.where(used, length / jnp.where(used, (of_expert * length).sum(1), 1), 0)
    one = jnp.eye(most, dtype=jnp.float32)
    descend, project = one - length[:, None] * on_device, one - part[:, None] * of_expert
    matrix = jnp.matmul(project, descend, precision=jax.lax.Precision.HIGHEST)
    alone = length * by_device(jnp.where(divisible, 0, even))[device]
    offset = part * tokens[index] - (project * alone).sum(1)

    before = ahead = jnp.where(used, even[index], 0)
    for i in range(ITERATIONS):
        now = jnp.maximum((matrix * ahead).sum(1) + offset, 0)
        before, ahead = now, now + i / (i + 3) * (now - before)
    found = jnp.where(used, before, 0)
    total = (of_expert * found).sum(1)
    found = jnp.where(total > 0, found * (tokens[index] / jnp.where(total > 0, total, 1)), even[index])
    by_slot = jnp.where(divisible, found.at[number - 1].get(mode="clip"), even)
    return jnp.where(by_device(by_slot).max() < by_device(even).max(), by_slot, even)


def _round(shares: jax.Array, counts: jax.Array, replicas: jax.Array) -> jax.Array:
    """Whole numbers of the same sums: rounded down, then what is left over goes to the first replicas."""
    whole = jnp.floor(shares).astype(jnp.int32)
    whole = jnp.clip(counts[:, None] - _sum_before(whole), 0, whole)
    left = (counts - whole.sum(1, dtype=jnp.int32))[:, None]
    rank, replicas = jnp.arange(shares.shape[1], dtype=jnp.int32), jnp.maximum(replicas, 1)[:, None]
    more = left // replicas + (rank < left % replicas).astype(jnp.int32)
    return jnp.where(rank < replicas, whole + more, 0)


def _sum_before(values: jax.Array, among: jax.Array | bool = True) -> jax.Array:
    """For each of [E, X] the sum of the row's earlier values, of those that are ``among`` [E, X, X]."""
    place = jnp.arange(values.shape[1], dtype=jnp.int32)
    earlier = (place[None, :] < place[:, None]) & among
    return jnp.where(earlier, values[:, None, :], 0).sum(2, dtype=values.dtype)


def choose_by_load(
    experts: Int[Array, "T k"],
    placement: Placement,
    counts: Int[Array, "devices E"],
    device: Int[Array, ""] | int,
    per_node: int,
) -> Int[Array, "T k"]:
    """The slot of each choice of this device's tokens, -1 for expert -1, so that replicas get what `split_tokens` says.

    As many tokens as that allows stay on their node; which of a device's tokens go where follows their order.

    Args:
      experts: logical experts of this device's tokens.
      placement: of one layer.
      counts: of each device's tokens, how many chose each expert; this device's must be those of ``experts``.
      device: where these tokens are.
      per_node: consecutive devices that share a node; a divisor of the devices.

    >>> import numpy as np
    >>> placement = Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3).of_layer(0)
    >>> counts = jnp.array([[3, 1, 0], [1, 3, 0]])
    >>> choose_by_load(jnp.array([[0], [0], [0], [1]]), placement, counts, 0, 1).ravel().tolist()
    [2, 2, 2, 1]
    """
    wanted = split_tokens(counts.astype(jnp.int32).sum(0, dtype=jnp.int32), placement, len(counts))
    return choose_by_amounts(experts, placement, counts, wanted, device, per_node)


def choose_by_amounts(
    experts: Int[Array, "T k"],
    placement: Placement,
    counts: Int[Array, "devices E"],
    wanted: Int[Array, "E X"],
    device: Int[Array, ""] | int,
    per_node: int,
) -> Int[Array, "T k"]:
    """`choose_by_load` where each replica gets as many tokens as ``wanted`` says, in the order of ``log2phy``."""
    num_devices = len(counts)
    counts = counts.astype(jnp.int32)
    table, replicas = jnp.asarray(placement.log2phy, jnp.int32), jnp.asarray(placement.logcnt, jnp.int32)

    # On each node, as many of its own tokens as its replicas take stay, the first ones; the others come after them.
    nodes = jnp.arange(num_devices // per_node, dtype=jnp.int32)
    node = jnp.asarray(device, jnp.int32) // per_node
    holder = jnp.where(table >= 0, table // (placement.phy2log.shape[-1] // num_devices * per_node), -1)
    of_nodes = counts.reshape(len(nodes), per_node, -1).sum(1, dtype=jnp.int32)
    room = jnp.where(holder == nodes[:, None, None], wanted, 0).sum(2, dtype=jnp.int32)
    stay = jnp.minimum(of_nodes, room)
    place = jnp.arange(num_devices, dtype=jnp.int32)
    before = ((place // per_node == node) & (place < device))[:, None]
    first = jnp.where(before, counts, 0).sum(0, dtype=jnp.int32)
    first_away = jnp.where((nodes < node)[:, None], of_nodes - stay, 0).sum(0, dtype=jnp.int32)

    # Where the tokens of each replica end: among those that stay here, and among those of all nodes that do not.
    in_node = _sum_before(wanted, holder[:, :, None] == holder[:, None, :])
    staying = jnp.where(holder == nodes[:, None, None], stay[:, :, None], 0).sum(0, dtype=jnp.int32)
    filled = jnp.clip(staying - in_node, 0, wanted)
    end_here = jnp.where(holder == node, in_node + filled, 0)
    rest = wanted - filled
    end_away = _sum_before(rest) + rest

    known = jnp.maximum(experts, 0)
    own_stay = jnp.where((nodes == node)[:, None], stay, 0).sum(0, dtype=jnp.int32)
    number = first[known] + rank_in_expert(experts, len(replicas))
    stays = number < own_stay[known]
    position = jnp.where(stays, number, first_away[known] + number - own_stay[known])
    ends = jnp.where(stays[..., None], end_here[known], end_away[known])
    column = jnp.arange(table.shape[1], dtype=jnp.int32)
    replica = jnp.where(position[..., None] < ends, column, table.shape[1]).min(-1)
    slot = table[known, jnp.minimum(replica, replicas[known] - 1)]
    return jnp.where(experts >= 0, slot, -1)


def rank_in_expert(experts: Int[Array, "T k"], num_experts: int) -> Int[Array, "T k"]:
    """How many earlier choices are of the same expert; int32, of no meaning for expert -1.

    >>> rank_in_expert(jnp.array([[0, 2], [2, 1], [2, 0]]), 3).tolist()
    [[0, 0], [1, 0], [2, 1]]
    """
    total = experts.size
    key = jnp.where(experts >= 0, experts, num_experts).reshape(-1).astype(jnp.int32)
    index = jnp.arange(total, dtype=jnp.int32)
    if (num_experts + 1) * total < 2**31:  # one number holds both, and sorting one array is faster
        ordered = jax.lax.sort(key * total + index)
        expert, order = ordered // total, ordered % total
    else:
        expert, order = jax.lax.sort((key, index), num_keys=1, is_stable=True)
    counts = (key[:, None] == jnp.arange(num_experts + 1, dtype=jnp.int32)).sum(0, dtype=jnp.int32)
    begins = jnp.cumsum(counts, dtype=jnp.int32) - counts
    ranks = jnp.zeros(total, jnp.int32).at[order].set(index - begins[expert], unique_indices=True)
    return ranks.reshape(experts.shape)
