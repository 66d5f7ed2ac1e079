"""Moves rows between the devices of a mesh axis: the collectives, each with its own transpose.

ep devices, C rows from one device to another, k choices, D width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.kernels.recipe import Encoding

Groups = tuple[tuple[int, ...], ...]
"""Devices of the axis, by place, that exchange with each other alone, each group in order; in place of it None: all."""


def all_to_all(x: Num[Array, "ep ..."], axis: str, groups: Groups | None = None) -> Num[Array, "ep ..."]:
    """Block d goes to device d of the axis, or of a group; block s of the result came from device s.

    It is its own transpose.
    """
    if groups is None:
        return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)
    return _all_to_all_in_groups(*_vary_over(axis, x), axis, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_to_all_in_groups(x: jax.Array, axis: str, groups: Groups) -> jax.Array:
    """`all_to_all` within groups, for which JAX knows no rule of `jax.vmap`."""

    @jax.custom_batching.custom_vmap
    def exchange(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, axis, 0, 0, tiled=True, axis_index_groups=groups)

    @exchange.def_vmap
    def _(size: int, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        del size, batched
        return jnp.moveaxis(_all_to_all_in_groups(jnp.moveaxis(x, 0, 1), axis, groups), 1, 0), True

    return exchange(x)


_all_to_all_in_groups.defvjp(
    lambda x, axis, groups: (_all_to_all_in_groups(x, axis, groups), None),
    lambda axis, groups, _, ct: (_all_to_all_in_groups(ct, axis, groups),),
)


def all_to_all_listed(
    slots: Int[Array, "ep C k"], weights: Float[Array, "ep C k"], axis: str, groups: Groups | None = None
) -> tuple[Int[Array, "ep C k"], Float[Array, "ep C k"]]:
    """`all_to_all` of both, as the words of one message."""
    return _all_to_all_listed(*_vary_over(axis, slots, weights), axis, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _all_to_all_listed(
    slots: jax.Array, weights: jax.Array, axis: str, groups: Groups | None
) -> tuple[jax.Array, jax.Array]:
    words = jax.lax.bitcast_convert_type(weights, jnp.int32).reshape(*slots.shape[:2], -1)
    slots, words = jnp.split(all_to_all(jnp.concatenate([slots, words], -1), axis, groups), [slots.shape[-1]], axis=-1)
    parts = words.reshape(weights.shape if words.shape == weights.shape else (*weights.shape, -1))
    return slots, jax.lax.bitcast_convert_type(parts, weights.dtype)


_all_to_all_listed.defvjp(
    lambda slots, weights, axis, groups: (_all_to_all_listed(slots, weights, axis, groups), None),
    lambda axis, groups, _, cts: (None, all_to_all(cts[1], axis, groups)),
)


def all_to_all_encoded(
    x: Float[Array, "ep C D"], axis: str, encoding: Encoding, groups: Groups | None = None
) -> Float[Array, "ep C D"]:
    """`all_to_all` of encoded rows; its transpose is exact, as if nothing were rounded."""
    return _all_to_all_encoded(*_vary_over(axis, x), axis, encoding, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_to_all_encoded(x: jax.Array, axis: str, encoding: Encoding, groups: Groups | None) -> jax.Array:
    return encoding.decode(tuple(all_to_all(part, axis, groups) for part in encoding.encode(x)), x.dtype)


_all_to_all_encoded.defvjp(
    lambda x, axis, encoding, groups: (_all_to_all_encoded(x, axis, encoding, groups), None),
    lambda axis, encoding, groups, _, ct: (all_to_all(ct, axis, groups),),
)


def all_to_all_encoded_back(
    x: Float[Array, "ep C D"], axis: str, encoding: Encoding, groups: Groups | None = None
) -> Float[Array, "ep C D"]:
    """`all_to_all` whose transpose is encoded: the combine of what `all_to_all_encoded` dispatched."""
    return _all_to_all_encoded_back(*_vary_over(axis, x), axis, encoding, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_to_all_encoded_back(x: jax.Array, axis: str, encoding: Encoding, groups: Groups | None) -> jax.Array:
    del encoding
    return all_to_all(x, axis, groups)


_all_to_all_encoded_back.defvjp(
    lambda x, axis, encoding, groups: (all_to_all(x, axis, groups), None),
    lambda axis, encoding, groups, _, ct: (_all_to_all_encoded(ct, axis, encoding, groups),),
)


def _vary_over(axis: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays varying over the same mesh axes, this one included."""
    return same_axes(*arrays, jax.lax.axis_index(axis))[:-1]


def all_to_all_ragged(x: Num[Array, "ep C D"], counts: Int[Array, " ep"], axis: str) -> Num[Array, "ep C D"]:
    """`all_to_all` of the first ``counts[d]`` rows of each block d alone; the other rows of the result are zero.

    XLA has no implementation for CPU.
    """
    ep, capacity = x.shape[:2]
    blocks = jnp.arange(ep, dtype=jnp.int32) * capacity
    theirs = all_to_all(counts, axis)
    start_there = jnp.full(ep, jax.lax.axis_index(axis) * capacity, jnp.int32)
    flat = x.reshape(ep * capacity, *x.shape[2:])
    out = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), blocks, counts, start_there, theirs, axis_name=axis)
    return out.reshape(x.shape)
