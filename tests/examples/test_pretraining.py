"""Model of the pretraining example."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining import model

import jaxpipe

CONFIG = model.ModelConfig(width=16, heads=2, hidden=24, layers=3, sequence=8)


def make_logits(seed=0):
    """(functions, params, a function of tokens returning the stack's output on one device)."""
    schedule = jaxpipe.schedule.build("gpipe", 1, 1)
    functions, params = model.build_model(CONFIG, schedule, seed)
    ctx = jaxpipe.Context(jnp.int32(0), jnp.int32(0), None, None)

    def run(tokens):
        x = functions.embed(params.outer, {"tokens": tokens}, ctx)
        return functions.stage(jax.tree.map(lambda leaf: leaf[0], params.stages), x, ctx)

    return functions, params, run


def test_the_future_does_not_change_the_past():
    _, _, run = make_logits()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 8)), jnp.int32)
    changed = tokens.at[0, 5].add(1)
    before, after = run(tokens), run(changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max()) > 1e-4


def test_rotations_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 1, 8)), (1, 9, 1, 1)), jnp.float32) for _ in range(2))
    scores = jnp.einsum("btnh,bsnh->ts", model.rotate(q), model.rotate(k))
    np.testing.assert_allclose(scores[2:, 2:], scores[:-2, :-2], rtol=1e-4, atol=1e-5)


def test_masked_targets_do_not_count():
    functions, params, _ = make_logits()
    y = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 16)), jnp.float32)
    mask = jnp.ones((2, 8)).at[1].set(0)
    targets = jnp.zeros((2, 8), jnp.int32)
    whole = functions.head(params.outer, y[:1], {"targets": targets[:1], "mask": mask[:1]}, None)
    masked = functions.head(params.outer, y, {"targets": targets, "mask": mask}, None)
    np.testing.assert_allclose(masked, whole, rtol=1e-6)


def test_no_features_give_the_loss_of_a_uniform_guess():
    functions, params, _ = make_logits()
    batch = {"targets": jnp.arange(16, dtype=jnp.int32).reshape(2, 8), "mask": jnp.ones((2, 8))}
    loss = functions.head(params.outer, jnp.zeros((2, 8, 16)), batch, None)
    np.testing.assert_allclose(loss, np.log(256), rtol=1e-6)
    assert loss.dtype == jnp.float32 and loss.shape == ()


def test_a_batch_without_targets_has_loss_zero():
    functions, params, _ = make_logits()
    batch = {"targets": jnp.zeros((2, 8), jnp.int32), "mask": jnp.zeros((2, 8))}
    assert float(functions.head(params.outer, jnp.ones((2, 8, 16)), batch, None)) == 0


def test_initial_parameters_do_not_depend_on_the_schedule():
    one = jaxpipe.schedule.build("1f1b", 3, 3)
    other = jaxpipe.schedule.build("gpipe", 1, 1)
    _, a = model.build_model(CONFIG, one, 0)
    _, b = model.build_model(CONFIG, other, 0)
    for x, y in zip(jax.tree.leaves(a.stages), jax.tree.leaves(b.stages), strict=True):
        np.testing.assert_array_equal(x.reshape(y.shape), y)


def test_bfloat16_parameters_give_bfloat16_activations():
    functions, params, _ = make_logits()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    ctx = jaxpipe.Context(jnp.int32(0), jnp.int32(0), None, None)
    x = functions.embed(low.outer, {"tokens": jnp.zeros((1, 8), jnp.int32)}, ctx)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention promotes by itself
        y = functions.stage(jax.tree.map(lambda leaf: leaf[0], low.stages), x, ctx)
    assert x.dtype == y.dtype == jnp.bfloat16


def test_width_must_hold_the_heads():
    with pytest.raises(ValueError, match=r"width 10 .* 4 heads"):
        model.ModelConfig(width=10)
