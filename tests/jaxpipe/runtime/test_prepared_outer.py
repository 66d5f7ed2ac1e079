"""What ``prepare`` makes of outer parameters: once a step, and gradients of its sums return once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.flax import from_nnx
from tests.jaxprs import primitives
from tests.plain import assert_trees_close

PP, EP, WIDTH, MICROBATCHES = 2, 2, 4, 4


def gathered(outer):
    """The output matrix of its rows on all devices."""
    return {**outer, "output": jax.lax.all_gather(outer["output"], "ep", tiled=True)}


def stage(w, x, ctx):
    return x + jnp.tanh(x @ w)


def embed(outer, data, ctx):
    return data @ outer["in"]


def head(outer, y, data, ctx):
    return jnp.mean(jnp.sin(y @ outer["output"]) ** 2)


def make(name, dtype=jnp.float64, head=head, **options):
    schedule = jaxpipe.schedule.build(name, PP, MICROBATCHES)
    rng = np.random.default_rng(0)
    params = jaxpipe.Params(
        jnp.asarray(rng.normal(size=(schedule.num_stages, WIDTH, WIDTH)) / 2, dtype),
        {"in": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), dtype),
         "output": jnp.asarray(rng.normal(size=(WIDTH, 6)), dtype)},
    )  # fmt: skip
    pipeline = jaxpipe.value_and_grad(
        stage, schedule, jaxpipe.make_mesh(pp=PP, ep=EP), embed=embed, head=head, data_axes=("ep",),
        **{"prepare": gathered, "specs": jaxpipe.Params(P("pp"), {"in": P(), "output": P("ep")}), **options},
    )  # fmt: skip
    return pipeline, params, jnp.asarray(rng.normal(size=(16, WIDTH)), dtype)


def plain(params, x):
    x = x @ params.outer["in"]
    for w in params.stages:
        x = stage(w, x, None)
    return head(params.outer, x, None, None)


@pytest.mark.parametrize("name", ["dualpipev", pytest.param("1f1b", marks=pytest.mark.slow)])
def test_equals_the_plain_program(x64, name):
    pipeline, params, x = make(name)
    (loss, _), grads = jax.jit(pipeline)(params, x)
    expected, expected_grads = jax.value_and_grad(plain)(params, x)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert_trees_close(grads, expected_grads, rtol=1e-10)
    assert grads.outer["output"].sharding.spec[0] == "ep"


def test_a_frozen_matrix_with_trained_adapters(x64):
    """`prepare` adds them: gradients of the sum are theirs, and the matrix has none."""

    def adapted(outer):
        return {**outer, "output": outer["output"] + outer["a"] @ outer["b"], "scale": 2.0}

    def scaled(outer, y, data, ctx):
        return head(outer, y, data, ctx) * outer["scale"]

    frozen = {"in": False, "output": False, "scale": False, "a": True, "b": True}
    trainable = jaxpipe.Params(True, frozen)
    pipeline, params, x = make("1f1b", head=scaled, prepare=adapted, specs=None, trainable=trainable)
    rng = np.random.default_rng(1)
    adapters = {"a": jnp.asarray(rng.normal(size=(WIDTH, 2))), "b": jnp.asarray(rng.normal(size=(2, 6)))}
    params = params._replace(outer={**params.outer, **adapters, "scale": jnp.ones(())})
    (loss, _), grads = jax.jit(pipeline)(params, x)

    def of(adapters):
        outer = adapted({**params.outer, **adapters})
        return 2 * plain(params._replace(outer=outer), x)

    expected, expected_grads = jax.value_and_grad(of)(adapters)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert_trees_close({name: grads.outer[name] for name in adapters}, expected_grads, rtol=1e-10)


class Tower(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.output = nnx.Linear(WIDTH, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def test_a_module_gets_what_is_prepared():
    """In training and in evaluation, of the trained model and of another."""

    def doubled(outer):
        return jax.tree.map(lambda shard: 2 * jax.lax.all_gather(shard, "ep", tiled=True), outer)

    def loss(model, x):
        return jnp.mean(jnp.sin(model(x)))

    model, x = Tower(), jnp.asarray(np.random.default_rng(0).normal(size=(8, WIDTH)), jnp.float32)
    pipe = from_nnx(
        model, jaxpipe.schedule.build("1f1b", PP, 2), jaxpipe.make_mesh(pp=PP, ep=EP), blocks="layers", loss=loss,
        data_axes=("ep",), specs=jaxpipe.Params(P("pp"), P("ep")), prepare=doubled,
    )  # fmt: skip
    (found, _), grads = jax.jit(pipe)(pipe.params, x)
    evaluated = [jax.jit(step)(pipe.params, x)[0] for step in (pipe.evaluate, pipe.evaluation(model))]

    def of(kernel):
        y = x
        for layer in model.layers:
            y = layer(y)
        return jnp.mean(jnp.sin(y @ (2 * kernel)))

    expected, expected_grad = jax.value_and_grad(of)(model.output.kernel[...])
    np.testing.assert_allclose([found, *evaluated], [expected] * 3, rtol=1e-6)
    (grad,) = jax.tree.leaves(grads.outer)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_gathers_once_a_step(x64):
    pipeline, params, x = make("1f1b", dispatch="loops")
    body = jax.make_jaxpr(pipeline)(params, x)
    (mapped,) = (eqn.params["jaxpr"] for eqn in body.eqns if eqn.primitive.name == "shard_map")
    loops = [eqn.params["jaxpr"].jaxpr for eqn in mapped.eqns if eqn.primitive.name == "scan"]
    assert "all_gather" in {eqn.primitive.name for eqn in mapped.eqns}
    assert not {"all_gather", "reduce_scatter"} & {name for loop in loops for name in primitives(loop)}


def test_the_plan_has_the_matrix_and_the_sum_of_its_gradient_whole(x64):
    """Each in the width of what is there: 24 numbers, of which a device's parameters are half."""
    for dtype, size in ((jnp.float64, 8), (jnp.float32, 4)):
        pipeline, params, x = make("1f1b", dtype, dispatch="loops")
        without = make("1f1b", dtype, dispatch="loops", prepare=None, head=lambda outer, y, data, ctx: (y**2).mean())[0]
        memory, other = (jaxpipe.plan(step, params, x, "H100").memory for step in (pipeline, without))
        assert memory.working - other.working == 24 * size
        assert memory.gradients - other.gradients == 12 * size


def test_sums_are_not_narrowed_on_their_way_back():
    """Of two devices' sums of 257, which bfloat16 cannot hold, comes 514, which it cannot hold either."""

    def narrow(outer):
        return {**outer, "output": jax.lax.all_gather(outer["output"].astype(jnp.bfloat16), "ep", tiled=True)}

    def summing(outer, y, data, ctx):
        return outer["output"].astype(jnp.float32).sum() * data.sum()

    pipeline, params, x = make("1f1b", jnp.float32, head=summing, prepare=narrow)
    x = jnp.zeros_like(x).at[::2, 0].set(jnp.asarray([64.0, 64, 64, 65] * 2))
    (_, _), grads = jax.jit(pipeline)(params, x)
    np.testing.assert_array_equal(grads.outer["output"], np.full((WIDTH, 6), 514 / 8))


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda outer: outer["in"], {}, "returns a tree of the same structure"),
        (lambda outer: {**outer, "in": jnp.zeros(3, jnp.int32)}, {}, r"int32 of outer\['in'\], which is float32"),
        (gathered, {"fsdp_axis": "ep"}, "leave one of both out"),
        (lambda: None, {}, r"called as prepare\(outer\)"),
    ],
)
def test_bad_functions_are_refused(prepare, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline, params, x = make("1f1b", jnp.float32, prepare=prepare, **options)
        jax.eval_shape(pipeline, params, x)
