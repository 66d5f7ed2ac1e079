"""NNX modules as functions: random streams, constants, and what is refused."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import linen_stages, nnx_function, nnx_stages

WIDTH = 6
SCHEDULE = jaxpipe.schedule.build("dualpipev", 2, 4)


def batch():
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, WIDTH)), jnp.float32)


class Bits(nnx.Module):
    """x with one more decimal digit for each of its random streams: 1 or 0 at random."""

    def __init__(self, rngs):
        self.unused = nnx.Param(jnp.zeros(()))
        self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.rngs = rngs
        self.noise = nnx.Rngs(noise=0)

    def __call__(self, x, rngs=None):
        one = jnp.ones(x.shape)
        draws = [self.first(one), self.second(one)]
        draws += [
            jax.random.bernoulli(draw(), 0.5, x.shape) for draw in (self.rngs.params, self.rngs.x, self.noise.noise)
        ]
        if rngs is not None:
            draws += [nnx.Dropout(0.5, rngs=nnx.Rngs(9))(one, rngs=rngs)]
            draws += [jax.random.bernoulli(draw(), 0.5, x.shape) for draw in (rngs.noise, rngs.default, rngs.noise)]
        for draw in draws:
            x = x * 10 + draw.astype(bool).astype(x.dtype)
        return x


def decimal_digits(x, count):
    return (np.asarray(x, np.int64)[..., None] // 10 ** np.arange(count)) % 10


def assert_independent(bits):
    """Columns of 0 and 1, near enough half of them equal between any two."""
    assert set(np.unique(bits)) == {0, 1}
    for i, j in itertools.combinations(range(bits.shape[-1]), 2):
        assert 0.4 < np.mean(bits[..., i] == bits[..., j]) < 0.6, (i, j)


@pytest.mark.parametrize("uses_rngs", [False, True, ("dropout", "noise")])
def test_streams_of_a_module_are_independent(uses_rngs, x64):
    """Every stream of every stage and microbatch draws its own bits."""
    stage, stacked = nnx_stages(Bits, SCHEDULE, nnx.Rngs(0, params=0), uses_rngs=uses_rngs)
    stages = jaxpipe.unstack_stages(stacked, SCHEDULE)
    count = 9 if uses_rngs else 5

    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def run(params, index, microbatch):
        ctx = jaxpipe.Context.make(index, microbatch, jax.random.key(0), None, num_stages=4)
        return stage(params, jnp.zeros(1000), ctx)

    x = jnp.stack([jax.jit(run)(stages[index], index, jnp.arange(2)) for index in (0, 3)])
    assert_independent(decimal_digits(x, count).transpose(2, 0, 1, 3).reshape(1000, -1))


class LinenBits(nn.Module):
    names: tuple = ("dropout", "noise", "noise", "other")

    @nn.compact
    def __call__(self, x):
        self.param("unused", nn.initializers.zeros, ())
        for name in self.names:
            x = x * 10 + jax.random.bernoulli(self.make_rng(name), 0.5, x.shape).astype(x.dtype)
        return x


@pytest.mark.parametrize("uses_rngs", [True, ("dropout", "noise", "other")])
def test_streams_of_linen_modules_are_independent(uses_rngs):
    example = jax.ShapeDtypeStruct((1000,), jnp.float32)
    stage, stacked = linen_stages(LinenBits(), SCHEDULE, jax.random.key(0), example, uses_rngs=uses_rngs)
    params = jaxpipe.unstack_stages(stacked, SCHEDULE)
    contexts = [jaxpipe.Context.make(i, m, jax.random.key(0), None, num_stages=4) for i in (0, 3) for m in (0, 1)]
    x = np.stack([stage(params[ctx.stage], jnp.zeros(1000), ctx) for ctx in contexts])
    assert_independent(decimal_digits(x, 4).transpose(1, 0, 2).reshape(1000, -1))


class Block(nnx.Module):
    """The usual idiom: streams given when it is made, drop(x) when it is called."""

    def __init__(self, rngs):
        self.linear, self.drop = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(jnp.tanh(self.linear(x)))


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit, nnx.remat])
def test_random_numbers_need_a_key_unless_turned_off(transform):
    class Wrapped(Block):
        def __call__(self, x):
            return transform(Block.__call__)(self, x)

    module, x = Wrapped(nnx.Rngs(0)), batch()
    function = nnx_function(module)
    ctx = jaxpipe.Context.make(0, 0, None, None, num_stages=1)
    for call in (lambda: function(function.params, x), lambda: function(function.params, x, ctx=ctx)):
        with pytest.raises(
            ValueError, match=r"Wrapped draws from its random stream 'default' without a key: .*eval\(\)"
        ):
            call()
    with pytest.raises(ValueError, match=r"without a key: .*function.merge\(params, ctx\)"):
        function.merge(function.params).drop(x)
    keyed = jaxpipe.Context.make(0, 0, jax.random.key(0), None, num_stages=1)
    np.testing.assert_array_equal(function(function.params, x, ctx=keyed), function.merge(function.params, keyed)(x))
    module.eval()
    quiet = nnx_function(module)
    np.testing.assert_allclose(quiet(quiet.params, x), x + jnp.tanh(module.linear(x)), rtol=1e-6)


class Layers(nnx.Module):
    """Layers made by vmap and run by scan, each with dropout."""

    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_old_keys_give_the_same_bits():
    function = nnx_function(Layers(nnx.Rngs(0)))
    typed, raw = (
        jaxpipe.Context.make(2, 1, key, None, num_stages=4) for key in (jax.random.key(7), jax.random.PRNGKey(7))
    )
    np.testing.assert_array_equal(
        function(function.params, batch(), ctx=typed), function(function.params, batch(), ctx=raw)
    )


def test_layers_made_by_vmap_draw_their_own_bits():
    function = nnx_function(Layers(nnx.Rngs(0)))
    merged = function.merge(function.params, jaxpipe.Context.make(1, 0, jax.random.key(0), None, num_stages=2))
    keys = jax.random.key_data(merged.layers.drop.rngs.key[...])
    assert keys.shape[0] == 3 and len({tuple(map(int, row)) for row in keys}) == 3
    assert not merged.layers.drop.rngs.count[...].any()


def test_keys_that_are_equal_stay_equal():
    """A stream that layers share on purpose, as `broadcast` makes it."""

    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.stream = rngs.dropout.broadcast(3)

    function = nnx_function(Shared(nnx.Rngs(0)))
    merged = function.merge(function.params, jaxpipe.Context.make(1, 0, jax.random.key(0), None, num_stages=2))
    keys = jax.random.key_data(merged.stream.key[...])
    np.testing.assert_array_equal(keys, keys[:1].repeat(3, 0))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in "ab")
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return x + self.b(jnp.tanh(self.a(x)))


class Containers(nnx.Module):
    def __init__(self, rngs):
        self.many = nnx.List([nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs) for _ in range(11)])
        self.named = nnx.Dict(low=nnx.Linear(WIDTH, WIDTH, rngs=rngs, param_dtype=jnp.bfloat16, dtype=jnp.float32))
        self.row = nnx.Sequential(nnx.Linear(WIDTH, 3, rngs=rngs), jax.nn.gelu, nnx.Linear(3, WIDTH, rngs=rngs))
        self.tree = nnx.Param({"w": jnp.arange(6.0), "b": jnp.ones(6)})

    def __call__(self, x):
        for index, layer in enumerate(self.many):
            x = x + index * jnp.tanh(layer(x))
        return self.row(self.named["low"](x)) * self.tree.get_value()["w"] + self.tree.get_value()["b"]


class Transformed(nnx.Module):
    def __init__(self, rngs):
        self.layers, self.table = Layers(rngs), nnx.Variable(jnp.arange(6.0))
        self.eval()

    @nnx.jit
    def inner(self, x):
        return self.layers(x) * self.table[...]

    @nnx.remat
    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", [Tied, Containers, Transformed])
def test_modules_of_many_kinds(kind):
    """The function and its gradient are the module's own."""
    module, x = kind(nnx.Rngs(0)), batch()
    function = nnx_function(module)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def plain(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params, jax.tree.map(jnp.asarray, rest))(x)))

    got, grads = jax.value_and_grad(lambda params: jnp.sum(jnp.sin(function(params, x))))(function.params)
    expected, expected_grads = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, grads, nnx.to_pure_dict(expected_grads))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_a_call_changes_is_refused():
    class Counting(nnx.Module):
        def __init__(self, transform):
            self.count, self.transform = nnx.Variable(jnp.zeros(())), transform

        def __call__(self, x):
            def add(self, x):
                self.count[...] += 1
                return x + self.count[...]

            return self.transform(add)(self, x)

    class Sowing(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "hidden", x)
            return x

    for module, name in (Counting(lambda f: f), "count"), (Counting(nnx.jit), "count"), (Sowing(), "hidden"):
        function = nnx_function(module)
        with pytest.raises(ValueError, match=rf"changes or makes variables \['{name}'\] when it is called"):
            function(function.params, batch())


def test_what_stages_may_not_share_or_change():
    kept = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"module 1 shares its parameter bias with module 0 \(bias\)"):
        nnx_stages(lambda rngs: kept, SCHEDULE, nnx.Rngs(0))
    widths = itertools.count(5)
    stage, stages = nnx_stages(lambda rngs: nnx.Linear(WIDTH, next(widths), rngs=rngs), SCHEDULE, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"maps float32\[4, 6\] to float32\[4, 5\]: input and output of a"):
        stage(jax.tree.map(lambda leaf: leaf[0], stages), jnp.ones((4, WIDTH)), jaxpipe.Context.make(
            0, 0, None, None, num_stages=4
        ))  # fmt: skip
    stage, stages = nnx_stages(Block, SCHEDULE, nnx.Rngs(0), uses_rngs=True)
    ctx = jaxpipe.Context.make(0, 0, jax.random.key(0), None, num_stages=4)
    with pytest.raises(ValueError, match=r"Block.__call__\('self', 'x'\) takes no rngs"):
        stage(jax.tree.map(lambda leaf: leaf[0], stages), batch(), ctx)
    function = nnx_function(kept)
    with pytest.raises(ValueError, match=r"parameters of structure .* for Linear, whose parameters have structure"):
        function({"kernel": jnp.ones((6, 6))}, batch())


def test_linen_modules_without_a_key_are_refused():
    example, context = jnp.zeros(4), functools.partial(jaxpipe.Context.make, 0, 0, data=None, num_stages=4)
    for uses_rngs, key, remedy in (
        (True, None, r"call step\(params, batch, rng\)"),
        (False, jax.random.key(0), "pass uses_rngs=True"),
    ):
        if not uses_rngs:
            init, _ = linen_stages(
                nn.Dropout(0.5), SCHEDULE, jax.random.key(0), example, arguments=lambda ctx: (False,)
            )
        else:
            init, _ = linen_stages(
                nn.Dropout(0.5), SCHEDULE, jax.random.key(0), example, arguments=lambda ctx: (False,), uses_rngs=True
            )
        with pytest.raises(ValueError, match=rf"Dropout draws random numbers without a key: {remedy}"):
            init({}, example, context(rng=key))
