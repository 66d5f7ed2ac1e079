"""The grouped product behind one function: checks, choice of the backend, gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from eplb_jax.kernels import registry
from eplb_jax.kernels.accumulable import OuterProduct
from eplb_jax.kernels.grouped_gemm import xla
from eplb_jax.kernels.grouped_gemm.layout import ALIGN, round_up
from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.kernels.registry import Backend, ChosenBackend

FLOATS = ("bfloat16", "float16", "float32", "float64")


def grouped_matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups k n"] | Float[Array, "groups n k"],
    group_sizes: Integer[Array | np.ndarray, " groups"],
    *,
    backend: Backend = "auto",
    transpose_rhs: bool = False,
) -> Float[Array, "rows n"]:
    """Multiplies each group of rows by the matrix of its group.

    Group g has rows ``[start, start + group_sizes[g])`` with ``start = group_starts(group_sizes)[g]``, a multiple of
    `ALIGN`. Rows of no group, between groups or after the last, may hold anything: they reach no result and no
    gradient, but their own results, and their own rows of the gradient of lhs, are unspecified. `jax.vmap` over any of
    the arguments makes one product after the other.

    Args:
      lhs: the rows; bfloat16, float16, float32 or float64.
      rhs: a matrix for each group, of the same dtype; [groups, n, k] with ``transpose_rhs``.
      group_sizes: rows of each group, of any integer dtype; zero is fine. Rounded up to `ALIGN` they fit the rows.
      backend: "xla" runs everywhere. "mosaic" is for bfloat16 and float16 on Hopper GPUs. "auto" takes "mosaic" where
        it can, and a program that is lowered for another platform gets "xla". The device is that of the mesh in
        scope, otherwise the default device; so to compile ahead for another machine's GPU, set a mesh of it.
      transpose_rhs: multiplies by the transposed matrices, without making them.

    Returns:
      dtype of lhs, summed in float32 (float64 for float64).

    Raises:
      ValueError: shapes, dtypes or NumPy sizes that do not fit; "mosaic" for what it cannot do.

    Source: the expert layers of MegaBlocks, arXiv 2211.15841; the layout is that of ``torch._grouped_mm``.

    >>> rows = jnp.arange(16.0)[:, None]
    >>> grouped_matmul(rows, jnp.array([[[1.0]], [[10.0]]]), jnp.array([3, 2]))[jnp.array([0, 1, 2, 8, 9]), 0].tolist()
    [0.0, 1.0, 2.0, 80.0, 90.0]
    """
    check(lhs, rhs, group_sizes, transpose_rhs)
    chosen = choose(lhs, rhs, backend)
    lhs, rhs, group_sizes = same_axes(jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(group_sizes, jnp.int32))
    return _grouped_matmul(lhs, rhs, group_sizes, chosen, transpose_rhs)


def check(lhs: Any, rhs: Any, group_sizes: Any, transpose_rhs: bool) -> None:
    """Raises ValueError unless shapes and dtypes fit each other, and the sizes the rows where they are NumPy's."""
    if len(lhs.shape) != 2 or len(rhs.shape) != 3 or len(group_sizes.shape) != 1:
        raise ValueError(
            f"lhs, rhs and group_sizes have shapes {lhs.shape}, {rhs.shape} and {group_sizes.shape}: "
            "they must be [rows, k], [groups, k, n] and [groups]; flatten batch and sequence into rows"
        )
    if rhs.shape[0] != group_sizes.shape[0]:
        raise ValueError(f"rhs has {rhs.shape[0]} matrices for {group_sizes.shape[0]} group sizes: each group has one")
    if lhs.shape[1] != rhs.shape[2 if transpose_rhs else 1]:
        other = rhs.shape[1 if transpose_rhs else 2]
        hint = f"; transpose_rhs={not transpose_rhs} would fit" if lhs.shape[1] == other else ""
        raise ValueError(f"lhs {lhs.shape} does not fit rhs {rhs.shape} with transpose_rhs={transpose_rhs}{hint}")
    if lhs.dtype != rhs.dtype or lhs.dtype not in FLOATS:
        raise ValueError(
            f"lhs has dtype {lhs.dtype} and rhs {rhs.dtype}: they must be the same of {', '.join(FLOATS)}; cast one"
        )
    check_sizes(group_sizes, lhs.shape[0])


def check_sizes(group_sizes: Any, rows: int, align: int = ALIGN) -> None:
    """Raises ValueError unless the sizes of groups are integers, and fit the rows of lhs where they are NumPy's."""
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes has dtype {group_sizes.dtype}: it must hold numbers of rows; cast it to int32")
    if isinstance(group_sizes, np.ndarray):
        needed = int(round_up(group_sizes.astype(np.int64), align).sum())
        if (group_sizes < 0).any() or needed > rows:
            raise ValueError(
                f"group_sizes {group_sizes.tolist()} need {needed} rows when each is rounded up to {align}, and lhs "
                f"has {rows}: sizes are at least zero and fit the rows; pad lhs"
            )


def choose(lhs: Any, rhs: Any, backend: str) -> ChosenBackend:
    """Who makes the products of arguments that `check` accepts."""
    return registry.choose("grouped_matmul", backend, lhs, rhs)


def _matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, chosen: ChosenBackend, transpose_rhs: bool
) -> jax.Array:
    """The product on the chosen backend."""
    return registry.dispatch(chosen, "matmul", xla.matmul, lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)


def outer(lhs: jax.Array, dout: jax.Array, group_sizes: jax.Array, chosen: ChosenBackend) -> jax.Array:
    """The gradient of the right-hand side on the chosen backend."""
    return OuterProduct(chosen, "outer", xla.outer)(lhs, dout, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(lhs: Any, rhs: Any, group_sizes: Any, chosen: ChosenBackend, transpose_rhs: bool) -> Any:
    return _matmul(lhs, rhs, group_sizes, chosen, transpose_rhs)


def _forward(lhs: Any, rhs: Any, group_sizes: Any, chosen: ChosenBackend, transpose_rhs: bool) -> Any:
    return _matmul(lhs, rhs, group_sizes, chosen, transpose_rhs), (lhs, rhs, group_sizes)


def _backward(chosen: ChosenBackend, transpose_rhs: bool, residuals: Any, dout: Any) -> Any:
    """Two products that share nothing, so that a pipeline can make the weights' gradient later."""
    lhs, rhs, group_sizes = residuals
    dlhs = _matmul(dout, rhs, group_sizes, chosen, not transpose_rhs)
    pair = (dout, lhs) if transpose_rhs else (lhs, dout)
    return dlhs, outer(*pair, group_sizes, chosen), None


_grouped_matmul.defvjp(_forward, _backward)
