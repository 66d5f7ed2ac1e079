"""Within a budget a stage computes again what takes least time for its bytes, and says the least that works."""

import functools
import itertools
import random
import re

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.planning.chips import CHIPS
from jaxpipe.stage import again, matmul_flops, split_stage
from jaxpipe.stage.divide import closure
from jaxpipe.stage.graph import make_graph
from jaxpipe.stage.residuals import cheapest_cut
from jaxpipe.stage.split import Divisible
from jaxpipe.stage.stash import Slots
from tests.jaxpipe.stage import zoo
from tests.jaxpipe.stage.test_minimum_cut import random_graph
from tests.plain import assert_trees_close


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_is_cheaper(seed):
    """Of all sets of values to keep none has a lower sum of what is kept, run again, and paid twice."""
    nodes, values, needed, given = random_graph(seed)
    rng = random.Random(seed)
    costs = {node: rng.choice([None, 0, 1, 5, 20]) for node in nodes}
    twice = {value: rng.choice([0, 0, 3]) for value in values}
    keep = lambda value: 3 * value.nbytes  # noqa: E731
    chosen = cheapest_cut(needed, nodes, given, keep, costs.get, twice.get)

    def price(kept):
        """None where something needed cannot be made."""
        missing = [value for value in needed if value not in kept]
        run = closure(missing, nodes, given | kept, lambda node: costs[node] is not None)
        if run is None:
            return None
        used = {value for node in run for value in node.ins} | set(missing)
        made = {value for node in run for value in node.outs if value in used and value not in given | kept}
        return sum(keep(value) + 1 for value in kept) + sum(map(costs.get, run)) + sum(map(twice.get, made))

    candidates = [value for value in values if value not in given]
    others = (set(kept) for count in range(5) for kept in itertools.combinations(candidates, count))
    assert price(chosen) == min(found for kept in others if (found := price(kept)) is not None)


def gated(params, x):
    """Norm, gate and two products, twice: what to compute again ranges from nothing to all of it."""
    for p in params:
        normal = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        gate, up = jnp.split(normal @ p["in"], 2, -1)
        x = x + (jax.nn.silu(gate) * up) @ p["out"]
    return x


def layers(count=2):
    return [{"in": zoo.normal(8, 32, seed=s), "out": zoo.normal(16, 8, seed=s + 9)} for s in range(count)]


def kept_bytes(split):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((split.residuals, split.crossing)))


def gradients(split, params, x, out_ct):
    """(halves, whole): each parameters' and x's cotangents."""
    prepared = split.prepare(params)
    _, residuals = split.forward(prepared, x)
    x_ct, crossing = split.backward_input(prepared, residuals, out_ct)
    halves = split.backward_weight(prepared, residuals.weight, crossing), x_ct
    return halves, split.backward(prepared, residuals, out_ct)


def scanned(params, x):
    """The same as one loop, which is computed again as a whole."""
    return jax.lax.scan(lambda x, p: (gated([p], x), None), x, params)[0]


@pytest.mark.parametrize("loop", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_less_is_kept_and_more_computed(x64, loop):
    """Bytes stay within each budget, products grow as it falls, none runs twice in the whole backward, all is equal."""
    stage, params, x = gated, layers(), zoo.normal(5, 8)
    if loop:
        stage, params = scanned, jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    out_ct = jnp.cos(x)
    expected = jax.vjp(stage, params, x)[1](out_ct)
    forward = matmul_flops(stage, params, x)
    divisible, found = Divisible(stage, params, x), []
    for budget in (1 << 40, 4000, 2000, 640):
        split = divisible.within(budget)
        assert kept_bytes(split) <= budget
        if budget == 640:
            found_here = jax.jit(functools.partial(gradients, split))(params, x, out_ct)
            assert_trees_close(found_here, (expected, expected), rtol=1e-12)
        shapes = jax.eval_shape(split.prepare, params), split.residuals, out_ct
        found.append((matmul_flops(split.backward_input, *shapes), matmul_flops(split.backward, *shapes)))
    assert found == sorted(found)
    assert found[0] == (forward, 2 * forward)
    assert 2 * forward < found[-1][1] <= 3 * forward


def test_a_budget_too_small_tells_the_least(x64):
    params, x = layers(), zoo.normal(5, 8)
    with pytest.raises(ValueError, match=r"stash=100 bytes .* the least that works, .* is 640 for each of 1 slots"):
        split_stage(gated, params, x, stash=100)
    # The input and the output's cotangent make everything else.
    assert kept_bytes(split_stage(gated, params, x, stash=640)) == 2 * x.nbytes == 640
    for wrong in (-1, 1.5, "auto", True):
        with pytest.raises(ValueError, match=re.escape(f"stash={wrong!r}: it must be an integer of at least 0")):
            split_stage(gated, params, x, stash=wrong)


def test_what_is_in_memory_is_kept_where_nothing_is_copied(x64):
    """A product's operands and results are arrays in any case: kept as they are, and no part of them made again."""
    params, x = layers(1), zoo.normal(5, 8)
    divisible, shapes = Divisible(gated, params, x), []
    for copied in (True, False):
        split, _ = divisible.priced(0.0, Slots(copied=copied))
        shapes.append(sorted(leaf.shape for leaf in jax.tree.leaves(split.residuals)))
        out_ct = jnp.cos(x)
        found = jax.jit(functools.partial(gradients, split))(params, x, out_ct)
        assert_trees_close(found, 2 * (jax.vjp(gated, params, x)[1](out_ct),), rtol=1e-12)
    # Both operands of the two products, and the first one's result, of whose halves copies would be made.
    assert all(shape in shapes[1] for shape in [(5, 8), (5, 16), (5, 32)])
    assert (5, 32) not in shapes[0]


def test_slots_weigh_what_is_kept(x64):
    """Where few slots are for what crosses more of it does, and the forward keeps less."""
    params, x, budgets = layers(), zoo.normal(5, 8), {}
    for slots in (Slots(9, 9, 1, 0.1), Slots(2, 2, 9, 1.0)):
        stage = Divisible(gated, params, x)
        prices = [stage.priced(2.0**power, slots)[0] for power in range(-50, -15)]
        budgets[slots] = [(sum(leaf.size for leaf in p.crossing), kept_bytes(p)) for p in prices]
    few, many = ([crossing / max(1, kept - crossing) for crossing, kept in each] for each in budgets.values())
    assert sum(few) > sum(many)


def test_what_nobody_may_run_again_is_kept(x64):
    """A callback and a loop of unknown length run once, whatever the budget; a random mask is made of its key."""

    def stage(w, x, key):
        jax.debug.print("{}", x[0, 0])
        factor = jax.lax.while_loop(lambda i: i < 9, lambda i: i * 2, jax.lax.stop_gradient(abs(x[0, 0]) + 1))
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(keep, jnp.sin(x @ w) * factor, 0)

    args = zoo.normal(4, 4), zoo.normal(6, 4), jax.random.key(0)
    with pytest.raises(ValueError) as error:
        split_stage(stage, *args, stash=0)
    least = int(re.search(r"is ([\d,]+) for", str(error.value))[1].replace(",", ""))
    split = split_stage(stage, *args, stash=least)
    assert not any(leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves((split.residuals, split.crossing)))
    shapes = jax.eval_shape(split.prepare, args[0]), split.residuals, args[1]
    text = str(jax.make_jaxpr(split.backward)(*shapes))
    assert "while" not in text and "debug" not in text


@pytest.mark.parametrize("stash", [None, 10**6, 1500])
def test_conditions_on_the_number_of_a_turn(x64, stash):
    """What a loop makes of nothing is there for whatever runs again."""

    def stage(p, x):
        def turn(c, given):
            return jax.lax.cond(given[0] > 0, lambda c: jnp.tanh(c @ given[1]), lambda c: c * 1.5, c), None

        return jax.lax.scan(turn, x, (jnp.arange(3), p))[0]

    params, x = zoo.normal(3, 8, 8, seed=1), zoo.normal(4, 8, seed=2)
    split = split_stage(stage, params, x, stash=stash)
    _, pull_back = jax.vjp(stage, params, x)
    for found in gradients(split, params, x, x):
        assert_trees_close(found, pull_back(x), rtol=1e-12)


def test_what_decides_between_equals_is_kept():
    """Computed again, a router could choose other experts of those that rounding alone tells apart."""
    x = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)
    graph = make_graph(jax.make_jaxpr(lambda x: (jax.lax.top_k(x, 2), jnp.argsort(x)))(x))
    assert {node.name for node in graph.nodes if again.seconds_again(node) is None} >= {"top_k", "sort"}


def test_what_is_run_again_says_so(x64):
    """Profiles and plans find it in the scope that jax.checkpoint has, and find nothing there without a budget."""
    params, x = layers(), zoo.normal(5, 8)
    for stash, scopes in ((None, False), (640, True)):
        split = split_stage(gated, params, x, stash=stash)
        shapes = jax.eval_shape(split.prepare, params), split.residuals, x
        jaxpr = jax.make_jaxpr(split.backward)(*shapes)
        found = {str(eqn.source_info.name_stack).split("/")[0] for eqn in jaxpr.eqns}
        assert (again.RECOMPUTED in found) == scopes


def test_what_costs_more_takes_longer(x64):
    """Products by their FLOPs and by what multiplies, gathers by their bytes, exchanges by the network's."""
    side = 4096
    shape = jax.ShapeDtypeStruct((side, side), jnp.bfloat16)

    def seconds(function, *args):
        (found,) = {again.seconds_again(node) for node in make_graph(jax.make_jaxpr(function)(*args)).nodes[-1:]}
        return found

    wide = jax.ShapeDtypeStruct((side, side), jnp.float32)
    product, twice = seconds(jnp.dot, shape, shape), seconds(jnp.dot, wide, wide)
    assert product == pytest.approx(2 * side**3 / (0.68 * CHIPS["H100"].bf16), rel=0.02)
    assert twice == pytest.approx(2 * product, rel=0.02)
    rows = jax.ShapeDtypeStruct((side,), jnp.int32)
    gather = seconds(lambda x, i: jax.lax.dynamic_slice(x, (i[0], i[1]), (side, side)), shape, rows)
    assert seconds(jnp.sin, shape) < gather < product
    mapped = jax.make_jaxpr(lambda x: jax.lax.all_to_all(x, "ep", 0, 0, tiled=True), axis_env=[("ep", 2)])(shape)
    assert again.seconds_again(make_graph(mapped).nodes[-1]) > product
    assert seconds(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, jnp.sin, x), shape) is None


def test_keys_count_as_their_data():
    """A random key is kept as two numbers of 32 bits."""

    def stage(w, x, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x @ w, 0)

    args = jnp.ones((4, 4)), jnp.ones((64, 4)), jax.random.key(0)
    with pytest.raises(ValueError, match=f"is {2 * 1024 + 8:,} for each of 1 slots"):
        split_stage(stage, *args, stash=0)
    assert kept_bytes(split_stage(stage, *args, stash=2056)) == 2056
