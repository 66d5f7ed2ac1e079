"""Ways to divide a model over a mesh: each trains the plain model's numbers, and says what it takes in lines."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import MoE, MoEConfig, RouterConfig
from jaxpipe.flax import from_linen, from_nnx
from tests.plain import assert_trees_close

VOCABULARY, WIDTH, HIDDEN, HEADS, BLOCKS, SEQUENCES, LENGTH = 16, 8, 16, 4, 3, 16, 4
SCHEDULE = jaxpipe.schedule.build("zb1p", 2, 4)
EXPERTS = MoEConfig(
    WIDTH, HIDDEN, RouterConfig(4, 2, 1, 1), num_shared=1, masters=4, capacity_factor=None, backend="xla"
)


def normal(*names):
    """An initializer; with names, annotated with them where arrays are sharded later."""
    initializer = nnx.initializers.normal(0.5, jnp.float64)
    return nnx.with_partitioning(initializer, names, eager_sharding=False) if any(names) else initializer


class Block(nnx.Module):
    """Attention and a gated MLP or experts; axes: ``tensor`` of kernels, ``sequence`` of activations, ``experts``."""

    def __init__(self, rngs, tensor=None, sequence=None, experts=None):
        def linear(inputs, outputs, *names):
            return nnx.Linear(
                inputs, outputs, use_bias=False, kernel_init=normal(*names), param_dtype=jnp.float64, rngs=rngs
            )

        self.norm = nnx.Param(jnp.linspace(0.5, 1.5, WIDTH, dtype=jnp.float64))
        self.qkv = nnx.List([linear(WIDTH, WIDTH, None, tensor) for _ in range(3)])
        self.out, self.down = linear(WIDTH, WIDTH, tensor, None), linear(HIDDEN, WIDTH, tensor, None)
        self.gate, self.up = (linear(WIDTH, HIDDEN, None, tensor) for _ in range(2))
        self.sequence, self.experts = sequence, experts and MoE(EXPERTS, rngs, axis=experts, dtype=jnp.float64)
        if experts == "all":
            self.experts.axis = None

    def __call__(self, x):
        def divided(x):
            return jax.lax.with_sharding_constraint(x, P(None, self.sequence)) if self.sequence else x

        y = divided(x) * self.norm[...]
        q, k, v = (each(y).reshape(*y.shape[:2], HEADS, -1) for each in self.qkv)
        scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
        x = divided(x + self.out(jnp.einsum("bhts,bshd->bthd", scores, v).reshape(x.shape)))
        y = x * self.norm[...]
        if self.experts:
            return x + self.experts(y)[0]
        return divided(x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)))


class Llama(nnx.Module):
    def __init__(self, rngs, **options):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, param_dtype=jnp.float64, rngs=rngs)
        self.layers = nnx.List([Block(rngs, **options) for _ in range(BLOCKS)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


def loss(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"]), batch["targets"]).mean()


def make(**options):
    return Llama(nnx.Rngs(0), **options)


# Each recipe as a user writes it, one argument a line. What counts is the lines that `pipeline` does not have.


def pipeline():
    mesh = jaxpipe.make_mesh(pp=2)
    pipe = from_nnx(
        make(),
        SCHEDULE,
        mesh,
        blocks="layers",
        loss=loss,
    )
    optimizer = optax.adam(0.1)
    return pipe, optimizer


def data_parallel():
    mesh = jaxpipe.make_mesh(pp=2, dp=4)
    pipe = from_nnx(
        make(),
        SCHEDULE,
        mesh,
        blocks="layers",
        loss=loss,
        data_axes="dp",
    )
    optimizer = optax.adam(0.1)
    return pipe, optimizer


def zero1():
    mesh = jaxpipe.make_mesh(pp=2, dp=4)
    pipe = from_nnx(
        make(),
        SCHEDULE,
        mesh,
        blocks="layers",
        loss=loss,
        data_axes="dp",
        zero1_axis="dp",
        min_shard_size=0,
    )
    optimizer = optax.adam(0.1)
    optimizer = jaxpipe.shard_optimizer(optimizer, pipe)
    return pipe, optimizer


def fsdp():
    mesh = jaxpipe.make_mesh(pp=2, dp=4)
    pipe = from_nnx(
        make(),
        SCHEDULE,
        mesh,
        blocks="layers",
        loss=loss,
        data_axes="dp",
        fsdp_axis="dp",
        min_shard_size=0,
    )
    optimizer = optax.adam(0.1)
    return pipe, optimizer


def tensor_parallel():
    mesh = jaxpipe.make_mesh(pp=2, tp=4)
    pipe = from_nnx(
        make(tensor="tp"),
        SCHEDULE,
        mesh,
        blocks="layers",
        loss=loss,
    )
    optimizer = optax.adam(0.1)
    return pipe, optimizer


def sequence_parallel():
    mesh = jaxpipe.make_mesh(pp=2, tp=4)
    pipe = from_nnx(
        make(tensor="tp", sequence="tp"),
        SCHEDULE,
        mesh,
        blocks="layers",
        loss=loss,
    )
    optimizer = optax.adam(0.1)
    return pipe, optimizer


def fsdp_and_tensor_parallel():
    mesh = jaxpipe.make_mesh(pp=2, dp=2, tp=2)
    pipe = from_nnx(
        make(tensor="tp", sequence="tp"),
        SCHEDULE,
        mesh,
        blocks="layers",
        loss=loss,
        data_axes="dp",
        fsdp_axis="dp",
        min_shard_size=0,
    )
    optimizer = optax.adam(0.1)
    return pipe, optimizer


EXTRA_LINES = {
    data_parallel: 2,
    zero1: 5,
    fsdp: 4,
    tensor_parallel: 2,
    sequence_parallel: 2,
    fsdp_and_tensor_parallel: 5,
}


def lines(recipe):
    return {line.strip() for line in inspect.getsource(recipe).splitlines()[1:]}


@pytest.mark.parametrize("recipe", EXTRA_LINES, ids=lambda recipe: recipe.__name__)
def test_recipes_take_so_many_lines(recipe):
    """Lines beyond those of a pipeline: the mesh's, and one for each argument."""
    assert len(lines(recipe) - lines(pipeline)) == EXTRA_LINES[recipe]


def plain(model, batch):
    """The mean over all sequences is that over microbatches and devices."""
    return nnx.value_and_grad(loss)(model, batch)


def pure(tree):
    return nnx.to_pure_dict(nnx.state(tree, nnx.Param))


def tokens():
    """Tokens and targets apart: a slice of a dimension that the compiler shards is a permute of all ranks."""
    text = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH + 1)))
    return {"tokens": text[:, :-1], "targets": text[:, 1:]}


FAST = (fsdp_and_tensor_parallel,)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, id=r.__name__, marks=() if r in FAST else pytest.mark.slow) for r in EXTRA_LINES],
)
def test_recipes_equal_the_plain_model(x64, recipe):
    pipe, optimizer = recipe()
    batch = tokens()

    @jax.jit
    def step(params, state, batch):
        (value, _), grads = pipe(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return value, grads, optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(optimizer.init)(pipe.params)
        value, grads, params, _ = step(pipe.params, state, batch)
        expected, expected_grads = plain(make(), batch)
        wanted = optax.adam(0.1)
        given = pure(make())
        updates, _ = wanted.update(pure(expected_grads), wanted.init(given), given)
        updated = optax.apply_updates(given, updates)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(pure(pipe.merge(grads)), pure(expected_grads), rtol=1e-10)
    assert_trees_close(pure(pipe.merge(params)), updated, rtol=1e-8)
    placed = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), params, pipe.shardings
    )
    assert jax.tree.all(placed)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param({"pp": 2, "ep": 2, "tp": 2}, {"data_axes": "ep"}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "ep": 1, "tp": 2, "dp": 2}, {"data_axes": ("dp", "ep")}, marks=pytest.mark.slow),
        pytest.param(
            {"pp": 2, "ep": 2, "dp": 2},
            {"data_axes": ("dp", "ep"), "fsdp_axis": ("dp", "ep"), "min_shard_size": 0},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pp2 ep2 tp2 dp1", "pp2 ep1 tp2 dp2", "pp2 ep2 dp2 fsdp"],
)
def test_experts_beside_tensor_and_data_parallelism(x64, sizes, options):
    """Experts by hand over ep, attention by the compiler over tp; all specs are the model's own."""
    tensor = "tp" if "tp" in sizes else None
    model, batch = make(tensor=tensor, experts="ep"), tokens()
    pipe = from_nnx(model, SCHEDULE, jaxpipe.make_mesh(**sizes), blocks="layers", loss=loss, **options)
    specs = jax.tree.map(lambda sharding: sharding.spec, pipe.shardings.stages)
    assert specs["experts"]["w_in"][:3] == ("pp", None, "ep") or "fsdp_axis" in options
    assert tensor is None or specs["out"]["kernel"] == P("pp", None, "tp")
    (value, _), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = plain(make(experts="all"), batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(pure(pipe.merge(grads)), pure(expected_grads), rtol=1e-10)


class LinenBlock(nn.Module):
    logical: bool = False

    @nn.compact
    def __call__(self, x):
        def dense(features, *names):
            annotate = nn.with_logical_partitioning if self.logical else nn.with_partitioning
            initializer = annotate(nn.initializers.normal(0.5), names)
            return nn.Dense(features, use_bias=False, kernel_init=initializer, param_dtype=jnp.float64)

        names = ("width", "hidden") if self.logical else (None, "tp")
        hidden = nn.gelu(dense(HIDDEN, *names)(x))
        return x + dense(WIDTH, *names[::-1])(hidden), None


class LinenModel(nn.Module):
    logical: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, param_dtype=jnp.float64)
        blocks = nn.scan(
            LinenBlock,
            length=4,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "blocks"},
        )
        return embed.attend(blocks(self.logical, name="blocks")(embed(tokens))[0])


def linen(logical, **options):
    model = LinenModel(logical)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    def init():
        return model.init(jax.random.key(0), tokens()["tokens"])["params"]

    return from_linen(init, SCHEDULE, jaxpipe.make_mesh(pp=2, dp=2, tp=2), blocks="blocks", loss=loss, **options), loss


def test_linen_annotations_are_its_specs(x64):
    """Of blocks in nn.scan, whose own dimension is the pipeline's, beside FSDP."""
    pipe, loss = linen(False, data_axes="dp", fsdp_axis="dp", min_shard_size=0)
    specs = jax.tree.map(lambda sharding: sharding.spec, pipe.shardings)
    assert specs.stages["Dense_0"]["kernel"] == P("pp", None, "dp", "tp")
    assert specs.stages["Dense_1"]["kernel"] == P("pp", None, "tp", "dp")
    assert specs.outer["Embed_0"]["embedding"] == P("dp")
    (value, _), grads = jax.jit(pipe)(pipe.params, tokens())
    expected, expected_grads = jax.value_and_grad(loss)(pipe.merge(pipe.params), tokens())
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(pipe.merge(grads), expected_grads, rtol=1e-10)


def test_logical_names_need_rules(x64):
    with pytest.raises(ValueError, match=r"\('blocks', '\w+', '\w+'\), and no rules.*logical_axis_rules"):
        linen(True)
    with nn.logical_axis_rules((("width", None), ("hidden", "tp"), ("blocks", None))):
        pipe, _ = linen(True)
    assert pipe.shardings.stages["Dense_0"]["kernel"].spec == P("pp", None, None, "tp")


def test_blocks_that_are_annotated_differently_are_refused(x64):
    model = make(tensor="tp")
    model.layers[1] = Block(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layers\[1\] annotates .* layers\[0\] with .*annotate all alike"):
        from_nnx(model, SCHEDULE, jaxpipe.make_mesh(pp=2, tp=2), blocks="layers", loss=loss)
