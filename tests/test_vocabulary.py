"""A vocabulary sharded over a mesh axis: lookups, losses and gradients of the whole one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe import vocabulary

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
@pytest.mark.parametrize("size", [5, 16, 19])
@pytest.mark.parametrize("shape", [(4,), (3, 5)])
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
    shapes = [v.aval.shape for eqn in equations(body) for v in eqn.outvars]
    assert max(np.prod(shape) for shape in shapes) == tokens * size // devices
    assert sum(eqn.primitive.name == "dot_general" for eqn in equations(body)) == 3


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


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
