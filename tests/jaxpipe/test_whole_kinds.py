"""Whole models whose blocks have parameters of several structures, from Flax and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.flax import from_linen, from_nnx, linen_stages, nnx_function, nnx_stages, unstack_layers
from tests.cases import cases
from tests.jaxpipe.test_whole import DOUBLE, MICROBATCHES, VOCABULARY, WIDTH, loss_of, make_batch, plain
from tests.plain import assert_trees_close

EXPERTS = 3


class Attention(nnx.Module):
    """Looks back over a window; a local one has narrower keys."""

    def __init__(self, rngs, window, keys):
        self.key = nnx.Linear(WIDTH, keys, use_bias=False, rngs=rngs, **DOUBLE)
        self.value = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs, **DOUBLE)
        self.window = window

    def __call__(self, x, mask):
        key, back = self.key(x), jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
        scores = jnp.where((back >= 0) & (back < self.window), jnp.einsum("bqd,bkd->bqk", key, key), -1e9)
        return jax.nn.softmax(scores) @ (self.value(x) * mask)


class Dense(nnx.Module):
    """Returns activations alone."""

    def __init__(self, rngs, rate=0.0):
        self.attention = Attention(rngs, 8, WIDTH)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs, **DOUBLE)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs, **DOUBLE)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(x, mask)
        return x + self.dropout(self.down(jnp.tanh(self.up(x))))


class Experts(nnx.Module):
    """Returns activations, a loss and figures."""

    def __init__(self, rngs, local=False, rate=0.0):
        self.attention = Attention(rngs, 2 if local else 8, 4 if local else WIDTH)
        self.router = nnx.Linear(WIDTH, EXPERTS, rngs=rngs, **DOUBLE)
        self.experts = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs, **DOUBLE) for _ in range(EXPERTS)])
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(x, mask)
        gates = jax.nn.softmax(self.router(x))
        y = sum(gates[..., i, None] * jnp.tanh(expert(x)) for i, expert in enumerate(self.experts))
        return x + self.dropout(y), (gates**2).mean(), {"on": (gates > 0.4).sum(dtype=jnp.int32)}


class Model(nnx.Module):
    """Tied embeddings; dense blocks first, then experts, local and global in turn."""

    def __init__(self, rngs, dense=3, count=5, rate=0.0):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, **DOUBLE)
        self.layers = nnx.List(
            [Dense(rngs, rate) if index < dense else Experts(rngs, index % 2 == 1, rate) for index in range(count)]
        )

    def __call__(self, tokens):
        x, mask, others = self.embed(tokens), (tokens > 2)[..., None].astype(jnp.float64), []
        for index, layer in enumerate(self.layers):
            x = layer(x, mask)
            if isinstance(x, tuple):
                x, square, figures = x
                others.append(square * (index + 1) + 0.01 * figures["on"].astype(square.dtype))
        return self.embed.attend(x), others


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_nnx_equals_the_plain_model_and_comes_back(x64):
    """5 blocks of three kinds on 2 stages, divided by costs."""
    model, batch = Model(nnx.Rngs(0)), make_batch()
    schedule = jaxpipe.schedule.build("zb1p", 2, MICROBATCHES)
    options = {"blocks": "layers", "loss": loss_of, "layer_costs": [1, 1, 1, 3, 3]}
    pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=2), **options)
    # The stages hold 4 blocks and 1. All have attention.value; three of the first, and the last one, have wide keys.
    attention = pipe.params.stages["attention"]
    assert attention["value"]["kernel"].shape == (2, 4, WIDTH, WIDTH)
    keys = attention["key"]["kernel"]
    assert {kind: leaf.shape for kind, leaf in keys.items()} == {
        "kind_0": (2, 3, WIDTH, WIDTH),
        "kind_1": (2, 1, WIDTH, 4),
    }
    (loss, _), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = nnx.jit(nnx.value_and_grad(plain(loss_of, batch, MICROBATCHES)))(model)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(parameters(pipe.merge(grads)), nnx.to_pure_dict(expected_grads), rtol=1e-10)
    back = pipe.merge(pipe.params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, parameters(back), parameters(model)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, pipe.split(back), pipe.params))


@pytest.mark.slow
def test_made_in_shards_and_divided_over_devices(x64):
    """Two devices for each rank share the batch and, by one spec for all kinds, the columns of a kernel."""
    batch = make_batch()
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    specs = jaxpipe.Params({"attention": {"value": P("pp", None, None, "tp"), "key": P("pp", None, None, "tp")}}, P())
    specs = specs._replace(stages={**dict.fromkeys(("up", "down", "router", "experts"), P("pp")), **specs.stages})
    pipe = from_nnx(
        lambda: Model(nnx.Rngs(0), dense=1, count=3),
        schedule,
        jaxpipe.make_mesh(pp=2, tp=2),
        blocks="layers",
        loss=loss_of,
        specs=specs,
    )
    kernels = pipe.params.stages["attention"]["key"]["kernel"]
    assert {kind: leaf.sharding.spec for kind, leaf in kernels.items()} == {
        "kind_0": P("pp", None, None, "tp"),
        "kind_1": P("pp", None, None, "tp"),
    }
    model = pipe.merge(pipe.params)
    made = parameters(Model(nnx.Rngs(0), dense=1, count=3))
    assert_trees_close(parameters(model), made, rtol=1e-6)
    (loss, _), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = nnx.value_and_grad(plain(loss_of, batch, MICROBATCHES))(model)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(parameters(pipe.merge(grads)), nnx.to_pure_dict(expected_grads), rtol=1e-10)


@pytest.mark.slow
def test_dropout_depends_on_the_key_alone(x64):
    """Not on how many stages the blocks of several kinds are divided over."""
    model, batch, found = Model(nnx.Rngs(0), dense=1, count=3, rate=0.3), make_batch(), []
    for ranks in (1, 2):
        schedule = jaxpipe.schedule.build("1f1b", ranks, MICROBATCHES)
        pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=ranks), blocks="layers", loss=loss_of)
        found.append([float(jax.jit(pipe)(pipe.params, batch, jax.random.key(key))[0][0]) for key in (0, 1)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert abs(found[0][0] - found[0][1]) > 1e-4


class LinenDense(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return x + nn.Dense(WIDTH, name="down", **DOUBLE)(jnp.tanh(nn.Dense(2 * WIDTH, name="up", **DOUBLE)(x))) * mask


class LinenGated(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, mask):
        gate = jax.nn.sigmoid(nn.Dense(self.width, name="gate", **DOUBLE)(x))
        return x + nn.Dense(WIDTH, name="down", **DOUBLE)(gate * nn.Dense(self.width, name="up", **DOUBLE)(x)) * mask


def linen_blocks():
    return [LinenDense(), LinenDense(), LinenGated(4), LinenGated(6), LinenGated(4)]


class LinenModel(nn.Module):
    def setup(self):
        self.table = nn.Embed(VOCABULARY, WIDTH, **DOUBLE)
        self.layers = linen_blocks()

    def __call__(self, tokens):
        x, mask = self.table(tokens), (tokens > 2)[..., None].astype(jnp.float64)
        for layer in self.layers:
            x = layer(x, mask)
        return self.table.attend(x)


@pytest.mark.slow
def test_linen_equals_the_plain_model_and_comes_back(x64):
    model, batch = LinenModel(), make_batch()

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    params = model.init(jax.random.key(0), batch["tokens"])["params"]
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    pipe = from_linen(params, schedule, jaxpipe.make_mesh(pp=2), blocks="layers", loss=loss)
    assert set(pipe.params.stages["up"]["kernel"]) == {"kind_0", "kind_1", "kind_2"}
    assert pipe.params.stages["down"]["bias"].shape == (2, 3, WIDTH)
    (value, _), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = jax.value_and_grad(loss)(params, batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(pipe.merge(grads), expected_grads, rtol=1e-10)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, pipe.merge(pipe.params), params))


class Compact(nn.Module):
    """Blocks named by their classes: LinenDense_0, LinenGated_0, LinenGated_1, LinenDense_1."""

    @nn.compact
    def __call__(self, x):
        for block in (LinenDense, LinenGated, LinenGated, LinenDense):
            x = (block(4) if block is LinenGated else block())(x, jnp.ones((), x.dtype))
        return x


@pytest.mark.parametrize(("blocks", "message"), [
    (["LinenDense_0", "LinenGated", "LinenDense_1"], None),
    (["LinenDense", "LinenGated"], "the loss calls LinenDense_0, LinenGated_0, LinenGated_1, LinenDense_1"),
    (["LinenDense", "Dense"], "neither Dense_0, Dense_1, .* nor an entry Dense"),
    (["LinenDense", "decoder.LinenGated"], "name the blocks of one module"),
    ("LinenDense", "LinenDense_1 is not called with what LinenDense_0 returns"),
])  # fmt: skip
def test_linen_blocks_of_several_names(x64, blocks, message):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 5, WIDTH)))
    params = Compact().init(jax.random.key(0), x)["params"]

    def loss(params, batch):
        return (Compact().apply({"params": params}, batch) ** 2).mean()

    def run():
        schedule = jaxpipe.schedule.build("1f1b", 2, 2)
        pipe = from_linen(params, schedule, jaxpipe.make_mesh(pp=2), blocks=blocks, loss=loss)
        return pipe, *jax.jit(pipe)(pipe.params, x)

    if message is not None:
        with pytest.raises(ValueError, match=message):
            run()
        return
    pipe, (value, _), grads = run()
    expected, expected_grads = jax.value_and_grad(loss)(params, x)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(pipe.merge(grads), expected_grads, rtol=1e-10)


@pytest.mark.slow
def test_frozen_parameters_of_some_kinds(x64):
    """What all blocks have is trained, and what only some have; nothing else has a gradient."""
    model, batch = Model(nnx.Rngs(0), dense=1, count=3), make_batch()
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    _, expected = nnx.value_and_grad(plain(loss_of, batch, MICROBATCHES))(model)
    expected = dict(nnx.to_flat_state(expected))
    trainable = nnx.Any(nnx.PathContains("value"), nnx.PathContains("router"))
    mesh = jaxpipe.make_mesh(pp=2)
    pipe = from_nnx(model, schedule, mesh, blocks="layers", loss=loss_of, trainable=trainable)
    _, grads = jax.jit(pipe)(pipe.params, batch)
    grads = dict(nnx.to_flat_state(nnx.state(pipe.merge(grads), nnx.Param)))
    trained = [path for path, leaf in grads.items() if leaf.get_value().dtype != jax.dtypes.float0]
    assert sum("value" in path for path in trained) == 3  # a kernel each
    assert sum("router" in path for path in trained) == len(trained) - 3 == 4  # two with a kernel and a bias
    for path in trained:
        np.testing.assert_allclose(grads[path].get_value(), expected[path].get_value(), rtol=1e-10, atol=1e-14)


@cases("num_layers", [None, 5], quick=[5])
@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_modules_of_several_kinds_as_stages(x64, library, num_layers):
    """One of each stage, or 5 layers on 2 stages."""
    count = num_layers or 2
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    x, mask = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, WIDTH))), jnp.ones((2, 5, 1), jnp.float64)
    options = {"num_layers": num_layers, "arguments": lambda ctx: (ctx.data,)}
    if library == "nnx":
        makers = [Dense, Dense, lambda rngs: FirstOf(Experts(rngs))] if num_layers else [Dense]
        makers += [lambda rngs: FirstOf(Experts(rngs, local=True))] * (count - len(makers))
        stage, stacked = nnx_stages(makers, schedule, nnx.Rngs(0), **options)
        modules = [make(nnx.Rngs(0)) for make in makers]
        layers = [lambda params, x, module=module: nnx_function(module)(params, x, mask) for module in modules]
    else:
        modules = linen_blocks()[-count:]
        stage, stacked = linen_stages(modules, schedule, jax.random.key(0), x, data=mask, **options)
        layers = [lambda params, x, module=module: module.apply({"params": params}, x, mask) for module in modules]
    params, expected, found = unstack_layers(stacked, stage, schedule), x, x
    for layer, each in zip(layers, params, strict=True):
        expected = layer(each, expected)
    for s, each in enumerate(jaxpipe.unstack_stages(stacked, schedule)):
        found = stage(each, found, jaxpipe.Context.make(s, 0, None, mask, num_stages=2))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


class FirstOf(nnx.Module):
    """A module's activations alone."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x, mask):
        return self.inner(x, mask)[0]


def test_wrong_numbers_of_modules_and_costs_are_refused(x64):
    schedule, rngs = jaxpipe.schedule.build("1f1b", 2, 4), nnx.Rngs(0)
    with pytest.raises(ValueError, match="3 functions for 2 stages or layers"):
        nnx_stages([Dense] * 3, schedule, rngs)
    with pytest.raises(ValueError, match="pass num_layers too"):
        nnx_stages(Dense, schedule, rngs, layer_costs=[1, 2])
    with pytest.raises(ValueError, match="2 costs for 5 layers"):
        mesh = jaxpipe.make_mesh(pp=2)
        from_nnx(Model(rngs, count=5), schedule, mesh, blocks="layers", loss=loss_of, layer_costs=[1, 2])
