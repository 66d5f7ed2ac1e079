"""Parameters become numbers of 8 bits once a step, although wider ones are made on the way; others stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.stage import split_stage
from tests.plain import assert_trees_close

WIDTH, LAYERS = 16, 3
E4M3 = jnp.dtype(jnp.float8_e4m3fn)


@jax.custom_vjp
def linear(x, w):
    return scaled(x, *quantised(w))


def quantised(w):
    """Rounded with one scale for a row: wider numbers, constants and a bitcast in between."""
    wide = w.astype(jnp.float32)
    largest = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(jnp.abs(wide), jnp.int32).max(1), jnp.float32)
    scale = jnp.where(largest > 0, largest / 448, jnp.full(largest.shape, 1.0, jnp.float32))
    return (wide / scale[:, None]).astype(E4M3), scale


def scaled(x, numbers, scale):
    return ((x.astype(jnp.float32) * scale) @ numbers.astype(jnp.float32)).astype(x.dtype)


def linear_bwd(residuals, ct):
    x, w, (numbers, scale) = residuals
    dx = (ct.astype(jnp.float32) @ numbers.astype(jnp.float32).T * scale).astype(x.dtype)
    return dx, (x.T @ ct).astype(w.dtype)


def linear_fwd(x, w):
    eight = quantised(w)
    return scaled(x, *eight), (x, w, eight)


linear.defvjp(linear_fwd, linear_bwd)


def in_a_loop(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(linear(x, w)), None), x, params)[0]


def in_a_branch(params, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x, w: jnp.tanh(linear(x, w)), lambda x, w: x @ w, x, params)


@pytest.mark.parametrize("stage, shape", [
    pytest.param(lambda params, x: jnp.tanh(linear(x, params)), (WIDTH, WIDTH), marks=pytest.mark.slow),
    (in_a_loop, (LAYERS, WIDTH, WIDTH)),
    (in_a_branch, (WIDTH, WIDTH)),
], ids=["plain", "loop", "branch"])  # fmt: skip
def test_once_a_step(stage, shape):
    """The forward reads 8 bits and makes none; the wide numbers are neither handed to it nor made in it."""
    params = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (4, WIDTH))).astype(jnp.bfloat16)
    split = split_stage(stage, params, x)
    prepared = split.prepare(params)
    wide = [leaf for leaf in prepared if leaf.dtype == jnp.float32 and leaf.size >= np.prod(shape)]
    assert {leaf.shape for leaf in prepared if leaf.dtype == E4M3} == {shape} and not wide
    y, residuals = split.forward(prepared, x)
    text = str(jax.make_jaxpr(split.forward)(prepared, x))
    assert "new_dtype=float8_e4m3fn" not in text and "bitcast_convert_type" not in text
    assert all(leaf.dtype != E4M3 for leaf in jax.tree.leaves(residuals))
    x_ct, crossing = split.backward_input(prepared, residuals, y)
    expected = jax.vjp(stage, params, x)
    assert_trees_close(y, expected[0], rtol=0)
    assert_trees_close((split.backward_weight(prepared, residuals.weight, crossing), x_ct), expected[1](y), rtol=1e-2)


def test_what_else_reads_the_wide_numbers_keeps_all_where_it_is():
    """Or they would be handed to each microbatch, twice the parameter's bytes."""

    def stage(w, x):
        return linear(x, w) + jnp.sin(w.astype(jnp.float32))[0, : x.shape[1]].astype(x.dtype) * (
            x.astype(jnp.float32) @ w.astype(jnp.float32)
        ).astype(x.dtype)

    w, x = jnp.ones((WIDTH, WIDTH), jnp.bfloat16), jnp.ones((4, WIDTH), jnp.bfloat16)
    prepared = split_stage(stage, w, x).prepare(w)
    assert all(leaf.nbytes <= w.nbytes for leaf in prepared)


def test_without_numbers_of_8_bits_wide_ones_stay():
    """A small result of a wide copy is not worth more than it was."""

    def stage(w, x):
        return x * (w.astype(jnp.float32) ** 2).sum().astype(x.dtype)

    w, x = jnp.ones((WIDTH, WIDTH), jnp.bfloat16), jnp.ones((4, WIDTH), jnp.bfloat16)
    split = split_stage(stage, w, x)
    assert [leaf.shape for leaf in split.prepare(w)] == [w.shape]
