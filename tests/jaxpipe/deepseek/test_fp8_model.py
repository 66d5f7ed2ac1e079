"""The model in FP8: pipelined as plain, near bfloat16's place, and which of its Linears stay."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.deepseek import MODELS, DenseBlock, build_model
from jaxpipe.deepseek.linear import logger, takes_fp8
from jaxpipe.flax import nnx_function
from tests.jaxpipe.deepseek.models import make_batch
from tests.jaxpipe.deepseek.test_stages import pipeline

TINY = dataclasses.replace(MODELS["tiny-128"], sequence=32, redundant=0)
FP8 = TINY.in_precision("fp8")
ROWS = 16


def loss_and_gradients(config, name, pp, ep):
    """On a mesh of so many devices, of parameters in the order of the model."""
    schedule = jaxpipe.schedule.build(name, pp, 4)
    model = build_model(config, schedule, 0, axis="ep" if ep > 1 else None)
    batch = jax.tree.map(jnp.asarray, make_batch(0, ROWS, config))
    (loss, aux), grads = jax.jit(pipeline(model, schedule, pp, ep))(model.params, batch)
    return float(loss), model.to_layers(grads), aux


def cosines(found, wanted):
    def of(a, b):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        return a @ b / np.sqrt((a @ a) * (b @ b))

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return [of(a, b) for a, b in pairs if a.dtype == jnp.float32 and np.asarray(b).any()]


@pytest.mark.slow
def test_a_pipeline_of_eight_devices_equals_the_plain_program():
    loss, grads, aux = loss_and_gradients(FP8, "1f1b", 4, 2)
    expected, expected_grads, expected_aux = loss_and_gradients(FP8, "gpipe", 1, 1)
    assert int(aux["not_finite"]) == int(expected_aux["not_finite"]) == 0
    np.testing.assert_allclose(loss, expected, rtol=1e-3)  # other microbatches have other blocks of 128 rows
    assert min(cosines(grads, expected_grads)) > 0.99


@pytest.mark.slow
def test_loss_is_near_that_of_bfloat16s_place():
    config = dataclasses.replace(TINY, layers=2)
    loss, grads, aux = loss_and_gradients(config.in_precision("fp8"), "gpipe", 1, 1)
    expected, expected_grads, plain_aux = loss_and_gradients(config, "gpipe", 1, 1)
    assert 0 < abs(loss / expected - 1) < 5e-3
    assert np.median(cosines(grads, expected_grads)) > 0.95  # some tokens choose other experts
    assert int(aux["not_finite"]) == 0 and "not_finite" not in plain_aux


@pytest.mark.slow
def test_gradients_of_a_dense_layer():
    """Attention and SwiGLU in FP8 beside the same layer in bfloat16's place."""
    x = jax.random.normal(jax.random.key(1), (2, 64, TINY.width))
    made = []
    for config in (FP8, TINY):
        block = nnx_function(DenseBlock(config, nnx.Rngs(0)))
        out, pull = jax.vjp(block, block.params, x)
        made.append((out, *pull(jnp.cos(x))))
    assert 0.99 < min(cosines(*made)) < max(cosines(*made)) < 1 - 1e-9


def test_sizes_that_stay_are_logged_once(caplog):
    caplog.set_level(logging.WARNING, logger.name)
    assert takes_fp8(2048, 10944) and takes_fp8(7168, 576) and not takes_fp8(72, 200) and not takes_fp8(72, 200)
    assert [record.getMessage() for record in caplog.records] == [
        "a Linear of a model in FP8 stays in the dtype of its activations: a matrix of 72 x 200 would be padded to 128 "
        "x 256, by more than an eighth: FP8 wants multiples of 128"
    ]


def test_refusals():
    with pytest.raises(ValueError, match="precision='fp4': it must be one of bf16, fp8"):
        TINY.in_precision("fp4")
    with pytest.raises(ValueError, match="fp8 needs width to be a multiple of 128, not 64"):
        MODELS["tiny"].in_precision("fp8")
    with pytest.raises(ValueError, match="precision='fp4'"):
        dataclasses.replace(TINY, precision="fp4")


def test_a_model_in_bf16_is_the_same_program():
    assert MODELS["dsv3-671b"].moe.recipe.name == "fp8_exchange" and MODELS["dsv3-671b"].precision == "bf16"
    assert TINY.in_precision("fp8").in_precision("bf16").moe.recipe.name == "bf16"
