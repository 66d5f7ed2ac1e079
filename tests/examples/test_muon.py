"""Muon and courses of the learning rate."""

import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.examples.sizes import make_batch, small  # first: it makes the example importable

from pretraining import muon, trainer  # isort: skip
import jaxpipe
from jaxpipe.deepseek import build_model

SHAPES = {
    "router": (2, 6, 4),
    "w_in": (2, 3, 6, 8),
    "query_up": (2, 5, 2, 3),
    "out": (2, 2, 3, 6),
}


def single(matrix):
    """One matrix by optax: of its first step, in which all forms of momentum have the same direction."""
    transform = optax.contrib.scale_by_muon()
    with jax.numpy_dtype_promotion("standard"):
        found, _ = transform.update(matrix, transform.init(matrix))
    return np.asarray(found) * muon.SIZE * max(matrix.shape) ** 0.5


def by_loops(name, array):
    found = np.empty_like(array)
    for place in np.ndindex(array.shape[:1] if name in ("query_up", "out") else array.shape[:-2]):
        one = array[place]
        if name in muon.HALVES:
            half = one.shape[1] // 2
            found[place][:, :half], found[place][:, half:] = single(one[:, :half]), single(one[:, half:])
        elif name == "query_up":
            found[place] = single(one.reshape(one.shape[0], -1)).reshape(one.shape)
        elif name == "out":
            found[place] = single(one.reshape(-1, one.shape[-1])).reshape(one.shape)
        else:
            found[place] = single(one)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_matrices_are_those_of_the_model_one_by_one(name):
    array = np.random.default_rng(0).normal(size=SHAPES[name]).astype(np.float32)
    np.testing.assert_allclose(muon.orthogonalise(name, jnp.asarray(array)), by_loops(name, array), atol=1e-5)
    shown = muon.as_matrices(name, jnp.asarray(array))
    np.testing.assert_array_equal(muon.from_matrices(name, shown, array.shape), array)


def test_singular_values_become_alike():
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(40, 24)).astype(np.float32))
    values = np.linalg.svd(np.asarray(muon.newton_schulz(matrix)), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    assert not np.asarray(muon.newton_schulz(jnp.zeros((3, 3)))).any()


def test_what_is_no_matrix_is_adamws():
    """Of parameters with the names of a model's."""
    rng = np.random.default_rng(0)
    slot = {
        "attention_norm": {"scale": np.ones((2, 6))},
        "moe": {name: rng.normal(size=SHAPES[name]) for name in ("router", "w_in")} | {"bias": np.zeros((2, 4))},
    }
    params = jaxpipe.Params({"layer_0": slot}, {"embedding": np.ones((8, 6)), "output": np.ones((8, 6))})
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    every = trainer._last_names(params)
    model = types.SimpleNamespace(
        params=params,
        config=small(),
        trained=jax.tree.map(lambda name: name != "bias", every),
        decayed=jax.tree.map(lambda name: name not in ("bias", "scale"), every),
    )
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 1e-3, jnp.float32), params)
    found = {}
    for name in trainer.OPTIMIZERS:
        config = trainer.TrainConfig(4, warmup=0, optimizer=name, weight_decay=0.0)
        optimizer = trainer.make_optimizer(config, cast(Any, model))
        with jax.numpy_dtype_promotion("standard"):
            found[name], _ = optimizer.update(grads, optimizer.init(params), params)
    leaves = zip(*map(jax.tree.leaves, (every, found["muon"], found["adamw"], grads)), strict=True)
    for name, ours, theirs, grad in leaves:
        if name in muon.NOT_MATRICES:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        elif name != "bias":
            np.testing.assert_allclose(ours, -3e-3 * muon.orthogonalise(name, grad), rtol=1e-3, atol=1e-7)


def test_courses_of_the_learning_rate():
    rates = [float(trainer.TrainConfig(20, 1.0, 4, rates="wsd", decay=0.25).rate(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.4375, 0.625, 0.8125, 1.0])
    np.testing.assert_allclose(rates[5:16], 1.0)
    np.testing.assert_allclose(rates[15:], 1 - 0.9 * np.arange(6) / 5, rtol=1e-6)
    for changed in ({"optimizer": "sgd"}, {"rates": "flat"}, {"decay": 0.0}, {"decay": 1.5}):
        with pytest.raises(ValueError, match="is one of"):
            trainer.TrainConfig(20, **changed)


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_muon_through_a_pipeline_equals_the_plain_program(moments):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    config = small(moments=moments)
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2, ep=2)
    model = build_model(config, schedule, 0, axis="ep", abstract=True)
    optimizer = trainer.make_optimizer(trainer.TrainConfig(3, 1e-2, 1, optimizer="muon"), model)
    plain = model.on_one_device()
    state, one = trainer.init_state(model, optimizer, mesh), trainer.init_state(plain, optimizer)
    step = trainer.make_step(trainer.pipelined(model, schedule, mesh), model, optimizer, mesh)
    expected = trainer.make_step(trainer.plain_value_and_grad(plain, parts=8), plain, optimizer)
    losses = []
    for index in range(3):
        batch = make_batch(index, 16, config)
        state, ours = step(state, batch, jax.random.key(0))
        one, theirs = expected(one, batch, jax.random.key(0))
        losses.append(float(ours["loss"]))
        assert losses[-1] == pytest.approx(float(theirs["loss"]), rel=1e-4)
    assert losses[-1] < losses[0]
