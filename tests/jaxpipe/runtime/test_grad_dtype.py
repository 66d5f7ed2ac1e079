"""The dtype that gradients are summed in, `grad_dtype`: against sums made one by one in that dtype."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxpipe
from jaxpipe.runtime.execute import _scaled

COUNT = 8


def make_step(name, ranks, dp=1, **options):
    """A chain of factors of 1: a microbatch's gradient is its number, over how many microbatches there are."""
    schedule = jaxpipe.schedule.build(name, ranks, COUNT)
    step = jaxpipe.value_and_grad(
        lambda w, x, ctx: x * w, schedule, jaxpipe.make_mesh(pp=ranks, dp=dp), data_axes=("dp",),
        embed=lambda outer, data, ctx: data * outer["in"],
        head=lambda outer, y, data, ctx: (y * outer["out"]).mean(), **options,
    )  # fmt: skip
    ones = jnp.ones(schedule.num_stages), {"in": jnp.float32(1), "out": jnp.float32(1)}
    return step, jaxpipe.Params(*ones)


def summed(numbers, dtype):
    total = dtype(0)
    for number in numbers:
        total = dtype(total + dtype(number))
    return total


@pytest.mark.parametrize(
    "name, ranks, dp, options",
    [
        ("1f1b", 1, 1, {}),
        pytest.param("1f1b", 2, 1, {"dispatch": "loops"}, marks=pytest.mark.slow),
        ("zb1p", 2, 2, {"dispatch": "stretches"}),
        ("dualpipe", 2, 1, {"order": "storage"}),
        ("zb1p", 2, 2, {"zero1_axis": "dp", "min_shard_size": 0}),
        ("1f1b", 2, 1, {"shared_ends": True}),
    ],
)
def test_sums_are_those_of_the_dtype(name, ranks, dp, options):
    """256 + 1 is 256 in bfloat16, and 257 in float32."""
    numbers = np.ones((dp, COUNT), np.float32)
    numbers[0, [0, COUNT // 2]] = 256, 512
    step, params = make_step(name, ranks, dp, grad_dtype=jnp.bfloat16, **options)
    (loss, _), grads = jax.jit(step)(params, jnp.asarray(numbers.reshape(-1)) * COUNT * dp)
    assert float(loss) == numbers.sum()
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    # Each direction of DualPipe has a copy of a stage, with sums of its own.
    halves = np.split(numbers, 2, axis=1) if name == "dualpipe" else [numbers]
    parts = [summed(row, ml_dtypes.bfloat16) for half in halves for row in half]
    expected = float(summed(parts, ml_dtypes.bfloat16))
    assert expected < numbers.sum()
    np.testing.assert_array_equal(grads.stages, expected)
    assert {float(leaf) for leaf in jax.tree.leaves(grads.outer)} == {expected}


def test_wider_sums_than_the_parameters(x64):
    """float64 sums of float32 parameters' gradients: what float32 would lose stays."""
    numbers = np.ones(COUNT, np.float32)
    numbers[0], numbers[-1] = 2**25, -(2.0**25)
    step, params = make_step("1f1b", 2, grad_dtype=jnp.float64)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    _, grads = jax.jit(step)(params, jnp.asarray(numbers) * COUNT)
    assert summed(numbers, np.float32) == 0
    np.testing.assert_array_equal(grads.stages, np.float32(COUNT - 2))


def test_complex_sums_stay_complex():
    mesh, schedule = jaxpipe.make_mesh(pp=2), jaxpipe.schedule.build("1f1b", 2, 2)
    params = jaxpipe.Params({"w": jnp.full((2, 3), 1 + 2j, jnp.complex64)})

    def stage(p, x, ctx):
        z = x.astype(jnp.complex64) * p["w"]
        return z.real * z.imag

    def gradient(dtype):
        step = jaxpipe.value_and_grad(stage, schedule, mesh, head=lambda o, y, d, c: y.sum(), grad_dtype=dtype)
        return jax.jit(step)(params, jnp.ones((4, 3)))[1].stages["w"]

    np.testing.assert_array_equal(gradient(jnp.float32), gradient(None))
    assert np.abs(gradient(None).imag).min() > 1


def test_a_scale_is_not_rounded_to_it():
    values = jnp.arange(128, 256, dtype=jnp.float32)
    scaled = _scaled(jnp.float32(1 / 12), values.astype(jnp.bfloat16))
    np.testing.assert_array_equal(scaled, (values * jnp.float32(1 / 12)).astype(jnp.bfloat16))


def test_plans_know_it():
    sizes = {}
    for dtype in (None, jnp.bfloat16):
        schedule = jaxpipe.schedule.build("1f1b", 2, 4)
        step = jaxpipe.value_and_grad(
            lambda w, x, ctx: jnp.tanh(x @ w), schedule, jaxpipe.make_mesh(pp=2), grad_dtype=dtype,
            head=lambda outer, y, data, ctx: (y**2).mean(),
        )  # fmt: skip
        params = jaxpipe.Params(jax.ShapeDtypeStruct((2, 64, 64), jnp.float32))
        batch = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        sizes[dtype] = jaxpipe.plan(step, params, batch, chip="h100").memory.gradients
    assert sizes == {None: 64 * 64 * 4, jnp.bfloat16: 64 * 64 * 2}


@pytest.mark.parametrize(
    "dtype, message",
    [
        (jnp.int32, r"grad_dtype=.*int32.*: give a floating dtype, such as jnp.bfloat16, or None"),
        ("bf16", "grad_dtype='bf16': give a floating dtype"),
        (jnp.float8_e4m3fn, "sums in 8 bits lose what is added to them; give jnp.bfloat16, jnp.float32 or None"),
        (jnp.float64, 'without 64-bit numbers JAX would sum in float32; call jax.config.update."jax_enable_x64"'),
    ],
)
def test_what_is_no_dtype_of_sums_is_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        make_step("1f1b", 2, grad_dtype=dtype)
