"""Layers with parameters of several structures equal the plain loop, and are stored once each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.flax import layered_stages, split_layers, unstack_layers
from tests.jaxprs import primitives
from tests.plain import assert_trees_close, fold

WIDTH, WIDE, EXPERTS, MICROBATCHES = 4, 6, 3, 8
SCHEDULES = {
    "1f1b": ("1f1b", 4),
    "zb1p": ("zb1p", 4),
    "dualpipe": ("dualpipe", 4),
    "dualpipev": ("dualpipev", 2),
}
ROWS = {
    "dense, then experts": "DDDMMMMMMMMMM",
    "in turn": "DMDMDMDMDMDMD",
    "three kinds": "DMMLMMLMMLMMD",
    "as many of each": "DMDMDMDM",
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) / 2)


def make_layer(kind, seed):
    """All have ``mix`` and a norm; D and M a table of experts or of one; L nothing else."""
    shared = {"mix": normal(WIDTH, WIDTH, seed=seed), "norm": {"scale": 1 + normal(WIDTH, seed=seed)}}
    if kind == "L":
        return shared
    if kind == "D":
        return {**shared, "mlp": {"up": normal(WIDTH, WIDE, seed=seed), "down": normal(WIDE, WIDTH, seed=seed)}}
    experts = {"up": normal(EXPERTS, WIDTH, WIDE, seed=seed), "down": normal(EXPERTS, WIDE, WIDTH, seed=seed)}
    return {**shared, "mlp": {"router": normal(WIDTH, EXPERTS, seed=seed), **experts}}


def dropout(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x, jnp.zeros_like(x)) / 0.8


def layer(params, x, ctx):
    """Layers without experts have no auxiliary loss and no count of tokens."""
    x = x + dropout(ctx.rng, jnp.tanh(x @ params["mix"])) * jnp.cos(ctx.layer.astype(x.dtype))
    x = x * params["norm"]["scale"]
    if "mlp" not in params:
        return jaxpipe.Output(x, metrics={"local": jnp.ones((), bool)})
    mlp = params["mlp"]
    if "router" not in mlp:
        return x + jnp.tanh(x @ mlp["up"]) @ mlp["down"]
    gates = jax.nn.softmax(x @ mlp["router"])
    y = jnp.einsum("be,ebw,ewd->bd", gates, jnp.tanh(jnp.einsum("bd,edw->ebw", x, mlp["up"])), mlp["down"])
    return jaxpipe.Output(x + y, (gates**2).mean(), {"tokens": (gates > 0.4).sum(0, dtype=jnp.int32)})


def head(outer, y, data, ctx):
    return jnp.mean((y @ outer - data) ** 2)


def plain(layers, outer, batch, key):
    """(loss, (auxiliary loss, tokens of each expert)) of a loop."""

    def loss(m, data):
        x, aux_loss, tokens = data, 0.0, jnp.zeros(EXPERTS, jnp.int32)
        for i, params in enumerate(layers):
            output = layer(params, x, jaxpipe.Context(None, m, fold(key, i, m), data, jnp.int32(i)))
            output = output if isinstance(output, jaxpipe.Output) else jaxpipe.Output(output)
            x, tokens = output.value, tokens + output.metrics.get("tokens", 0)
            aux_loss += 0.0 if output.aux_loss is None else output.aux_loss
        return head(outer, x, data, None) + aux_loss, tokens

    losses, tokens = jax.vmap(loss)(jnp.arange(MICROBATCHES), batch.reshape(MICROBATCHES, -1, WIDTH))
    return losses.mean(), tokens.sum(0)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_kinds_equal_the_plain_loop(name, row, x64):
    """Loss, metrics and gradients, of layers with keys of their own."""
    layers = [make_layer(kind, seed) for seed, kind in enumerate(ROWS[row])]
    outer, batch, key = normal(WIDTH, WIDTH, seed=30), normal(16, WIDTH, seed=31), jax.random.key(5)
    (expected, tokens), expected_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(layers, outer, batch, key)
    kind, ranks = SCHEDULES[name]
    schedule = jaxpipe.schedule.build(kind, ranks, MICROBATCHES)
    stage, stacked = layered_stages(layer, layers, schedule)
    step = jax.jit(jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=ranks), head=head))
    (loss, aux), grads = step(jaxpipe.Params(stacked, outer), batch, key)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_array_equal(aux["tokens"], tokens)
    if "L" in ROWS[row]:
        assert int(aux["local"]) == ROWS[row].count("L") * MICROBATCHES
    assert_trees_close((unstack_layers(grads.stages, stage, schedule), grads.outer), expected_grads, rtol=1e-10)
