"""Weight gradients that are products come in float32 where they are added to float32 sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import jaxpipe
from jaxpipe.stage import split_stage

WIDTH, ROWS = 16, 32
NARROW = jnp.bfloat16


def dense(params, x):
    """Products of weights as they are and of a layer's own copies, one within a row, a scale, and tied weights."""
    y = jnp.tanh(x @ params["w"]) + x @ params["rows"][0]
    y = y + x @ params["masters"].astype(x.dtype)
    return y * params["scale"] + jnp.sin(y @ params["tied"]) @ params["tied"]


def make(seed=0):
    keys = jax.random.split(jax.random.key(seed), 7)
    shapes = {"w": (WIDTH, WIDTH), "rows": (1, WIDTH, WIDTH), "masters": (WIDTH, WIDTH), "scale": (WIDTH,)}
    shapes["tied"] = (WIDTH, WIDTH)
    params = {name: jax.random.normal(key, shape) / 4 for key, (name, shape) in zip(keys, shapes.items(), strict=False)}
    params = {name: leaf if name == "masters" else leaf.astype(NARROW) for name, leaf in params.items()}
    x, ct = (jax.random.normal(key, (ROWS, WIDTH), NARROW) for key in keys[-2:])
    return params, x, ct


@pytest.mark.parametrize("halves", [False, True])
def test_products_are_not_rounded(halves):
    """Each is its operands' product, as float64 has it, to float32's rounding; rounded, it is the gradient of old."""
    params, x, ct = make()
    split = split_stage(dense, params, x)
    prepared = split.prepare(params)
    _, kept = split.forward(prepared, x)

    def gradients(**options):
        if not halves:
            found = split.backward(prepared, kept, ct, summands=True, **options)[0]
        else:
            _, crossing = split.backward_input(prepared, kept, ct)
            found = split.backward_weight(prepared, kept.weight, crossing, summands=True, **options)
        return split.gradients(prepared, found)

    narrow, wide = gradients(), gradients(wide_products=True)
    products = {"w", "rows", "masters"}
    assert {name for name, leaf in wide.items() if leaf.dtype == jnp.float32} == products
    assert {leaf.dtype for leaf in narrow.values()} == {jnp.dtype(NARROW)}
    for name, leaf in narrow.items():
        exact = wide[name].astype(NARROW) if name in products else wide[name]
        np.testing.assert_array_equal(leaf, exact)
    # What comes before the products is the same, so the three differ as little as their operands' order of sums.
    np.testing.assert_allclose(wide["rows"][0], wide["masters"], rtol=1e-5, atol=1e-5)
    y_ct = jax.vjp(lambda y: y * params["scale"] + jnp.sin(y @ params["tied"]) @ params["tied"], _y(params, x))[1](ct)
    expected = np.asarray(x, np.float64).T @ np.asarray(y_ct[0], np.float64)
    np.testing.assert_allclose(wide["masters"], expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(narrow["masters"], np.float64) - expected).max() > 1e-3


def test_a_product_that_is_the_gradient_of_two_is_one():
    """Where x and a parameter are added and multiplied, both have the same gradient, x's in its own dtype."""
    params = {"w": jnp.ones((WIDTH, WIDTH), NARROW), "shift": jnp.zeros((ROWS, WIDTH), NARROW)}
    x = jnp.ones((ROWS, WIDTH), NARROW)
    split = split_stage(lambda params, x: (x + params["shift"]) @ params["w"], params, x)
    prepared = split.prepare(params)
    y, kept = split.forward(prepared, x)
    found, dx = split.backward(prepared, kept, y, summands=True, wide_products=True)
    grads = split.gradients(prepared, found)
    assert grads["w"].dtype == jnp.float32 and grads["shift"].dtype == dx.dtype == NARROW
    np.testing.assert_array_equal(grads["shift"], dx)


def _y(params, x):
    y = jnp.tanh(x @ params["w"]) + x @ params["rows"][0]
    return y + x @ params["masters"].astype(x.dtype)


@pytest.mark.parametrize("grad_dtype, count", [(None, 3), (jnp.bfloat16, 0)])
def test_on_gpus_the_executor_asks_for_them(grad_dtype, count):
    """As many products in float32 as there are weights."""
    step = jaxpipe.value_and_grad(
        dense_of_stage, jaxpipe.schedule.build("1f1b", 1, 1), AbstractMesh((1,), ("pp",), axis_types=(AxisType.Auto,)),
        head=lambda outer, y, data, ctx: y.astype(jnp.float32).sum(), compute_dtype=NARROW, grad_dtype=grad_dtype,
    )  # fmt: skip
    params = jaxpipe.Params([jax.ShapeDtypeStruct((1, WIDTH, WIDTH), jnp.float32)] * 3)
    batch = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    text = jax.jit(step).trace(params, batch).lower(lowering_platforms=("cuda",)).as_text()
    narrow = rf"tensor<{ROWS}x{WIDTH}xbf16>"
    found = re.findall(rf"dot_general .* : \({narrow}, {narrow}\) -> tensor<\S+xf32>", text)
    assert len(found) == count


def dense_of_stage(params, x, ctx):
    for weight in params:
        x = jnp.tanh(x @ weight)
    return x
