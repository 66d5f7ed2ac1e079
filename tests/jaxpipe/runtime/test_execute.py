"""The pipeline's loss, metrics and gradients are the plain program's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from tests.cases import cases
from tests.jaxpipe.runtime import models
from tests.plain import assert_trees_close, compiled_plain, cosine_difference, plain_value_and_grad, split_batch

GRID = [
    ("gpipe", 1, 3),
    pytest.param("gpipe", 2, 8, marks=pytest.mark.slow),
    ("gpipe", 4, 4),
    ("1f1b", 1, 1),
    ("1f1b", 2, 4),
    pytest.param("1f1b", 3, 5, marks=pytest.mark.slow),
    ("1f1b", 5, 3),
    ("interleaved", 1, 4),
    pytest.param("interleaved", 2, 4, marks=pytest.mark.slow),
    ("interleaved", 4, 12),
    ("zb1p", 4, 4),
    pytest.param("zb1p", 4, 8, marks=pytest.mark.slow),
    ("zb1p", 8, 16),
    ("zbv", 2, 4),
    ("zbv", 3, 6),
    pytest.param("zbv", 4, 8, marks=pytest.mark.slow),
    ("dualpipe", 2, 4),
    pytest.param("dualpipe", 4, 8, marks=pytest.mark.slow),
    ("dualpipe", 6, 14),
    pytest.param("dualpipe", 8, 20, marks=pytest.mark.slow),
    ("dualpipev", 1, 2),
    ("dualpipev", 2, 4),
    pytest.param("dualpipev", 3, 6, marks=pytest.mark.slow),
    pytest.param("dualpipev", 4, 10, marks=pytest.mark.slow),
    pytest.param("dualpipev", 3, 10, marks=pytest.mark.slow),
    pytest.param("dualpipev", 8, 18, marks=pytest.mark.slow),
]
OVERLAPPED = ("dualpipe", "dualpipev")
DEEPSEEK = [("dualpipe", ranks, 20) for ranks in (2, 4, 8)] + [("dualpipev", ranks, 20) for ranks in (1, 2, 3, 4, 8)]
OTHERS = [(name, ranks, 20) for name in jaxpipe.schedule.BUILDERS if name not in OVERLAPPED for ranks in (2, 4)]
QUICK = [("dualpipe", 4, 20), ("dualpipev", 2, 20), ("dualpipev", 4, 20), *OTHERS[1::2]]
REDUCED = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in DEEPSEEK + OTHERS]


def compare(schedule, params, batch, rng=None, *, rtol=1e-10, mesh=None, **functions):
    """Runs pipeline and plain program; asserts equality of everything; returns the pipeline's gradients."""
    mesh = mesh or jaxpipe.make_mesh(pp=schedule.num_ranks)
    plain = {name: functions.get(name) for name in ("embed", "head", "weight")}
    (loss, aux), grads = jax.jit(jaxpipe.value_and_grad(schedule=schedule, mesh=mesh, **functions))(params, batch, rng)
    reference = compiled_plain(functions["stage"], schedule.num_stages, schedule.num_microbatches, **plain)
    (expected_loss, expected_aux), expected = reference(params, batch, rng)
    assert float(loss) == pytest.approx(float(expected_loss), rel=rtol)
    for name, value in aux.items():
        np.testing.assert_allclose(value, expected_aux[name], rtol=rtol, err_msg=name)
    assert_trees_close(grads, expected, rtol=rtol)
    for leaf, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert cosine_difference(leaf, other) < 1e-13
    return grads


@cases(
    "name, ranks, microbatches",
    GRID,
    quick=[
        ("gpipe", 1, 3),
        ("1f1b", 2, 4),
        ("zb1p", 4, 4),
        ("zbv", 2, 4),
        ("dualpipe", 2, 4),
        ("dualpipev", 2, 4),
    ],
)
def test_every_schedule_equals_the_plain_program(x64, name, ranks, microbatches):
    """Tied embedding, dropout, auxiliary losses, metrics, masks and integer activations, all at once."""
    schedule = jaxpipe.schedule.build(name, ranks, microbatches)
    compare(
        schedule,
        models.token_params(schedule),
        models.token_batch(2 * microbatches),
        jax.random.key(3),
        stage=models.token_stage,
        embed=models.token_embed,
        head=models.token_head,
        weight=models.token_weight,
    )


def deepseek_example(name, ranks, microbatches, width, hidden, sequence):
    schedule = jaxpipe.schedule.build(name, ranks, microbatches)
    compare(
        schedule,
        models.deepseek_params(schedule, width, hidden),
        models.deepseek_batch(schedule, width, sequence=sequence),
        stage=models.deepseek_stage,
        embed=models.deepseek_embed,
        head=models.deepseek_head,
    )


@cases("name, ranks, microbatches", REDUCED, quick=[("interleaved", 4, 20), ("dualpipev", 4, 20)])
def test_deepseek_example_reduced(x64, name, ranks, microbatches):
    """The example of DeepSeek's repository with 16-wide layers and 8 positions."""
    deepseek_example(name, ranks, microbatches, 16, 64, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks, microbatches", [("dualpipe", 2, 20), ("dualpipev", 1, 20)])
def test_deepseek_example(x64, name, ranks, microbatches):
    """MLP 512-2048-512, microbatches of 3 x 256, as in DeepSeek's repository."""
    deepseek_example(name, ranks, microbatches, 512, 2048, 256)


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks, microbatches", DEEPSEEK[1:3] + DEEPSEEK[4:] + OTHERS)
def test_deepseek_example_on_more_ranks(x64, name, ranks, microbatches):
    """MLP 512-2048-512, microbatches of 3 x 256, as in DeepSeek's repository."""
    deepseek_example(name, ranks, microbatches, 512, 2048, 256)


@cases("dispatch", ["switch", "loops", "stretches", "sequential"], quick=["loops", "stretches"])
def test_dispatchers_agree(x64, dispatch):
    schedule = jaxpipe.schedule.build("dualpipev", 2, 6)
    compare(
        schedule,
        models.deepseek_params(schedule, 8, 16),
        models.deepseek_batch(schedule, 8, sequence=4),
        stage=models.deepseek_stage,
        embed=models.deepseek_embed,
        head=models.deepseek_head,
        dispatch=dispatch,
    )


@pytest.mark.slow
def test_result_does_not_depend_on_the_schedule(x64):
    """Same model of 8 stages, dropout included, through three schedules."""
    losses = []
    for name, ranks in (("dualpipev", 4), ("interleaved", 4), ("1f1b", 8)):
        schedule = jaxpipe.schedule.build(name, ranks, 8)
        step = jaxpipe.value_and_grad(
            models.token_stage,
            schedule,
            jaxpipe.make_mesh(pp=ranks),
            embed=models.token_embed,
            head=models.token_head,
        )
        (loss, _), _ = jax.jit(step)(models.token_params(schedule), models.token_batch(16), jax.random.key(0))
        losses.append(float(loss))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-12)


def test_without_embed_the_batch_is_the_first_input(x64):
    schedule = jaxpipe.schedule.build("dualpipe", 2, 4)
    compare(
        schedule,
        models.deepseek_params(schedule, 8, 16),
        models.deepseek_batch(schedule, 8, sequence=4)["x"],
        stage=models.deepseek_stage,
        head=lambda outer, y, data, ctx: jnp.mean(y * jnp.cos(data)),
    )


def test_without_head_auxiliary_losses_are_the_objective(x64):
    def stage(params, x, ctx):
        y = models.deepseek_stage(params, x, ctx)
        return jaxpipe.Output(y, aux_loss=jnp.mean(y**2))

    schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    compare(
        schedule,
        models.deepseek_params(schedule, 8, 16),
        models.deepseek_batch(schedule, 8, sequence=4)["x"],
        stage=stage,
    )


@cases("name", ["gpipe", "interleaved", "zbv", "dualpipe", "dualpipev"], quick=["zbv", "dualpipe", "dualpipev"])
def test_forward_only_returns_outputs_in_the_order_of_the_batch(x64, name):
    schedule = jaxpipe.schedule.build(name, 2, 4)
    params = models.deepseek_params(schedule, 8, 16)
    batch = models.deepseek_batch(schedule, 8, sequence=4)
    mesh = jaxpipe.make_mesh(pp=2, dp=2)
    run = jaxpipe.forward(
        models.deepseek_stage,
        schedule,
        mesh,
        embed=models.deepseek_embed,
        head=lambda outer, y, data, ctx: {"y": y, "positive": y[..., 0] > 0},
        data_axes=("dp",),
    )
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[::-1]]), batch)
    outputs, metrics = jax.jit(run)(params, batch)
    x = batch["x"]
    for stage in jaxpipe.unstack_stages(params.stages, schedule):
        x = models.deepseek_stage(stage, x, None)
    np.testing.assert_allclose(outputs["y"], x, rtol=1e-12)
    np.testing.assert_array_equal(outputs["positive"], x[..., 0] > 0)
    assert metrics == {}


def test_bfloat16_compute_is_as_close_as_bfloat16_allows(x64):
    """Error of every gradient against float64 at most twice that of the plain bfloat16 program."""
    schedule = jaxpipe.schedule.build("dualpipe", 4, 8)
    params64 = models.deepseek_params(schedule, 64, 128)
    batch64 = models.deepseek_batch(schedule, 64, sequence=16)
    params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params64, batch64))

    def head(outer, y, data, ctx):
        return jnp.mean((y.astype(data["target"].dtype) - data["target"]) ** 2)

    def embed(outer, data, ctx):
        return data["x"].astype(jnp.bfloat16)

    def plain_bfloat16(params, batch):
        cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        function = plain_value_and_grad(models.deepseek_stage, schedule, embed=embed, head=head)
        return function(cast, batch)

    plain = functools.partial(plain_value_and_grad, models.deepseek_stage, schedule, embed=models.deepseek_embed)
    _, exact = plain(head=head)(params64, batch64)
    _, rounded = jax.jit(plain_bfloat16)(params, batch)
    step = jaxpipe.value_and_grad(
        models.deepseek_stage,
        schedule,
        jaxpipe.make_mesh(pp=4),
        embed=embed,
        head=head,
        compute_dtype=jnp.bfloat16,
    )
    _, grads = jax.jit(step)(params, batch)

    def error(grad, true):
        return float(np.linalg.norm(np.asarray(grad, np.float64) - true) / np.linalg.norm(true))

    for grad, low, true in zip(*map(jax.tree.leaves, (grads, rounded, exact)), strict=True):
        assert grad.dtype == jnp.float32
        assert error(grad, true) <= 2 * error(low, true)
        assert error(grad, true) < 2e-2


def test_jaxprs_hold_one_scan_whatever_the_microbatches():
    """The traced program does not grow with the number of microbatches."""

    def size(microbatches):
        schedule = jaxpipe.schedule.build("dualpipev", 2, microbatches)
        step = jaxpipe.value_and_grad(
            models.deepseek_stage, schedule, jaxpipe.make_mesh(pp=2), embed=models.deepseek_embed,
            head=models.deepseek_head,
        )  # fmt: skip
        params = models.deepseek_params(schedule, 8, 16)
        batch = models.deepseek_batch(schedule, 8, sequence=4)
        return len(jax.jit(step).lower(params, batch).as_text().splitlines())

    assert abs(size(64) - size(8)) <= 0.02 * size(8)


def test_microbatches_are_contiguous_parts_of_the_batch(x64):
    schedule = jaxpipe.schedule.build("gpipe", 2, 4)

    def head(outer, y, data, ctx):
        row = jnp.where(jnp.arange(4, dtype=jnp.int32) == ctx.microbatch, data.sum(), 0.0)
        return jaxpipe.Output(jnp.mean(y), metrics={"sums": row})

    batch = jnp.arange(8.0)[:, None] * jnp.ones((8, 8))
    step = jaxpipe.value_and_grad(models.deepseek_stage, schedule, jaxpipe.make_mesh(pp=2), head=head)
    (_, aux), _ = jax.jit(step)(models.deepseek_params(schedule, 8, 16), batch)
    np.testing.assert_allclose(aux["sums"], [part.sum() for part in split_batch(batch, 4)])
