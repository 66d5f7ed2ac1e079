"""Conditionals are divided: weights' products in the second half, and a stash as large as the largest branch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.stage import matmul_flops, split_stage
from tests.cases import cases
from tests.jaxpipe.stage import zoo
from tests.plain import assert_trees_close

ROWS, WIDTH, HIDDEN, LAYERS, KINDS = 5, 3, 7, 4, 3


def params_of(*lead):
    shapes = {"up": (WIDTH, HIDDEN), "gate": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "scale": (WIDTH,)}
    return {name: zoo.normal(*lead, *shape) for name, shape in shapes.items()}


def tanh_layer(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def gated_layer(p, x):
    return x * p["scale"] + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def attention_layer(p, x):
    """Queries from one matrix, keys and values from another."""
    q, k = x @ p["up"], x @ p["gate"]
    return x + jax.nn.softmax(q @ k.T) @ k @ p["down"]


LAYER_KINDS = (tanh_layer, gated_layer, attention_layer)


def switch_stage(p, x, index):
    return lax.switch(index, LAYER_KINDS, p, x)


def scanned_stage(p, x, index):
    """Another kind in each turn."""

    def layer(x, row):
        turn, p = row
        return switch_stage(p, x, (index + turn * turn) % KINDS), None

    return lax.scan(layer, x, (jnp.arange(LAYERS, dtype=jnp.int32), p))[0]


def value_stage(p, x, index):
    """The index is known when the forward runs, and no sooner."""
    largest = jnp.abs(x).max(0).argmax().astype(jnp.int32)
    return switch_stage(p, x, (largest + index) % KINDS)


def nested_stage(p, x, index):
    def inner(p, x):
        return lax.cond(x.sum() > 0, tanh_layer, gated_layer, p, x)

    return lax.switch(index, [inner, attention_layer, lambda p, x: inner(p, -x)], p, x)


def loop_in_branch(p, x, index):
    def loop(p, x):
        return lax.scan(lambda x, p: (tanh_layer(p, x), x.sum()), x, p)

    def other(p, x):
        row = jax.tree.map(lambda leaf: leaf[0], p)
        return gated_layer(row, x), jnp.sum(x @ row["up"]) * jnp.ones(LAYERS)

    return lax.switch(index, [loop, other, lambda p, x: loop(jax.tree.map(jnp.flip, p), x)], p, x)


def conditional_in_a_loop_in_a_branch(p, x, index):
    def loop(p, x):
        return scanned_stage(p, x, index)

    return lax.cond(x[0, 0] > 10, lambda p, x: x, loop, p, x)


def remat_in_branch(p, x, index):
    return lax.switch(index, [jax.checkpoint(kind) for kind in LAYER_KINDS], p, x)


def own_derivative(p, x, index):
    def own(p, x):
        return zoo.scaled_product(x, p["up"]) @ p["down"]

    return lax.switch(index, [own, jax.jit(gated_layer), lambda p, x: jax.nn.relu(x) * p["scale"]], p, x)


def integers_beside(p, x, index):
    """A branch also returns integers, which choose rows."""

    def sorted_rows(p, x):
        order = jnp.argsort(lax.stop_gradient(x[:, 0]))
        return x @ p["up"], order.astype(jnp.int32)

    def as_they_are(p, x):
        return jnp.tanh(x @ p["gate"]), jnp.arange(ROWS, dtype=jnp.int32)

    h, order = lax.switch(index, [sorted_rows, as_they_are, sorted_rows], p, x)
    return {"y": h[order] @ p["down"], "order": order}


def without_gradients(p, x, index):
    """Branches that read nothing, or no parameters, or no input."""
    branches = [lambda p, x: jnp.ones_like(x), lambda p, x: x * 2, lambda p, x: x * 0 + p["scale"]]
    return lax.switch(index, branches, p, x) * p["scale"] + x


def dropout_in_branch(p, x, index, key):
    def dropped(rate, p, x):
        keep = jax.random.bernoulli(jax.random.fold_in(key, index), rate, x.shape)
        return jnp.where(keep, tanh_layer(p, x), 0)

    return lax.switch(index, [functools.partial(dropped, 0.5), gated_layer, functools.partial(dropped, 0.2)], p, x)


def alone(stage, *lead, args=()):
    return stage, params_of(*lead), zoo.normal(ROWS, WIDTH), args


CASES = {
    "switch": lambda: alone(switch_stage),
    "index from data": lambda: alone(value_stage),
    "in a loop": lambda: alone(scanned_stage, LAYERS),
    "in a loop in remat": lambda: alone(jax.checkpoint(scanned_stage), LAYERS),
    "nested": lambda: alone(nested_stage),
    "loop in a branch": lambda: alone(loop_in_branch, LAYERS),
    "in a loop in a branch": lambda: alone(conditional_in_a_loop_in_a_branch, LAYERS),
    "in remat": lambda: alone(jax.checkpoint(switch_stage)),
    "remat in branches": lambda: alone(remat_in_branch),
    "own derivatives": lambda: alone(own_derivative),
    "integers": lambda: alone(integers_beside),
    "without gradients": lambda: alone(without_gradients),
    "dropout": lambda: alone(dropout_in_branch, args=(jax.random.key(3),)),
}


def divided(stage, params, x, *args):
    """(split, prepared, residuals, cotangent of out, crossing)."""
    split = split_stage(stage, params, x, *args)
    prepared = split.prepare(params)
    out, residuals = split.forward(prepared, x, *args)
    out_ct = jax.tree.map(lambda leaf: jnp.cos(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, out)
    return split, prepared, residuals, out_ct, split.backward_input(prepared, residuals, out_ct)[1]


def plain_cotangent(out_ct):
    return jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape, jax.dtypes.float0),
        out_ct,
    )


SIMILAR = ("in a loop", "loop in a branch", "in a loop in remat", "in remat", "nested")
"""As others that run by default, and slow."""


@cases("name", CASES, quick=[name for name in CASES if name not in SIMILAR])
def test_each_branch_has_the_plain_gradients(x64, name):
    stage, params, x, more = CASES[name]()
    split = split_stage(stage, params, x, jnp.int32(0), *more)
    assert split.opaque == ()

    @jax.jit
    def run(index):
        args = index, *more
        prepared = split.prepare(params)
        out, residuals = split.forward(prepared, x, *args)
        out_ct = jax.tree.map(lambda leaf: jnp.cos(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, out)
        x_ct, crossing = split.backward_input(prepared, residuals, out_ct)
        halves = split.backward_weight(prepared, residuals.weight, crossing), x_ct
        expected, vjp = jax.vjp(lambda p, x: stage(p, x, *args), params, x)
        whole, expected_cts = split.backward(prepared, residuals, out_ct), vjp(plain_cotangent(out_ct))
        return (out, halves, whole), (expected, expected_cts, expected_cts)

    for index in range(KINDS):
        found, expected = run(jnp.int32(index))
        assert_trees_close(found, expected, rtol=1e-10)


@cases("name", CASES, quick=[name for name in CASES if name not in SIMILAR])
def test_weight_products_are_in_the_second_half(x64, name):
    """In each branch both halves have the products of the whole, and the first only those of the input's gradient."""
    stage, params, x, more = CASES[name]()
    args = jnp.int32(0), *more
    split, prepared, residuals, out_ct, crossing = divided(stage, params, x, *args)
    vjp = jax.vjp(lambda p, x: stage(p, x, *args), params, x)[1]
    of_input = jax.vjp(lambda x: stage(params, x, *args), x)[1]
    for branch in range(KINDS):
        flops = functools.partial(matmul_flops, branch=branch)
        first = flops(split.backward_input, prepared, residuals, out_ct)
        second = flops(split.backward_weight, prepared, residuals.weight, crossing)
        assert first + second == flops(vjp, plain_cotangent(out_ct))
        assert first <= flops(of_input, plain_cotangent(out_ct))


def widths_stage(p, x, index):
    """Branches that keep 1, 2 and 3 arrays, beside x, and hand over as many."""

    def branch(depth, p, x):
        for _ in range(depth):
            x = jnp.sin(x @ p)
        return x

    return lax.switch(index, [functools.partial(branch, depth) for depth in (1, 2, 3)], p, x)


def looped_widths_stage(p, x, index):
    return lax.scan(lambda x, p: (widths_stage(p, x, index), None), x, p)[0]


@pytest.mark.parametrize(
    "stage, lead", [(widths_stage, ()), (looped_widths_stage, (LAYERS,))], ids=["once", "in a loop"]
)
def test_the_stash_is_that_of_the_largest_branch(x64, stage, lead):
    """Not the sum of all: what branches keep and hand over shares places."""
    split = split_stage(stage, zoo.normal(*lead, WIDTH, WIDTH), zoo.normal(ROWS, WIDTH), jnp.int32(0))
    arrays = [leaf for leaf in jax.tree.leaves(split.residuals) if leaf.dtype != jnp.int32]
    # What the three sines of the largest read and their derivatives; not 6, 4 and 2 arrays for the three branches.
    assert [leaf.shape for leaf in arrays] == [(*lead, ROWS, WIDTH)] * 6
    assert [leaf.shape for leaf in split.crossing] == [(*lead, ROWS, WIDTH)] * 3


def test_values_of_other_branches_share_places(x64):
    """Three arrays of one shape and one of another, whichever branch makes how many of them."""
    stage, params, x, _ = CASES["switch"]()
    split = split_stage(stage, params, x, jnp.int32(0))
    shapes = [leaf.shape for leaf in split.crossing]
    # tanh: of down's and up's products; gated: two more of HIDDEN columns; attention: one of rows by rows.
    assert sorted(shapes) == [(ROWS, WIDTH), (ROWS, HIDDEN), (ROWS, HIDDEN)]


@pytest.mark.parametrize("name", CASES)
def test_no_branch_keeps_parameters(x64, name):
    stage, params, x, more = CASES[name]()
    split = split_stage(stage, params, x, jnp.int32(0), *more)
    kept = {leaf.shape for leaf in jax.tree.leaves((split.residuals, split.crossing))}
    matrices = {leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "scale" not in str(path)}
    assert kept.isdisjoint(matrices)


@cases("lead", [(), (LAYERS,)], quick=[(LAYERS,)], ids=["once", "in a loop"])
def test_casts_in_branches_are_made_once_a_step(lead):
    """One narrow copy of each parameter for all branches, made by `SplitStage.prepare`; gradients are still right."""

    def layer(kind, p, x):
        return kind(jax.tree.map(lambda leaf: leaf.astype(x.dtype), p), x)

    narrow = [functools.partial(layer, kind) for kind in LAYER_KINDS]

    def chosen(p, x, index):
        if not lead:
            return lax.switch(index, narrow, p, x)

        def body(x, row):
            return lax.switch((index + row[0]) % KINDS, narrow, row[1], x), None

        return lax.scan(body, x, (jnp.arange(LAYERS, dtype=jnp.int32), p))[0]

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of(*lead))
    x = zoo.normal(ROWS, WIDTH).astype(jnp.bfloat16)
    split, prepared, residuals, out_ct, crossing = divided(chosen, params, x, jnp.int32(1))
    matrices = [(*lead, *shape) for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    assert sorted(leaf.shape for leaf in prepared if leaf.shape in matrices) == sorted(matrices)
    assert {leaf.dtype.name for leaf in prepared} == {"bfloat16"}
    assert {leaf.shape for leaf in jax.tree.leaves((residuals, crossing))}.isdisjoint(matrices)
    found = split.backward(prepared, residuals, out_ct)
    assert_trees_close(
        found, jax.vjp(lambda p, x: chosen(p, x, jnp.int32(1)), params, x)[1](out_ct), rtol=5e-2, atol=5e-2
    )


def test_side_effects_of_the_branch_that_runs(capsys):
    def loud(name, p, x):
        jax.debug.print(name)
        return tanh_layer(p, x)

    branches = [functools.partial(loud, "one"), tanh_layer, jax.checkpoint(functools.partial(loud, "three"))]

    def stage(p, x, index):
        return lax.switch(index, branches, p, x)

    split = split_stage(stage, params_of(), zoo.normal(ROWS, WIDTH), jnp.int32(0))
    prepared = split.prepare(params_of())
    for index, printed in enumerate(["one\n", "", "three\n"]):
        out, residuals = split.forward(prepared, zoo.normal(ROWS, WIDTH), jnp.int32(index))
        jax.effects_barrier()
        assert capsys.readouterr().out == printed
        _, crossing = split.backward_input(prepared, residuals, out)
        split.backward_weight(prepared, residuals.weight, crossing)
        jax.effects_barrier()
        assert capsys.readouterr().out == ""


@jax.custom_vjp
def loud_derivative(x, w):
    return x @ w


def _loud_backward(kept, ct):
    jax.debug.print("derivative")
    return ct @ kept[1].T, kept[0].T @ ct


loud_derivative.defvjp(lambda x, w: (x @ w, (x, w)), _loud_backward)


def test_side_effects_of_derivatives_run_once(capsys):
    """In one of the halves, and in the whole backward, of the branch that was taken."""

    def loud(p, x):
        return loud_derivative(x, p["up"]) @ p["down"]

    def stage(p, x, index):
        return lax.switch(index, [loud, tanh_layer, jax.checkpoint(loud)], p, x)

    split = split_stage(stage, params_of(), zoo.normal(ROWS, WIDTH), jnp.int32(0))
    prepared = split.prepare(params_of())
    for index, printed in enumerate(["derivative\n", "", "derivative\n"]):
        out, residuals = split.forward(prepared, zoo.normal(ROWS, WIDTH), jnp.int32(index))
        _, crossing = split.backward_input(prepared, residuals, out)
        split.backward_weight(prepared, residuals.weight, crossing)
        jax.effects_barrier()
        assert capsys.readouterr().out == printed
        split.backward(prepared, residuals, out)
        jax.effects_barrier()
        assert capsys.readouterr().out == printed


def test_collectives_in_branches(x64):
    """Devices of a group take the same branch; the halves' conditionals hold its collectives."""
    mesh = jaxpipe.make_mesh(ep=4)

    def summed(p, x):
        return jnp.tanh(lax.psum(x @ p["up"], "ep") @ p["down"])

    def stage(p, x, index):
        return lax.switch(index, [tanh_layer, summed, lambda p, x: lax.psum(x, "ep") * p["scale"]], p, x)

    def both(p, x, index):
        split = split_stage(stage, p, x, index)
        assert {axis for _, axis in split.collectives} == {"ep"}
        prepared = split.prepare(p)
        out, residuals = split.forward(prepared, x, index)
        x_ct, crossing = split.backward_input(prepared, residuals, out)
        found = split.backward_weight(prepared, residuals.weight, crossing), x_ct
        return found, jax.vjp(lambda p, x: stage(p, x, index), p, x)[1](out)

    run = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(P(), P("ep"), P()), out_specs=P("ep"), check_vma=False))
    for index in range(3):
        found, expected = run(params_of(), zoo.normal(4 * ROWS, WIDTH), jnp.int32(index))
        assert_trees_close(found, expected, rtol=1e-10)
