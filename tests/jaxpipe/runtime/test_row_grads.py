"""Gradients of embeddings, added to sums as rows: against JAX's own gradient, an array of the table's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.runtime.program import Op
from jaxpipe.runtime.row_grads import Rows, add_with_rows, pull_back_rows
from tests.jaxprs import equations

ROWS, WIDTH = 7, 5


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


LOOKUPS = {
    "indexing": lambda table, tokens: table[tokens],
    "zeros outside": lambda table, tokens: table.at[tokens].get(mode="fill", fill_value=0),
    "clipped": lambda table, tokens: jnp.take(table, tokens, axis=0, mode="clip"),
    "scaled": lambda table, tokens: 3.0 * table[tokens],
    "columns": lambda table, tokens: table[:, tokens % WIDTH],
    "jitted": jax.jit(lambda table, tokens: table[tokens]),
    "masked": lambda table, tokens: jnp.where((tokens % 2 == 0)[..., None], table[tokens], 0.0),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_are_jax_own_gradient(x64, name):
    """Tokens that come often, negative ones, and ones beyond the table."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(-2, ROWS + 3, (3, 40)) % 9)
    y, pull_back = jax.vjp(lambda table: LOOKUPS[name](table, tokens), random(ROWS, WIDTH))
    total, ct = random(ROWS, WIDTH, seed=2), random(*y.shape, seed=3)
    (rows,) = pull_back_rows(pull_back, ct)
    assert isinstance(rows, Rows)
    np.testing.assert_allclose(rows.added_to(total), total + pull_back(ct)[0], rtol=1e-13, atol=1e-13)


def test_what_is_no_lookup_alone_is_left_as_it_is(x64):
    """A tied table that is multiplied too, two lookups, rows that are added to something: arrays as JAX has them."""
    tokens, x = jnp.array([1, 1, 4]), random(3, WIDTH)

    def function(params):
        tied, twice, plain = params
        y = tied[tokens] @ tied.T @ jnp.ones((ROWS, WIDTH)) + twice[tokens] + twice[tokens[::-1]]
        return y + x * plain.sum()

    params = tuple(random(ROWS, WIDTH, seed=seed) for seed in range(3))
    y, pull_back = jax.vjp(function, params)
    expected = pull_back(jnp.ones_like(y))
    found = pull_back_rows(pull_back, jnp.ones_like(y))
    assert not any(isinstance(leaf, Rows) for leaf in jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, Rows)))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_in_sums_of_other_dtypes():
    """Rows of a bfloat16 table are added up in float32, whatever the sum's dtype: 300 ones are 300, not 256."""
    tokens = jnp.zeros(300, jnp.int32)
    _, pull_back = jax.vjp(lambda table: table[tokens], jnp.ones((2, 1), jnp.bfloat16))
    grads = pull_back_rows(pull_back, jnp.ones((300, 1), jnp.bfloat16))
    for dtype in (jnp.float32, jnp.bfloat16):
        (total,) = add_with_rows((jnp.ones((2, 1), dtype),), grads)
        assert total.dtype == dtype
        np.testing.assert_array_equal(total.astype(jnp.float32), jnp.array([[301], [1]], dtype).astype(jnp.float32))


def test_a_microbatch_that_does_not_count_adds_nothing():
    _, pull_back = jax.vjp(lambda table: table[jnp.array([1])], jnp.ones((2, 1)))
    grads, total = pull_back_rows(pull_back, jnp.full((1, 1), jnp.nan)), (jnp.ones((2, 1)),)
    np.testing.assert_array_equal(add_with_rows(total, grads, jnp.bool_(False))[0], total[0])
    assert np.isnan(add_with_rows(total, grads, jnp.bool_(True))[0][1, 0])


def test_a_pipeline_makes_no_array_of_the_tables_size():
    """Where it is the embedding's turn nothing fills, casts or adds one: what has its size is the sum itself."""
    schedule, vocab = jaxpipe.schedule.build("1f1b", 2, 4), 1009
    step = jaxpipe.value_and_grad(
        lambda w, x, ctx: jnp.tanh(x @ w), schedule, jaxpipe.make_mesh(pp=2), compute_dtype=jnp.bfloat16,
        embed=lambda outer, data, ctx: outer[data], head=lambda outer, y, data, ctx: (y**2).mean(),
    )  # fmt: skip
    params = jaxpipe.Params(jnp.ones((2, WIDTH, WIDTH)), jnp.ones((vocab, WIDTH)))
    jaxpr = jax.make_jaxpr(step)(params, jnp.zeros((8, 3), jnp.int32))
    makers = {
        eqn.primitive.name
        for eqn, _ in equations(jaxpr)
        if Op.EMBED_GRAD.value in str(eqn.source_info.name_stack).split("/")
        and any(var.aval.shape == (vocab, WIDTH) for var in eqn.outvars)
    }
    assert makers == {"scatter-add"}
