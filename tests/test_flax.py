"""Flax modules as pipelines equal the plain program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import layered_stages, linen_stages, nnx_function, nnx_stages, split_layers
from tests.plain import assert_trees_close, plain_value_and_grad

WIDTH = 6
SCHEDULE = jaxpipe.schedule.build("dualpipev", 2, 4)


class Dense(nnx.Module):
    """A residual layer with dropout."""

    def __init__(self, rngs, rate=0.0):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, rngs=None):
        return x + self.dropout(jnp.tanh(self.linear(x)), rngs=rngs)


class LinenDense(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(WIDTH)(x))
        return x + nn.Dropout(self.rate, deterministic=self.rate == 0)(h)


def head(outer, y, data, ctx):
    return jnp.mean((y - data[:, ::-1]) ** 2)


def batch():
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, WIDTH)), jnp.float32)


def compare(stage, stacked, schedule=SCHEDULE, rng=None):
    """Pipeline against plain program in float32; returns the gradients."""
    params = jaxpipe.Params(stacked)
    mesh = jaxpipe.make_mesh(pp=schedule.num_ranks)
    (loss, _), grads = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, head=head))(params, batch(), rng)
    (expected_loss, _), expected = jax.jit(plain_value_and_grad(stage, schedule, head=head))(params, batch(), rng)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_trees_close(grads, expected, rtol=1e-5)
    return grads.stages


def test_nnx_stages():
    compare(*nnx_stages(Dense, SCHEDULE, nnx.Rngs(0)))


def test_nnx_stages_with_dropout():
    stage, stacked = nnx_stages(lambda rngs: Dense(rngs, 0.5), SCHEDULE, nnx.Rngs(0), uses_rngs=True)
    compare(stage, stacked, rng=jax.random.key(1))


def test_linen_stages():
    compare(*linen_stages(LinenDense(), SCHEDULE, jax.random.key(0), jnp.ones((2, WIDTH))))


def test_linen_stages_with_dropout():
    stage, stacked = linen_stages(LinenDense(0.5), SCHEDULE, jax.random.key(0), jnp.ones((2, WIDTH)), uses_rngs=True)
    compare(stage, stacked, rng=jax.random.key(1))


def test_dropout_without_a_key_is_refused():
    stage, stacked = nnx_stages(lambda rngs: Dense(rngs, 0.5), SCHEDULE, nnx.Rngs(0), uses_rngs=True)
    with pytest.raises(ValueError, match=r"without a key: call step\(params, batch, rng\)"):
        compare(stage, stacked)


def layers(count):
    rng = np.random.default_rng(3)
    return [{"w": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 3, jnp.float32)} for _ in range(count)]


def layer(params, x, ctx):
    return x + jnp.tanh(x @ params["w"])


@pytest.mark.parametrize("count", [8, 10])
def test_any_number_of_layers(count):
    """Stages of 2 and 3 layers compute what the plain stack of layers computes."""
    params = layers(count)
    stage, stacked = layered_stages(layer, params, SCHEDULE)
    grads = jaxpipe.unstack_stages(compare(stage, stacked), SCHEDULE)

    def plain(params):
        x = batch()
        for p in params:
            x = layer(p, x, None)
        return head(None, x, batch(), None)

    expected = jax.grad(plain)(params)
    counts = split_layers(count, SCHEDULE.num_stages)
    got = [{"w": grad["w"][i]} for grad, real in zip(grads, counts, strict=True) for i in range(real)]
    assert_trees_close(got, expected, rtol=1e-5)
    for grad, real in zip(grads, counts, strict=True):
        np.testing.assert_array_equal(grad["w"][real:], 0)


def test_fewer_layers_than_stages_are_refused():
    with pytest.raises(ValueError, match="3 layers for 4 stages"):
        layered_stages(layer, layers(3), SCHEDULE)


def test_stages_must_be_alike():
    uneven = [*layers(3), {"w": jnp.ones((2, 2))}]
    with pytest.raises(ValueError, match=r"parameters 3 have shapes .*must be alike"):
        layered_stages(layer, uneven, SCHEDULE)


def test_state_that_calls_change_is_refused():
    with pytest.raises(ValueError, match=r"BatchNorm holds variables of kinds \['BatchStat'\]"):
        nnx_function(nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)))
    norm = nn.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"BatchNorm has variable collections \['batch_stats'\]"):
        linen_stages(norm, SCHEDULE, jax.random.key(0), jnp.ones((2, WIDTH)))
