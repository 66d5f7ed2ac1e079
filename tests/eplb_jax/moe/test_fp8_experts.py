"""Experts in FP8 equal the plain program in NumPy; what no row of theirs holds reaches nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from eplb_jax import make_capacities, working_copies
from eplb_jax.kernels.grouped_gemm.layout import used_rows
from eplb_jax.kernels.recipe import RECIPES
from eplb_jax.kernels.scaled import ScaledRows, quantise_rows
from eplb_jax.moe.carried import Carried, Products
from eplb_jax.moe.dispatch import padded_rows, sort_by_slot
from eplb_jax.moe.experts import init_experts
from eplb_jax.moe.fp8_experts import (
    apply_scaled_experts,
    quantise_experts,
    scaled_working_copies,
)
from eplb_jax.moe.fp8_layer import scaled_layer
from tests.cases import cases
from tests.eplb_jax.moe import fp8_plain
from tests.eplb_jax.moe.test_layer import make_mesh

PRODUCTS = Products(RECIPES["fp8"].arithmetic, "xla")
WIDTH, HIDDEN = 256, 128


def relative(a, b):
    """Norm of the difference, of the norm of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def no_cotangent(leaf):
    return np.zeros(leaf.shape, jax.dtypes.float0)


@cases("tokens", [300, 256], quick=[300])
def test_equals_the_plain_program(tokens):
    """Groups of several blocks, of a part of one, of no row; numbers of tokens that are no multiple of 128."""
    rng = np.random.default_rng(tokens)
    slots = np.argsort(rng.random((tokens, 5)) - [0.9, 0.3, -9, 0, 0.1], axis=1)[:, :2].astype(np.int32)
    assert sorted((slots == i).sum() > 128 for i in range(5)) != [False] * 5 and not (slots == 2).any()
    weights = jnp.asarray(rng.uniform(0.1, 1, slots.shape), jnp.float32)
    x, ct = jnp.asarray(rng.standard_normal((2, tokens, WIDTH)), jnp.float32)
    experts, shared = (init_experts(jax.random.key(n), n, WIDTH, HIDDEN) for n in (5, 1))
    capacities = make_capacities(tokens, 2, 1, 5, None)

    @jax.jit
    def run(experts, shared, x, weights, ct):
        def function(experts, shared, x, weights):
            return scaled_layer(experts, shared, x, jnp.asarray(slots), weights, 5, capacities, PRODUCTS, None)

        (y, dropped, bad), pull = jax.vjp(function, experts, shared, x, weights)
        return (y, *pull((ct, no_cotangent(dropped), no_cotangent(bad)))), dropped, bad

    found, dropped, bad = run(experts, shared, x, weights, ct)
    expected = fp8_plain.layer(experts, shared, x, slots, weights, ct)
    assert int(dropped) == int(bad) == 0
    for (path, got), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert relative(got, want) < 1e-3, jax.tree_util.keystr(path)


def test_rows_of_no_expert_may_hold_anything():
    """Their numbers and scales, weights and gradients are NaN; nothing else changes."""
    sizes = jnp.array([130, 0, 5], jnp.int32)
    used = used_rows(sizes, 512, 128)
    rng = np.random.default_rng(0)
    values, cts = jnp.asarray(rng.standard_normal((2, 512, WIDTH)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.1, 1, 512), jnp.float32)
    experts = init_experts(jax.random.key(0), 3, WIDTH, HIDDEN)

    def poisoned(rows: ScaledRows, by):
        scales = jnp.where(used, rows.scales, by)
        return ScaledRows(jnp.where(used[:, None], rows.numbers, jnp.asarray(by, rows.numbers.dtype)), scales)

    @jax.jit
    def run(by):
        def function(experts, gradient, weight):
            rows = Carried(poisoned(quantise_rows(values), by), gradient)
            return apply_scaled_experts(quantise_experts(experts, PRODUCTS), rows, weight, sizes, PRODUCTS)

        arguments = experts, jnp.zeros_like(values), jnp.where(used, weight, by)
        (y, bad), pull = jax.vjp(function, *arguments)
        ct = Carried(jnp.zeros_like(y.value), poisoned(quantise_rows(cts), by))
        grads, dx, dweight = pull((ct, no_cotangent(bad)))
        return bad, grads, y.value[:130], y.value[256:261], dx[:130], dx[256:261], dweight[:130], dweight[256:261]

    clean, dirty = run(0.0), run(jnp.nan)
    assert int(dirty[0]) == 0 and not np.asarray(dirty[1].w_in[1]).any()
    for (path, got), want in zip(jax.tree.leaves_with_path(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=jax.tree_util.keystr(path))


def test_backward_quantises_the_gradient_of_the_gate_alone():
    """What is kept are the rows' own numbers and the gate's input; the result's gradient comes in 8 bits."""
    sizes = jnp.array([128], jnp.int32)
    values = jax.random.normal(jax.random.key(1), (128, WIDTH))

    @jax.eval_shape
    def traced():
        experts = quantise_experts(init_experts(jax.random.key(0), 1, WIDTH, HIDDEN, jnp.bfloat16), PRODUCTS)
        rows = Carried(quantise_rows(values), jnp.zeros_like(values))
        return jax.vjp(lambda *a: apply_scaled_experts(experts, *a, sizes, PRODUCTS), rows, jnp.ones(128))

    (y, _), pull = traced
    types = {(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pull) if leaf.ndim == 2 and leaf.size > 256}
    assert types == {("float8_e4m3fn", (128, WIDTH)), ("float8_e4m3fn", (128, 2 * HIDDEN))}
    assert y.gradient.numbers.dtype == jnp.float8_e4m3fn and y.gradient.numbers.shape == y.value.shape


@cases(("axis", "fetched"), [(None, None), ("ep", None), ("ep", 1)], quick=[("ep", None), ("ep", 1)])
def test_working_copies_are_quantised_before_they_are_gathered(axis, fetched):
    """The same numbers as copies that are quantised, in both layouts, and the same gradients; only bytes travel."""
    masters = init_experts(jax.random.key(0), 4, WIDTH, HIDDEN, jnp.bfloat16)
    phy2log = jnp.array([3, 0, 1, 1, -1, 3, 3, 1] if fetched else [3, 0, 1, 2, -1, 3, 3, 1], jnp.int32)
    cts = init_experts(jax.random.key(1), 8, WIDTH, HIDDEN, jnp.bfloat16)

    def run(quantise, masters, cts):
        found, pull = jax.vjp(quantise, masters)
        zeros = jax.tree.map(jnp.zeros_like, found)
        ct = type(found)(*(each._replace(gradient=g) for each, g in zip(zeros, cts, strict=True)))
        return found, pull(ct)[0]

    def first(masters):
        return scaled_working_copies(masters, phy2log, PRODUCTS, axis, fetched=fetched)

    def afterwards(masters):
        return quantise_experts(working_copies(masters, phy2log, axis), PRODUCTS)

    def both(masters, cts):
        return run(first, masters, cts), run(afterwards, masters, cts)

    if axis is not None:
        spec = jax.sharding.PartitionSpec("ep")
        both = jax.shard_map(both, mesh=make_mesh(2), in_specs=spec, out_specs=spec)
    got, want = jax.jit(both)(masters, cts)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert np.asarray(got[1].w_in, np.float32).any() and not np.asarray(got[0].w_in.forward.scales[4]).any()
    if axis is not None:
        jaxpr = str(jax.make_jaxpr(jax.shard_map(first, mesh=make_mesh(2), in_specs=spec, out_specs=spec))(masters))
        assert set(re.findall(r":(\w+)\[[\d,]*\](?:\{[^}]*\})? = all_gather", jaxpr)) == {"u8", "f32"}
        if fetched:
            assert set(re.findall(r":(\w+)\[[\d,]*\](?:\{[^}]*\})? = all_to_all", jaxpr)) == {"u8", "f32"}


def test_other_starts_of_groups_drop_the_same_choices():
    rng = np.random.default_rng(0)
    sort = jax.jit(sort_by_slot, static_argnums=(1, 2, 3))
    for skew in (0.0, 10.0):
        slots = np.argsort(rng.random((64, 6)) + skew * np.arange(6) / 6, axis=1)[:, :3].astype(np.int32)
        for rows in (128, 248):
            near, far = (sort(slots, 6, rows, align) for align in (8, 128))
            assert near.sizes.tolist() == far.sizes.tolist() and int(near.dropped) == int(far.dropped)
            assert int(near.dropped) == 192 - int(near.sizes.sum()) and far.assignment.shape == (
                padded_rows(rows, 6, 128),
            )
            starts = np.cumsum([0, *(-(-np.asarray(far.sizes) // 128) * 128)])
            for slot, size in enumerate(far.sizes.tolist()):
                held = np.asarray(far.assignment)[starts[slot] : starts[slot + 1]]
                assert (slots.ravel()[held[:size]] == slot).all() and (held[size:] == 192).all()
            assert np.array_equal(
                np.asarray(near.moves.rows) < near.assignment.size, np.asarray(far.moves.rows) < far.assignment.size
            )


def test_experts_for_inference_have_no_place_for_gradients():
    params = init_experts(jax.random.key(0), 2, WIDTH, HIDDEN, jnp.bfloat16)
    quantise = jax.jit(quantise_experts, static_argnames=("products", "differentiable"))
    experts = quantise(params, PRODUCTS, differentiable=False)
    assert experts.w_in.gradient is None and experts.w_out.shape == params.w_out.shape
    values = jax.random.normal(jax.random.key(1), (256, WIDTH))
    zeros, sizes = jnp.zeros_like(values), jnp.array([128, 128])

    @functools.partial(jax.value_and_grad, argnums=1)
    def loss(experts, gradient):
        rows = Carried(quantise_rows(values), gradient)
        return apply_scaled_experts(experts, rows, jnp.ones(256), sizes, PRODUCTS)[0].value.sum()

    found, expected = (jax.jit(loss)(each, zeros) for each in (experts, quantise(params, PRODUCTS)))
    assert float(found[0]) == float(expected[0]) != 0
    np.testing.assert_array_equal(found[1], expected[1])
