"""What is kept is enough, and no other choice takes fewer bytes; a stage keeps what is small and makes the rest."""

import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxpipe import _jax
from jaxpipe._jax import LIGHT
from jaxpipe.stage import split_stage
from jaxpipe.stage.divide import closure
from jaxpipe.stage.graph import RECOMPUTE, Node, Value
from jaxpipe.stage.residuals import minimum_cut
from tests.cases import cases
from tests.jaxpipe.stage import zoo
from tests.plain import assert_trees_close


def random_graph(seed, size=9):
    """Nodes over one input, light and heavy, of one or two inputs and results of all sizes; what is needed, given."""
    rng = random.Random(seed)

    def value():
        return Value(jax.ShapeDtypeStruct((rng.randint(1, 6),), np.int8))

    values, nodes = [value()], []
    for _ in range(size):
        outs = tuple(value() for _ in range(rng.choice([1, 1, 2])))
        ins = tuple(rng.sample(values, min(len(values), rng.choice([1, 1, 2]))))
        nodes.append(Node(rng.choice(["add", "add", "dot_general"]), ins, outs, run=lambda *_: ()))
        values += outs
    return nodes, values, rng.sample(values, 4), set(rng.sample(values, 2))


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_takes_fewer_bytes(seed):
    nodes, values, needed, given = random_graph(seed)
    chosen = minimum_cut(needed, nodes, given)

    def enough(kept):
        return closure([value for value in needed if value not in kept], nodes, given | kept) is not None

    def cost(kept):
        return sum(value.nbytes + 1 for value in kept)

    candidates = [value for value in values if value not in given]
    others = (set(kept) for count in range(5) for kept in itertools.combinations(candidates, count))
    assert enough(chosen)
    assert cost(chosen) == min(cost(kept) for kept in others if enough(kept))


def test_the_one_table_knows_what_is_told_of_primitives():
    """Every set of primitives has only names that some table of how heavy they are knows."""
    known = LIGHT | _jax.CHEAP | _jax.HEAVY
    told = ("VIEWS", "WRITES_IN_PLACE", "READS_PART", "READS_WHOLE", "REDUCTIONS", "COMPUTED_ONCE", "WITHOUT_KERNEL",
            "PRODUCTS", "ATTENTION_PRODUCTS", "WITH_BODIES", "COLLECTIVES", "SILENT")  # fmt: skip
    assert {name: set(getattr(_jax, name)) - known for name in told} == {name: set() for name in told}


def test_light_work_is_known_to_jax():
    """Names of primitives that this JAX has; those of other versions match nothing."""
    jaxpr = jax.make_jaxpr(lambda x: jnp.pad(jnp.tanh(x).reshape(2, 2).T.sum(0) > 0, 1))(jnp.ones(4))
    names = {eqn.primitive.name for eqn in jaxpr.eqns} - {"jit", "pjit"}
    assert {"tanh", "reshape", "transpose", "reduce_sum", "gt"} <= names & LIGHT


def test_a_gated_layer_keeps_what_its_products_made(x64):
    """Input and the first product's result; norm, gate and their product are computed again in both halves."""

    def stage(p, x):
        normal = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        gate, up = jnp.split(normal @ p["in"], 2, -1)
        return x + (jax.nn.silu(gate) * up) @ p["out"]

    params, x = {"in": zoo.normal(4, 12), "out": zoo.normal(6, 4)}, zoo.normal(5, 4)
    split = split_stage(stage, params, x)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(split.residuals)) == [(5, 4), (5, 12)]
    # The cotangents of both products' results.
    assert sorted(leaf.shape for leaf in split.crossing) == [(5, 4), (5, 6)]


def test_what_collectives_and_sorts_made_is_kept(x64):
    split = split_stage(lambda w, x: jnp.sort(x, 0) * w, zoo.normal(4), zoo.normal(3, 4))
    kept = [leaf.shape for leaf in jax.tree.leaves(split.residuals) if leaf.dtype == jnp.float64]
    assert kept == [(3, 4)]
    assert not LIGHT & {"sort", "all_to_all", "psum", "all_gather", "dot_general", "pallas_call", "custom_call", "scan"}


def test_what_the_user_calls_light_is_computed_again(x64):
    """A gather is not light, but where its result is named so it is; the name of a function means nothing."""

    def plain(table, rows):
        return table[rows]

    plain.__name__ = RECOMPUTE

    def named(table, rows):
        return checkpoint_name(table[rows], RECOMPUTE) + 0.0

    def stage(take, w, x, rows):
        return jnp.sin(take(x, rows) @ w)

    params, x, rows = zoo.normal(4, 4), zoo.normal(3, 4), jnp.arange(24) % 3
    kept = []
    for take in (jax.jit(plain), named, jax.jit(named)):
        split = split_stage(functools.partial(stage, take), params, x, rows)
        kept.append({leaf.shape for leaf in split.residuals.weight if leaf.dtype == jnp.float64})
        _, residuals = split.forward(split.prepare(params), x, rows)
        x_ct, crossing = split.backward_input(split.prepare(params), residuals, jnp.ones((24, 4)))
        found = split.backward_weight(split.prepare(params), residuals.weight, crossing), x_ct
        expected = jax.vjp(lambda w, x: stage(plain, w, x, rows), params, x)[1](jnp.ones((24, 4)))
        assert_trees_close(found, expected, rtol=1e-12)
    assert kept == [{(24, 4)}, {(3, 4)}, {(3, 4)}]


def test_summands_are_gradients_before_the_last_cast():
    params, x = jnp.ones((4, 4)), jnp.ones((2, 4), jnp.bfloat16)
    split = split_stage(lambda w, x: jnp.tanh(x @ w.astype(x.dtype)), params, x)
    prepared = split.prepare(params)
    y, residuals = split.forward(prepared, x)
    wide, _ = split.backward(prepared, residuals, y)
    (narrow,), _ = split.backward(prepared, residuals, y, summands=True)
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(wide, narrow.astype(jnp.float32))


def test_remat_shares_the_casts_that_are_made_once_a_step():
    """A step prepares one narrow copy of the parameters, not another behind the barrier, nor the wide ones."""

    @jax.checkpoint
    def stage(w, x):
        return jnp.tanh(x @ w.astype(x.dtype))

    params, x = jnp.linspace(-1, 1, 16).reshape(4, 4), jnp.ones((2, 4), jnp.bfloat16)
    split = split_stage(stage, params, x)
    prepared = split.prepare(params)
    assert [leaf.dtype for leaf in prepared] == [jnp.bfloat16]
    y, residuals = split.forward(prepared, x)
    expected = jax.vjp(stage, params, x)[1](y)
    assert_trees_close(split.backward(prepared, residuals, y), expected, rtol=2e-2)


@cases("reverse", [False, True], quick=[True])
def test_turns_of_an_unrolled_scan_are_as_written_out(x64, reverse):
    """What is kept and handed over is what code without a loop keeps; nothing is stacked, no parameter copied."""
    turns, width = 3, 4
    params = {"a": zoo.normal(turns, width, 2 * width), "b": zoo.normal(turns, 2 * width, width)}
    x, gain = zoo.normal(2, width), zoo.normal(turns, width)

    def layer(p, x, gain):
        return x + jax.nn.silu(jnp.tanh((x * gain) @ p["a"])) @ p["b"]

    def scanned(params, x, gain, *, unroll=turns):
        """Also stacks what a second loop reads."""
        step = lambda x, row: (layer(*row[:1], x, row[1]), x)  # noqa: E731
        x, rows = jax.lax.scan(step, x, (params, gain), reverse=reverse, unroll=unroll)
        return jax.lax.scan(lambda x, row: (x * jnp.cos(row), None), x, rows, unroll=unroll)[0]

    def written(params, x, gain):
        rows = [None] * turns
        for turn in range(turns)[::-1] if reverse else range(turns):
            rows[turn] = x
            x = layer(jax.tree.map(lambda leaf, turn=turn: leaf[turn], params), x, gain[turn])
        for row in rows:
            x = x * jnp.cos(row)
        return x

    def run(stage):
        split = split_stage(stage, params, x, gain)
        prepared = split.prepare(params)
        y, residuals = split.forward(prepared, x, gain)
        x_ct, crossing = split.backward_input(prepared, residuals, jnp.sin(y))
        shapes = [sorted(str(leaf.shape) for leaf in jax.tree.leaves(kept)) for kept in (residuals, crossing)]
        return (y, x_ct, split.backward_weight(prepared, residuals.weight, crossing)), shapes, prepared

    got, shapes, prepared = run(scanned)
    want, plain_shapes, _ = run(written)
    loop, loop_shapes, _ = run(functools.partial(scanned, unroll=1))
    assert_trees_close(got, want, rtol=1e-12)
    assert_trees_close(got, loop, rtol=1e-12)
    assert shapes == plain_shapes != loop_shapes
    assert sorted(leaf.shape for leaf in jax.tree.leaves(prepared)) == sorted(
        leaf.shape for leaf in jax.tree.leaves(params)
    )


@cases("inner", [1, 2], quick=[2])
def test_an_unrolled_scan_within_another(x64, inner):
    """Rows of rows of parameters; the inner one a loop, too."""
    params, x = {"w": zoo.normal(3, 2, 4, 4), "gain": zoo.normal(3, 4)}, zoo.normal(2, 4)

    def stage(params, x, *, outer=3, inner=inner):
        def block(x, row):
            y, norms = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sin(x)), x, row["w"], unroll=inner)
            return x + y * row["gain"], norms

        x, norms = jax.lax.scan(block, x, params, unroll=outer)
        return x + norms.sum((0, 1))

    y, vjp = jax.vjp(functools.partial(stage, outer=1, inner=1), params, x)
    split = split_stage(stage, params, x)
    prepared = split.prepare(params)
    found, residuals = split.forward(prepared, x)
    x_ct, crossing = split.backward_input(prepared, residuals, jnp.cos(y))
    got = found, (split.backward_weight(prepared, residuals.weight, crossing), x_ct)
    assert_trees_close(got, (y, vjp(jnp.cos(y))), rtol=1e-12)
    assert [leaf.shape for leaf in jax.tree.leaves(prepared) if leaf.size > 16] == [(3, 2, 4, 4)]  # and no copy
