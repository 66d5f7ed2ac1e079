"""Batches of any size: the mean is over the real examples, outputs are those of the rows given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import from_nnx
from tests.cases import cases
from tests.plain import assert_trees_close

SIZE = 5


def stage(w, x, ctx):
    return x + jnp.tanh(x @ w)


def embed(outer, data, ctx):
    return data["x"] * outer


def squares(outer, y, data):
    return ((y * outer - data["y"]) ** 2).mean(-1)


def head(outer, y, data, ctx):
    real = data["real"]
    loss = jnp.where(real, squares(outer, y, data), 0).sum() / real.sum(dtype=jnp.int32).astype(y.dtype)
    return jaxpipe.Output(loss, metrics={"examples": real.sum(dtype=jnp.int32)})


def make(size, stages=4):
    rng = np.random.default_rng(0)
    params = jaxpipe.Params(jnp.asarray(rng.normal(size=(stages, SIZE, SIZE)) / 2), jnp.asarray(rng.normal(size=SIZE)))
    return params, {"x": rng.normal(size=(size, SIZE)), "y": jnp.asarray(rng.normal(size=(size, SIZE)))}


@cases("size", [1, 7, 8, 21], quick=[21])
def test_the_mean_is_over_real_examples(x64, size):
    """Some microbatches have few examples, some none, on one of two devices or on both."""
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2, dp=2)
    step = jax.jit(
        jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, data_axes=("dp",), example_mask="real")
    )
    params, batch = make(size)

    def plain(params):
        x = embed(params.outer, batch, None)
        for w in params.stages:
            x = stage(w, x, None)
        return squares(params.outer, x, batch).mean()

    (loss, aux), grads = step(params, batch)
    expected, expected_grads = jax.value_and_grad(plain)(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert int(aux["examples"]) == size
    assert_trees_close(grads, expected_grads, rtol=1e-10)


def test_a_mask_of_the_batch_counts_too(x64):
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)
    step = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, example_mask="real"))
    params, batch = make(9, stages=2)
    (loss, aux), _ = step(params, batch | {"real": np.arange(9) < 6})
    (expected, _), _ = step(params, {name: leaf[:6] for name, leaf in batch.items()})
    assert float(loss) == pytest.approx(float(expected), rel=1e-12) and int(aux["examples"]) == 6
    padded, real = jaxpipe.pad_batch(batch, 4)
    assert isinstance(padded["x"], np.ndarray) and real.tolist() == [True] * 9 + [False] * 3
    assert float(step(params, padded | {"real": real})[0][0]) == float(step(params, batch)[0][0])


def test_forward_returns_the_rows_given(x64):
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2, dp=2)
    run = jax.jit(
        jaxpipe.forward(
            stage, schedule, mesh, embed=embed, data_axes=("dp",),
            head=lambda outer, y, data, ctx: {"square": squares(outer, y, data), "y": y},
        )
    )  # fmt: skip
    params, batch = make(24)
    whole, _ = run(params, batch)
    for size in (1, 6, 17, 24):
        found, _ = run(params, {name: leaf[:size] for name, leaf in batch.items()})
        assert found["y"].shape == (size, SIZE)
        assert_trees_close(found, jax.tree.map(lambda leaf, size=size: leaf[:size], whole), rtol=1e-12)


def test_a_model_of_nnx_with_a_mask(x64):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(SIZE, SIZE, rngs=rngs, param_dtype=jnp.float64) for _ in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def loss(model, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2, where=batch["real"][:, None])

    schedule, model, (_, batch) = jaxpipe.schedule.build("1f1b", 2, 4), Model(nnx.Rngs(0)), make(6)
    pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=2), blocks="layers", loss=loss, example_mask="real")
    (value, _), _ = jax.jit(pipe)(pipe.params, batch)
    assert float(value) == pytest.approx(float(loss(model, batch | {"real": np.ones(6, bool)})), rel=1e-12)


def test_what_does_not_divide_is_refused_with_sizes_that_do():
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2, dp=2)
    params, batch = make(21, stages=2)
    batch["real"] = np.ones(21, bool)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, data_axes=("dp",))
    with pytest.raises(ValueError, match=r"of 21 does not divide .*: use a multiple of 8, such as 16 or 24, or"):
        step(params, batch)
    masked = jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, example_mask="real")
    with pytest.raises(ValueError, match=r"batch\['real'\] is float32\[21\]: leave it out"):
        masked(params, batch | {"real": np.ones(21, np.float32)})
    with pytest.raises(ValueError, match="the batch is a tuple: pass a dict"):
        masked(params, (batch["x"],))
    with pytest.raises(ValueError, match="example_mask=True: give the name"):
        jaxpipe.value_and_grad(stage, schedule, mesh, head=head, example_mask=True)
    with pytest.raises(ValueError, match=r"leaves of shapes \[\(3,\), \(2,\)\]"):
        jaxpipe.pad_batch({"x": np.ones(3), "y": np.ones(2)}, 4)
    counted = jaxpipe.forward(lambda w, x, ctx: jaxpipe.Output(x, metrics={"seen": x.sum()}), schedule, mesh)
    with pytest.raises(ValueError, match=r"a batch of 3 is padded to 4, and the stages' metrics \['seen'\]"):
        jax.eval_shape(counted, jaxpipe.Params(params.stages), np.ones((3, SIZE), np.float32))
