"""Whole Flax models with frozen parameters: adapters alone are trained, and the rest comes back as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import from_linen, from_nnx
from tests.jaxpipe.test_whole import VOCABULARY, WIDTH, LinenModel, ScannedNNX, loss_of, make_batch, plain
from tests.plain import assert_trees_close

DOUBLE = {"param_dtype": jnp.float64}


class Adapted(nnx.Module):
    def __init__(self, rngs):
        base = nnx.Linear(WIDTH, WIDTH, rngs=rngs, **DOUBLE)
        self.linear = nnx.LoRA(WIDTH, 2, WIDTH, base_module=base, rngs=rngs, **DOUBLE)
        self.linear.lora_b[...] = jax.random.normal(rngs.params(), (2, WIDTH), jnp.float64)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


class Model(nnx.Module):
    def __init__(self, rngs, count=5):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, **DOUBLE)
        self.layers = nnx.List([Adapted(rngs) for _ in range(count)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


def loss(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"]), batch["targets"])
    return losses.mean(), {}


def pipelined(make=Model, blocks="layers", loss=loss, name="dualpipev", **options):
    schedule = jaxpipe.schedule.build(name, 2, 4)
    return from_nnx(make(nnx.Rngs(0)), schedule, jaxpipe.make_mesh(pp=2), blocks=blocks, loss=loss, **options)


def test_adapters_alone_are_trained(x64):
    batch = make_batch()
    pipe = pipelined(trainable=nnx.LoRAParam)
    (value, _), grads = jax.jit(pipe)(pipe.params, batch)
    model = pipe.merge(pipe.params)
    mean = plain(loss, batch, 4)
    expected, of_adapters = nnx.jit(nnx.value_and_grad(mean, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    merged = pipe.merge(grads)
    assert_trees_close(nnx.to_pure_dict(nnx.state(merged, nnx.LoRAParam)), nnx.to_pure_dict(of_adapters), rtol=1e-10)
    assert merged.layers[0].linear.base_module.kernel.dtype == jax.dtypes.float0
    assert pipe.trainable.outer == {"embed": {"embedding": False}}

    optimizer = jaxpipe.floating_only(optax.adamw(0.1), trainable=pipe.trainable)
    state = optimizer.init(pipe.params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(grads, state, pipe.params)
    after = pipe.merge(optax.apply_updates(pipe.params, updates))
    for kind, changed in ((nnx.LoRAParam, True), (nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), False)):
        states = (nnx.to_pure_dict(nnx.state(each, kind)) for each in (model, after))
        same = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *states))
        assert same and not any(same) if changed else all(same)


def test_filters_of_paths_and_rows(x64):
    """One block's parameters are rows of arrays that others share; scanned models have their rows already."""
    pipe = pipelined(trainable=lambda path, variable: path[-1] == "kernel" or path[0] == "embed")
    assert pipe.trainable.stages["linear"] == {
        "base_module": {"kernel": True, "bias": False},
        "lora_a": False,
        "lora_b": False,
    }
    with pytest.raises(
        ValueError, match=r"trains \['linear'\]\['lora_a'\] of layers\[0\] and freezes that of layers\[1\]"
    ):
        pipelined(trainable=lambda path, variable: path[:2] == ("layers", 0) and path[-1] == "lora_a")
    with pytest.raises(ValueError, match="leaves no floating parameter to train"):
        pipelined(trainable=nnx.BatchStat)
    pipe = pipelined(ScannedNNX, loss=loss_of, trainable=nnx.PathContains("embed"))
    _, grads = jax.eval_shape(pipe, pipe.params, make_batch())
    assert not any(jax.tree.leaves(pipe.trainable.stages))
    _, grads = jax.jit(pipe)(pipe.params, make_batch())
    assert pipe.merge(grads).layers.linear.kernel.dtype == jax.dtypes.float0


@pytest.mark.parametrize("call", [pytest.param("loop", marks=pytest.mark.slow), "scan"])
@pytest.mark.parametrize("given", ["paths", pytest.param("a mask", marks=pytest.mark.slow)])
def test_linen_masks_and_paths(x64, call, given):
    model, batch = LinenModel(call), make_batch()

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    params = jax.jit(model.init)(jax.random.key(0), batch["tokens"])["params"]
    schedule, mesh = jaxpipe.schedule.build("zb1p", 2, 4), jaxpipe.make_mesh(pp=2)
    trainable = {
        "paths": lambda path, leaf: path.endswith("['bias']"),
        "a mask": jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key == "bias", params),
    }[given]
    pipe = from_linen(params, schedule, mesh, blocks="layers", loss=loss, trainable=trainable)
    found = pipe.merge(jax.jit(pipe)(pipe.params, batch)[1])
    expected = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "bias" else np.zeros(leaf.shape, jax.dtypes.float0),
        jax.jit(jax.grad(loss))(params, batch),
    )
    assert_trees_close(found, expected, rtol=1e-10)
