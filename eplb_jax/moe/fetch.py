"""Working copies by exchanging only the experts that a placement needs elsewhere.

Each device of the axis sends another the masters that are in its slots, once each, in an all-to-all of fixed size: so
many experts for each pair of devices. What is sent is data, so another placement needs no other program while no pair
needs more; and as gathering all experts is the same function, a placement that does need more gathers.

ep devices, P slots of all devices, S of one, M masters of one, n experts from one device to another at most.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.moe.exchange import all_to_all
from eplb_jax.moe.pick import pick
from eplb_jax.plan import placement


class Fetches(NamedTuple):
    """What travels to this device's slots, and from its masters.

    Attributes:
      sent: which of its masters is the j-th that each device gets; int32.
      is_sent: whether there is a j-th.
      place: where the expert of each of its slots is among ``ep * n`` that came; int32.
      came: whether it is among them.
      own: which of its masters each of its slots holds; int32.
      is_own: whether it holds one.
      most: the most experts that any device needs from another; int32.
    """

    sent: Int[Array, "ep n"]
    is_sent: Array
    place: Int[Array, " S"]
    came: Array
    own: Int[Array, " S"]
    is_own: Array
    most: Int[Array, ""]


def most_fetched(phy2log: Int[placement.Array, "*layers P"], num_masters: int, num_devices: int) -> int:
    """How many experts one device needs from another at most, rounded up to a power of two, at least 1; on the host.

    It is what `eplb_jax.MoEConfig.fetched` should be for these placements and for others like them: powers of two, so
    that placements of many steps need few programs.

    Args:
      phy2log: the expert of each slot, of one or several layers.
      num_masters: rows of the masters of all devices, `eplb_jax.MoEConfig.num_masters`.
      num_devices: that slots and masters divide over.

    Raises:
      ValueError: slots or masters that do not divide over the devices; experts that are none of the masters.

    >>> most_fetched(np.array([0, 1, 2, 2, 3, 0]), 4, 2), most_fetched(np.array([2, 3, 0, 1]), 4, 2)
    (1, 2)
    """
    most = max(int(fetches_needed(phy2log, num_masters, num_devices).max(initial=0)), 1)
    return min(1 << (most - 1).bit_length(), num_masters // num_devices)


def fetches_needed(
    phy2log: Int[placement.Array, "*layers P"], num_masters: int, num_devices: int
) -> Int[np.ndarray, " layers"]:
    """How many experts one device needs from another at most, of each layer; arguments and errors of `most_fetched`.

    A layer with a smaller ``fetched`` gathers all of them.
    """
    array = np.asarray(phy2log)
    slots = array.shape[-1]
    if num_devices < 1 or slots % num_devices or num_masters % num_devices:
        raise ValueError(f"{slots} slots and {num_masters} masters must divide over num_devices={num_devices}")
    if array.size and not -1 <= array.min() <= array.max() < num_masters:
        raise ValueError(
            f"phy2log has experts {array.min()} to {array.max()}, and there are num_masters={num_masters} of all "
            "devices"
        )
    held = np.where(array < 0, num_masters, array).reshape(-1, num_devices, slots // num_devices)
    needs = np.zeros((len(held), num_devices, num_masters + 1), bool)
    np.put_along_axis(needs, held, True, axis=2)
    pairs = needs[..., :-1].reshape(len(held), num_devices, num_devices, -1).sum(3)
    pairs[:, np.arange(num_devices), np.arange(num_devices)] = 0
    return pairs.max((1, 2), initial=0)


def plan_fetches(phy2log: Int[Array, " P"], here: Any, devices: int, masters: int, most: int) -> Fetches:
    """Who sends what to whom; the same on all devices but for what is this device's.

    Args:
      phy2log: the expert of each slot of all devices, -1 for none.
      here: this device.
      devices: ep.
      masters: of each device, M.
      most: experts from one device to another, n.
    """
    slots = phy2log.reshape(devices, -1)
    capacity = slots.shape[1]
    device = jnp.arange(devices, dtype=jnp.int32)
    owner = jnp.where(slots >= 0, slots // masters, -1)
    order = jnp.arange(capacity, dtype=jnp.int32)
    same = slots[:, :, None] == slots[:, None, :]
    new = ~(same & (order < order[:, None])).any(2)  # a device gets an expert once, however many slots hold it
    travels = new & (owner >= 0) & (owner != device[:, None])
    earlier = travels[:, None, :] & (owner[:, :, None] == owner[:, None, :]) & (order < order[:, None])
    rank = earlier.sum(2, dtype=jnp.int32)
    needed = (travels[:, :, None] & (owner[:, :, None] == device)).sum(1, dtype=jnp.int32)

    mine = travels & (owner == here)
    hit = mine[:, None, :] & (rank[:, None, :] == jnp.arange(most, dtype=jnp.int32)[:, None])  # [ep, n, S]
    sent = jnp.where(hit, (slots % masters)[:, None, :], 0).sum(2, dtype=jnp.int32)

    def own_row(array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, here, keepdims=False)

    # The rank of an expert that several slots of a device hold is that of the first of them.
    rank = jnp.where(same & new[:, None, :], rank[:, None, :], 0).sum(2, dtype=jnp.int32)
    expert, home, rank = own_row(slots), own_row(owner), own_row(rank)
    is_own, came = home == here, (home >= 0) & (home != here)
    place = jnp.where(came, home * most + jnp.minimum(rank, most - 1), 0)
    return Fetches(sent, hit.any(2), place, came, jnp.where(is_own, expert % masters, 0), is_own, needed.max())


def fetch(owned: jax.Array, fetches: Fetches, axis: str) -> jax.Array:
    """The slots [S, ...] of this device, of its masters [M, ...] and of others' that are exchanged."""
    devices, most = fetches.sent.shape
    flat = fetches.sent.reshape(-1), fetches.is_sent.reshape(-1)
    sent = pick(*same_axes(owned, *flat)).reshape(devices, most, *owned.shape[1:])
    came = all_to_all(sent, axis).reshape(devices * most, *owned.shape[1:])
    there = pick(*same_axes(came, fetches.place, fetches.came))
    return there + pick(*same_axes(owned, fetches.own, fetches.is_own))


def gather(owned: jax.Array, mine: jax.Array, devices: int, axis: str) -> jax.Array:
    """The slots [S, ...] of this device, of all devices' masters, which are gathered in parts."""
    experts = owned.shape[0]
    parts = next(n for n in range(min(devices, experts), experts + 1) if experts % n == 0)
    size = experts // parts
    owner, place = mine // experts, mine % experts
    found = []
    for part, block in enumerate(jnp.split(owned, parts)):
        # Grouped by expert axis alone, so legal where pipeline ranks do different things; a permute is not.
        everyones = jax.lax.all_gather(block, axis, tiled=True)
        is_here = (mine >= 0) & (place // size == part)
        index = jnp.maximum(owner, 0) * size + place % size
        found.append(pick(*same_axes(everyones, index, is_here)))
    return functools.reduce(jnp.add, found)
