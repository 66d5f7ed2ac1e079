"""What belongs to a step and to no example: whole in every context, not differentiated, never stashed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import from_linen, from_nnx
from tests.cases import cases
from tests.jaxpipe.test_whole import VOCABULARY, WIDTH, make_batch
from tests.jaxprs import equations
from tests.plain import assert_trees_close

SIZE = 6


def embed(outer, data, ctx):
    return data * outer["scale"] * ctx.step_inputs["scale"]


def stage(params, x, ctx):
    given = ctx.step_inputs
    noise = jax.random.normal(given["key"], x.shape, x.dtype) * given["scale"]
    y = jnp.tanh(x @ (params["w"] * given["mask"])) * jnp.where(given["step"] > 2, 1.0, 0.5) + 0.01 * noise
    return jaxpipe.Output(x + y, aux_loss=(y**2).mean() * given["scale"])


def head(outer, y, data, ctx):
    return ((y * outer["scale"]) ** 2).mean() * ctx.step_inputs["step"]


def make(stages=4):
    rng = np.random.default_rng(0)
    params = jaxpipe.Params(
        {"w": jnp.asarray(rng.normal(size=(stages, SIZE, SIZE)) / 2)}, {"scale": jnp.asarray(rng.normal(size=SIZE))}
    )
    return params, jnp.asarray(rng.normal(size=(16, SIZE)))


def step_inputs(step):
    mask = np.tril(np.ones((SIZE, SIZE)))
    return {"step": step, "scale": 0.1 * step, "mask": jnp.asarray(mask), "key": jax.random.key(step)}


def plain(params, batch, given, microbatches, aux=True):
    losses = []
    for m, data in enumerate(np.split(np.asarray(batch), microbatches)):
        contexts = [
            jaxpipe.Context.make(s, m, None, data, num_stages=4, step_inputs=given) for s in (-1, 0, 1, 2, 3, 4)
        ]
        x, loss = embed(params.outer, data, contexts[0]), 0.0
        for s in range(4):
            x, aux_loss, _ = stage({"w": params.stages["w"][s]}, x, contexts[s + 1])
            loss += aux_loss
        losses.append(loss + head(params.outer, x, data, contexts[-1]))
    return sum(losses) / microbatches


@cases(
    "options",
    [{}, {"shared_ends": True}, {"dispatch": "switch"}],
    quick=[{"shared_ends": True}],
)
def test_equal_the_plain_program_and_compile_once(x64, options):
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2, dp=2)
    params, batch = make()
    run = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, data_axes=("dp",), **options))
    for step in (1, 5):
        given = step_inputs(step)
        (loss, _), grads = run(params, batch, None, given)
        arrays = jax.tree.map(jnp.asarray, given)
        # Each device draws noise for half of a microbatch, the same on both.
        expected, expected_grads = jax.value_and_grad(plain)(params, batch, arrays, 8)
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)
        assert_trees_close(grads, expected_grads, rtol=1e-10)
    assert run._cache_size() == 1


def test_forward_has_them_too(x64):
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)
    run = jax.jit(jaxpipe.forward(lambda w, x, ctx: x * w + ctx.step_inputs, schedule, mesh))
    outputs, _ = run(jaxpipe.Params(jnp.asarray([2.0, 3.0])), jnp.arange(8.0), None, jnp.float64(10))
    np.testing.assert_array_equal(outputs, (np.arange(8) * 2 + 10) * 3 + 10)


def test_nothing_is_stashed_for_a_microbatch(x64):
    """A mask that all share is there all the step long; what is made of it alone is made once."""
    schedule, mesh = jaxpipe.schedule.build("zb1p", 2, 4), jaxpipe.make_mesh(pp=2)

    def masked(params, x, ctx):
        return jnp.tanh(x @ (params * jnp.tanh(ctx.step_inputs)))

    step = jaxpipe.value_and_grad(masked, schedule, mesh, head=lambda outer, y, data, ctx: (y**2).mean())
    traced = jax.make_jaxpr(step)(jaxpipe.Params(jnp.ones((2, 7, 7))), jnp.ones((8, 7)), None, jnp.ones((7, 7)))
    (loop,) = (eqn for eqn, _ in equations(traced) if eqn.primitive.name == "scan")
    carried = [var.aval.shape for var in loop.outvars]
    assert carried.count((7, 7)) == 1  # the gradient's sum
    assert not any(len(shape) == 3 and shape[1:] == (7, 7) for shape in carried)
    within = [
        around
        for eqn, around in equations(traced)
        if eqn.primitive.name == "tanh" and eqn.outvars[0].aval.shape == (7, 7)
    ]
    assert within == [("shard_map",)] * 1


def test_what_is_no_array_is_refused():
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)
    run = jaxpipe.forward(lambda w, x, ctx: x * w, schedule, mesh)
    with pytest.raises(ValueError, match=r"step_inputs\['phase'\] is 'warmup', a str"):
        run(jaxpipe.Params(jnp.ones(2)), jnp.ones(8), None, {"phase": "warmup"})


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, param_dtype=jnp.float64)
        self.layers = nnx.List([Gated(rngs) for _ in range(4)])

    def __call__(self, tokens, gate):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, gate**2)
        return self.embed.attend(x)


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x, gate):
        return x + jnp.tanh(self.linear(x)) * gate


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def test_a_models_loss_takes_them_by_name(x64):
    model, batch = Model(nnx.Rngs(0)), make_batch()
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)

    def loss(model, batch, step_inputs):
        return cross_entropy(model(batch["tokens"], step_inputs["gate"]), batch) * step_inputs["factor"]

    pipe = from_nnx(model, schedule, mesh, blocks="layers", loss=loss)
    step = jax.jit(pipe)
    for gate in (0.5, 2.0):
        given = {"gate": gate, "factor": jnp.float64(3)}
        (value, _), grads = step(pipe.params, batch, None, given)
        expected, expected_grads = nnx.value_and_grad(loss)(model, batch, given)
        assert float(value) == pytest.approx(float(expected), rel=1e-12)
        found = nnx.to_pure_dict(nnx.state(pipe.merge(grads), nnx.Param))
        assert_trees_close(found, nnx.to_pure_dict(expected_grads), rtol=1e-10)
    assert step._cache_size() == 1
    plain = from_nnx(model, schedule, mesh, blocks="layers", loss=lambda model, batch: loss(model, batch, given))
    with pytest.raises(ValueError, match=r"the loss function takes \(model, batch\): give it a parameter"):
        jax.eval_shape(plain, plain.params, batch, None, given)


@cases("keyed", [False, True], quick=[True])
def test_a_linen_models_loss_too(x64, keyed):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens, gate):
            x = nn.Embed(VOCABULARY, WIDTH, param_dtype=jnp.float64)(tokens) * gate
            for _ in range(4):
                x = nn.Dense(WIDTH, param_dtype=jnp.float64)(x)
            return nn.Dense(VOCABULARY, param_dtype=jnp.float64, name="head")(x * gate)

    net, batch = Net(), make_batch()

    def loss(params, batch, step_inputs):
        return cross_entropy(net.apply({"params": params}, batch["tokens"], step_inputs), batch)

    def with_key(params, batch, key, step_inputs):
        assert key is None
        return loss(params, batch, step_inputs)

    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)
    params = net.init(jax.random.key(0), batch["tokens"], 1.0)["params"]
    pipe = from_linen(params, schedule, mesh, blocks="Dense", loss=with_key if keyed else loss)
    (value, _), grads = jax.jit(pipe)(pipe.params, batch, None, 0.7)
    expected, expected_grads = jax.value_and_grad(loss)(params, batch, 0.7)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(pipe.merge(grads), expected_grads, rtol=1e-10)
