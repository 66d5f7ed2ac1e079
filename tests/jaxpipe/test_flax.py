"""Flax modules as pipelines equal the plain program."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import layered_stages, linen_stages, nnx_function, nnx_stages, split_layers, unstack_layers
from tests.cases import cases
from tests.plain import assert_trees_close, plain_value_and_grad

WIDTH = 6
SCHEDULE = jaxpipe.schedule.build("dualpipev", 2, 4)


class Dense(nnx.Module):
    """A residual layer with dropout."""

    def __init__(self, rngs, rate=0.0):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, rngs=None):
        return x + self.dropout(jnp.tanh(self.linear(x)), rngs=rngs)


class LinenDense(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(WIDTH)(x))
        return x + nn.Dropout(self.rate, deterministic=self.rate == 0)(h)


def head(outer, y, data, ctx):
    return jnp.mean((y - data[:, ::-1]) ** 2)


def batch():
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, WIDTH)), jnp.float32)


def compare(stage, stacked, schedule=SCHEDULE, rng=None):
    """Pipeline against plain program in float32; returns the gradients."""
    params = jaxpipe.Params(stacked)
    mesh = jaxpipe.make_mesh(pp=schedule.num_ranks)
    (loss, _), grads = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, head=head))(params, batch(), rng)
    (expected_loss, _), expected = plain_value_and_grad(stage, schedule, head=head)(params, batch(), rng)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_trees_close(grads, expected, rtol=1e-5)
    return grads.stages


@pytest.mark.slow
def test_nnx_stages():
    compare(*nnx_stages(Dense, SCHEDULE, nnx.Rngs(0)))


def test_nnx_stages_with_dropout():
    stage, stacked = nnx_stages(lambda rngs: Dense(rngs, 0.5), SCHEDULE, nnx.Rngs(0), uses_rngs=True)
    compare(stage, stacked, rng=jax.random.key(1))


def test_linen_stages():
    compare(*linen_stages(LinenDense(), SCHEDULE, jax.random.key(0), jnp.ones((2, WIDTH))))


@pytest.mark.slow
def test_linen_stages_with_dropout():
    stage, stacked = linen_stages(LinenDense(0.5), SCHEDULE, jax.random.key(0), jnp.ones((2, WIDTH)), uses_rngs=True)
    compare(stage, stacked, rng=jax.random.key(1))


def test_dropout_without_a_key_is_refused():
    stage, stacked = nnx_stages(lambda rngs: Dense(rngs, 0.5), SCHEDULE, nnx.Rngs(0), uses_rngs=True)
    with pytest.raises(ValueError, match=r"without a key: call step\(params, batch, rng\)"):
        compare(stage, stacked)


def layers(count):
    rng = np.random.default_rng(3)
    return [{"w": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 3, jnp.float32)} for _ in range(count)]


def layer(params, x, ctx):
    return x + jnp.tanh(x @ params["w"])


@cases("count", [8, 10], quick=[10])
def test_any_number_of_layers(count):
    """Stages of 2 and 3 layers compute what the plain stack of layers computes."""
    params = layers(count)
    stage, stacked = layered_stages(layer, params, SCHEDULE)
    grads = jaxpipe.unstack_stages(compare(stage, stacked), SCHEDULE)

    def plain(params):
        x = batch()
        for p in params:
            x = layer(p, x, None)
        return head(None, x, batch(), None)

    expected = jax.grad(plain)(params)
    counts = split_layers(count, SCHEDULE.num_stages)
    got = [{"w": grad["w"][i]} for grad, real in zip(grads, counts, strict=True) for i in range(real)]
    assert_trees_close(got, expected, rtol=1e-5)
    for grad, real in zip(grads, counts, strict=True):
        np.testing.assert_array_equal(grad["w"][real:], 0)


def test_fewer_layers_than_stages_are_refused():
    with pytest.raises(ValueError, match="3 layers for 4 stages"):
        layered_stages(layer, layers(3), SCHEDULE)


def test_stages_must_be_alike():
    uneven = [*layers(3), {"w": jnp.ones((2, 2))}]
    with pytest.raises(ValueError, match=r"parameters 3 have shapes .*must be alike"):
        jaxpipe.stack_stages(uneven, SCHEDULE)


def test_state_that_calls_change_is_refused():
    with pytest.raises(ValueError, match=r"BatchNorm holds variables of kinds \['BatchStat'\]"):
        nnx_function(nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)))
    norm = nn.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"BatchNorm has variable collections \['batch_stats'\]"):
        linen_stages(norm, SCHEDULE, jax.random.key(0), jnp.ones((2, WIDTH)))


def in_order(modules, x):
    for module in modules:
        x = module(x)
    return x


def staged(stage, params, x):
    """The stages one after the other, as a plain program calls them."""
    for index, each in enumerate(params):
        ctx = jaxpipe.Context.make(index, 0, None, None, num_stages=len(params))
        x = stage(each, x, ctx)
    return x


def uses_conditional(stage, params, x):
    ctx = jaxpipe.Context.make(0, 0, None, None, num_stages=4)
    return " cond[" in str(jax.make_jaxpr(stage)(params, x, ctx))


class Mixed(nnx.Module):
    """Layers in turn that differ in static attributes and in arrays of all kinds, some of which nothing reads."""

    def __init__(self, rngs, index):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, kernel_init=nnx.initializers.normal(0.5))
        self.name, self.wide, self.activation = f"layer {index}", index % 2 == 1, [jnp.tanh, jax.nn.relu][index % 2]
        self.mask = np.arange(WIDTH) != index
        self.scale = jnp.full(WIDTH, 1.0 + 0.1 * index)
        self.table = nnx.Variable(jnp.linspace(0, 1, WIDTH))
        self.number = nnx.data(0.5 * (index % 2))

    def __call__(self, x):
        y = jnp.where(self.mask, self.linear(x), 0.0) * self.scale + self.table[...] + self.number
        return x + (self.activation(y) if self.wide else self.activation(y - y.mean(-1, keepdims=True)))


@cases("num_layers", [None, 8, 9], quick=[9])
def test_what_differs_between_modules_stays_theirs(num_layers):
    """Pipeline against the modules in order: functions in turn, constants of each layer."""
    count = num_layers or 4
    numbers = itertools.count()
    stage, stacked = nnx_stages(lambda rngs: Mixed(rngs, next(numbers)), SCHEDULE, nnx.Rngs(0), num_layers=num_layers)
    assert uses_conditional(stage, jaxpipe.unstack_stages(stacked, SCHEDULE)[0], batch()) == (num_layers != 8)
    mesh = jaxpipe.make_mesh(pp=2)
    step = jax.jit(jaxpipe.value_and_grad(stage, SCHEDULE, mesh, head=head))
    (loss, _), grads = step(jaxpipe.Params(stacked), batch())

    rngs = nnx.Rngs(0)
    split = [nnx.split(Mixed(rngs, index), nnx.Param, ...) for index in range(count)]

    @jax.jit
    def plain(params):
        modules = [nnx.merge(graphdef, each, rest) for (graphdef, _, rest), each in zip(split, params, strict=True)]
        return head(None, in_order(modules, batch()), batch(), None)

    expected, expected_grads = jax.value_and_grad(plain)([params for _, params, _ in split])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    got = (
        unstack_layers(grads.stages, count, SCHEDULE) if num_layers else jaxpipe.unstack_stages(grads.stages, SCHEDULE)
    )
    assert_trees_close(got, [nnx.to_pure_dict(grad) for grad in expected_grads], rtol=1e-5)


class Indexed(nnx.Module):
    """Static attributes that differ and change nothing: an index for names, functions made anew in each call."""

    def __init__(self, rngs, index):
        self.linear, self.index = nnx.Linear(WIDTH, WIDTH, rngs=rngs, kernel_init=nnx.initializers.normal(1)), index
        self.activation = lambda x: jax.nn.silu(x)

    def __call__(self, x):
        with jax.named_scope(f"layer_{self.index}"):
            return x + self.activation(self.linear(x))


def test_attributes_that_change_nothing_cost_nothing():
    numbers = itertools.count()
    stage, stacked = nnx_stages(lambda rngs: Indexed(rngs, next(numbers)), SCHEDULE, nnx.Rngs(0))
    assert not uses_conditional(stage, jaxpipe.unstack_stages(stacked, SCHEDULE)[0], batch())


def test_constants_that_are_equal_are_kept_once():
    class Masked(nnx.Module):
        def __init__(self, rngs):
            self.scale, self.mask = nnx.Param(jnp.ones(())), jnp.tri(50)

        def __call__(self, x):
            return x * self.scale + self.mask.sum()

    stage, stacked = nnx_stages(Masked, SCHEDULE, nnx.Rngs(0))
    ctx = jaxpipe.Context.make(0, 0, None, None, num_stages=4)
    consts = jax.make_jaxpr(stage)(jax.tree.map(lambda w: w[0], stacked), 1.0, ctx).consts
    assert max(np.size(const) for const in consts) == 50 * 50


class Masked(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask, *, train=False, sign):
        assert train is True
        return x + sign * jnp.where(mask, jnp.tanh(self.linear(x)), jnp.zeros_like(x))


class LinenMasked(nn.Module):
    @nn.compact
    def __call__(self, x, mask, *, train=False, sign):
        assert train is True
        return x + sign * jnp.where(mask, jnp.tanh(nn.Dense(WIDTH)(x)), jnp.zeros_like(x))


def masked_arguments(ctx):
    return {"mask": ctx.data > 0, "train": True, "sign": 1 - 2 * (ctx.layer % 2).astype(jnp.float32)}


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_further_arguments_of_a_module(kind):
    """Masks of the microbatch, what is made of the context, and Python's own values."""
    if kind == "nnx":
        stage, stacked = nnx_stages(Masked, SCHEDULE, nnx.Rngs(0), arguments=masked_arguments, num_layers=5)
    else:
        example = jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)
        stage, stacked = linen_stages(
            LinenMasked(), SCHEDULE, jax.random.key(0), example, arguments=masked_arguments, data=example, num_layers=5
        )
    x = expected = batch()
    for index, params in enumerate(unstack_layers(stacked, 5, SCHEDULE)):
        kernel, bias = (jax.tree.leaves(params)[i] for i in (1, 0))
        expected += (-1) ** index * jnp.where(batch() > 0, jnp.tanh(expected @ kernel + bias), 0.0)
    for index, params in enumerate(jaxpipe.unstack_stages(stacked, SCHEDULE)):
        x = jax.jit(stage)(params, x, jaxpipe.Context.make(index, 0, None, batch(), num_stages=4))
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_positional_arguments_and_wrong_ones():
    def run(arguments):
        stage, stacked = nnx_stages(Masked, SCHEDULE, nnx.Rngs(0), arguments=arguments)
        ctx = jaxpipe.Context.make(0, 0, None, batch(), num_stages=4)
        return stage(jaxpipe.unstack_stages(stacked, SCHEDULE)[0], batch(), ctx)

    with pytest.raises(TypeError, match="sign"):
        run(lambda ctx: (ctx.data > 0,))
    with pytest.raises(ValueError, match=r"arguments\(ctx\) returned a .*Array.*: return a tuple"):
        run(lambda ctx: ctx.data > 0)


class LinenTurn(nn.Module):
    wide: bool
    name_of_layer: str = ""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(WIDTH, kernel_init=nn.with_partitioning(nn.initializers.normal(1), (None, "tp")))(x)
        return x + (jnp.tanh(y) if self.wide else jax.nn.relu(y))


def test_linen_modules_that_differ():
    """One module for each layer, with boxes of metadata, which come off."""
    modules = [LinenTurn(index % 2 == 1, f"layer {index}") for index in range(8)]
    stage, stacked = linen_stages(modules, SCHEDULE, jax.random.key(0), batch()[:2], num_layers=8)
    layers = unstack_layers(stacked, 8, SCHEDULE)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(layers, is_leaf=lambda x: hasattr(x, "unbox")))
    expected = batch()
    for module, params in zip(modules, layers, strict=True):
        expected = module.apply({"params": params}, expected)
    params = jaxpipe.unstack_stages(stacked, SCHEDULE)
    np.testing.assert_allclose(staged(jax.jit(stage), params, batch()), expected, rtol=1e-5)
    assert not uses_conditional(stage, params[0], batch())
    with pytest.raises(ValueError, match="8 modules for 4 stages"):
        linen_stages(modules, SCHEDULE, jax.random.key(0), batch()[:2])


class Block(nnx.Module):
    """The usual idiom: streams given when it is made, drop(x) when it is called."""

    def __init__(self, rngs):
        self.linear, self.drop = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(jnp.tanh(self.linear(x)))


@pytest.mark.slow
def test_dropout_that_holds_its_stream():
    """In stages and in the head; the plain program is the same functions in a loop."""
    stage, stacked = nnx_stages(Block, SCHEDULE, nnx.Rngs(0), num_layers=6)
    end = nnx_function(Block(nnx.Rngs(1)))

    def block_head(outer, y, data, ctx):
        return head(None, end(outer, y, ctx=ctx), data, ctx)

    params, key, mesh = jaxpipe.Params(stacked, end.params), jax.random.key(4), jaxpipe.make_mesh(pp=2)
    step = jax.jit(jaxpipe.value_and_grad(stage, SCHEDULE, mesh, head=block_head))
    (loss, _), grads = step(params, batch(), key)
    plain = plain_value_and_grad(stage, SCHEDULE, head=block_head)
    (expected, _), expected_grads = plain(params, batch(), key)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_trees_close(grads, expected_grads, rtol=1e-5)
    assert step(params, batch(), jax.random.key(5))[0][0] != loss


@pytest.mark.parametrize(("attempt", "message"), [
    (lambda: nnx_stages(Dense(nnx.Rngs(0)), SCHEDULE, nnx.Rngs(0)), r"got a Dense and a Rngs: pass a function"),
    (lambda: nnx_stages(Dense, SCHEDULE, jax.random.key(0)), r"and nnx\.Rngs\(seed\)"),
    (lambda: nnx_stages(lambda rngs: None, SCHEDULE, nnx.Rngs(0)), r"make_stage returned a NoneType"),
    (lambda: linen_stages(LinenDense, SCHEDULE, jax.random.key(0), jnp.ones((2, WIDTH))), r"pass LinenDense\(\.\.\.\)"),
    (lambda: linen_stages(LinenDense(), SCHEDULE, jax.random.key(0), (2, WIDTH)), r"\['x'\]\[0\] is 2: give"),
])  # fmt: skip
def test_what_is_no_module_is_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()
