"""Whole Flax models as pipelines: the plain loss function's numbers, whatever the model does round its blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.flax import from_linen, from_nnx
from tests.cases import cases
from tests.plain import assert_trees_close

WIDTH, VOCABULARY, LENGTH, SEQUENCES, MICROBATCHES = 8, 16, 5, 8, 4
DOUBLE = {"param_dtype": jnp.float64}


class Block(nnx.Module):
    """Takes a mask and a flag; has a table of its own, and says how many units are on."""

    def __init__(self, rngs, index=0, rate=0.0, dtype=None):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, dtype=dtype, **DOUBLE)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.table = jnp.linspace(0.0, 1.0, WIDTH) * (index + 1)

    def __call__(self, x, mask, *, scaled=False):
        y = jnp.tanh(self.linear(x) + self.table.astype(x.dtype)) * mask
        return x + self.dropout(y * (2.0 if scaled else 1.0)), (y**2).mean(), {"on": (y > 0).sum()}


class Norm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.linspace(0.5, 1.5, WIDTH))

    def __call__(self, x):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * self.scale[...]


class Decoder(nnx.Module):
    def __init__(self, rngs, count, *options):
        self.layers = nnx.List([Block(rngs, index, *options) for index in range(count)])


class Model(nnx.Module):
    """Tied embeddings, a residual round all blocks, masks that differ, losses of blocks; calls blocks in some way."""

    def __init__(self, rngs, count=6, call="loop", rate=0.0, dtype=None):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, dtype=dtype, **DOUBLE)
        self.decoder = Decoder(rngs, count, rate, dtype)
        self.norm = Norm()
        self.call = call

    def __call__(self, tokens):
        start = x = self.embed(tokens)
        mask = (tokens > 2)[..., None].astype(x.dtype)
        gate = jax.nn.sigmoid(self.norm(x)).mean(
            -1, keepdims=True
        )  # made with parameters: it passes from stage to stage

        def run(block, x, mask):
            return block(x, mask, scaled=self.call == "scaled")

        run = {"remat": nnx.remat(run), "jit": nnx.jit(run)}.get(self.call, run)
        others = []
        for index, block in enumerate(self.decoder.layers):
            x, square, counts = run(block, x, mask * gate if index % 2 else mask)
            others.append(square * (index + 1) + 0.01 * counts["on"].astype(square.dtype))
        return self.embed.attend(self.norm(x + 0.1 * start)), others


def loss_of(model, batch):
    logits, others = model(batch["tokens"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return losses.mean() + 0.1 * sum(others) ** 2, {"targets": batch["targets"].sum()}


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (SEQUENCES, LENGTH + 1))
    return {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}


def plain(loss, batch, parts):
    """The mean over microbatches."""
    split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)

    def mean(model):
        losses = [loss(model, jax.tree.map(lambda leaf, i=i: leaf[i], split))[0] for i in range(parts)]
        return sum(losses) / parts

    return mean


@cases(("name", "call"), [
    pytest.param("dualpipev", "loop", marks=pytest.mark.slow),
    ("1f1b", "remat"),
    *(pytest.param(name, call, marks=pytest.mark.slow) for name, call in (
        ("1f1b", "loop"), ("1f1b", "scaled"), ("1f1b", "jit"), ("dualpipev", "remat"), ("dualpipev", "jit"),
    )),
    ("dualpipev", "scaled"),
], quick=[("dualpipev", "scaled")])  # fmt: skip
def test_nnx_equals_the_plain_model(x64, name, call):
    model, batch = Model(nnx.Rngs(0), call=call), make_batch()
    schedule = jaxpipe.schedule.build(name, 2, MICROBATCHES)
    pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=2), blocks="decoder.layers", loss=loss_of)
    (loss, aux), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = nnx.value_and_grad(plain(loss_of, batch, MICROBATCHES))(model)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert int(aux["targets"]) == int(batch["targets"].sum())
    found = nnx.state(pipe.merge(grads), nnx.Param)
    assert_trees_close(nnx.to_pure_dict(found), nnx.to_pure_dict(expected_grads), rtol=1e-10)


@pytest.mark.slow  # the guide of whole models does all of it
def test_data_parallel_uneven_and_made_in_shards(x64):
    """7 blocks on 4 stages, two devices for each rank; a model that no device has ever held whole."""
    batch = make_batch()
    schedule = jaxpipe.schedule.build("dualpipev", 2, MICROBATCHES)

    def make():
        return Model(nnx.Rngs(0), count=7)

    options = {"blocks": "decoder.layers", "loss": loss_of, "data_axes": ("dp",)}
    pipe = from_nnx(make, schedule, jaxpipe.make_mesh(pp=2, dp=2), **options)
    assert all(leaf.sharding.spec[0] == "pp" for leaf in jax.tree.leaves(pipe.params.stages))
    model = pipe.merge(pipe.params)
    assert_trees_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.to_pure_dict(nnx.state(make(), nnx.Param)), rtol=1e-6
    )
    (loss, _), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = nnx.value_and_grad(plain(loss_of, batch, SEQUENCES))(model)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    found = nnx.to_pure_dict(nnx.state(pipe.merge(grads), nnx.Param))
    assert_trees_close(found, nnx.to_pure_dict(expected_grads), rtol=1e-10)
    again = pipe.split(model)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, pipe.params))


@pytest.mark.slow
def test_dropout_depends_on_the_key_alone(x64):
    """Not on schedule, ranks or stages; another key gives another loss, and none a sentence."""
    model, batch, found = Model(nnx.Rngs(0), rate=0.2), make_batch(), []
    for name, ranks in (("1f1b", 1), ("1f1b", 2), ("dualpipev", 2)):
        schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
        pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=ranks), blocks="decoder.layers", loss=loss_of)
        step = jax.jit(pipe)
        found.append([float(step(pipe.params, batch, jax.random.key(key))[0][0]) for key in (0, 1)])
    np.testing.assert_allclose(found, [found[0]] * 3, rtol=1e-5)
    assert abs(found[0][0] - found[0][1]) > 1e-4
    with pytest.raises(ValueError, match="without a key: call step"):
        step(pipe.params, batch)


def test_bfloat16_and_the_models_eval(x64):
    model, batch = Model(nnx.Rngs(0), rate=0.5, dtype=jnp.bfloat16), make_batch()
    model.eval()
    exact = Model(nnx.Rngs(0))
    schedule = jaxpipe.schedule.build("dualpipev", 2, MICROBATCHES)
    options = {"blocks": "decoder.layers", "compute_dtype": jnp.bfloat16}

    def loss(model, batch):
        return loss_of(model, batch)[0].astype(jnp.float32)

    pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=2), loss=loss, **options)
    (value, _), grads = jax.jit(pipe)(pipe.params, batch)
    assert float(value) == pytest.approx(float(plain(loss_of, batch, MICROBATCHES)(exact)), rel=2e-2)
    assert [leaf.dtype for leaf in jax.tree.leaves(grads)] == [leaf.dtype for leaf in jax.tree.leaves(pipe.params)]


class ScannedNNX(nnx.Module):
    """Blocks made by nnx.vmap and called in nnx.scan."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, **DOUBLE)
        make = nnx.vmap(lambda rngs: Block(rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=6)(make)(rngs)

    def __call__(self, tokens):
        mask = (tokens > 2)[..., None].astype(jnp.float64)

        @nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=(nnx.Carry, 0))
        def run(x, block, mask):
            x, square, _ = block(x, mask)
            return x, square

        x, squares = run(self.embed(tokens), self.layers, mask)
        return self.embed.attend(x), [squares.sum()]


def test_scanned_nnx_equals_the_plain_model(x64):
    model, batch = ScannedNNX(nnx.Rngs(0)), make_batch()
    schedule = jaxpipe.schedule.build("dualpipev", 2, MICROBATCHES)
    pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=2), blocks="layers", loss=loss_of)
    (loss, _), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = nnx.value_and_grad(plain(loss_of, batch, MICROBATCHES))(model)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    found = nnx.to_pure_dict(nnx.state(pipe.merge(grads), nnx.Param))
    assert_trees_close(found, nnx.to_pure_dict(expected_grads), rtol=1e-10)


class Changed(nnx.Module):
    """What a cut must refuse."""

    def __init__(self, rngs, wrong):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4)])
        self.wrong = wrong
        if wrong == "shared":
            self.layers[1].kernel = self.layers[0].kernel

    def __call__(self, tokens):
        x, seen = self.embed(tokens), []
        for index, layer in enumerate(self.layers):
            if self.wrong == "skipped" and index == 2:
                continue
            x = layer(x) if self.wrong != "keyword" else layer(inputs=x)
            x = x * 2 if self.wrong == "between" else x
            seen.append(x)
        if self.wrong == "twice":
            x = self.layers[0](x)
        return x + seen[0] if self.wrong == "earlier" else x


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("shared", "share parameters"),
        ("skipped", r"the loss calls layers\[0\], layers\[1\], layers\[3\]"),
        ("twice", r"layers\[3\], layers\[0\]: it must call each once"),
        ("between", r"layers\[1\] is not called with what layers\[0\] returns"),
        ("earlier", "of a block before the last"),
        ("keyword", "without positional arguments"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_a_remedy(wrong, message):
    schedule = jaxpipe.schedule.build("1f1b", 2, 2)

    def loss(model, batch):
        return (model(batch) ** 2).mean()

    with pytest.raises(ValueError, match=message):
        pipe = from_nnx(Changed(nnx.Rngs(0), wrong), schedule, jaxpipe.make_mesh(pp=2), blocks="layers", loss=loss)
        jax.eval_shape(pipe, pipe.params, jnp.zeros((4, 3), jnp.int32))


def test_blocks_that_are_not_there_name_what_is(x64):
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 2), jaxpipe.make_mesh(pp=2)
    with pytest.raises(ValueError, match="Model has no layers; it has call, decoder, embed, norm"):
        from_nnx(Model(nnx.Rngs(0)), schedule, mesh, blocks="layers", loss=loss_of)
    with pytest.raises(ValueError, match="share no dimension of blocks"):
        from_nnx(Model(nnx.Rngs(0)), schedule, mesh, blocks="decoder", loss=loss_of)
    with pytest.raises(ValueError, match=r"give an nnx\.Module, or a function"):
        from_nnx(3, schedule, mesh, blocks="layers", loss=loss_of)


class LinenBlock(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, mask):
        y = (
            nn.Dense(WIDTH, **DOUBLE)(nn.LayerNorm(force_float32_reductions=False, dtype=jnp.float64, **DOUBLE)(x))
            * mask
        )
        return x + nn.Dropout(self.rate, deterministic=self.rate == 0)(jnp.tanh(y))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return LinenBlock(name="block")(x, mask), None


class LinenModel(nn.Module):
    call: str = "loop"

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(VOCABULARY, WIDTH, name="table", **DOUBLE)
        x, mask = table(tokens), (tokens > 2)[..., None].astype(jnp.float64)
        if self.call == "scan":
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
            x, _ = nn.scan(Scanned, length=6, in_axes=nn.broadcast, **axes)(name="layers")(x, mask)
        else:
            block = nn.remat(LinenBlock) if self.call == "remat" else LinenBlock
            for index in range(6):
                x = block(name=f"layers_{index}")(x, mask)
        return table.attend(nn.LayerNorm(force_float32_reductions=False, dtype=jnp.float64, **DOUBLE)(x))


@cases("call", ["loop", "remat", "scan"], quick=["scan"])
def test_linen_equals_the_plain_model(x64, call):
    model, batch = LinenModel(call), make_batch()

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    def make():
        return model.init(jax.random.key(0), batch["tokens"])["params"]

    schedule = jaxpipe.schedule.build("dualpipev", 2, MICROBATCHES)
    pipe = from_linen(make, schedule, jaxpipe.make_mesh(pp=2), blocks="layers", loss=loss)
    (value, _), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = jax.value_and_grad(loss)(pipe.merge(pipe.params), batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(pipe.merge(grads), expected_grads, rtol=1e-10)


def test_tensor_parallel_by_specs(x64):
    """Rows of a block's parameters have the stage's and the layer's dimension before their own."""
    model, batch = Model(nnx.Rngs(0)), make_batch()
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    specs = jaxpipe.Params({"linear": {"kernel": P("pp", None, None, "tp"), "bias": P("pp", None, "tp")}}, P())
    pipe = from_nnx(model, schedule, jaxpipe.make_mesh(pp=2, tp=2), blocks="decoder.layers", loss=loss_of, specs=specs)
    (loss, _), _ = jax.jit(pipe)(pipe.params, batch)
    assert float(loss) == pytest.approx(float(plain(loss_of, batch, MICROBATCHES)(model)), rel=1e-12)


def test_a_loss_that_changes_its_model_is_refused(x64):
    """`model.eval()` within the loss would be without effect: blocks are those that were given."""

    def evaluated(model, batch):
        model.eval()
        return loss_of(model, batch)

    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES), jaxpipe.make_mesh(pp=2)
    pipe = from_nnx(Model(nnx.Rngs(0), rate=0.5), schedule, mesh, blocks="decoder.layers", loss=evaluated)
    with pytest.raises(ValueError, match=r"dropout\.deterministic of decoder\.layers\[0\] from False to True"):
        jax.eval_shape(pipe, pipe.params, make_batch(), jax.random.key(0))


def test_products_wider_than_asked_for_are_told():
    """An embedding's own dtype decides what the blocks multiply in."""

    class Wide(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])

        def __call__(self, tokens):
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x)
            return x

    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)
    options = {"blocks": "layers", "loss": lambda model, tokens: model(tokens).mean(), "compute_dtype": jnp.bfloat16}
    pipe = from_nnx(Wide(nnx.Rngs(0)), schedule, mesh, **options)
    warned = pytest.warns(UserWarning, match=r"layers\[0\] is called with activations of float32")
    with warned, jax.numpy_dtype_promotion("standard"):
        jax.eval_shape(pipe, pipe.params, jnp.zeros((8, 3), jnp.int32))
