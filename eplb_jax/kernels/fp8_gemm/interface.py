"""The products of scaled 8-bit numbers behind four functions: checks, and the choice of the backend.

They have no derivatives: a gradient's operands are quantised anew, which is for the layer to say.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from eplb_jax.kernels import registry
from eplb_jax.kernels.accumulable import OuterProduct
from eplb_jax.kernels.fp8_gemm import xla
from eplb_jax.kernels.grouped_gemm import interface
from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN
from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.kernels.registry import Backend
from eplb_jax.kernels.scaled import BLOCK, E4M3, ScaledMatrices, ScaledRows

RESULTS = ("bfloat16", "float32")


def scaled_matmul(
    lhs: ScaledRows,
    rhs: ScaledMatrices,
    group_sizes: Integer[Array | np.ndarray, " groups"],
    *,
    backend: Backend = "auto",
    dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "rows N"]:
    """Multiplies each group of rows by the matrix of its group, transposed: a forward pass or an input gradient.

    Group g has rows ``[start, start + group_sizes[g])`` with ``start = group_starts(group_sizes, FP8_ALIGN)[g]``, a
    multiple of 128. Rows of no group may hold anything and reach no other result; their own are unspecified. The sum
    of each 128 products is scaled and added to the others' in float32.

    Args:
      lhs: numbers [rows, K] and scales [K / 128, rows]; rows, and K, are multiples of 128.
      rhs: numbers [groups, N, K] and scales [groups, N / 128, K / 128]; N is a multiple of 128.
      group_sizes: rows of each group, of any integer dtype; zero is fine. Rounded up to 128 they fit the rows.
      backend: as for `eplb_jax.grouped_matmul`.
      dtype: of the result, bfloat16 or float32.

    Raises:
      ValueError: shapes, dtypes or NumPy sizes that do not fit; "mosaic" for what it cannot do.

    Source: the DeepSeek-V3 report, arXiv 2412.19437, 3.3.2.

    >>> from eplb_jax.kernels.scaled import quantise_matrices, quantise_rows
    >>> rows, matrices = quantise_rows(jnp.ones((256, 128))), quantise_matrices(jnp.ones((2, 128, 128)))
    >>> scaled_matmul(rows, matrices, jnp.array([3, 2]))[jnp.array([0, 129]), 0].tolist()
    [128.0, 128.0]
    """
    check_matmul(lhs, rhs, dtype)
    rows = lhs.numbers.shape[0]
    if rows % FP8_ALIGN:
        raise ValueError(f"lhs has {rows} rows: groups of rows start at multiples of {FP8_ALIGN} in FP8; pad lhs")
    check_sizes(group_sizes, rhs.numbers.shape[0], rows, "rhs")
    return _matmul(lhs, rhs, group_sizes, backend, dtype)


def scaled_outer(
    lhs: ScaledRows,
    dout: ScaledRows,
    group_sizes: Integer[Array | np.ndarray, " groups"],
    *,
    backend: Backend = "auto",
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "groups K N"]:
    """The product ``lhs[:, rows] @ dout[:, rows].T`` of each group's rows: the gradient of the matrices.

    Both operands are transposed and scaled along the rows, and are zeros where a block of 128 rows has rows of no
    group; blocks of no group may hold anything. Sums are made as in `scaled_matmul`.

    Args:
      lhs: numbers [K, rows] and scales [rows / 128, K]; K is a multiple of 128, rows too.
      dout: numbers [N, rows] and scales [rows / 128, N]; N is a multiple of 128.
      group_sizes: rows of each group, as for `scaled_matmul`.
      backend: as for `eplb_jax.grouped_matmul`.
      dtype: of the result, bfloat16 or float32.

    Returns:
      Zeros for a group without rows.

    Raises:
      ValueError: shapes, dtypes or NumPy sizes that do not fit; "mosaic" for what it cannot do.

    >>> from eplb_jax.kernels.scaled import quantise_columns
    >>> columns = quantise_columns(jnp.ones((256, 128)).at[130:].set(0))
    >>> scaled_outer(columns, columns, jnp.array([128, 0, 2]))[:, 0, 0].tolist()
    [128.0, 0.0, 2.0]
    """
    check_outer(lhs, dout, dtype)
    check_sizes(group_sizes, group_sizes.shape[0] if group_sizes.ndim == 1 else 0, lhs.numbers.shape[1], "the result")
    return _outer(lhs, dout, group_sizes, backend, dtype)


def scaled_dot(
    lhs: ScaledRows, rhs: ScaledMatrices, *, backend: Backend = "auto", dtype: DTypeLike = jnp.bfloat16
) -> Float[Array, "rows N"]:
    """Multiplies all rows by one matrix, transposed.

    Args:
      lhs: numbers [rows, K] and scales [K / 128, rows], any number of rows; K is a multiple of 128.
      rhs: numbers [1, N, K] and scales [1, N / 128, K / 128]; N is a multiple of 128.
      backend: as for `eplb_jax.grouped_matmul`.
      dtype: of the result, bfloat16 or float32.

    Raises:
      ValueError: shapes or dtypes that do not fit; "mosaic" for what it cannot do.

    >>> from eplb_jax.kernels.scaled import quantise_matrices, quantise_rows
    >>> scaled_dot(quantise_rows(jnp.ones((3, 128))), quantise_matrices(jnp.ones((1, 128, 128)))).shape
    (3, 128)
    """
    check_matmul(lhs, rhs, dtype)
    if rhs.numbers.shape[0] != 1:
        raise ValueError(
            f"rhs has {rhs.numbers.shape[0]} matrices: a dense product has one; scaled_matmul multiplies groups"
        )
    return _matmul(lhs, rhs, np.array([lhs.numbers.shape[0]]), backend, dtype)


def scaled_dot_outer(
    lhs: ScaledRows, dout: ScaledRows, *, backend: Backend = "auto", dtype: DTypeLike = jnp.float32
) -> Float[Array, "K N"]:
    """The product ``lhs @ dout.T`` over all rows: the gradient of `scaled_dot`'s matrix.

    Args:
      lhs: numbers [K, rows] and scales [rows / 128, K]; K is a multiple of 128, rows too.
      dout: numbers [N, rows] and scales [rows / 128, N]; N is a multiple of 128.
      backend: as for `eplb_jax.grouped_matmul`.
      dtype: of the result, bfloat16 or float32.

    Raises:
      ValueError: shapes or dtypes that do not fit; "mosaic" for what it cannot do.

    >>> from eplb_jax.kernels.scaled import quantise_columns
    >>> columns = quantise_columns(jnp.ones((256, 128)))
    >>> float(scaled_dot_outer(columns, columns)[0, 0])
    256.0
    """
    check_outer(lhs, dout, dtype)
    # A reshape and no row of it: what is nothing but a product can be added to a sum in its place.
    found = _outer(lhs, dout, np.array([lhs.numbers.shape[1]]), backend, dtype)
    return found.reshape(found.shape[1:])


def check_matmul(lhs: ScaledRows, rhs: ScaledMatrices, dtype: DTypeLike) -> None:
    """Raises ValueError unless operands of `scaled_matmul` and of `scaled_dot` fit each other and their scales."""
    _check_rows("lhs", lhs, "K")
    if len(rhs.numbers.shape) != 3:
        raise ValueError(f"rhs has numbers {rhs.numbers.shape}: they must be [groups, N, K]")
    groups, columns, depth = rhs.numbers.shape
    if columns % BLOCK or depth % BLOCK:
        raise ValueError(f"rhs has matrices of {columns} x {depth}: both sides must be multiples of {BLOCK} in FP8")
    if lhs.numbers.shape[1] != depth:
        hint = "; rhs.transposed() would fit" if lhs.numbers.shape[1] == columns else ""
        raise ValueError(
            f"lhs {lhs.numbers.shape} does not fit rhs {rhs.numbers.shape}: the contraction is last in both{hint}"
        )
    _check_scales("rhs", rhs, (groups, columns // BLOCK, depth // BLOCK), "[groups, N / 128, K / 128]")
    _check_dtype(dtype)


def check_outer(lhs: ScaledRows, dout: ScaledRows, dtype: DTypeLike) -> None:
    """Raises ValueError unless operands of `scaled_outer` fit each other and their scales."""
    for name, operand in (("lhs", lhs), ("dout", dout)):
        _check_rows(name, operand, "rows")
        if operand.numbers.shape[0] % BLOCK:
            raise ValueError(
                f"{name} has numbers {operand.numbers.shape}: the first side must be a multiple of {BLOCK}, too"
            )
    if lhs.numbers.shape[1] != dout.numbers.shape[1]:
        raise ValueError(
            f"lhs {lhs.numbers.shape} does not fit dout {dout.numbers.shape}: both have the rows last; quantise "
            "them with eplb_jax.kernels.scaled.quantise_columns"
        )
    _check_dtype(dtype)


def check_sizes(group_sizes: Any, groups: int, rows: int, whose: str) -> None:
    """Raises ValueError unless there is an integer size for each group, and NumPy's fit the rows."""
    if len(group_sizes.shape) != 1:
        raise ValueError(f"group_sizes has shape {group_sizes.shape}: it must be [groups]")
    if group_sizes.shape[0] != groups:
        raise ValueError(f"{whose} has {groups} matrices for {group_sizes.shape[0]} group sizes: each group has one")
    interface.check_sizes(group_sizes, rows, FP8_ALIGN)


def _check_rows(name: str, rows: ScaledRows, last: str) -> None:
    """Raises ValueError unless these are numbers of e4m3 with their scales."""
    if len(rows.numbers.shape) != 2:
        raise ValueError(
            f"{name} has numbers {rows.numbers.shape}: they must have two axes; flatten batch and sequence into rows"
        )
    first, depth = rows.numbers.shape
    if depth % BLOCK:
        raise ValueError(
            f"{name} has numbers {rows.numbers.shape}: {last}, the contraction, must be a multiple of {BLOCK} in FP8; "
            "pad it"
        )
    _check_scales(
        name, rows, (depth // BLOCK, first), f"one for {BLOCK} of {last}, those of neighbouring rows together"
    )


def _check_scales(name: str, operand: ScaledRows | ScaledMatrices, shape: tuple[int, ...], meaning: str) -> None:
    if operand.numbers.dtype != E4M3:
        raise ValueError(
            f"{name} has numbers of dtype {operand.numbers.dtype}: they must be float8_e4m3fn; quantise them with "
            "eplb_jax.kernels.scaled"
        )
    if operand.scales.shape != shape or operand.scales.dtype != jnp.float32:
        raise ValueError(
            f"{name} has scales {operand.scales.dtype}{list(operand.scales.shape)} for numbers "
            f"{operand.numbers.shape}: they must be float32{list(shape)}, {meaning}"
        )


def _check_dtype(dtype: DTypeLike) -> None:
    if jnp.dtype(dtype).name not in RESULTS:
        raise ValueError(f"dtype={jnp.dtype(dtype).name}: results are {' or '.join(RESULTS)}; cast them afterwards")


def _matmul(lhs: ScaledRows, rhs: ScaledMatrices, group_sizes: Any, backend: str, dtype: DTypeLike) -> jax.Array:
    chosen = registry.choose("scaled_matmul", backend, lhs.numbers, rhs.numbers)
    operands = same_axes(*map(jnp.asarray, (*lhs, *rhs)), jnp.asarray(group_sizes, jnp.int32))
    return registry.dispatch(chosen, "scaled_matmul", xla.matmul, *operands, dtype=jnp.dtype(dtype))


def _outer(lhs: ScaledRows, dout: ScaledRows, group_sizes: Any, backend: str, dtype: DTypeLike) -> jax.Array:
    chosen = registry.choose("scaled_outer", backend, lhs.numbers, dout.numbers)
    operands = same_axes(*map(jnp.asarray, (*lhs, *dout)), jnp.asarray(group_sizes, jnp.int32))
    return OuterProduct(chosen, "scaled_outer", xla.outer, jnp.dtype(dtype))(*operands)
