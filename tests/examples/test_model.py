"""The pretraining example's model under its trainer: gradients and optimizer state, whatever the stages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.examples.sizes import SMALL, make_batch, small  # first: it makes the example importable

from pretraining import trainer  # isort: skip

import jaxpipe
from jaxpipe.deepseek import build_model
from tests.jaxpipe.deepseek.models import built
from tests.plain import assert_trees_close


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention", "layer"])
def test_what_is_computed_again_is_the_same(remat):
    batch = {name: jnp.asarray(value) for name, value in make_batch(0, 2).items()}
    results = []
    for choice in ("none", remat):
        model = built(small(remat=choice, layers=2), "gpipe", 1, 1)
        plain = trainer.plain_value_and_grad(model, parts=1)
        (loss, _), grads = jax.jit(plain)(model.params, batch)
        floats = [g for g in jax.tree.leaves(grads) if g.dtype == jnp.float32]
        results.append((loss, floats))
    assert_trees_close(results[1], results[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "ranks", "shared_ends"),
    [
        pytest.param("1f1b", 3, False, marks=pytest.mark.slow),
        pytest.param("dualpipe", 2, True, marks=pytest.mark.slow),
        pytest.param("dualpipev", 2, True, marks=pytest.mark.slow),
    ],
)
def test_initial_parameters_and_their_order_do_not_depend_on_the_schedule(name, ranks, shared_ends):
    config = dataclasses.replace(SMALL, shared_ends=shared_ends)
    one = built(config, "gpipe", 1, 1)
    model = build_model(config, jaxpipe.schedule.build(name, ranks, 2 * ranks), 0, axis="ep")
    layers = model.to_layers(model.params)
    expected = one.to_layers(one.params)
    jax.tree.map(np.testing.assert_array_equal, layers, expected)
    again = model.from_layers(jax.device_get(layers))
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(model.params))

    optimizer = trainer.make_optimizer(trainer.TrainConfig(steps=2), model)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(model.params)
    (moments,) = (node for node in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(node))
    back = model.from_layers(model.to_layers(moments.mu))
    assert jax.tree.structure(back) == jax.tree.structure(moments.mu)
    trained = sum(leaf.size for leaf in jax.tree.leaves(model.to_layers(moments.mu)))
    assert trained == SMALL.total - SMALL.moe_layers * SMALL.experts  # all but the routers' biases


@pytest.mark.slow
def test_places_without_a_layer_change_nothing():
    """Four layers over three stages are four layers: output, loads and gradients; the padding's gradients are zero."""
    config = small(dense_layers=0, layers=4)
    model = build_model(config, jaxpipe.schedule.build("gpipe", 3, 1), 0)
    assert model.arrangement.padded and model.arrangement.counts == (2, 1, 1)
    whole = built(config, "gpipe", 1, 1)
    batch = {name: jnp.asarray(value) for name, value in make_batch(0, 2).items()}
    results = []
    for each in (model, whole):
        (loss, aux), grads = jax.jit(trainer.plain_value_and_grad(each, parts=1))(each.params, batch)
        floats = jax.tree.map(lambda g: g if g.dtype == jnp.float32 else None, grads)
        results.append((loss, each.to_layers(floats), each.loads_of(aux), each.dropped_of(aux), aux["aux_loss"]))
        empty = [leaf[each.arrangement.layer_of[:, 1] < 0] for leaf in jax.tree.leaves(floats.stages["layer_1"])]
        assert not any(np.asarray(leaf).any() for leaf in empty)
    assert_trees_close(results[0], results[1], rtol=1e-5, atol=1e-9)
    assert results[0][2].sum(1).tolist() == [2 * 8 * 2] * 4


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)
