"""Weight gradients as equations that say how they are added to a sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from eplb_jax import grouped_matmul
from eplb_jax.kernels import registry
from eplb_jax.kernels.accumulable import OuterProduct
from eplb_jax.kernels.backend import HOPPER_SMS, Target
from eplb_jax.kernels.fp8_gemm import xla as fp8_xla
from eplb_jax.kernels.grouped_gemm import xla
from eplb_jax.kernels.scaled import quantise_columns

ROWS, K, N = 384, 128, 256
SIZES = np.array([100, 0, 130], np.int32)
SPANS = [slice(0, 100), slice(104, 104), slice(104, 234)], [slice(0, 100), slice(128, 128), slice(128, 258)]


def made(name):
    """(the product, its operands, the gradients in float64, the bound of its result's rounding)."""
    rng = np.random.default_rng(0)
    lhs, dout = (rng.standard_normal((ROWS, side)).astype(np.float32) for side in (K, N))
    if name == "outer":
        lhs, dout = (jnp.asarray(x, jnp.bfloat16) for x in (lhs, dout))
        want = [np.asarray(lhs, np.float64)[s].T @ np.asarray(dout, np.float64)[s] for s in SPANS[0]]
        product = OuterProduct(registry.XLA, "outer", xla.outer)
        return product, (lhs, dout, jnp.asarray(SIZES)), np.stack(want), 2**-8
    used = np.concatenate([np.arange(s.start, s.stop) for s in SPANS[1]])
    for x in (lhs, dout):
        x[np.setdiff1d(np.arange(ROWS), used)] = 0
    want = [lhs[s].astype(np.float64).T @ dout[s] for s in SPANS[1]]
    product = OuterProduct(registry.XLA, "scaled_outer", fp8_xla.outer, jnp.dtype(jnp.float32))
    columns = *quantise_columns(jnp.asarray(lhs)), *quantise_columns(jnp.asarray(dout))
    return product, (*columns, jnp.asarray(SIZES)), np.stack(want), 0.05  # of numbers with three bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["outer", "scaled_outer"])
def test_a_sum_is_total_and_product(name, dtype):
    """Bit for bit, by XLA on CPUs, and close to the plain loop's; what does not count changes nothing, were it NaN."""
    product, operands, want, bound = made(name)
    alone = jax.jit(product)(*operands)
    assert np.abs(np.asarray(alone, np.float64) - want).max() < bound * np.abs(want).max()
    total = jnp.asarray(np.random.default_rng(1).standard_normal(want.shape), dtype)
    like = jax.ShapeDtypeStruct(total.shape, total.dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def accumulate(first, counts, *operands):
        return product.accumulate(like if first else total, counts, *operands)

    for first, counts in ((False, None), (True, None), (False, jnp.array(True))):
        found, expected = accumulate(first, counts, *operands), (0 if first else total) + alone.astype(dtype)
        if jax.default_backend() == "cpu":
            np.testing.assert_array_equal(found, expected)
        else:  # where XLA may leave out that the product is rounded before
            np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, expected)), rtol=2**-6, atol=2**-6)
    broken = [jnp.full_like(x, jnp.nan) if x.dtype in (jnp.bfloat16, jnp.float32) else x for x in operands]
    np.testing.assert_array_equal(accumulate(False, jnp.array(False), *broken), total)
    assert not np.asarray(accumulate(True, jnp.array(False), *broken)).any()


def test_it_is_differentiated_and_mapped_as_what_it_makes(x64):
    """A gradient's gradient, forward over reverse, is that of the plain loop; mapped products are each their own."""
    rng = np.random.default_rng(0)
    x, w, seed = (jnp.asarray(rng.standard_normal(shape)) for shape in ((16, 3), (2, 3, 5), (16, 5)))
    sizes = np.array([5, 8], np.int32)
    used = jnp.asarray([True] * 5 + [False] * 3 + [True] * 8)[:, None]

    def loss(function, x, w):
        return (jnp.where(used, jnp.sin(function(x, w)), 0) * seed).sum()

    def plain(x, w):
        return jnp.concatenate([x[:8] @ w[0], x[8:] @ w[1]])

    def curvature(function):
        gradient = jax.grad(functools.partial(loss, function), (0, 1))
        masked = lambda x, w: [jnp.where(used, gradient(x, w)[0], 0), gradient(x, w)[1]]  # noqa: E731
        return jax.jvp(masked, (x, w), (x + 1, w - 1))

    got, want = curvature(lambda x, w: grouped_matmul(x, w, sizes)), curvature(plain)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    product = OuterProduct(registry.XLA, "outer", xla.outer)
    both = jax.vmap(product, in_axes=(0, None, None))(jnp.stack([x, 2 * x]), seed, jnp.asarray(sizes))
    np.testing.assert_allclose(both[1], 2 * both[0], rtol=1e-12)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["mosaic", "auto"])
def test_a_kernel_writes_over_its_total(monkeypatch, kind, first):
    """Lowered for a GPU within shard_map, with its check of varying values; a first sum is a kernel's, too."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA H200", HOPPER_SMS, True))
    shape = jax.ShapeDtypeStruct
    lhs, rhs = shape((128, K), jnp.bfloat16), shape((2, K, N), jnp.bfloat16)
    product = OuterProduct(registry.choose("grouped_matmul", kind, lhs, rhs), "outer", xla.outer)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def body(total, *operands):
        return product.accumulate(shape(total.shape, total.dtype) if first else total, None, *operands)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    arguments = shape((4, K, N), jnp.float32), shape((256, K), jnp.bfloat16), shape((256, N), jnp.bfloat16)
    traced = jax.jit(mapped).trace(*arguments, shape((4,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1 and text.count("output_operand_alias<") == (not first)
