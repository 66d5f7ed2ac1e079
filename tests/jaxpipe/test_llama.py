"""A Llama as one writes it in Flax without a thought of pipelines, NNX and Linen, equals itself in a pipeline.

RMSNorm, rotary positions, grouped queries, a padding mask, positions, dropout, an untied head; float64.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import linen_stages, nnx_function, nnx_stages, unstack_layers
from jaxpipe.nnx_function import fold_name
from tests.plain import assert_trees_close

VOCABULARY, WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 61, 16, 40, 4, 2, 6
RATE = 0.2
DTYPE = jnp.float64


def rotate(x, positions):
    """RoPE of x ``[batch, length, heads, size]`` at positions ``[batch, length]``."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angles = positions[:, :, None, None].astype(x.dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q, k, v, mask):
    """Causal attention of grouped heads; mask ``[batch, length]`` is True at real tokens."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], size)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / jnp.sqrt(jnp.asarray(size, q.dtype))
    causal = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(causal & mask[:, None, None, None, :], scores, jnp.finfo(scores.dtype).min)
    y = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, axis=-1), v)
    return y.reshape(batch, length, heads * size)


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


class Attention(nnx.Module):
    def __init__(self, rngs):
        def linear(features, outputs):
            return nnx.Linear(features, outputs, use_bias=False, param_dtype=DTYPE, rngs=rngs)

        size = WIDTH // HEADS
        self.q, self.k, self.v = (linear(WIDTH, heads * size) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.out = linear(HEADS * size, WIDTH)

    def __call__(self, x, mask, positions):
        def heads(y):
            return y.reshape(*y.shape[:-1], -1, WIDTH // HEADS)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        return self.out(attend(rotate(q, positions), rotate(k, positions), v, mask))


class RMSNorm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(WIDTH, DTYPE))

    def __call__(self, x):
        return rms_norm(x, self.scale[...])


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.gate, self.up = (nnx.Linear(WIDTH, HIDDEN, use_bias=False, param_dtype=DTYPE, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, param_dtype=DTYPE, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()
        self.attention, self.mlp = Attention(rngs), MLP(rngs)
        self.drop1, self.drop2 = nnx.Dropout(RATE, rngs=rngs), nnx.Dropout(RATE, rngs=rngs)

    def __call__(self, x, mask, positions):
        x = x + self.drop1(self.attention(self.norm1(x), mask, positions))
        return x + self.drop2(self.mlp(self.norm2(x)))


class Embedding(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(VOCABULARY, WIDTH, param_dtype=DTYPE, rngs=rngs)
        self.drop = nnx.Dropout(RATE, rngs=rngs)

    def __call__(self, tokens):
        return self.drop(self.table(tokens))


class Head(nnx.Module):
    def __init__(self, rngs):
        self.norm = RMSNorm()
        self.linear = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, param_dtype=DTYPE, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.norm(x))


class Llama(nnx.Module):
    def __init__(self, rngs):
        self.embed = Embedding(rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = Head(rngs)

    def __call__(self, tokens, mask, positions):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask, positions)
        return self.head(x)


class LinenBlock(nn.Module):
    deterministic: bool = False

    @nn.compact
    def __call__(self, x, mask, positions):
        def linear(features, name):
            return nn.Dense(features, use_bias=False, param_dtype=DTYPE, name=name)

        def heads(y):
            return y.reshape(*y.shape[:-1], -1, size)

        size = WIDTH // HEADS
        y = rms_norm(x, self.param("norm1", nn.initializers.ones, (WIDTH,), DTYPE))
        q, k, v = (
            heads(linear(count * size, name)(y)) for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        y = linear(WIDTH, "out")(attend(rotate(q, positions), rotate(k, positions), v, mask))
        x = x + nn.Dropout(RATE)(y, deterministic=self.deterministic)
        y = rms_norm(x, self.param("norm2", nn.initializers.ones, (WIDTH,), DTYPE))
        y = linear(WIDTH, "down")(jax.nn.silu(linear(HIDDEN, "gate")(y)) * linear(HIDDEN, "up")(y))
        return x + nn.Dropout(RATE)(y, deterministic=self.deterministic)


MICROBATCHES, SIZE, LENGTH = 4, 2, 7
SCHEDULES = [
    ("dualpipev", 2),
    *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("1f1b", "interleaved", "dualpipe")),
    pytest.param("zbv", 1, marks=pytest.mark.slow),
]
"""(schedule, ranks); six layers on four stages of DualPipeV: some are padded."""


def make_batch():
    """Rows of unequal length, one microbatch of padding alone among them; positions that start anywhere."""
    count = MICROBATCHES * SIZE
    tokens = jax.random.randint(jax.random.key(1), (count, LENGTH), 0, VOCABULARY)
    lengths = jnp.array([7, 5, 3, 6, 0, 0, 1, 4])
    mask = jnp.arange(LENGTH) < lengths[:, None]
    positions = jnp.arange(LENGTH) + jnp.arange(count)[:, None]
    return {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1), "mask": mask, "positions": positions}


def mean_loss(logits, data):
    """The mean over real tokens, NaN where there are none."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["targets"])
    return jnp.sum(losses * data["mask"].astype(losses.dtype)) / jnp.sum(data["mask"])


def arguments(ctx):
    return {"mask": ctx.data["mask"], "positions": ctx.data["positions"]}


def run_pipeline(name, ranks, stage, params, embed, head, rng):
    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    step = jaxpipe.value_and_grad(
        stage, schedule, jaxpipe.make_mesh(pp=ranks), embed=embed, head=head, weight=lambda data: data["mask"].sum()
    )
    (loss, _), grads = jax.jit(step)(params, make_batch(), rng)
    return loss, unstack_layers(grads.stages, LAYERS, schedule), grads.outer


def plain(embed, block, head, rng):
    """Loss and gradients of (layers, outer) by a loop over microbatches and layers; no pipeline."""
    batch = make_batch()

    def objective(layers, outer):
        total = 0.0
        for m in range(MICROBATCHES):
            data = jax.tree.map(lambda leaf, m=m: leaf[m * SIZE : (m + 1) * SIZE], batch)
            if not data["mask"].any():
                continue
            context = lambda index, m=m, data=data: jaxpipe.Context.make(index, m, rng, data, num_stages=LAYERS)  # noqa: E731
            x = embed(outer, data, context(-1))
            for index, layer in enumerate(layers):
                x = block(layer, x, context(index))
            total += head(outer, x, data, context(LAYERS)) * data["mask"].sum()
        return total / batch["mask"].sum()

    return jax.value_and_grad(objective, argnums=(0, 1))


def check(found, expected):
    loss, layers, outer = found
    expected_loss, (expected_layers, expected_outer) = expected
    assert loss.dtype == jnp.float64 and jnp.isfinite(loss)
    assert abs(loss - expected_loss) <= 1e-12 * expected_loss
    assert_trees_close(layers, list(expected_layers), rtol=1e-11)
    assert_trees_close(outer, expected_outer, rtol=1e-11)


@pytest.fixture
def standard_promotion():
    """Flax's dropout and jnp's means mix dtypes as users' models do."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(("name", "ranks"), SCHEDULES)
@pytest.mark.slow
def test_nnx(name, ranks, x64, standard_promotion):
    model = Llama(nnx.Rngs(0))
    embed_fn, head_fn = nnx_function(model.embed), nnx_function(model.head)
    blocks = [nnx_function(block) for block in model.blocks]
    outer = {"embed": embed_fn.params, "head": head_fn.params}
    rng = jax.random.key(3)

    def embed(outer, data, ctx):
        return embed_fn(outer["embed"], data["tokens"], ctx=ctx)

    def head(outer, y, data, ctx):
        return mean_loss(head_fn(outer["head"], y, ctx=ctx), data)

    def block(params, x, ctx):
        return blocks[0](params, x, ctx=ctx, **arguments(ctx))

    expected = plain(embed, block, head, rng)([block.params for block in blocks], outer)
    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    made = iter(model.blocks)
    stage, stages = nnx_stages(lambda _: next(made), schedule, nnx.Rngs(0), num_layers=LAYERS, arguments=arguments)
    check(run_pipeline(name, ranks, stage, jaxpipe.Params(stages, outer), embed, head, rng), expected)
    without = plain(embed, block, head, jax.random.key(4))([block.params for block in blocks], outer)[0]
    assert abs(without - expected[0]) > 1e-4  # dropout is on


@pytest.mark.slow
def test_nnx_without_dropout_is_the_model_itself(x64, standard_promotion):
    model = Llama(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    batch = make_batch()

    def objective(state):
        logits = nnx.merge(graphdef, state)(batch["tokens"], batch["mask"], batch["positions"])
        return mean_loss(logits, batch)

    loss, grads = jax.value_and_grad(objective, allow_int=True)(state)
    grads = nnx.to_pure_dict(grads)
    embed_fn, head_fn = nnx_function(model.embed), nnx_function(model.head)
    made = iter(model.blocks)
    schedule = jaxpipe.schedule.build("dualpipev", 2, MICROBATCHES)
    stage, stages = nnx_stages(lambda _: next(made), schedule, nnx.Rngs(0), num_layers=LAYERS, arguments=arguments)
    params = jaxpipe.Params(stages, {"embed": embed_fn.params, "head": head_fn.params})
    found, layers, outer = run_pipeline(
        "dualpipev",
        2,
        stage,
        params,
        lambda outer, data, ctx: embed_fn(outer["embed"], data["tokens"]),
        lambda outer, y, data, ctx: mean_loss(head_fn(outer["head"], y), data),
        None,
    )
    assert abs(found - loss) <= 1e-12 * loss
    expected = [keep(grads["blocks"][index], layers[index]) for index in range(LAYERS)]
    assert_trees_close(layers, expected, rtol=1e-11)
    assert_trees_close(outer, {name: keep(grads[name], outer[name]) for name in outer}, rtol=1e-11)


def keep(tree, like):
    """The part of nested dicts that another one has."""
    return {name: keep(tree[name], like[name]) for name in like} if isinstance(like, dict) else tree


@pytest.mark.parametrize(("name", "ranks"), SCHEDULES)
@pytest.mark.slow
def test_linen(name, ranks, x64, standard_promotion):
    module, rng = LinenBlock(), jax.random.key(3)
    example = {name: leaf[:SIZE] for name, leaf in make_batch().items()}
    outer = {
        "table": jax.random.normal(jax.random.key(5), (VOCABULARY, WIDTH), DTYPE),
        "norm": jnp.ones(WIDTH, DTYPE),
        "head": jax.random.normal(jax.random.key(6), (WIDTH, VOCABULARY), DTYPE) / 4,
    }

    def embed(outer, data, ctx):
        return outer["table"][data["tokens"]]

    def head(outer, y, data, ctx):
        return mean_loss(rms_norm(y, outer["norm"]) @ outer["head"], data)

    def block(params, x, ctx):
        return module.apply({"params": params}, x, **arguments(ctx), rngs={"dropout": fold_name(ctx.rng, "dropout")})

    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    stage, stages = linen_stages(
        module, schedule, jax.random.key(7), jax.ShapeDtypeStruct((SIZE, LENGTH, WIDTH), DTYPE),
        num_layers=LAYERS, arguments=arguments, data=example, uses_rngs=True,
    )  # fmt: skip
    expected = plain(embed, block, head, rng)(unstack_layers(stages, LAYERS, schedule), outer)
    check(run_pipeline(name, ranks, stage, jaxpipe.Params(stages, outer), embed, head, rng), expected)
