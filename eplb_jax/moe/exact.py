"""Even loads in every microbatch, whatever the router does: masters stay, fuller devices give tokens to emptier ones.

Once all devices know how many tokens chose each expert, each that lacks tokens gets them from one other device, which
can always be so, as in Walker's alias method (Electronics Letters 10, 1974). Who gives to whom is found without a loop,
by sums over what devices have too much, fullest first, and over what they lack, emptiest first (compare the sweep of
Huebschle-Schneider and Sanders, Parallel Weighted Random Sampling, ESA 2019): both divide the same line, and whoever
lacks a stretch of it gets it from the device that has its beginning too much. Where the stretch goes on behind that
device's own, the device has given too much, and gets as much from the next one.

A device gives all tokens of its fullest experts first, so that few experts travel. The weights of these experts travel
for this microbatch alone, and their gradients go back the same way: between two devices in an all-to-all of fixed size.
With more devices, who gives to whom is data, and an all-to-all would carry the experts for all pairs.

E logical experts, R devices, M masters of a device, n experts that a device may get, P slots of both devices.
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


class ExactSplit(NamedTuple):
    """Which tokens devices compute so that all have equally many; arrays are int32.

    Attributes:
      giver: the one device from which each gets tokens; -1: it gets none.
      fetched: experts whose weights each device needs for them, the giver's fullest first; -1: none.
      wanted: tokens of each expert that each device computes.
    """

    giver: Int[Array, " R"]
    fetched: Int[Array, "R n"]
    wanted: Int[Array, "E R"]


def split_exactly(
    counts: Int[Array, " E"], num_devices: int, *, masters: int | None = None, most: int | None = None
) -> ExactSplit:
    """A division of a microbatch's tokens after which no device has more than one token more than another.

    Experts are on one device each. A device that lacks tokens gets them from one other device and needs no more than
    that device's experts for them; with the default ``most`` all loads are equal, or differ by the one token that does
    not divide. It has no loop and runs under `jax.jit` and `jax.vmap`.

    Args:
      counts: tokens of each expert, of all devices; their sum below 2**31.
      num_devices: R, which experts are over in order.
      masters: experts of a device, M; the last devices may have fewer. None: E / R, rounded up.
      most: experts that a device may get, n; where more were needed, it gets the tokens of n, and loads stay uneven.
        None: as many as a device has.

    Raises:
      ValueError: no vector of counts; no device; too few masters for the experts; ``most`` not within 1 to M.

    >>> found = split_exactly(jnp.array([9, 1, 1, 1]), 4)
    >>> found.giver.tolist(), found.fetched.ravel().tolist()
    ([-1, 0, 0, 0], [-1, 0, 0, 0])
    >>> found.wanted.tolist()
    [[3, 2, 2, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    """
    if counts.ndim != 1 or not len(counts) or num_devices < 1:
        raise ValueError(
            f"counts have shape {counts.shape}, for {num_devices} devices: give a vector of one layer's tokens of each "
            "expert, and at least one device"
        )
    experts = len(counts)
    rows = -(-experts // num_devices) if masters is None else masters
    if rows * num_devices < experts:
        raise ValueError(f"masters={masters} of {num_devices} devices are fewer than {experts} experts: take more")
    if most is not None and not 1 <= most <= rows:
        raise ValueError(f"most={most}: a device has {rows} experts to give, so take 1 to {rows}, or None")
    own = jnp.pad(counts.astype(jnp.int32), (0, num_devices * rows - experts)).reshape(num_devices, rows)
    giver, first, last = _pair(own.sum(1, dtype=jnp.int32))

    # Each giver's tokens in a row, those of its fullest expert first; a receiver gets the stretch [first, last).
    place = jnp.argsort(own, axis=1, descending=True, stable=True).astype(jnp.int32)
    full = jnp.take_along_axis(own, place, axis=1)
    end = jnp.cumsum(full, axis=1, dtype=jnp.int32)
    of_giver = jnp.maximum(giver, 0)
    end, full, expert = end[of_giver], full[of_giver], of_giver[:, None] * rows + place[of_giver]
    amount = jnp.maximum(jnp.minimum(last[:, None], end) - jnp.maximum(first[:, None], end - full), 0)
    number = jnp.cumsum((amount > 0).astype(jnp.int32), axis=1, dtype=jnp.int32)
    amount = jnp.where(number <= (rows if most is None else most), amount, 0)

    device = jnp.arange(num_devices, dtype=jnp.int32)
    away = jnp.zeros((num_devices * rows, num_devices), jnp.int32).at[expert, device[:, None]].add(amount)
    at_home = device == (jnp.arange(num_devices * rows, dtype=jnp.int32) // rows)[:, None]
    wanted = away + jnp.where(at_home, own.reshape(-1, 1) - away.sum(1, keepdims=True, dtype=jnp.int32), 0)
    slot = jnp.arange(rows if most is None else most, dtype=jnp.int32) + 1
    taken = (number[:, None, :] == slot[:, None]) & (amount > 0)[:, None, :]
    fetched = jnp.where(taken.any(2), jnp.where(taken, expert[:, None, :], 0).sum(2, dtype=jnp.int32), -1)
    return ExactSplit(giver, fetched, wanted[:experts])


def _pair(home: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each device who gives to it, or -1, and which stretch [first, last) of the giver's tokens; int32 [R]."""
    number = jnp.arange(len(home), dtype=jnp.int32)
    fuller = (home > home[:, None]) | ((home == home[:, None]) & (number < number[:, None]))  # than the row's device
    total = home.sum(dtype=jnp.int32)
    odd = fuller.sum(1, dtype=jnp.int32) < total % len(home)  # the fullest have the tokens that do not divide
    excess = home - total // len(home) - odd.astype(jnp.int32)
    gives, lacks = jnp.maximum(excess, 0), jnp.maximum(-excess, 0)
    start = jnp.where(fuller, gives, 0).sum(1, dtype=jnp.int32)
    end = start + gives
    filled = jnp.where(fuller.T, lacks, 0).sum(1, dtype=jnp.int32) + lacks  # where the emptiest first have got theirs

    # The stretch of who lacks tokens, and what sticks out behind a giver's own.
    beyond = jnp.where((lacks > 0) & (filled >= end[:, None]), filled, jnp.iinfo(jnp.int32).max).min(1)
    first = jnp.where(lacks > 0, filled - lacks, end)
    last = jnp.where(lacks > 0, filled, jnp.where(gives > 0, beyond, end))
    has = (start <= first[:, None]) & (first[:, None] < end) & (last > first)[:, None]
    giver = jnp.argmax(has, axis=1).astype(jnp.int32)
    offset = start[giver]
    return jnp.where(has.any(1), giver, -1), first - offset, last - offset


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
    found = split_exactly(counts, DEVICES, masters=masters, most=most)
    giver = found.giver.max()
    gifts = found.fetched.max(0)
    given = gifts >= 0
    place = jnp.where(given, gifts - giver * masters, 0)
    number = jnp.arange(experts, dtype=jnp.int32)
    at_home = jnp.where(number < masters, found.wanted[:, 0], found.wanted[:, 1])
    wanted = jnp.stack([at_home, counts.astype(jnp.int32) - at_home], axis=1)
    device = jnp.arange(DEVICES, dtype=jnp.int32)[:, None]
    all_masters = jnp.arange(DEVICES * masters, dtype=jnp.int32).reshape(DEVICES, masters)
    held = jnp.where(all_masters < experts, all_masters, -1)
    spare = jnp.where((device != giver) & given, gifts, -1)
    phy2log = jnp.concatenate([held, spare], axis=1).reshape(-1)
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
            f"exact={most} on {devices} devices: who gives to whom is data, for which an all-to-all has room for all "
            "pairs; take ep=2, or redundant experts and replicas='split'"
        )
    if most > masters:
        return f"exact={most}: a device has {masters} masters, so take at most as many"
    return None
