"""The two steps of the load balancer: copy the experts with most load, then pack what there is onto equal GPUs.

Both are exact where DeepSeek's own code is: loads are float32, equal ones keep their order, of equal choices the first
is taken. Sums are made from first to last, and quotients are rounded correctly on every backend.

Shapes: L layers (or layers times nodes), E logical experts, N items, M packs, R replicas. Within the loops the last
axis is L, so that one step of all layers is a few vector instructions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Num

from eplb_jax.plan.arguments import check_loads, on_host, to_float32
from eplb_jax.plan.halves import plan_in_halves
from eplb_jax.plan.placement import Array

MOST_COUNTED = 384
"""Up to this many items, comparing each with each is as fast as XLA's sort on a CPU, and 6 times as fast at 40."""

MOST_COMPARED = 2**22
"""Comparisons of all rows at most, whose results of 4 bytes are kept: memory that the allocator of C gives back to the
system after each plan (from 32 MiB on) has to be cleared anew for the next, which takes a quarter of its time."""


def balanced_packing(
    weight: Num[Array, "layers items"], num_packs: int
) -> tuple[Int[Array, "layers items"], Int[Array, "layers items"]]:
    """Packs items so that each pack holds equally many and their loads are close.

    Items go, heaviest first, to the lightest pack that is not full.

    Args:
      weight: loads of at least zero; taken as float32. NumPy in, NumPy out; JAX arrays may be traced.
      num_packs: a divisor of the number of items.

    Returns:
      The pack of each item, and its position in that pack; int32.

    Raises:
      ValueError: items that do not divide over the packs; negative or non-finite loads; not two axes.

    Source: ``balanced_packing`` of github.com/deepseek-ai/EPLB.

    >>> balanced_packing(np.array([[9, 1, 5, 4]]), 2)
    (array([[0, 0, 1, 1]], dtype=int32), array([[0, 1, 0, 1]], dtype=int32))
    """
    weight = check_loads(weight)
    items = weight.shape[1]
    if num_packs < 1 or items % num_packs:
        raise ValueError(f"{items} items do not divide over num_packs={num_packs}: every pack holds equally many")
    return call(_pack_jit, weight, num_packs=int(num_packs))


def replicate_experts(
    weight: Num[Array, "layers experts"], num_replicas: int
) -> tuple[Int[Array, "layers replicas"], Int[Array, "layers replicas"], Int[Array, "layers experts"]]:
    """Gives each spare replica to the expert whose replicas have the most load each.

    That minimises the largest load of a replica.

    Args:
      weight: loads of at least zero; taken as float32. NumPy in, NumPy out; JAX arrays may be traced.
      num_replicas: replicas altogether, at least as many as experts.

    Returns:
      The expert of each replica, which of the expert's replicas it is, and the replicas of each expert; int32.

    Raises:
      ValueError: fewer replicas than experts; negative or non-finite loads; not two axes.

    Source: ``replicate_experts`` of github.com/deepseek-ai/EPLB.

    >>> replicate_experts(np.array([[9, 1, 5]]), 5)[2]
    array([[2, 1, 2]], dtype=int32)
    """
    weight = check_loads(weight)
    if num_replicas < weight.shape[1]:
        raise ValueError(f"num_replicas={num_replicas} is less than the {weight.shape[1]} experts: each needs one")
    return call(_replicate_jit, weight, num_replicas=int(num_replicas))


def call(function: Any, weight: Array, **arguments: Any) -> Any:
    """Calls a jitted function of float32 loads; NumPy loads give NumPy results, made on the CPU."""
    if isinstance(weight, jax.Array):
        return function(to_float32(weight), **arguments)
    with on_host():
        return jax.tree.map(np.asarray, function(to_float32(weight), **arguments))


def call_in_halves(function: Any, weight: Array) -> Any:
    """As `call`; NumPy loads of many layers are planned for in two halves at once."""
    if isinstance(weight, jax.Array):
        return function(to_float32(weight))
    return plan_in_halves(function, len(weight), to_float32(weight))


def pack(weight: jax.Array, num_packs: int) -> tuple[jax.Array, jax.Array]:
    """`balanced_packing` of float32 [L, N] without checks."""
    items = weight.shape[1]
    capacity = items // num_packs
    if capacity == 1:
        each = jnp.broadcast_to(jnp.arange(items, dtype=jnp.int32), weight.shape)
        return each, jnp.zeros_like(each)
    place = descending_ranks(ordered_bits(weight))
    if num_packs == 1:
        return jnp.zeros_like(place), place
    weight = take(weight, inverse(place))
    chosen, rank = _pack_pairs(weight) if capacity == 2 else _pack_sorted(weight, num_packs)
    return take(chosen, place), take(rank, place)


def _pack_sorted(weight: jax.Array, num_packs: int) -> tuple[jax.Array, jax.Array]:
    """Pack and position of each of [L, N] items that come in descending order."""
    capacity = weight.shape[1] // num_packs
    ids = jnp.arange(num_packs, dtype=jnp.int32)[:, None]

    def step(state, item):
        loads, counts = state
        open_loads = jnp.where(counts < capacity, loads, jnp.inf)
        lightest = jnp.where(open_loads == open_loads.min(0), ids, num_packs).min(0)
        hit = ids == lightest
        rank = jnp.where(hit, counts, 0).max(0)
        return (jnp.where(hit, loads + item, loads), counts + hit.astype(jnp.int32)), (lightest, rank)

    empty = jnp.zeros((num_packs, weight.shape[0]), jnp.float32)
    _, (chosen, rank) = jax.lax.scan(step, (empty, empty.astype(jnp.int32)), weight.T, unroll=4)
    return chosen.T, rank.T


def _pack_pairs(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_pack_sorted` for packs of two, without its loop.

    The heavier half opens the packs in order, the other half closes them from the lightest on. Items without load fill
    one empty pack after the other.
    """
    half = weight.shape[1] // 2
    item = jnp.arange(2 * half, dtype=jnp.int32)
    opened = (weight[:, :half] > 0).sum(1, dtype=jnp.int32, keepdims=True)
    idle = item - opened  # counts the items without load that come before the closing ones
    closing = inverse(descending_ranks(~ordered_bits(weight[:, :half])))
    closing = jnp.concatenate([jnp.zeros_like(closing), closing], axis=1)
    middle = (idle >= 0) & (item < 2 * half - opened)
    chosen = jnp.where(idle < 0, item, jnp.where(middle, opened + idle // 2, closing))
    return chosen, jnp.where(idle < 0, 0, jnp.where(middle, idle % 2, 1))


def replicate(weight: jax.Array, num_replicas: int, most: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`replicate_experts` of float32 [L, E] without checks.

    With ``most``, no expert gets more replicas than that, and of equal loads the expert with fewest replicas is taken.
    """
    layers, experts = weight.shape
    weight = weight.T
    ids = jnp.arange(experts, dtype=jnp.int32)[:, None]

    def step(state, _):
        each, counts = state
        wanted = each == each.max(0)
        if most is not None:
            wanted &= counts == jnp.where(wanted, counts, num_replicas).min(0)
        chosen = jnp.where(wanted, ids, experts).min(0)
        hit = ids == chosen
        rank = jnp.where(hit, counts, 0).max(0)
        counts = counts + hit.astype(jnp.int32)
        left = divide(weight, counts)
        if most is not None:
            left = jnp.where(counts < most, left, -1.0)
        return (jnp.where(hit, left, each), counts), (chosen, rank)

    start = weight, jnp.ones(weight.shape, jnp.int32)
    (_, counts), (spare, rank) = jax.lax.scan(step, start, None, length=num_replicas - experts, unroll=2)
    first = jnp.broadcast_to(ids, (experts, layers))
    phy2log = jnp.concatenate([first, spare])
    return phy2log.T, jnp.concatenate([jnp.zeros_like(first), rank]).T, counts.T


def descending_ranks(keys: jax.Array) -> jax.Array:
    """The place of each int32 key of [L, N] in stable descending order; no key is 2**31 - 1."""
    index = jnp.arange(keys.shape[1], dtype=jnp.int32)
    if keys.shape[1] > MOST_COUNTED or keys.size * keys.shape[1] > MOST_COMPARED:
        items = jnp.broadcast_to(index, keys.shape)
        return inverse(jax.lax.sort((~keys, items), dimension=1, num_keys=1, is_stable=True)[1])
    before = (index[None, :] < index[:, None]).astype(jnp.int32)  # one that comes before wins a tie
    return (keys[:, None, :] + before > keys[:, :, None]).astype(jnp.int32).sum(-1, dtype=jnp.int32)


def ordered_bits(weight: jax.Array) -> jax.Array:
    """float32 loads of at least zero as int32 keys of the same order."""
    return jax.lax.bitcast_convert_type(jnp.abs(weight), jnp.int32)  # -0.0 is zero


def inverse(order: jax.Array) -> jax.Array:
    """The inverse of each row's permutation."""
    rows = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None]
    index = jnp.broadcast_to(jnp.arange(order.shape[1], dtype=jnp.int32), order.shape)
    return jnp.zeros_like(order).at[rows, order].set(index, unique_indices=True, mode="promise_in_bounds")


def take(values: jax.Array, index: jax.Array) -> jax.Array:
    """Each row of values at the row's indices."""
    return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")


def divide(weight: jax.Array, count: jax.Array) -> jax.Array:
    """float32 loads by int32 counts below 2**15, correctly rounded on every backend: GPUs approximate a division."""
    weight, count = jnp.broadcast_arrays(weight, count)
    return jax.lax.platform_dependent(weight, count, cpu=_divide, default=divide_by_integers)


def _divide(weight: jax.Array, count: jax.Array) -> jax.Array:
    return weight / count.astype(jnp.float32)


def divide_by_integers(weight: jax.Array, count: jax.Array) -> jax.Array:
    """The mantissa is divided in two steps to 26 bits and what remains, then rounded to nearest, ties to even."""
    pattern = jax.lax.bitcast_convert_type(weight, jnp.uint32)
    exponent, divisor = (pattern >> 23).astype(jnp.int32), count.astype(jnp.uint32)
    mantissa = (pattern & 0x7FFFFF) | 0x800000
    high, rest = mantissa // divisor, mantissa % divisor
    shift = jax.lax.clz(high) - 6
    low = (rest << shift) // divisor
    quotient, inexact = (high << shift) + low, (rest << shift) != low * divisor
    kept, cut = quotient >> 2, quotient & 3
    up = (cut == 3) | ((cut == 2) & (inexact | (kept & 1 == 1)))
    exponent_out = exponent + 2 - shift.astype(jnp.int32)
    rounded = (exponent_out.astype(jnp.uint32) << 23) + (kept + up.astype(jnp.uint32) - 0x800000)
    normal = (exponent > 0) & (exponent_out > 0) & (exponent < 255)  # others are zero, tiny, or marks like infinity
    return jnp.where(normal, jax.lax.bitcast_convert_type(rounded, jnp.float32), _divide(weight, count))


@functools.partial(jax.jit, static_argnames="num_packs")
def _pack_jit(weight: jax.Array, *, num_packs: int) -> tuple[jax.Array, jax.Array]:
    return pack(weight, num_packs)


@functools.partial(jax.jit, static_argnames="num_replicas")
def _replicate_jit(weight: jax.Array, *, num_replicas: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return replicate(weight, num_replicas)
