"""Rows of layers as stages equal the plain loop: any number of layers, with keys, losses and functions of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.layer_choice import Choice
from jaxpipe.layers import layered_stages, split_layers, stages_of_mixed_layers, unstack_layers
from tests.cases import cases
from tests.jaxprs import primitives
from tests.plain import assert_trees_close, fold, split_batch

WIDTH, LAYERS, MICROBATCHES = 3, 13, 8
SCHEDULES = {
    "one rank": ("1f1b", 1),
    "gpipe": ("gpipe", 2),
    "1f1b": ("1f1b", 4),
    "interleaved": ("interleaved", 2),
    "zbv": ("zbv", 2),
    "dualpipe": ("dualpipe", 2),
    "dualpipev": ("dualpipev", 2),
}


def dropout(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x, jnp.zeros_like(x)) / 0.8


def layer(params, x, ctx):
    return x + dropout(ctx.rng, jnp.tanh(x @ params["w"])) * jnp.cos(ctx.layer.astype(x.dtype))


def embed(outer, data, ctx):
    return dropout(ctx.rng, data @ outer["in"])


def head(outer, y, data, ctx):
    return jnp.mean((dropout(ctx.rng, y) @ outer["out"] - data) ** 2)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) / 2)


def pipeline(schedule, stage, stacked, outer, batch, key=None, **functions):
    """((loss, aux), gradients)."""
    mesh = jaxpipe.make_mesh(pp=schedule.num_ranks)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, **functions)
    return jax.jit(step)(jaxpipe.Params(stacked, outer), batch, key)


@pytest.fixture(scope="module")
def expected_with_dropout():
    """Arguments and result of the plain program, every key written out."""
    with jax.enable_x64(True):
        layers = [{"w": normal(WIDTH, WIDTH, seed=i)} for i in range(LAYERS)]
        outer = {"in": normal(WIDTH, WIDTH, seed=20), "out": normal(WIDTH, WIDTH, seed=21)}
        batch, key = normal(16, WIDTH, seed=22), jax.random.key(5)

        def plain(layers, outer):
            def loss(m, data):
                x = embed(outer, data, jaxpipe.Context(None, m, fold(key, -1, m), data))
                for i, params in enumerate(layers):
                    x = layer(params, x, jaxpipe.Context(None, m, fold(key, i, m), data, jnp.int32(i)))
                return head(outer, x, data, jaxpipe.Context(None, m, fold(key, -2, m), data))

            return jax.vmap(loss)(jnp.arange(MICROBATCHES), batch.reshape(MICROBATCHES, -1, WIDTH)).mean()

        return layers, outer, batch, key, jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(layers, outer)


@cases("name", SCHEDULES, quick=["dualpipev"])
def test_keys_depend_on_no_schedule(name, expected_with_dropout, x64):
    """13 layers, embedding and head with dropout: the same loss and gradients however stages divide the layers."""
    layers, outer, batch, key, (expected, expected_grads) = expected_with_dropout
    kind, ranks = SCHEDULES[name]
    schedule = jaxpipe.schedule.build(kind, ranks, MICROBATCHES)
    stage, stacked = layered_stages(layer, layers, schedule)
    (loss, _), grads = pipeline(schedule, stage, stacked, outer, batch, key, embed=embed, head=head)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert_trees_close((unstack_layers(grads.stages, LAYERS, schedule), grads.outer), expected_grads, rtol=1e-10)


def test_keys_of_a_plain_program():
    """`Context.make` gives the documented keys; no two of embed, head and layers of two microbatches are the same."""
    key, keys = jax.random.key(1), set()
    for m in (0, 1):
        for stage in range(-1, 9):
            ctx = jaxpipe.Context.make(stage, m, key, None, num_stages=8)
            layer = -2 if stage == 8 else stage
            assert (int(ctx.stage), int(ctx.layer), int(ctx.microbatch)) == (stage, stage, m)
            np.testing.assert_array_equal(jax.random.key_data(ctx.rng), jax.random.key_data(fold(key, layer, m)))
            inside = jaxpipe.Context.make(0, m, key, None, num_stages=2).at_layer(stage)
            assert bool((inside.rng == ctx.rng) == (stage < 8)) and int(inside.layer) == stage
            keys.add(tuple(map(int, jax.random.key_data(ctx.rng))))
    assert len(keys) == 20
    assert jaxpipe.Context.make(3, 0, None, None, num_stages=8).at_layer(4).rng is None


DUALPIPEV = jaxpipe.schedule.build("dualpipev", 2, 4)


def falling(params, x, ctx):
    """Defined above ``b``, with values below it: NaN on its own output."""
    y = params["b"] - 2 + params["w"] * jnp.sqrt(x - params["b"])
    return jaxpipe.Output(y, jnp.mean(y * params["w"]), {"sum": y.sum(), "layers": jax.nn.one_hot(ctx.layer, 10)})


def test_padding_runs_on_the_input_of_its_layer(x64):
    """Stages of 3 and 2 layers that are not defined on their own output: finite gradients, those of the plain loop."""
    layers = [{"w": 0.8 + 0.2 * jax.nn.sigmoid(normal(seed=i)), "b": jnp.asarray(30.0 - 2 * i)} for i in range(10)]
    batch = 30.3 + 0.7 * jax.nn.sigmoid(normal(8, WIDTH))

    def last(outer, y, data, ctx):
        return jnp.mean(y**2)

    def plain(layers):
        total, aux_loss, metrics = 0.0, 0.0, jnp.zeros(())
        for data in split_batch(batch, 4):
            x = data
            for i, params in enumerate(layers):
                output = falling(params, x, jaxpipe.Context(None, None, None, data, jnp.int32(i)))
                x, aux_loss, metrics = output.value, aux_loss + output.aux_loss / 4, metrics + output.metrics["sum"]
            total += last(None, x, data, None) / 4
        return total + aux_loss, (aux_loss, metrics)

    (expected, (aux_loss, total)), expected_grads = jax.value_and_grad(plain, has_aux=True)(layers)
    ctx = jaxpipe.Context(0, 0, None, None, 0)
    assert np.isnan(falling(layers[0], falling(layers[0], batch, ctx).value, ctx).value).all()
    stage, stacked = layered_stages(falling, layers, DUALPIPEV)
    (loss, aux), grads = pipeline(DUALPIPEV, stage, stacked, None, batch, head=last)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(aux["aux_loss"], aux_loss, rtol=1e-12)
    np.testing.assert_allclose(aux["sum"], total, rtol=1e-12)
    np.testing.assert_array_equal(aux["layers"], np.full(10, 4.0))
    assert_trees_close(unstack_layers(grads.stages, 10, DUALPIPEV), expected_grads, rtol=1e-10)
    for stage_grads, count in zip(jaxpipe.unstack_stages(grads.stages, DUALPIPEV), split_layers(10, 4), strict=True):
        jax.tree.map(lambda leaf, count=count: np.testing.assert_array_equal(leaf[count:], 0), stage_grads)


def test_layers_already_stacked():
    """One pytree of rows, with integers and keys among them, gives the stages that a list of layers gives."""
    rows = {
        "w": normal(7, WIDTH, WIDTH).astype(jnp.float32),
        "order": jnp.arange(7 * WIDTH, dtype=jnp.int32).reshape(7, WIDTH) % WIDTH,
        "key": jax.random.split(jax.random.key(0), 7),
    }
    stage, stacked = layered_stages(layer, rows, DUALPIPEV)
    _, from_list = layered_stages(layer, [jax.tree.map(lambda leaf, i=i: leaf[i], rows) for i in range(7)], DUALPIPEV)
    data = functools.partial(
        jax.tree.map, lambda leaf: jax.random.key_data(leaf) if leaf.dtype == rows["key"].dtype else leaf
    )
    assert_trees_close(data(stacked), data(from_list), rtol=0)
    back = unstack_layers(stacked, 7, DUALPIPEV)
    assert_trees_close(data(jax.tree.map(lambda *leaves: jnp.stack(leaves), *back)), data(rows), rtol=0)
    plain = functools.partial(jaxpipe.Context.make, microbatch=0, rng=jax.random.key(1), data=None, num_stages=7)
    x = expected = jnp.ones((2, WIDTH))
    for i in range(7):
        expected = jax.jit(layer)(back[i], expected, plain(i))
    for s, params in enumerate(jaxpipe.unstack_stages(stacked, DUALPIPEV)):
        x = jax.jit(stage)(params, x, jaxpipe.Context.make(s, 0, jax.random.key(1), None, num_stages=4))
    np.testing.assert_allclose(x, expected, rtol=1e-6)


@cases(
    ("count", "turn", "conditional"),
    [(8, 2, False), (10, 2, True), (9, 4, True), (4, 1, False)],
    quick=[(8, 2, False), (9, 4, True)],
)
def test_functions_in_turn(count, turn, conditional, x64):
    """Layers of several functions; a conditional only where a slot has different ones in different stages."""
    functions = [lambda w, x, ctx, k=k: x + [jnp.tanh, jnp.sin, jnp.cos, jax.nn.relu][k](x * w) for k in range(turn)]
    weights, x = normal(count), normal(2, WIDTH)
    stage, stacked = stages_of_mixed_layers(functions, [i % turn for i in range(count)], weights, DUALPIPEV)
    ctx = jaxpipe.Context.make(0, 0, None, None, num_stages=4)
    stages = jaxpipe.unstack_stages(stacked, DUALPIPEV)
    assert ("cond" in primitives(jax.make_jaxpr(stage)(stages[0], x, ctx))) == conditional

    def staged(stages, x):
        for s, params in enumerate(stages):
            x = stage(params, x, jaxpipe.Context.make(s, 0, None, None, num_stages=4))
        return (x**2).sum()

    def plain(weights, x):
        for i in range(count):
            x = functions[i % turn](weights[i], x, None)
        return (x**2).sum()

    got, expected = jax.jit(jax.grad(staged, (0, 1)))(stages, x), jax.jit(jax.grad(plain, (0, 1)))(weights, x)
    grads = unstack_layers(jaxpipe.stack_stages(got[0], DUALPIPEV), count, DUALPIPEV)
    np.testing.assert_allclose(grads, expected[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-12)


@jax.custom_vjp
def doubled(x):
    return x


doubled.defvjp(lambda x: (x, None), lambda _, ct: (2 * ct,))


@jax.custom_vjp
def tripled(x):
    return x


tripled.defvjp(lambda x: (x, None), lambda _, ct: (3 * ct,))

SAME = {
    "equal closures": ([lambda w, x, ctx, c=c: jax.nn.gelu(x * w) * c for c in (2.0, 2.0)], True),
    "constants": ([lambda w, x, ctx, c=c: x * w * c for c in (2.0, 3.0)], False),
    "arrays": ([lambda w, x, ctx, c=c: x * w + np.full(WIDTH, c, np.float32) for c in (2, 3)], False),
    "relu": ([lambda w, x, ctx: jax.nn.relu(x * w), lambda w, x, ctx: jax.nn.relu(x * w)], True),
    "derivative rules": ([lambda w, x, ctx: doubled(x * w), lambda w, x, ctx: tripled(x * w)], False),
    "order": ([lambda w, x, ctx: x - x * w, lambda w, x, ctx: x * w - x], False),
    "in a loop": ([lambda w, x, ctx, c=c: jax.lax.fori_loop(0, c, lambda _, x: x * w, x) for c in (2, 3)], False),
    "nan": ([lambda w, x, ctx, c=c: jnp.where(x > 0, x * w, c) for c in (np.nan, np.nan)], True),
    "recomputed": ([lambda w, x, ctx: jax.checkpoint(lambda x: jnp.tanh(x * w))(x) for _ in "ab"], True),
    "data": ([lambda w, x, ctx: x * w + ctx.data["a"], lambda w, x, ctx: x * w + ctx.data["b"]], False),
}


@pytest.mark.parametrize("name", SAME)
def test_functions_that_compute_the_same_are_one(name):
    functions, same = SAME[name]
    ctx = jaxpipe.Context.make(0, 0, None, dict.fromkeys("ab", jnp.ones(WIDTH)), num_stages=2)
    kinds = Choice(functions, (0, 1)).kinds(jnp.ones(()), jnp.ones((2, WIDTH)), ctx)
    assert kinds == ((0, 0) if same else (0, 1))


def test_bad_layers_are_refused():
    def run(layer, layers):
        stage, stacked = layered_stages(layer, layers, DUALPIPEV)
        stages = jaxpipe.unstack_stages(stacked, DUALPIPEV)
        return stage(stages[0], jnp.ones(3), jaxpipe.Context.make(0, 0, None, None, num_stages=4))

    with pytest.raises(ValueError, match="3 layers for 4 stages"):
        run(layer, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="there are no layers"):
        run(layer, [])
    with pytest.raises(ValueError, match="need the number of layers as leading dimension"):
        run(layer, {"a": jnp.ones((4, 2)), "b": jnp.ones((5, 2))})
    with pytest.raises(ValueError, match=r"the layer maps float32\[3\] to bfloat16\[3\]"):
        run(lambda w, x, ctx: x.astype(jnp.bfloat16), jnp.ones((5, 2)))
    functions = [lambda w, x, ctx: x * w, lambda w, x, ctx: jaxpipe.Output(x * w, metrics={"n": x.sum()})]
    stage, _ = stages_of_mixed_layers(functions, (0, 1, 0, 1), jnp.ones(4), DUALPIPEV)
    with pytest.raises(ValueError, match=r"layer 1 returns .*'n'.*, but layer 0 returns"):
        stage(jnp.ones(1), jnp.ones(3), jaxpipe.Context.make(0, 0, None, None, num_stages=4))
