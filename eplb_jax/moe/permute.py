"""Moves rows within a device by index: tokens to the rows of their experts, and back. Each move has its own transpose.

N tokens, R rows, D width. Two arrays describe a move, each the inverse of the other, so that neither it nor its
gradient scatters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from eplb_jax.kernels import registry
from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.kernels.registry import Backend, ChosenBackend
from eplb_jax.kernels.scaled import ScaledRows

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


def permute_scaled(rows: ScaledRows, moves: RowMap, *, backend: Backend = "auto") -> ScaledRows:
    """`permute` of rows in 8 bits with their scales: zeros in rows that hold none. It has no derivative.

    Args:
      rows: N of them.
      moves, backend: as there.

    >>> rows = ScaledRows(jnp.ones((2, 128), jnp.float8_e4m3fn), jnp.array([[1.0, 5.0]]))
    >>> permute_scaled(rows, RowMap(jnp.array([1, 2, 0]), jnp.array([[2], [0]]))).scales.tolist()
    [[5.0, 0.0, 1.0]]
    """
    numbers, scales, *indices = same_axes(*rows, *moves)
    moves = RowMap(*indices)
    # Bytes are copied as any others: the kernel takes the shapes that it takes of 16-bit rows.
    chosen = _choose(jax.ShapeDtypeStruct(numbers.shape, jnp.bfloat16), moves, backend)
    numbers = _dispatch(chosen, "copy_rows", copy_rows_by_xla, numbers, *moves)

    def move_scales(scales: jax.Array, source: jax.Array) -> jax.Array:
        return checkpoint_name(_take_or_zero(scales.T, source).T, RECOMPUTE)

    return ScaledRows(numbers, jax.jit(move_scales)(scales, moves.source))


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


def _choose(array: jax.Array | jax.ShapeDtypeStruct, moves: RowMap, backend: str) -> ChosenBackend:
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
