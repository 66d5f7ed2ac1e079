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
    """Attention and a gated MLP or experts; ``tensor``: how kernels are annotated; ``sequence``: axis of the sequence."""

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


FAST = (zero1, fsdp_and_tensor_parallel)


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
        ({"pp": 2, "ep": 2, "tp": 2}, {"data_axes": "ep"}),
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
    assert tensor is None or specs["out"]["kernel"] == P("pp", None, "tp", None)
    (value, _), grads = jax.jit(pipe)(pipe.params, batch)
    expected, expected_grads = plain(make(experts="all"), batch)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(pure(pipe.merge(grads)), pure(expected_grads), rtol=1e-10)
