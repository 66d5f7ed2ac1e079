"""Bytes alive at once, of programs whose answer is known."""

import jax
import jax.numpy as jnp

from jaxpipe.planning.liveness import peak


def test_peak_of_known_programs():
    """Products are allocated, what surrounds them is not; loops and slots share memory with what they carry."""
    x, size = jnp.ones((16, 16)), 16 * 16 * 4

    def bytes_of(function, *args, **options):
        return peak(jax.make_jaxpr(function)(*args).jaxpr, **options)

    assert bytes_of(lambda x: (x @ x) @ x, x) == 2 * size
    assert bytes_of(lambda x: jnp.sin(x).reshape(-1).sum(), x) == 4
    assert bytes_of(lambda x: jnp.tanh(x) @ x, x) == 2 * size
    assert bytes_of(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x @ x, 1, 0), jnp.ones((3, 16, 16)), x) == size

    def loop(x):
        return jax.lax.scan(lambda c, _: (c + (x @ x) @ x, None), x, None, length=4)[0]

    assert bytes_of(loop, x) == 2 * size

    def accumulate(x, ordered):
        def body(sums, _):
            grads = x @ x, x @ x.T
            grads = jax.lax.optimization_barrier(grads) if ordered else grads
            return jax.tree.map(jnp.add, sums, grads), None

        return jax.lax.scan(body, (x, x), None, length=4)[0]

    # What is added to a carried sum is freed at once, unless something must be there before the addition.
    assert bytes_of(lambda x: accumulate(x, False), x) - bytes_of(lambda x: accumulate(x, True), x) == -size

    def add_rows(x):
        places = jnp.arange(2)
        return jax.lax.scan(lambda sums, _: (sums.at[places].add(x[:2] @ x), None), x, None, length=4)[0]

    rows = bytes_of(add_rows, x)
    assert rows < size  # of the rows alone: they are added to the carried sum where it is
    assert rows + 2 * size > bytes_of(lambda x: jnp.zeros_like(x).at[jnp.arange(2)].add(x[:2]) @ x, x) >= 2 * size

    groups, masked = jnp.array([8, 8]), 2 * size
    matrices = jnp.ones((2, 16, 16))
    assert bytes_of(lambda x: jax.lax.ragged_dot(x, matrices, groups), x) == size
    assert bytes_of(lambda x: jax.lax.ragged_dot(x, matrices, groups), x, cpu=True) == size + masked
