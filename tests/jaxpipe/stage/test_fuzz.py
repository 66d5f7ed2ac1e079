"""Random stages are divided rightly; `python -m tests.jaxpipe.stage.fuzz --seeds N` tries more of them than these."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe.stage import split_stage
from tests.cases import cases
from tests.jaxpipe.stage import fuzz, zoo
from tests.jaxpipe.stage.expressions import Book, expressions
from tests.jaxpipe.stage.leaves import LEAVES, ROWS, Context
from tests.jaxpipe.stage.pieces import NESTED
from tests.plain import assert_trees_close, plain_value_and_grad

SEEDS = 150


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] * (n >= 6)) for n in range(SEEDS)])
def test_divided_backward_is_the_plain_one(seed):
    fuzz.run_seed(seed)


@cases("seed", range(150, 210), quick=[150])
def test_divided_within_a_budget_it_is_the_plain_one(seed):
    fuzz.run_seed(seed, budgets=True)


@cases("seed", range(0, 27, 3), quick=[3, 6, 18])
def test_its_numbers_are_those_of_the_plain_one(seed):
    assert fuzz.dtype_of(seed) == "float64"
    fuzz.run_seed(seed, numbers=True)


def test_programs_are_of_every_kind(x64):
    names = {name for seed in range(SEEDS) for name in fuzz.make_program(seed).pieces}
    assert names == {*LEAVES, *NESTED}
    assert {fuzz.dtype_of(seed) for seed in range(SEEDS)} == set(fuzz.DTYPES)


def test_other_expressions_are_seen(x64):
    """The comparison can fail: another order of a product, another turn of a loop, another constant."""

    def numbers(function):
        return expressions(book, function, (zoo.normal(3, 3), zoo.normal(3)), inputs)[0]

    def loop(w, x, f):
        return jax.lax.scan(lambda c, row: (f(c, row), c), x, w)

    book = Book()
    inputs = book.inputs("", (0, 1))
    assert numbers(lambda w, x: w @ x) == numbers(lambda w, x: jax.jit(jnp.dot)(w, x)) != numbers(lambda w, x: w.T @ x)
    assert numbers(lambda w, x: jnp.sin(x) * 2) != numbers(lambda w, x: jnp.sin(x) * 3)
    one = numbers(lambda w, x: loop(w, x, jnp.multiply))
    unrolled = numbers(lambda w, x: x * w[0] * w[1])
    assert one != numbers(lambda w, x: loop(w[::-1], x, jnp.multiply)) != unrolled
    assert one == numbers(lambda w, x: jax.checkpoint(functools.partial(loop, f=jnp.multiply))(w, x))


PLACES = {
    "1f1b": (jaxpipe.schedule.build("1f1b", 2, 3), None),
    "zb1p": (jaxpipe.schedule.build("zb1p", 2, 3), None),
    "one rank": (jaxpipe.schedule.build("1f1b", 1, 3), "unrolled"),
}


@cases(
    "place, seed",
    [(place, 3 * i) for i, place in enumerate([*PLACES, *PLACES])],
    quick=[("zb1p", 3), ("one rank", 6), ("1f1b", 9)],
)
def test_programs_in_a_pipeline(x64, place, seed):
    """The executor's numbers for a random stage: its stashes, slots and branches."""
    schedule, dispatch = PLACES[place]
    program = fuzz.make_program(seed, longest=2)

    def stage(params, x, ctx):
        key = jax.random.fold_in(jax.random.key(seed), 100 * ctx.stage + ctx.microbatch)
        context = Context(ctx.data["mask"], ctx.data["position"], ctx.stage % 3, key)
        out = program.stage(params, x, context)
        return out[0] if program.has_aux else out

    def embed(outer, data, ctx):
        return data["x"]

    def head(outer, y, data, ctx):
        return sum(jnp.mean(leaf**2) for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.floating))

    count = schedule.num_microbatches
    batch = {"x": program.x, "mask": program.context.mask, "position": program.context.position}
    batch = jax.tree.map(lambda leaf: jnp.concatenate([jnp.roll(leaf, m, 0) for m in range(count)]), batch)
    floating = {name: leaf for name, leaf in program.params.items() if name != "offset"}
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf / (s + 1) for s in range(schedule.num_stages)]), floating)
    params = jaxpipe.Params(rows)
    mesh = jaxpipe.make_mesh(pp=schedule.num_ranks)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, dispatch=dispatch)
    (loss, _), grads = jax.jit(step)(params, batch)
    (expected, _), expected_grads = plain_value_and_grad(stage, schedule, embed=embed, head=head)(params, batch)
    assert_trees_close((loss, grads.stages), (expected, expected_grads.stages), rtol=1e-10)


def drop(key, index, x):
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, index), 0.9, x.shape), x / 0.9, 0)


def two_dropped_branches(p, x, c):
    x = x + drop(c.key, 0, jnp.tanh(x) @ p["a"] + p["c"])
    return x + drop(c.key, 1, x @ p["b"])


MASKED = {
    "a matrix for some rows, another for others": lambda p, x, c: jnp.where(c.mask[:, None], x @ p["a"], x @ p["b"]),
    "low rank on some rows": lambda p, x, c: x @ p["a"] + jnp.where(c.mask[:, None], x @ p["b"], 0),
    "absolute values": lambda p, x, c: jnp.abs(x @ p["a"]) + p["c"],
    "clipped": lambda p, x, c: jnp.clip(x @ p["a"], -0.1, 0.1) + p["c"],
    "residual of a rectifier": lambda p, x, c: x + jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"],
    "the larger of two": lambda p, x, c: jnp.maximum(x @ p["a"], x @ p["b"]) + p["c"],
    "two dropped branches": two_dropped_branches,
    "the best of each row": lambda p, x, c: jnp.where(x >= jax.lax.top_k(x, 2)[0][:, 1:], x @ p["a"], p["c"]),
    "associative scan": lambda p, x, c: jax.lax.associative_scan(jnp.maximum, x @ p["a"]) + p["c"],
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_that_both_halves_read(x64, name):
    """What the weights' half reads of the mask it has from the forward, not from the input's half, nor twice."""
    rows = ROWS * 2
    p = {"a": zoo.normal(4, 4), "b": zoo.normal(4, 4, seed=1), "c": zoo.normal(4)}
    context = Context(jnp.arange(rows) % 3 == 0, jnp.arange(rows), jnp.int32(0), jax.random.key(0))
    program = fuzz.Program(0, "float64", MASKED[name], p, zoo.normal(rows, 4), context, False, ())
    fuzz.check(program)
    fuzz.check_numbers(program)
    split = split_stage(MASKED[name], p, program.x, context)
    assert not [leaf for leaf in split.crossing if leaf.dtype == jnp.bool_]


@cases("seed", [22, 25], quick=[22])
def test_a_stage_is_divided_alike_every_time(seed, x64):
    """What the halves of nested loops stack and hand over has one order, or no cache finds the compiled program."""

    def divided():
        program = fuzz.make_program(seed)
        args = program.params, program.x, program.context
        split = split_stage(program.stage, *args, has_aux=program.has_aux)
        prepared = jax.eval_shape(split.prepare, args[0])
        residuals = jax.eval_shape(split.forward, prepared, *args[1:])[-1]
        out_ct = fuzz.cotangents(program, split.out)
        _, crossing = jax.eval_shape(split.backward_input, prepared, residuals, out_ct)
        halves = (
            jax.make_jaxpr(split.forward)(prepared, *args[1:]),
            jax.make_jaxpr(split.backward_input)(prepared, residuals, out_ct),
            jax.make_jaxpr(split.backward_weight)(prepared, residuals.weight, crossing),
        )
        return [re.sub(" at 0x[0-9a-f]+", "", str(half)) for half in halves]

    first = divided()
    assert all(divided() == first for _ in range(6))
