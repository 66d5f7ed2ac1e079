"""Side effects of embed, stages and head run once for each microbatch in a pipeline, whatever runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jaxpipe
from tests.cases import cases
from tests.plain import assert_trees_close, plain_value_and_grad

MICROBATCHES, ROWS, WIDTH = 4, 2, 4
SEEN = []


def tap(name, ctx, value):
    jax.debug.callback(
        lambda stage, microbatch, value: SEEN.append((name, int(stage), int(microbatch), round(float(value), 6))),
        ctx.stage, ctx.microbatch, jnp.sum(value),
    )  # fmt: skip


def layer(w, x, ctx):
    tap("stage", ctx, x)
    return jnp.tanh(x @ w)


def in_loop(w, x, ctx):
    return jax.lax.scan(lambda c, _: (jax.checkpoint(layer)(w, c, ctx), None), x, length=2)[0]


def embed(outer, data, ctx):
    @jax.checkpoint
    def look_up(table, data):
        tap("embed", ctx, data)
        return jnp.sin(table) * data

    return look_up(outer, data)


def head(outer, y, data, ctx):
    @jax.checkpoint
    def loss(outer, y):
        tap("head", ctx, y)
        return jnp.mean((y * outer) ** 2)

    return loss(outer, y)


def counted(function, *args):
    SEEN.clear()
    result = jax.block_until_ready(jax.jit(function)(*args))
    jax.effects_barrier()
    return result, sorted(SEEN)


def inputs(schedule):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (schedule.num_stages, WIDTH, WIDTH)) / 2
    params = jaxpipe.Params(weights, jax.random.normal(keys[1], (WIDTH,)))
    return params, jax.random.normal(keys[2], (MICROBATCHES * ROWS, WIDTH))


def plain_seen(stage, schedule, params, batch):
    """What the plain forward shows: a loop over microbatches and one over stages."""

    def run(params, batch):
        for m, data in enumerate(batch.reshape(MICROBATCHES, ROWS, WIDTH)):

            def ctx(s, m=m, data=data):
                return jaxpipe.Context(jnp.int32(s), jnp.int32(m), None, data)

            x = embed(params.outer, data, ctx(-1))
            for s in range(schedule.num_stages):
                x = stage(params.stages[s], x, ctx(s))
            head(params.outer, x, data, ctx(schedule.num_stages))

    return counted(run, params, batch)[1]


PLACES = {
    "1f1b, switch": ("1f1b", 2, "switch", layer),
    "1f1b, loops": ("1f1b", 2, "loops", layer),
    "zb1p, sequential": ("zb1p", 2, "sequential", in_loop),
    "dualpipev, stretches": ("dualpipev", 2, "stretches", layer),
    "zbv, by rank": ("zbv", 2, "by_rank", layer),
    "one rank, unrolled": ("1f1b", 1, "unrolled", in_loop),
}


@cases("place", PLACES, quick=["1f1b, loops", "zb1p, sequential", "dualpipev, stretches"])
def test_each_effect_runs_once_for_a_microbatch(place):
    name, ranks, dispatch, stage = PLACES[place]
    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    params, batch = inputs(schedule)
    expected = plain_seen(stage, schedule, params, batch)
    mesh = jaxpipe.make_mesh(pp=ranks)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, dispatch=dispatch)
    ((loss, _), grads), seen = counted(step, params, batch)
    assert [item[:3] for item in seen] == [item[:3] for item in expected]
    np.testing.assert_allclose([item[3] for item in seen], [item[3] for item in expected], rtol=1e-4, atol=1e-5)
    (plain_loss, _), plain_grads = plain_value_and_grad(stage, schedule, embed=embed, head=head)(params, batch)
    assert_trees_close((loss, grads), (plain_loss, plain_grads), rtol=1e-5)


def test_effects_of_a_forward_run_once():
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    params, batch = inputs(schedule)
    expected = plain_seen(layer, schedule, params, batch)

    def show(outer, y, data, ctx):
        tap("head", ctx, y)
        return y

    forward = jaxpipe.forward(layer, schedule, jaxpipe.make_mesh(pp=2), embed=embed, head=show)
    _, seen = counted(forward, params, batch)
    assert [item[:3] for item in seen] == [item[:3] for item in expected]


def squared_loss(outer, y, data, ctx):
    return jnp.mean(y**2)


def test_ordered_callbacks_keep_the_order_of_a_rank():
    """And debug callbacks, which JAX orders on one device only, are refused on two, wherever they are."""
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    params, batch = inputs(schedule)

    def stage(w, x, ctx):
        for step in range(2):
            io_callback(
                lambda *at: SEEN.append(tuple(map(int, at))), None, ctx.stage, ctx.microbatch, step, ordered=True
            )
        return jnp.tanh(x @ w)

    mesh = jaxpipe.make_mesh(pp=2)
    SEEN.clear()
    jax.block_until_ready(jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, head=squared_loss))(params, batch))
    jax.effects_barrier()
    for s in range(2):
        mine = [item[1:] for item in SEEN if item[0] == s]
        assert mine == [(m, step) for m in range(MICROBATCHES) for step in range(2)]

    def shown(value):
        jax.debug.print("{}", value, ordered=True)
        return value

    bad_stage = jaxpipe.value_and_grad(lambda w, x, ctx: shown(x) @ w, schedule, mesh, head=squared_loss)
    bad_embed = jaxpipe.value_and_grad(
        lambda w, x, ctx: x @ w, schedule, mesh, embed=lambda outer, data, ctx: shown(data), head=squared_loss
    )
    for name, step in {"a stage": bad_stage, "embed": bad_embed}.items():
        with pytest.raises(ValueError, match=name + r" has an ordered debug.*2 devices.*ordered=False"):
            step(params, batch)


def test_an_embedding_that_asks_the_host_for_its_gradient_is_refused():
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    params, batch = inputs(schedule)

    def embed(outer, data, ctx):
        scale = io_callback(lambda m: np.float32(m), jax.ShapeDtypeStruct((), jnp.float32), ctx.microbatch)
        return data * outer * scale

    step = jaxpipe.value_and_grad(layer, schedule, jaxpipe.make_mesh(pp=2), embed=embed, head=squared_loss)
    with pytest.raises(ValueError, match=r"gradient of embed needs what \['io_callback'\] returned.*in the batch"):
        step(params, batch)


def doubled(x):
    """Scratch memory, as a kernel would use it."""
    y = jax.new_ref(x)
    y[...] *= 2
    y[:, 0] += 1
    return jax.freeze(y)


@cases("ranks, dispatch", [(2, "loops"), (1, "unrolled")], quick=[(2, "loops")])
def test_refs_everywhere(ranks, dispatch):
    schedule = jaxpipe.schedule.build("zb1p" if ranks == 2 else "1f1b", ranks, MICROBATCHES)
    params, batch = inputs(schedule)
    mesh = jaxpipe.make_mesh(pp=ranks)

    def stage(w, x, ctx):
        return jnp.tanh(doubled(x @ w))

    def embed(outer, data, ctx):
        return doubled(data * outer)

    def head(outer, y, data, ctx):
        return jnp.mean(doubled(y * outer) ** 2)

    step = jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, dispatch=dispatch)
    (loss, _), grads = jax.jit(step)(params, batch)
    (plain_loss, _), plain_grads = plain_value_and_grad(stage, schedule, embed=embed, head=head)(params, batch)
    assert_trees_close((loss, grads), (plain_loss, plain_grads), rtol=1e-5)
    outputs, _ = jax.jit(jaxpipe.forward(stage, schedule, mesh, embed=embed))(params, batch)
    expected = embed(params.outer, batch, None)
    for row in params.stages:
        expected = stage(row, expected, None)
    assert_trees_close(outputs, expected, rtol=1e-5)
