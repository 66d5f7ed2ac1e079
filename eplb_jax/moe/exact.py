"""Even loads in every microbatch, whatever the router does: masters stay, and the fuller of two devices gives tokens.

Once both devices know how many tokens chose each expert, the one with more gives the other half of the difference: all
tokens of its fullest experts first, so that few experts travel, and part of one more's. The weights of these experts
travel for this microbatch alone, in an all-to-all of fixed size, and their gradients go back the same way.

With more devices than two a receiver can still be filled from one giver (pairs of a fuller and an emptier device, one
after the other, as in Walker's alias method: Electronics Letters 10, 1974), but who gives to whom is then data, and XLA
has no exchange between pairs that are data: an all-to-all would carry the experts for all pairs.

E logical experts, M masters of a device, n experts that a device may get, P slots of both devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.moe.exchange import all_to_all
from eplb_jax.moe.pick import pick
from eplb_jax.plan.placement import Placement

DEVICES = 2


class Gift(NamedTuple):
    """Who gives what in a microbatch.

    Attributes:
      giver: the device with more tokens; int32.
      place: which of its masters it gives, fullest first; int32.
      given: whether it gives a j-th; bool.
      wanted: tokens of each expert at home and at the other device; int32.
      placement: of M + n slots a device: its masters, then what it got.
    """

    giver: Int[Array, ""]
    place: Int[Array, " n"]
    given: Array
    wanted: Int[Array, "E 2"]
    placement: Placement


def plan_gift(counts: Int[Array, " E"], masters: int, most: int) -> Gift:
    """The gift that makes two devices' loads differ by one token at most, or by what ``most`` experts leave.

    Args:
      counts: tokens of each expert, of both devices.
      masters: rows of a device, M; experts fill them in order.
      most: experts that may be given, n.

    >>> gift = plan_gift(jnp.array([5, 9, 1, 1]), 2, 1)
    >>> gift.wanted.tolist(), gift.placement.phy2log.tolist()
    ([[5, 0], [3, 6], [1, 0], [1, 0]], [0, 1, -1, 2, 3, 1])
    """
    experts = len(counts)
    padded = jnp.pad(counts.astype(jnp.int32), (0, DEVICES * masters - experts)).reshape(DEVICES, masters)
    home = padded.sum(1, dtype=jnp.int32)
    giver = jnp.argmax(home).astype(jnp.int32)
    own = jnp.where(giver == 0, padded[0], padded[1])
    need = jnp.abs(home[0] - home[1]) // 2
    place = jnp.argsort(own, descending=True, stable=True)[:most].astype(jnp.int32)
    full = own[place]
    amount = jnp.clip(need - (jnp.cumsum(full, dtype=jnp.int32) - full), 0, full)
    given = amount > 0

    gifts = giver * masters + place
    away = jnp.zeros(experts, jnp.int32).at[gifts].add(amount, mode="drop")
    wanted = jnp.stack([counts.astype(jnp.int32) - away, away], axis=1)
    device = jnp.arange(DEVICES, dtype=jnp.int32)[:, None]
    all_masters = jnp.arange(DEVICES * masters, dtype=jnp.int32).reshape(DEVICES, masters)
    held = jnp.where(all_masters < experts, all_masters, -1)
    spare = jnp.where((device != giver) & given, gifts, -1)
    phy2log = jnp.concatenate([held, spare], axis=1).reshape(-1)
    number = jnp.arange(experts, dtype=jnp.int32)
    slots = masters + most
    here = number // masters * slots + number % masters
    there = (1 - giver) * slots + masters + jnp.arange(most, dtype=jnp.int32)
    other = jnp.full(experts, -1, jnp.int32).at[jnp.where(given, gifts, experts)].set(there, mode="drop")
    table = jnp.stack([here, other], axis=1)
    placement = Placement(phy2log, table, (table >= 0).sum(1, dtype=jnp.int32))
    return Gift(giver, place, given, wanted, placement)


def with_gift(masters: Any, gift: Gift, axis: str) -> Any:
    """Experts [M + n, ...] of this device: its masters [M, ...], and what the other one gave."""
    here = jax.lax.axis_index(axis).astype(jnp.int32)
    gives = gift.given & (gift.giver == here)

    def join(owned: jax.Array) -> jax.Array:
        sent = pick(*same_axes(owned, gift.place, gives))
        # To both, zeros to itself: what it got is the other's block.
        block = jnp.arange(DEVICES, dtype=jnp.int32).reshape(-1, *(1,) * owned.ndim) != here
        came = all_to_all(jnp.where(block, sent, jnp.zeros((), sent.dtype)), axis)
        return jnp.concatenate([owned, came.sum(0, dtype=came.dtype)])

    return jax.tree.map(join, masters)


def why_not(devices: int, masters: int, most: int) -> str | None:
    """Why a layer cannot be balanced so, with the remedy; None if it can."""
    if devices > DEVICES:
        return (
            f"exact={most} on {devices} devices: who gives to whom is data, which XLA has an exchange for between two "
            "devices alone; take ep=2, or redundant experts and replicas='split'"
        )
    if most > masters:
        return f"exact={most}: a device has {masters} masters, so take at most as many"
    return None
