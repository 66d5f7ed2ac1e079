"""Whole models whose blocks have parameters of several structures, from Flax and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import from_linen, from_nnx, linen_stages, nnx_stages, unstack_layers
from tests.jaxpipe.test_whole import DOUBLE, MICROBATCHES, SEQUENCES, VOCABULARY, WIDTH, loss_of, make_batch, plain
from tests.plain import assert_trees_close

EXPERTS = 3


class Attention(nnx.Module):
    """Looks back over a window; a local one has narrower keys."""

    def __init__(self, rngs, window, keys):
        self.key = nnx.Linear(WIDTH, keys, use_bias=False, rngs=rngs, **DOUBLE)
        self.value = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs, **DOUBLE)
        self.window = window

    def __call__(self, x, mask):
        key, back = self.key(x), jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
        scores = jnp.where((back >= 0) & (back < self.window), jnp.einsum("bqd,bkd->bqk", key, key), -1e9)
        return jax.nn.softmax(scores) @ (self.value(x) * mask)


class Dense(nnx.Module):
    """Returns activations alone."""

    def __init__(self, rngs, rate=0.0):
        self.attention = Attention(rngs, 8, WIDTH)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs, **DOUBLE)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs, **DOUBLE)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(x, mask)
        return x + self.dropout(self.down(jnp.tanh(self.up(x))))


class Experts(nnx.Module):
    """Returns activations, a loss and figures."""

    def __init__(self, rngs, local=False, rate=0.0):
        self.attention = Attention(rngs, 2 if local else 8, 4 if local else WIDTH)
        self.router = nnx.Linear(WIDTH, EXPERTS, rngs=rngs, **DOUBLE)
        self.experts = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs, **DOUBLE) for _ in range(EXPERTS)])
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(x, mask)
        gates = jax.nn.softmax(self.router(x))
        y = sum(gates[..., i, None] * jnp.tanh(expert(x)) for i, expert in enumerate(self.experts))
        return x + self.dropout(y), (gates**2).mean(), {"on": (gates > 0.4).sum(dtype=jnp.int32)}


class Model(nnx.Module):
    """Tied embeddings; dense blocks first, then experts, local and global in turn."""

    def __init__(self, rngs, dense=3, count=13, rate=0.0):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, **DOUBLE)
        self.layers = nnx.List([
            Dense(rngs, rate) if index < dense else Experts(rngs, index % 2 == 1, rate) for index in range(count)
        ])

    def __call__(self, tokens):
        x, mask, others = self.embed(tokens), (tokens > 2)[..., None].astype(jnp.float64), []
        for index, layer in enumerate(self.layers):
            x = layer(x, mask)
            if isinstance(x, tuple):
                x, square, figures = x
                others.append(square * (index + 1) + 0.01 * figures["on"].astype(square.dtype))
        return self.embed.attend(x), others


@pytest.mark.parametrize(("name", "ranks"), [("zb1p", 4), ("dualpipev", 2)])
def test_nnx_equals_the_plain_model(x64, name, ranks):
    """13 blocks of three kinds on 4 stages, divided by costs; and the model back."""
    model, batch = Model(nnx.Rngs(0)), make_batch()
    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    options = {"blocks": "layers", "loss": loss_of, "layer_costs": [1] * 3 + [3] * 10}
    pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=ranks), **options)
    # 5, 3, 3 and 2 layers; all have attention.value, and of those with the wide keys 4 are in the first stage.
    attention = pipe.params.stages["attention"]
    assert attention["value"]["kernel"].shape == (4, 5, WIDTH, WIDTH)
    assert {k: v.shape[1:] for k, v in attention["key"]["kernel"].items()} == {
        "kind_0": (4, WIDTH, WIDTH),
        "kind_1": (2, WIDTH, 4),
    }
    (loss, aux), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = nnx.value_and_grad(plain(loss_of, batch, MICROBATCHES))(model)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    found = nnx.state(pipe.merge(grads), nnx.Param)
    assert_trees_close(nnx.to_pure_dict(found), nnx.to_pure_dict(expected_grads), rtol=1e-10)
    back = pipe.merge(pipe.params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(back, nnx.Param), nnx.state(model, nnx.Param)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, pipe.split(back), pipe.params))
