"""The grouped products by XLA's own ragged dot: every platform, every float type, no claim of speed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.grouped_gemm.layout import round_up, used_rows


def matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups k n"] | Float[Array, "groups n k"],
    group_sizes: Integer[Array, " groups"],
    transpose_rhs: bool = False,
) -> Float[Array, "rows n"]:
    """Each group of rows times its matrix; rows of no group get anything.

    Args:
      lhs: rows in the layout of `eplb_jax.kernels.grouped_gemm.layout`.
      rhs: a matrix for each group; [groups, n, k] with ``transpose_rhs``.
      group_sizes: rows of each group.
      transpose_rhs: whether to multiply by the transposed matrices.

    Returns:
      dtype of lhs, summed in float32 (float64 for float64).

    >>> matmul(jnp.ones((8, 2)), jnp.ones((1, 2, 3)), jnp.array([8])).shape
    (8, 3)
    """
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_rhs else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return _ragged_dot(lhs, rhs, group_sizes, numbers)


def outer(
    lhs: Float[Array, "rows k"], dout: Float[Array, "rows n"], group_sizes: Integer[Array, " groups"]
) -> Float[Array, "groups k n"]:
    """The product ``lhs[rows].T @ dout[rows]`` of each group's rows: the gradient of `matmul`'s matrices.

    Args:
      lhs, dout: rows in the layout of `eplb_jax.kernels.grouped_gemm.layout`; those of no group may hold anything,
        even NaN.
      group_sizes: rows of each group.

    Returns:
      dtype of lhs, summed in float32 (float64 for float64); zeros for an empty group.

    >>> outer(jnp.ones((8, 2)), jnp.ones((8, 3)), jnp.array([5, 0]))[:, 0, 0].tolist()
    [5.0, 0.0]
    """
    used = used_rows(group_sizes, lhs.shape[0])[:, None]
    lhs, dout = (jnp.where(used, x, jnp.zeros_like(x)) for x in (lhs, dout))
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return _ragged_dot(lhs, dout, group_sizes, numbers)


def _ragged_dot(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, numbers: jax.lax.RaggedDotDimensionNumbers):
    """XLA's product with each group's unused rows counted to the group, which keeps the starts right.

    JAX maps a ragged dot over all three operands or none; here each of a mapped one's products is made after the other.
    """

    @jax.custom_batching.sequential_vmap
    def product(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(lhs, rhs, sizes, numbers, preferred_element_type=wide(lhs.dtype))

    return product(lhs, rhs, round_up(group_sizes.astype(jnp.int32))).astype(lhs.dtype)
