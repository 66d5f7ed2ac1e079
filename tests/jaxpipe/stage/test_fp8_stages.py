"""Stages in FP8: the division of their backward, what they keep in 8 bits, and what is quantised once a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax.kernels.fp8_linear import scaled_feed_forward, scaled_linear
from jaxpipe.stage import split_stage
from jaxpipe.stage.flops import matmul_flops
from tests.cases import cases

ROWS, WIDTH, HIDDEN = 256, 256, 640
"""Sides of two blocks or more: a product over one block is a loop of one turn, which is opened; its part of the matrix,
all of it, is then made once besides."""


def linear(params, x):
    """576 columns are padded to 640, and with them the rows that the next Linear reads."""
    return scaled_linear(scaled_linear(x, params["a"]), params["b"])


def swiglu(params, x):
    return scaled_feed_forward(x, params["in"], params["out"])


SHAPES = {"a": (WIDTH, 576), "b": (576, WIDTH), "in": (WIDTH, 2 * HIDDEN), "out": (HIDDEN, WIDTH)}
USED = {linear: ("a", "b"), swiglu: ("in", "out")}


@cases(
    ("stage", "dtype", "remat"),
    [
        (linear, "bfloat16", False),
        (linear, "float32", True),
        pytest.param(swiglu, "float32", False, marks=pytest.mark.slow),
        (swiglu, "bfloat16", True),
    ],
    quick=[(linear, "bfloat16", False), (swiglu, "bfloat16", True)],
)
def test_halves_and_what_they_keep(stage, dtype, remat):
    params = {
        name: (jax.random.normal(jax.random.key(i), SHAPES[name]) * 0.1).astype(dtype)
        for i, name in enumerate(USED[stage])
    }
    x = jax.random.normal(jax.random.key(9), (ROWS, WIDTH), jnp.bfloat16)
    function = jax.checkpoint(stage) if remat else stage
    split = split_stage(function, params, x)
    prepared = split.prepare(params)
    y, kept = split.forward(prepared, x)
    x_ct, crossing = split.backward_input(prepared, kept, y)
    grads = split.backward_weight(prepared, kept.weight, crossing)

    out, pull = jax.vjp(stage, params, x)
    np.testing.assert_array_equal(y, out)
    expected, x_expected = pull(y)
    jax.tree.map(np.testing.assert_array_equal, (grads, x_ct), (expected, x_expected))

    forward = matmul_flops(split.forward, prepared, x)
    first = matmul_flops(split.backward_input, prepared, kept, y)
    second = matmul_flops(split.backward_weight, prepared, kept.weight, crossing)
    most = 2 if remat else 1  # forward products that are run again are in either half, where it needs their results
    assert forward <= first <= most * forward and forward <= second <= most * forward

    # Matrices only in 8 bits, both layouts, each once; nothing wider than their scales beside them.
    matrices = [leaf for leaf in prepared if leaf.dtype == jnp.float8_e4m3fn]
    assert len(matrices) == 4 and all(leaf.size <= 64 for leaf in prepared if leaf.dtype != jnp.float8_e4m3fn)
    if not remat:
        assert {leaf.dtype.name for leaf in kept.weight if leaf.ndim and leaf.shape[0] == ROWS} == {"float8_e4m3fn"}
        assert all(leaf.dtype in (jnp.float8_e4m3fn, jnp.float32) for leaf in (*kept.input, *crossing))


def test_rows_of_a_value_that_is_kept_anyway_are_made_again():
    """As those of attention's result, which its own backward reads."""

    def stage(w, x):
        mixed = x @ w["mix"]
        return scaled_linear(mixed, w["out"]) + jnp.tanh(mixed)

    w = {name: jnp.ones((128, 128), jnp.bfloat16) for name in ("mix", "out")}
    split = split_stage(stage, w, jnp.ones((ROWS, 128), jnp.bfloat16))
    kept = [leaf for leaf in (*split.residuals.input, *split.residuals.weight) if leaf.shape == (ROWS, 128)]
    assert [leaf.dtype.name for leaf in kept] == ["bfloat16"] * 2  # x and mixed
