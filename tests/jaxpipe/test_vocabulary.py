"""A vocabulary sharded over a mesh axis: lookups, losses and gradients of the whole one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe import vocabulary
from tests.cases import cases
from tests.jaxprs import equations

AXES = [(1, 1), (2, 1), (4, 2), (8, 1)]


def make(size, width=6, shape=(3, 5), dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(size, width)), dtype)
    y = jnp.asarray(rng.normal(size=(*shape, width)), dtype)
    return y, table, jnp.asarray(rng.integers(0, size, shape), jnp.int32)


def plain_cross_entropy(y, table, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(y @ table.T), targets[..., None], -1)[..., 0]


def shard(function, pp, dp, in_specs):
    mesh = jaxpipe.make_mesh(pp=pp, dp=dp)
    wrapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=P(), axis_names={"pp"}, check_vma=False)
    return jax.jit(wrapped)


@pytest.mark.parametrize("pp, dp", AXES)
@cases("size", [5, 16, 19], quick=[16, 19])
@cases("shape", [(4,), (3, 5)], quick=[(3, 5)])
def test_cross_entropy_and_its_gradients(x64, pp, dp, size, shape):
    """Also where the vocabulary does not divide, and where a device holds none of it (5 over 8)."""
    y, table, targets = make(size, shape=shape)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape))

    def objective(y, table, targets, weights):
        losses = vocabulary.cross_entropy(y, table, targets, "pp", size=size)
        return (losses * weights).sum(), losses

    def gradients(y, table, targets, weights):
        """One device's copy of the loss is differentiated; y is replicated, so its gradient is summed."""
        share = jnp.where(jax.lax.axis_index("pp") == 0, weights, 0.0)
        grads, losses = jax.grad(objective, (0, 1), has_aux=True)(y, table, targets, share)
        return losses, jax.lax.psum(grads[0], "pp"), jax.lax.all_gather(grads[1], "pp", tiled=True)

    padded = vocabulary.pad_vocabulary(table, pp)
    run = shard(gradients, pp, dp, (P(), P("pp"), P(), P()))
    losses, d_y, d_table = run(y, padded, targets, weights)
    expected = jax.grad(lambda y, table: (plain_cross_entropy(y, table, targets) * weights).sum(), (0, 1))(y, table)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    close(losses, plain_cross_entropy(y, table, targets))
    close(d_y, expected[0])
    close(d_table[:size], expected[1])
    assert not d_table[size:].any()


@pytest.mark.parametrize("pp, dp", AXES)
def test_embedding_and_its_gradient(x64, pp, dp):
    y, table, tokens = make(19)

    def gradients(table, tokens, y):
        share = jnp.where(jax.lax.axis_index("pp") == 0, y, 0.0)
        x, vjp = jax.vjp(lambda table: vocabulary.embed_tokens(table, tokens, "pp"), table)
        return x, jax.lax.all_gather(vjp(share)[0], "pp", tiled=True)

    run = shard(gradients, pp, dp, (P("pp"), P(), P()))
    x, d_table = run(vocabulary.pad_vocabulary(table, pp), tokens, y)
    np.testing.assert_array_equal(x, table[tokens])
    np.testing.assert_allclose(d_table[:19], jnp.zeros_like(table).at[tokens].add(y), rtol=1e-12)
    assert not d_table[19:].any()


def test_large_logits_do_not_overflow(x64):
    y, table, targets = make(16)
    losses = shard(lambda *args: vocabulary.cross_entropy(*args, "pp"), 4, 1, (P(), P("pp"), P()))(
        y * 1e4, table, targets
    )
    np.testing.assert_allclose(losses, plain_cross_entropy(y * 1e4, table, targets), rtol=1e-12)


def test_bfloat16_products_and_float32_sums():
    y, table, targets = make(64, dtype=jnp.bfloat16)
    losses = shard(lambda *args: vocabulary.cross_entropy(*args, "pp"), 4, 1, (P(), P("pp"), P()))(y, table, targets)
    assert losses.dtype == jnp.float32
    exact = plain_cross_entropy(y.astype(jnp.float32), table.astype(jnp.float32), targets)
    np.testing.assert_allclose(losses, exact, rtol=1e-5)


def test_no_device_holds_more_than_its_part_of_the_logits():
    """The largest arrays of forward and backward are [tokens, V / P]; logits are computed once."""
    tokens, size, width, devices = 64, 4096, 8, 4
    y, table, targets = make(size, width, (tokens,), np.float32)

    def objective(y, table):
        return vocabulary.cross_entropy(y, table, targets, "pp").mean()

    mesh = jaxpipe.make_mesh(pp=devices)
    run = jax.shard_map(jax.grad(objective, (0, 1)), mesh=mesh, in_specs=(P(), P("pp")), out_specs=(P(), P("pp")),
                        check_vma=False)  # fmt: skip
    (body,) = [eqn.params["jaxpr"] for eqn in jax.make_jaxpr(run)(y, table).eqns]
    shapes = [v.aval.shape for eqn, _ in equations(body) for v in eqn.outvars]
    assert max(np.prod(shape) for shape in shapes) == tokens * size // devices
    assert sum(eqn.primitive.name == "dot_general" for eqn, _ in equations(body)) == 3


def test_what_does_not_fit_is_refused():
    y, table, targets = make(8, dtype=np.float32)

    def run(y, table, targets, **options):
        function = functools.partial(vocabulary.cross_entropy, axis="pp", **options)
        jax.eval_shape(shard(function, 2, 1, (P(), P("pp"), P())), y, table, targets)

    with pytest.raises(ValueError, match=r"size=9, but the table has 4 rows on each of 2 devices.*pad_vocabulary"):
        run(y, table, targets, size=9)
    with pytest.raises(ValueError, match=r"y is float32\[3, 5, 6\].*\[4, 5\].*table's width"):
        run(y, table[:, :5], targets)
    with pytest.raises(ValueError, match=r"targets \[3\]: y needs"):
        run(y, table, targets[:, 0])
    with pytest.raises(ValueError, match=r"part bfloat16\[4, 6\].*table's dtype"):
        run(y, table.astype(jnp.bfloat16), targets)


@cases("size, ranks, dtype", [
    (300, 8, jnp.uint8), (256, 1, jnp.uint8), (100, 4, jnp.int8), (200, 2, jnp.int8), (70000, 4, jnp.uint16),
    (70000, 8, jnp.int16), (16, 2, jnp.uint4), (19, 2, jnp.uint32), (19, 4, jnp.int64), (19, 4, jnp.uint64),
], quick=[(300, 8, jnp.uint8), (200, 2, jnp.int8), (16, 2, jnp.uint4), (19, 4, jnp.uint64)])  # fmt: skip
def test_tokens_of_any_integer_dtype(x64, size, ranks, dtype):
    """A dtype that holds the tokens may not hold the vocabulary's size, nor the first row of a device."""
    y, table, _ = make(size)
    largest = min(size - 1, jnp.iinfo(dtype).max)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, largest, (3, 5)).astype(np.int64)).at[0, 0].set(largest)
    narrow, weights = tokens.astype(dtype), jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)))

    def run(table, y, tokens):
        def objective(table):
            share = jnp.where(jax.lax.axis_index("pp") == 0, 1.0, 0.0)
            rows = vocabulary.embed_tokens(table, tokens, "pp")
            losses = vocabulary.cross_entropy(y, table, tokens, "pp", size=size)
            return share * ((losses * weights).sum() + (rows * y).sum()), (rows, losses)

        grad, aux = jax.grad(objective, has_aux=True)(table)
        return *aux, jax.lax.all_gather(grad, "pp", tiled=True)

    def plain(table):
        return (plain_cross_entropy(y, table, tokens) * weights).sum() + (table[tokens] * y).sum()

    rows, losses, grad = shard(run, ranks, 1, (P("pp"), P(), P()))(vocabulary.pad_vocabulary(table, ranks), y, narrow)
    np.testing.assert_array_equal(rows, table[tokens])
    np.testing.assert_allclose(losses, plain_cross_entropy(y, table, tokens), rtol=1e-12)
    np.testing.assert_allclose(grad[:size], jax.grad(plain)(table), rtol=1e-10, atol=1e-12)
    assert not grad[size:].any()


@cases("dtype", [jnp.int32, jnp.int8, jnp.uint32], quick=[jnp.int8, jnp.uint32])
def test_what_is_no_token_of_the_vocabulary(x64, dtype):
    """Negative targets count nothing, those of padding rows and beyond are NaN; none has a gradient."""
    size = 10  # 12 rows on 4 devices
    y, table, targets = make(size)
    outside = {jnp.int32: [-1, -100, 10, 11, 12, 2**31 - 1], jnp.int8: [-1, -100, 10, 11, 12, 127],
               jnp.uint32: [10, 11, 12, 2**31, 2**32 - 1]}[dtype]  # fmt: skip
    targets = targets.at[:, 4].set(0).ravel()
    values = jnp.concatenate([targets[len(outside) :].astype(jnp.int64), jnp.asarray(outside, jnp.int64)])
    targets, y = values.astype(dtype), y.reshape(15, -1)
    inside = np.asarray((values >= 0) & (values < size))

    def run(table, y, targets):
        def objective(y, table):
            losses = vocabulary.cross_entropy(y, table, targets, "pp", size=size)
            share = jnp.where(jax.lax.axis_index("pp") == 0, 1.0, 0.0)
            return share * jnp.where(inside, losses, 0.0).sum(), losses

        (d_y, d_table), losses = jax.grad(objective, (0, 1), has_aux=True)(y, table)
        rows = vocabulary.embed_tokens(table, targets, "pp")
        return losses, rows, jax.lax.psum(d_y, "pp"), jax.lax.all_gather(d_table, "pp", tiled=True)

    padded = vocabulary.pad_vocabulary(table, 4)
    losses, rows, d_y, d_table = shard(run, 4, 1, (P("pp"), P(), P()))(padded, y, targets)
    np.testing.assert_array_equal(np.isnan(losses), np.asarray(values >= size))
    assert not losses[np.asarray(values < 0)].any() and not rows[~inside].any()

    def plain(y, table):
        return plain_cross_entropy(y[inside], table, targets[inside]).sum()

    expected = jax.grad(plain, (0, 1))(y, table)
    np.testing.assert_allclose(losses[inside], plain_cross_entropy(y, table, values)[inside], rtol=1e-12)
    np.testing.assert_allclose(d_y, expected[0], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(d_table[:size], expected[1], rtol=1e-10, atol=1e-13)
    assert not d_table[size:].any() and not d_y[~inside].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bool_])
def test_tokens_that_are_no_integers_are_refused(dtype):
    y, table, tokens = make(8, dtype=np.float32)
    with pytest.raises(ValueError, match=rf"tokens are {jnp.dtype(dtype).name}\[3, 5\].*integers"):
        jax.eval_shape(shard(lambda *args: vocabulary.embed_tokens(*args, "pp"), 2, 1, (P("pp"), P())), table,
                       tokens.astype(dtype))  # fmt: skip
    with pytest.raises(ValueError, match=rf"targets are {jnp.dtype(dtype).name}\[3, 5\].*integers"):
        jax.eval_shape(shard(lambda *args: vocabulary.cross_entropy(*args, "pp"), 2, 1, (P(), P("pp"), P())), y, table,
                       tokens.astype(dtype))  # fmt: skip
