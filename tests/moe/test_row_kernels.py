"""The Triton kernel sums the rows that XLA sums: interpreted here, compiled where there is an NVIDIA GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import row_kernels
from eplb_jax.exchange import Moves, gather_sum, spread, sum_rows_by_xla

SHAPES = [(40, 256, 17, 8), (5, 384, 9, 1), (8, 128, 1, 3)]


def operands(rows, width, count, choices, dtype):
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.normal(size=(rows, width)), dtype), jnp.asarray(
        rng.integers(0, rows + 1, (count, choices)), jnp.int32
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted_kernel_equals_xla(shape, dtype):
    array, index = operands(*shape, dtype)
    assert row_kernels.fits(array)
    found = row_kernels.sum_rows(array, index, interpret=True)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, sum_rows_by_xla(array, index))


@pytest.mark.parametrize("shape", [*SHAPES, (1000, 7168, 300, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compiled_kernel_equals_xla(shape, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip(f"an NVIDIA GPU is needed, the default backend is {jax.default_backend()}")
    array, index = operands(*shape, dtype)
    found = jax.jit(row_kernels.sum_rows)(array, index)
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]  # the order of sums may differ
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, sum_rows_by_xla(array, index))),
                               rtol=tolerance, atol=tolerance)  # fmt: skip


def test_values_that_no_row_names_do_not_matter():
    array = jnp.full((4, 128), jnp.nan).at[1].set(2.0)
    moves = Moves(jnp.array([1, 4], jnp.int32), jnp.array([[2], [2], [2], [2]], jnp.int32))
    assert spread(array, moves).tolist() == [[2.0] * 128, [0.0] * 128]
    moves = Moves(jnp.zeros(4, jnp.int32), jnp.array([[1, 4]], jnp.int32))
    assert gather_sum(array, moves).tolist() == [[2.0] * 128]


def test_what_does_not_fit():
    for shape, dtype in [((4, 96), "float32"), ((4, 128), "int32"), ((4, 2, 128), "float32")]:
        assert not row_kernels.fits(jnp.zeros(shape, dtype))
