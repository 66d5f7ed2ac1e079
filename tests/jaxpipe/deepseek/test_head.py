"""Embedding and head against their plain forms: a lookup, and the logarithm of a softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.deepseek import EmbeddingAndHead
from jaxpipe.flax import nnx_function
from tests.jaxpipe.deepseek.models import small


def test_losses_and_gradients_are_those_of_a_softmax(x64):
    keys = jax.random.split(jax.random.key(0), 4)
    config = small()
    module = nnx_function(EmbeddingAndHead(config, nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), module.params)
    features = jax.random.normal(keys[0], (2, 5, config.width), jnp.float64)
    targets = jax.random.randint(keys[1], (2, 5), 0, config.vocab)
    targets = targets.at[1, 2].set(-3)  # an index from the end, as anywhere
    mask = jax.random.bernoulli(keys[2], 0.7, (2, 5)).astype(jnp.float64).at[1, 2].set(1)
    weights = jax.random.normal(keys[3], (2,), jnp.float64)

    def ours(params, features):
        return (module.merge(params).losses(features, targets, mask)[0] * weights).sum()

    def plain(params, features):
        logits = module.merge(params).norm(features) @ params["output"].T
        chances = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
        picked = (chances * jax.nn.one_hot(targets % config.vocab, config.vocab)).sum(-1)
        return ((-jnp.log(picked) * mask).sum(1) * weights).sum()

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, features) for f in (ours, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), found, expected)


def test_a_table_of_which_each_device_has_columns_is_looked_up_by_all(x64):
    """Each device has tokens of its own, and gets their rows whole; gradients arrive where the columns are."""
    config, mesh = small(), jaxpipe.make_mesh(ep=2)
    module = nnx_function(EmbeddingAndHead(config, nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (4, 7), 0, config.vocab)
    table = jax.random.normal(jax.random.key(2), (config.vocab, config.width), jnp.float64)
    scale = jax.random.normal(jax.random.key(3), (4, 7, config.width), jnp.float64)

    def look_up(table, tokens):
        return module.merge({**module.params, "embedding": table}).embed(tokens, jnp.float64, "ep")

    specs = P(None, "ep"), P("ep")
    run = jax.shard_map(look_up, mesh=mesh, in_specs=specs, out_specs=P("ep"), check_vma=False)
    np.testing.assert_array_equal(jax.jit(run)(table, tokens), table[tokens])
    found = jax.jit(jax.grad(lambda table: (run(table, tokens) * scale).sum()))(table)
    np.testing.assert_allclose(found, jnp.zeros_like(table).at[tokens].add(scale), rtol=1e-12, atol=1e-14)
