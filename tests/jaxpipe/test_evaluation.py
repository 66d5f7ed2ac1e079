"""Evaluation beside training: the same loss and metrics of the same parameters, and nothing else."""

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import from_linen, from_nnx
from tests.jaxpipe.runtime.models import token_batch, token_embed, token_head, token_params, token_stage, token_weight
from tests.jaxpipe.test_whole import DOUBLE, VOCABULARY, WIDTH, Model, loss_of, make_batch, plain
from tests.jaxprs import primitives
from tests.plain import plain_value_and_grad

MODEL = {"embed": token_embed, "head": token_head, "weight": token_weight}


@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [
        pytest.param("1f1b", 1, {}, marks=pytest.mark.slow),
        pytest.param("dualpipe", 2, {}, marks=pytest.mark.slow),
        pytest.param("zb1p", 2, {"dispatch": "switch", "order": "storage"}, marks=pytest.mark.slow),
        ("dualpipev", 2, {"shared_ends": True}),
    ],
)
def test_loss_and_metrics_are_the_steps(x64, name, ranks, options):
    """Weighted microbatches, auxiliary losses, metrics of stages and of the head, dropout by the same keys."""
    schedule, mesh = jaxpipe.schedule.build(name, ranks, 4), jaxpipe.make_mesh(pp=ranks)
    step = jaxpipe.value_and_grad(token_stage, schedule, mesh, **MODEL, **options)
    params, batch, key = token_params(schedule), token_batch(8), jax.random.key(0)
    evaluate = jax.jit(step.evaluation)
    (loss, aux), (trained, trained_aux) = evaluate(params, batch, key), jax.jit(step)(params, batch, key)[0]
    assert float(loss) == pytest.approx(float(trained), rel=1e-14)
    assert sorted(aux) == sorted(trained_aux)
    for metric, value in aux.items():
        np.testing.assert_allclose(value, trained_aux[metric], rtol=1e-12, err_msg=metric)
    if options.get("order") != "storage":
        (expected, _), _ = plain_value_and_grad(token_stage, schedule, **MODEL)(params, batch, key)
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    again = jax.jit(step.evaluate)(params, batch, key)[0]
    assert float(again) == float(loss)
    assert step.evaluation.__name__ == f"{name}_{ranks}x4_evaluation"


def test_data_parallel_padded_and_with_step_inputs(x64):
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2, dp=2)

    def stage(w, x, ctx):
        y = jnp.tanh(x @ w) * ctx.step_inputs
        return jaxpipe.Output(x + y, aux_loss=(y**2).mean())

    def head(outer, y, data, ctx):
        return ((y**2).mean(-1)).mean(where=data["real"])

    step = jaxpipe.value_and_grad(
        stage, schedule, mesh, embed=lambda outer, data, ctx: data["x"], head=head, data_axes=("dp",),
        example_mask="real",
    )  # fmt: skip
    params = jaxpipe.Params(jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6))))
    batch = {"x": np.random.default_rng(1).normal(size=(13, 6))}
    (expected, aux), _ = jax.jit(step)(params, batch, None, 0.5)
    loss, found = jax.jit(step.evaluation)(params, batch, None, 0.5)
    assert float(loss) == pytest.approx(float(expected), rel=1e-14)
    assert float(found["aux_loss"]) == pytest.approx(float(aux["aux_loss"]), rel=1e-14)


def test_it_is_the_forward_pass_alone_with_the_same_arguments():
    """The step's parameters as they are, less memory than the step, and no products but the forward's."""
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2)

    def stage(w, x, ctx):
        return jnp.tanh(x @ w)

    step = jaxpipe.value_and_grad(
        stage, schedule, mesh, head=lambda outer, y, data, ctx: (y.astype(jnp.float32) ** 2).mean(),
        compute_dtype=jnp.bfloat16, order="storage",
    )  # fmt: skip
    params, batch = jaxpipe.Params(jnp.ones((4, 64, 64))), jnp.ones((64, 64))
    train, evaluate = (jax.jit(each).lower(params, batch).compile() for each in (step, step.evaluation))
    assert evaluate.input_shardings == train.input_shardings
    memory, of_step = evaluate.memory_analysis(), train.memory_analysis()
    assert memory.argument_size_in_bytes == of_step.argument_size_in_bytes
    assert memory.temp_size_in_bytes < of_step.temp_size_in_bytes
    assert memory.output_size_in_bytes < 64
    products = [
        primitives(jax.make_jaxpr(each)(params, batch)).count("dot_general") for each in (step, step.evaluation)
    ]
    assert products[1] == 2 and products[0] > 3 * products[1]  # a forward of each chunk, and branches with backwards


def test_a_forward_pass_and_its_gradient_are_refused():
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)
    with pytest.raises(ValueError, match=r"jaxpipe\.forward has no loss to evaluate"):
        _ = jaxpipe.forward(lambda w, x, ctx: x * w, schedule, mesh).evaluation
    step = jaxpipe.value_and_grad(lambda w, x, ctx: x * w, schedule, mesh, head=lambda outer, y, data, ctx: y.mean())
    with pytest.raises(ValueError, match="an evaluation cannot be differentiated"):
        jax.grad(lambda params: step.evaluate(params, jnp.ones(8))[0])(jaxpipe.Params(jnp.ones(2)))


@pytest.mark.slow
def test_a_model_of_nnx_without_dropout_and_with_another_loss(x64):
    batch, schedule, mesh = make_batch(), jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2)
    model = Model(nnx.Rngs(0), rate=0.5)
    pipe = from_nnx(model, schedule, mesh, blocks="decoder.layers", loss=loss_of)
    key = jax.random.key(1)
    trained = jax.jit(pipe)(pipe.params, batch, key)[0][0]
    assert float(jax.jit(pipe.evaluate)(pipe.params, batch, key)[0]) == pytest.approx(float(trained), rel=1e-14)
    with pytest.raises(ValueError, match="without a key"):
        jax.eval_shape(pipe.evaluate, pipe.params, batch)
    model.eval()
    expected = plain(loss_of, batch, 4)(model)
    loss, aux = jax.jit(pipe.evaluation(model))(pipe.params, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert int(aux["targets"]) == int(batch["targets"].sum())

    def accuracy(model, batch):
        return 1.0 - (model(batch["tokens"])[0].argmax(-1) == batch["targets"]).mean(dtype=jnp.float64)

    found, _ = jax.jit(pipe.evaluation(model, loss=accuracy))(pipe.params, batch)
    assert float(found) == pytest.approx(float(accuracy(model, batch)), rel=1e-12)
    made = pipe.evaluation(lambda: Model(nnx.Rngs(1)))
    assert float(jax.jit(made)(pipe.params, batch)[0]) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match="must be alike"):
        pipe.evaluation(Model(nnx.Rngs(0), count=7))


def test_a_model_of_linen_by_its_loss(x64):
    class Net(nn.Module):
        deterministic: bool

        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(VOCABULARY, WIDTH, **DOUBLE)(tokens)
            for index in range(4):
                x = Layer(self.deterministic, name=f"Layer_{index}")(x)
            return nn.Dense(VOCABULARY, **DOUBLE)(x)

    class Layer(nn.Module):
        deterministic: bool

        @nn.compact
        def __call__(self, x):
            return x + nn.Dropout(0.5, deterministic=self.deterministic)(jnp.tanh(nn.Dense(WIDTH, **DOUBLE)(x)))

    def loss_with(net):
        def loss(params, batch, key):
            logits = net.apply({"params": params}, batch["tokens"], rngs=None if key is None else {"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

        return loss

    batch, schedule, mesh = make_batch(), jaxpipe.schedule.build("zb1p", 2, 4), jaxpipe.make_mesh(pp=2)
    params = Net(True).init(jax.random.key(0), batch["tokens"])["params"]
    pipe = from_linen(params, schedule, mesh, blocks="Layer", loss=loss_with(Net(False)))
    evaluate = jax.jit(pipe.evaluation(loss=loss_with(Net(True))))
    expected = loss_with(Net(True))(params, batch, None)
    assert float(evaluate(pipe.params, batch)[0]) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match="a Linen model is what the loss calls"):
        pipe.evaluation(Net(True))


def test_a_pipelined_model_keeps_no_second_copy(x64):
    """What the user lets go of is freed: the pipeline's parameters are the only ones."""
    model = Model(nnx.Rngs(0))
    pipe = from_nnx(
        model, jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2), blocks="decoder.layers", loss=loss_of
    )
    kernel = weakref.ref(model.decoder.layers[0].linear.kernel.get_value())
    table = weakref.ref(model.embed.embedding.get_value())
    del model
    gc.collect()
    assert kernel() is None and table() is None
    assert pipe.merge(pipe.params).decoder.layers[0].linear.kernel.shape == (WIDTH, WIDTH)
