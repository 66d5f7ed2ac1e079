"""Tokens to experts and back: who sends what to whom, and how received tokens are sorted by expert.

A token travels once to each device that holds experts of it, with the list of them and their weights, and one row
comes back from each: the sum over the experts there. Where capacity is limited, later tokens are dropped
and counted.

Shapes: T tokens of this device, k choices, ep devices, S slots of a device, C tokens from one device to another,
N = ep * C tokens received (T where there is one device), R rows sorted by slot, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from eplb_jax.kernels.grouped_gemm.layout import ALIGN, group_starts, round_up
from eplb_jax.moe.permute import RowMap


class Capacities(NamedTuple):
    """Sizes that do not depend on values.

    Attributes:
      exchange: tokens that one device may send to another, C.
      rows: rows for the tokens of a device's experts where groups begin at multiples of `ALIGN`; R. See `padded_rows`
        for other multiples.
    """

    exchange: int
    rows: int


class Sends(NamedTuple):
    """What this device sends.

    Attributes:
      moves: from its tokens to the rows [ep * C] of the send buffer.
      counts: tokens sent to each device; int32.
      slots: the slots, there, that the token of each row goes to, -1 for none; int32.
      choices: which choice, token * k + its place, each of these is, T * k for none; int32.
      entries: where in slots each choice is, ep * C * k for none; int32.
      dropped: choices of this device's tokens that were dropped for lack of capacity; int32.
    """

    moves: RowMap
    counts: Int[Array, " ep"]
    slots: Int[Array, "ep C k"]
    choices: Int[Array, "ep C k"]
    entries: Int[Array, "T k"]
    dropped: Int[Array, ""]


class Sorted(NamedTuple):
    """Received tokens by slot.

    Attributes:
      moves: from tokens [N] to rows [R].
      assignment: the token * k + choice of each row, N * k for none; int32.
      sizes: rows of each slot; int32. Groups begin where `group_starts` says.
      dropped: choices that were dropped for lack of capacity; int32.
    """

    moves: RowMap
    assignment: Int[Array, " R"]
    sizes: Int[Array, " S"]
    dropped: Int[Array, ""]


def make_capacities(
    tokens: int, top_k: int, num_devices: int, num_slots: int, capacity_factor: float | None
) -> Capacities:
    """Capacities for the worst case, or for a factor times what evenly spread choices need.

    Args:
      tokens: of each device.
      top_k: choices of each token.
      num_devices: devices that exchange tokens.
      num_slots: slots of each device.
      capacity_factor: at least 1, or None: nothing is ever dropped.

    Raises:
      ValueError: a factor below 1, sizes below 1.

    >>> make_capacities(1024, 8, 8, 32, None)
    Capacities(exchange=1024, rows=65760)
    >>> make_capacities(1024, 8, 8, 32, 1.25)
    Capacities(exchange=848, rows=10464)
    """
    if min(tokens, top_k, num_devices, num_slots) < 1:
        raise ValueError(
            f"tokens={tokens}, top_k={top_k}, num_devices={num_devices}, num_slots={num_slots}: all must be at least 1"
        )
    check_capacity_factor(capacity_factor)
    gaps = (ALIGN - 1) * num_slots
    most = num_devices * tokens * min(top_k, num_slots)
    if capacity_factor is None:
        return Capacities(tokens, round_up(most + gaps))
    visited = visited_members(num_devices, num_devices * num_slots, top_k)
    exchange = min(tokens, round_up(math.ceil(capacity_factor * tokens * visited / num_devices)))
    rows = min(num_devices * exchange * min(top_k, num_slots), math.ceil(capacity_factor * tokens * top_k))
    return Capacities(exchange, round_up(rows + gaps))


def visited_members(members: float, experts: float, top_k: int) -> float:
    """Members that a token has experts on, on average, of experts that are even over members, and choices over experts.

    >>> visited_members(4, 8, 8), round(visited_members(64, 256, 8), 2)
    (4.0, 7.68)
    """
    missed = 1.0  # the chance that a member has none of a token's experts, which differ
    for chosen in range(min(top_k, math.ceil(experts))):
        missed *= max(experts - experts / members - chosen, 0) / (experts - chosen)
    return members * (1 - missed)


def check_capacity_factor(factor: float | None) -> None:
    """Raises ValueError unless it is None or a finite number of at least 1."""
    if factor is not None and not 1 <= factor < math.inf:
        raise ValueError(f"capacity_factor={factor}: it must be at least 1, or None to drop nothing")


def padded_rows(rows: int, num_slots: int, align: int) -> int:
    """Rows that hold whatever fits `Capacities.rows`, where groups begin at multiples of ``align``.

    >>> padded_rows(1056, 4, 8), padded_rows(1056, 4, 128)
    (1056, 1536)
    """
    return rows if align == ALIGN else round_up(rows + (align - ALIGN) * num_slots, align)


def plan_sends(slots: Int[Array, "T k"], num_devices: int, num_slots: int, capacity: int) -> Sends:
    """Gives each token a row for each device that it has choices on, while the capacity lasts.

    Args:
      slots: the slot of each choice among all devices' slots, -1 for none.
      num_devices: devices, ep.
      num_slots: slots of each, S.
      capacity: rows for each device, C.
    """
    tokens, top_k = slots.shape
    devices = jnp.arange(num_devices, dtype=jnp.int32)
    target = jnp.where(slots >= 0, slots // num_slots, -1)
    goes = (target[:, :, None] == devices).any(1)
    place = jnp.cumsum(goes.astype(jnp.int32), axis=0, dtype=jnp.int32) - 1
    fits = goes & (place < capacity)
    row = jnp.where(fits, devices * capacity + place, num_devices * capacity)
    token = jnp.arange(tokens, dtype=jnp.int32)
    source = jnp.full(num_devices * capacity, tokens, jnp.int32)
    source = source.at[row].set(jnp.broadcast_to(token[:, None], row.shape), mode="drop")

    # A token's rows by its choices: the first choice on a device stands for the device.
    nowhere = num_devices * capacity
    order = jnp.arange(top_k, dtype=jnp.int32)
    first = ~((target[:, :, None] == target[:, None, :]) & (order[:, None] > order)).any(-1)
    of_choice = jnp.where(target >= 0, jnp.take_along_axis(row, jnp.maximum(target, 0), axis=1), nowhere)
    rows = jnp.where(first, of_choice, nowhere)
    entries = jnp.where(of_choice < nowhere, of_choice * top_k + order, nowhere * top_k)

    known = jnp.minimum(source, tokens - 1)
    there = (source < tokens)[:, None] & (target[known] == jnp.repeat(devices, capacity)[:, None])
    shape = num_devices, capacity, top_k
    local = jnp.where(there, slots[known] % num_slots, -1).reshape(shape)
    choices = jnp.where(there, known[:, None] * top_k + order, tokens * top_k).reshape(shape)
    dropped = ((target >= 0) & (of_choice == nowhere)).sum(dtype=jnp.int32)
    return Sends(RowMap(source, rows), fits.sum(0, dtype=jnp.int32), local, choices, entries, dropped)


def sort_by_slot(slots: Int[Array, "N k"], num_slots: int, num_rows: int, align: int = ALIGN) -> Sorted:
    """Gives each choice a row among those of its slot, while the capacity lasts.

    If all choices need more rows than there are, the fullest slots are cut to one size, and their last tokens dropped.

    Args:
      slots: the slot of each choice, -1 for none.
      num_slots: slots, S.
      num_rows: rows, R; a multiple of `ALIGN`.
      align: where groups begin. Other multiples than `ALIGN` drop the same choices, and take `padded_rows`.
    """
    tokens, top_k = slots.shape
    total = tokens * top_k
    flat = slots.reshape(-1)
    assignment = jnp.arange(total, dtype=jnp.int32)
    slot = jnp.where(flat >= 0, flat, num_slots)
    slot_ids = jnp.arange(num_slots, dtype=jnp.int32)
    if (num_slots + 1) * total < 2**31:  # one number holds both, and sorting one array is faster
        order = jax.lax.sort(slot * total + assignment) % total
    else:
        order = jax.lax.sort((slot, assignment), num_keys=1, is_stable=True)[1]
    wanted = (slot[:, None] == slot_ids).sum(0, dtype=jnp.int32)
    sizes = _limit(wanted, num_rows)
    num_rows = padded_rows(num_rows, num_slots, align)
    starts, begins = group_starts(sizes, align), jnp.cumsum(wanted, dtype=jnp.int32) - wanted

    # Row r of slot s holds the choice at begins[s] + (r - starts[s]) of the order.
    row = jnp.arange(num_rows, dtype=jnp.int32)
    owner = (row[:, None] >= starts).sum(1, dtype=jnp.int32) - 1
    inside = row - starts[owner]
    used = inside < sizes[owner]
    of_row = jnp.where(used, order[jnp.where(used, begins[owner] + inside, 0)], total)
    rows = jnp.full(total, num_rows, jnp.int32).at[of_row].set(row, mode="drop", unique_indices=True)
    source = jnp.where(used, of_row // top_k, tokens)
    return Sorted(RowMap(source, rows.reshape(tokens, top_k)), of_row, sizes, (wanted - sizes).sum(dtype=jnp.int32))


def _limit(wanted: jax.Array, num_rows: int) -> jax.Array:
    """Sizes of at most those wanted whose groups, each a multiple of `ALIGN`, fit into the rows."""
    blocks, capacity = -(-wanted // ALIGN), num_rows // ALIGN
    # Slots that want at most as much as this one get that, the others as much as this one: does it fit?
    needed = jnp.minimum(blocks, blocks[:, None]).sum(1, dtype=jnp.int32)
    level = jnp.where(needed <= capacity, blocks, 0).max()
    more = blocks > level
    left = capacity - jnp.minimum(blocks, level).sum(dtype=jnp.int32)
    level = level + jnp.where(more.any(), left // jnp.maximum(more.sum(dtype=jnp.int32), 1), 0)
    return jnp.minimum(wanted, level * ALIGN)
