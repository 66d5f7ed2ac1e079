"""Moves rows within a device by index, and between devices by all-to-all; each move has its own transpose.

N tokens, R rows, D width. RowMap within a device are described by two arrays, each the inverse of the other, so that
neither a move nor its gradient scatters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Num

from eplb_jax.kernels import registry
from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.kernels.registry import Backend, ChosenBackend

FP8 = jnp.float8_e4m3fn
BLOCK = 128
"""Channels that share a scale when rows travel in 8 bits."""
RECOMPUTE = "recompute"
"""By agreement with `jaxpipe`: a value of this name is cheaper to compute again than to keep."""


class RowMap(NamedTuple):
    """Which row holds a copy of which token.

    Attributes:
      source: the token of each row, or N for rows that hold none; int32.
      rows: the rows with a copy of each token, R where there are fewer than k; int32.
    """

    source: Int[Array, " R"]
    rows: Int[Array, "N k"]


def permute(x: Float[Array, "N D"], moves: RowMap, *, backend: Backend = "auto") -> Float[Array, "R D"]:
    """A copy of its token in each row, zeros in rows that hold none.

    Args:
      x: the tokens.
      moves: which row holds which token.
      backend: "auto" takes our own kernels for Hopper GPUs, `eplb_jax.kernels.permute`, where it can, and else "xla",
        which runs everywhere and gives the same values; the device is that of `eplb_jax.grouped_matmul`.
        "mosaic" insists on the kernels.

    Raises:
      ValueError: "mosaic" for what it cannot do.

    >>> moves = RowMap(jnp.array([1, 0, 1, 2]), jnp.array([[1, 4], [0, 2]]))
    >>> permute(jnp.array([[1.0], [5.0]]), moves)[:, 0].tolist()
    [5.0, 1.0, 5.0, 0.0]
    >>> unpermute(jnp.array([[1.0], [2.0], [3.0], [jnp.nan]]), moves)[:, 0].tolist()
    [2.0, 4.0]
    """
    x, *indices = same_axes(x, *moves)
    return _permute(x, RowMap(*indices), _choose(x, moves, backend))


def unpermute(rows: Float[Array, "R D"], moves: RowMap, *, backend: Backend = "auto") -> Float[Array, "N D"]:
    """The sum of each token's rows, added in float32 (float64 for float64); the transpose of `permute`.

    Args:
      rows: what is added; rows that hold no token are not looked at.
      moves, backend: as there.
    """
    rows, *indices = same_axes(rows, *moves)
    return _unpermute(rows, RowMap(*indices), _choose(rows, moves, backend))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _permute(x: jax.Array, moves: RowMap, chosen: ChosenBackend) -> jax.Array:
    return _dispatch(chosen, "copy_rows", copy_rows_by_xla, x, moves.source, moves.rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _unpermute(rows: jax.Array, moves: RowMap, chosen: ChosenBackend) -> jax.Array:
    return _dispatch(chosen, "add_rows", add_rows_by_xla, rows, moves.rows)


_permute.defvjp(
    lambda x, moves, chosen: (_permute(x, moves, chosen), moves),
    lambda chosen, moves, ct: (_unpermute(ct, moves, chosen), None),
)
_unpermute.defvjp(
    lambda rows, moves, chosen: (_unpermute(rows, moves, chosen), moves),
    lambda chosen, moves, ct: (_permute(ct, moves, chosen), None),
)


def _choose(array: jax.Array, moves: RowMap, backend: str) -> ChosenBackend:
    """Who moves rows in either direction."""
    return registry.choose("move_rows", backend, array, moves.source, moves.rows)


def _dispatch(chosen: ChosenBackend, name: str, xla: Callable[..., jax.Array], *arguments: jax.Array) -> jax.Array:
    """The result on the chosen backend, named so that `jaxpipe` computes it again rather than stash it."""

    def move_rows(*arguments: jax.Array) -> jax.Array:
        return checkpoint_name(registry.dispatch(chosen, name, xla, *arguments), RECOMPUTE)

    return jax.jit(move_rows)(*arguments)


def copy_rows_by_xla(x: Float[Array, "N D"], source: Int[Array, " R"], rows: Int[Array, "N k"]) -> Float[Array, "R D"]:
    """`eplb_jax.kernels.permute.copy_rows` for every platform and dtype."""
    del rows
    return _take_or_zero(x, source)


def add_rows_by_xla(rows: Float[Array, "R D"], index: Int[Array, "N k"]) -> Float[Array, "N D"]:
    """`eplb_jax.kernels.permute.add_rows` for every platform and dtype."""
    dtype = wide(rows.dtype)
    parts = [_take_or_zero(rows, index[:, j]).astype(dtype) for j in range(index.shape[1])]
    return functools.reduce(jnp.add, parts).astype(rows.dtype)


def permute_each(
    values: Float[Array, "N k"], assignment: Int[Array, " R"], rows: Int[Array, "N k"]
) -> Float[Array, " R"]:
    """The value of each row's assignment (token * k + choice), zero for N * k; ``rows`` is the inverse, R for none."""
    return _permute_each(*same_axes(values, assignment, rows))


@jax.custom_vjp
def _permute_each(values: jax.Array, assignment: jax.Array, rows: jax.Array) -> jax.Array:
    return _take_or_zero(values.reshape(-1), assignment)


_permute_each.defvjp(
    lambda values, assignment, rows: (_permute_each(values, assignment, rows), rows),
    lambda rows, ct: (_take_or_zero(ct, rows), None, None),
)


def _take_or_zero(array: jax.Array, index: jax.Array) -> jax.Array:
    """Rows at an index, zeros where it is the number of rows."""
    found = index < array.shape[0]
    taken = array.at[jnp.where(found, index, 0)].get(mode="promise_in_bounds")
    return jnp.where(found.reshape(found.shape + (1,) * (array.ndim - 1)), taken, jnp.zeros((), array.dtype))


def all_to_all(x: Num[Array, "ep ..."], axis: str) -> Num[Array, "ep ..."]:
    """Block d goes to device d of the axis; block s of the result came from device s. Its own transpose."""
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


def all_to_all_listed(
    slots: Int[Array, "ep C k"], weights: Float[Array, "ep C k"], axis: str
) -> tuple[Int[Array, "ep C k"], Float[Array, "ep C k"]]:
    """`all_to_all` of both, as the words of one message."""
    return _all_to_all_listed(*_vary_over(axis, slots, weights), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _all_to_all_listed(slots: jax.Array, weights: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    words = jax.lax.bitcast_convert_type(weights, jnp.int32).reshape(*slots.shape[:2], -1)
    slots, words = jnp.split(all_to_all(jnp.concatenate([slots, words], -1), axis), [slots.shape[-1]], axis=-1)
    parts = words.reshape(weights.shape if words.shape == weights.shape else (*weights.shape, -1))
    return slots, jax.lax.bitcast_convert_type(parts, weights.dtype)


_all_to_all_listed.defvjp(
    lambda slots, weights, axis: (_all_to_all_listed(slots, weights, axis), None),
    lambda axis, _, cts: (None, all_to_all(cts[1], axis)),
)


def all_to_all_fp8(x: Float[Array, "ep C D"], axis: str) -> Float[Array, "ep C D"]:
    """`all_to_all` of numbers rounded to 8 bits (e4m3), one float32 scale for 128 channels; its transpose is exact.

    Source: the DeepSeek-V3 report, arXiv 2412.19437, 3.3.2 and 3.3.3.
    """
    return _all_to_all_fp8(*_vary_over(axis, x), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_to_all_fp8(x: jax.Array, axis: str) -> jax.Array:
    numbers, scales = quantise(x)
    # Travels as plain bytes, which every communication library knows.
    numbers = all_to_all(jax.lax.bitcast_convert_type(numbers, jnp.uint8), axis)
    return dequantise(jax.lax.bitcast_convert_type(numbers, FP8), all_to_all(scales, axis), x.dtype)


_all_to_all_fp8.defvjp(
    lambda x, axis: (_all_to_all_fp8(x, axis), None),
    lambda axis, _, ct: (all_to_all(ct, axis),),
)


def all_to_all_fp8_back(x: Float[Array, "ep C D"], axis: str) -> Float[Array, "ep C D"]:
    """`all_to_all` whose transpose travels in 8 bits: the combine of what `all_to_all_fp8` dispatched."""
    return _all_to_all_fp8_back(*_vary_over(axis, x), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_to_all_fp8_back(x: jax.Array, axis: str) -> jax.Array:
    return all_to_all(x, axis)


_all_to_all_fp8_back.defvjp(
    lambda x, axis: (all_to_all(x, axis), None),
    lambda axis, _, ct: (_all_to_all_fp8(ct, axis),),
)


def _vary_over(axis: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays varying over the same mesh axes, this one included."""
    return same_axes(*arrays, jax.lax.axis_index(axis))[:-1]


def quantise(x: Float[Array, "*rows D"]) -> tuple[Array, Float[Array, "*rows blocks"]]:
    """Numbers in e4m3 and float32 scales, one for 128 channels: the largest of them becomes 448.

    Raises:
      ValueError: a width that is not a multiple of 128.

    >>> numbers, scales = quantise(jnp.full((1, 128), 7.0))
    >>> float(numbers[0, 0]), scales.tolist()
    (448.0, [[0.015625]])
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"width {x.shape[-1]} is not a multiple of {BLOCK}, the channels that share a scale in FP8")
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, BLOCK)
    scales = jnp.abs(blocks).max(-1) / float(jnp.finfo(FP8).max)
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0, scales)  # too small to divide by
    numbers = jnp.where(scales[..., None] > 0, blocks / jnp.where(scales > 0, scales, 1)[..., None], 0)
    return numbers.astype(FP8).reshape(x.shape), scales


def dequantise(numbers: Array, scales: Float[Array, "*rows blocks"], dtype: jax.typing.DTypeLike) -> Array:
    """What `quantise` rounded, in another dtype."""
    blocks = numbers.astype(jnp.float32).reshape(*scales.shape, BLOCK)
    return (blocks * scales[..., None]).reshape(numbers.shape).astype(dtype)


def all_to_all_ragged(x: Float[Array, "ep C D"], counts: Int[Array, " ep"], axis: str) -> Float[Array, "ep C D"]:
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
