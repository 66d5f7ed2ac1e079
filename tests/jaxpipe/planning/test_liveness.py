"""Bytes alive at once, of programs whose answer is known."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.deepseek import stand_in
from jaxpipe.planning.liveness import called_jaxpr, peak, whole, workspace
from jaxpipe.stage.kernel_flops import kernel_name


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


def test_what_is_written_at_the_end_waits_beside_the_rest():
    """XLA writes into slots where the program does: what an action hands on is in memory until its end."""
    x, size = jnp.ones((16, 16)), 16 * 16 * 4

    def loop(at_the_end):
        def action(carry, _):
            slots, total = carry
            made = x @ x
            if not at_the_end:
                slots = jax.lax.dynamic_update_index_in_dim(slots, made, 0, 0)
            total = total + ((x @ x.T) @ x).sum()
            if at_the_end:
                slots = jax.lax.dynamic_update_index_in_dim(slots, made, 0, 0)
            return (slots, total), None

        return jax.lax.scan(action, (jnp.zeros((3, 16, 16)), jnp.zeros(())), None, length=4)[0]

    sooner, later = (peak(jax.make_jaxpr(lambda end=end: loop(end))().jaxpr) for end in (False, True))
    assert later - sooner == size


def test_what_is_written_into_a_slot_is_free_and_what_is_read_early_runs_early():
    """A compiler has several orders to choose from, and slots hold what was written into them."""
    x, size = jnp.ones((16, 16)), 16 * 16 * 4

    def store(slots, _):
        for place in range(3):  # one product at a time: each is in its slot before the next one is made
            slots = jax.lax.dynamic_update_index_in_dim(slots, x @ x, place, 0)
        return slots, None

    run = jax.make_jaxpr(lambda slots: jax.lax.scan(store, slots, None, length=4)[0])
    assert peak(run(jnp.ones((3, 16, 16))).jaxpr) == size

    def late(x):
        products = [x @ (x * scale) for scale in range(1, 9)]
        return sum(product @ x[0] for product in products)

    # Each product alone, with its operand, beside vectors; all eight in the order that they are written in.
    assert peak(jax.make_jaxpr(late)(x).jaxpr) < 4 * size


def test_a_loops_buffer_is_free_until_what_is_carried_next_is_written():
    """Of four products in a turn, one is in memory beside what is carried, as XLA allocates."""
    x = jnp.ones((64, 64))

    def loop(x):
        def turn(carried, _):
            for _ in range(4):
                carried = carried @ x
            return carried, None

        return jax.lax.scan(turn, x, None, length=3)[0]

    found: Any = jax.jit(loop).lower(x).compile().memory_analysis()
    assert found.temp_size_in_bytes == pytest.approx(x.nbytes, rel=0.02)
    jaxpr = jax.make_jaxpr(loop)(x).jaxpr
    assert peak(jaxpr) == peak(jaxpr, cpu=True) == x.nbytes


def test_a_kernel_for_a_platform_runs_once_on_the_same_values():
    """A backward pass that computes again what the forward pass made reads fewer results of it, or more."""
    x = jnp.ones((64, 64))

    def on_any(function):
        return lambda w: jax.lax.platform_dependent(w, cuda=function, default=function)

    def program(again, w, x):
        first, second = on_any(lambda w: (w @ w, w @ w.T))(w)
        also = on_any(lambda w: w @ w)(w) if again else first
        return (x @ first) @ also @ second @ also @ first

    def other(w, x):
        first, second = on_any(lambda w: (w @ w, w @ w.T))(w)
        third = on_any(lambda w: w.T @ w)(w)
        return (x @ first) @ third @ second @ third @ first

    once, twice = (functools.partial(program, again) for again in (False, True))
    known: Any = [jax.jit(each).lower(x, x).compile().memory_analysis() for each in (once, twice)]
    assert known[0].temp_size_in_bytes == known[1].temp_size_in_bytes
    planned = [peak(jax.make_jaxpr(each)(x, x).jaxpr) for each in (once, twice, other)]
    assert planned[0] == planned[1] == pytest.approx(planned[2] - x.nbytes, abs=8)


def test_attention_sums_gradients_of_queries_in_float32():
    """The backward pass of 4 x 2,048 tokens and 16 heads of 192 had a workspace of 101,187,840 bytes on an H200."""
    query, value = (jax.ShapeDtypeStruct((4, 2048, 16, width), jnp.bfloat16) for width in (192, 128))

    def gradients(q, k, v, ct):
        return jax.vjp(stand_in.attention, q, k, v)[1](ct)

    jaxpr = jax.make_jaxpr(gradients)(query, query, value, value).jaxpr
    (backward,) = [eqn for eqn in _all_eqns(jaxpr) if kernel_name(eqn) == stand_in.BACKWARD]
    assert workspace(backward, whole) == pytest.approx(101_187_840, abs=1000)
    results = sum(leaf.size * 2 for leaf in (query, query, value))
    assert peak(jaxpr) >= 101_187_000 + results > peak(jaxpr, cpu=True)


def _all_eqns(jaxpr):
    for eqn in jaxpr.eqns:
        called = called_jaxpr(eqn)
        yield from [eqn] if called is None else _all_eqns(called)
