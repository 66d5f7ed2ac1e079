"""A divided stage computes what jax.vjp computes, each product once, and stashes nothing it can do without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.stage import matmul_flops, split_stage
from tests.cases import cases
from tests.jaxpipe.stage import zoo
from tests.plain import assert_trees_close

UNDIVIDED = {"tokens": "no input half"}


def cotangents(out):
    """Fixed random cotangents; integers get zeros."""
    rng = np.random.default_rng(9)
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else jnp.zeros_like(leaf)
        ),
        out,
    )


def reference(stage, params, x, args, out_ct):
    """(out, params' cotangent, x's cotangent) by jax.vjp, integer leaves with zeros of their dtype."""

    def typed(ct, like):
        return jax.tree.map(lambda c, p: jnp.zeros_like(p) if c.dtype == jax.dtypes.float0 else c, ct, like)

    out, vjp = jax.vjp(lambda p, x: stage(p, x, *args), params, x)
    float0 = jax.tree.map(
        lambda ct: ct if jnp.issubdtype(ct.dtype, jnp.floating) else np.zeros(ct.shape, jax.dtypes.float0), out_ct
    )
    params_ct, x_ct = vjp(float0)
    return out, typed(params_ct, params), typed(x_ct, x)


SIMILAR = ("attention", "nnx", "remat of a scan", "scan of remat", "dropout in remat", "remat saving dots")
"""As others that run by default, and slow."""


@cases("name", zoo.CASES, quick=[name for name in zoo.CASES if name not in SIMILAR])
def test_halves_and_whole_equal_the_vjp(x64, name):
    stage, params, x, args = zoo.CASES[name]()
    split = split_stage(stage, params, x, *args)
    prepared = split.prepare(params)
    out, residuals = split.forward(prepared, x, *args)
    out_ct = cotangents(out)
    expected_out, params_ct, x_ct = reference(stage, params, x, args, out_ct)
    assert_trees_close(out, expected_out, rtol=1e-12)
    got_x, crossing = split.backward_input(prepared, residuals, out_ct)
    assert_trees_close(got_x, x_ct, rtol=1e-12)
    assert_trees_close(split.backward_weight(prepared, residuals.weight, crossing), params_ct, rtol=1e-12)
    assert_trees_close(split.backward(prepared, residuals, out_ct), (params_ct, x_ct), rtol=1e-12)
    for announced, real in ((split.residuals, residuals), (split.crossing, crossing)):
        assert jax.tree.map(lambda a: (a.shape, a.dtype), announced) == jax.tree.map(lambda a: (a.shape, a.dtype), real)


def flops(stage, params, x, args):
    """Matmul FLOPs of (forward, plain forward, I, W, plain backward)."""
    split = split_stage(stage, params, x, *args)
    prepared = split.prepare(params)
    out, residuals = split.forward(prepared, x, *args)
    out_ct = cotangents(out)
    _, crossing = split.backward_input(prepared, residuals, out_ct)
    diff_out, vjp = jax.vjp(lambda p: stage(p, x, *args), params) if zoo.embed_stage is stage else jax.vjp(
        lambda p, x: stage(p, x, *args), params, x
    )  # fmt: skip
    return (
        matmul_flops(lambda p, x: split.forward(split.prepare(p), x, *args), params, x),
        matmul_flops(lambda p, x: stage(p, x, *args), params, x),
        matmul_flops(split.backward_input, prepared, residuals, out_ct),
        matmul_flops(split.backward_weight, prepared, residuals.weight, crossing),
        matmul_flops(vjp, cotangents(diff_out)),
    )


@pytest.mark.parametrize("name", [name for name in zoo.CASES if name not in ("integers", *UNDIVIDED)])
def test_nothing_is_computed_twice(x64, name):
    """FLOPs(I) + FLOPs(W) = FLOPs(whole backward), and the forward is the plain one."""
    forward, plain_forward, input_half, weight_half, backward = flops(*zoo.CASES[name]())
    assert forward == plain_forward
    assert input_half + weight_half == backward
    assert weight_half > 0


@pytest.mark.parametrize("name", ["mlp", "scan", "nnx", "linen"])
def test_matrix_products_divide_in_half(x64, name):
    _, forward, input_half, weight_half, _ = flops(*zoo.CASES[name]())
    assert input_half == weight_half == forward


def test_rematerialisation_recomputes_once(x64):
    """The recomputed forward is in the input half, and only there."""
    _, forward, input_half, weight_half, _ = flops(*zoo.CASES["scan of remat"]())
    assert weight_half == forward
    assert forward < input_half <= 2 * forward


def test_without_differentiable_input_there_is_no_input_half(x64):
    _, _, input_half, weight_half, backward = flops(*zoo.CASES["tokens"]())
    assert input_half == 0
    assert weight_half == backward


def test_undivided_primitives_are_named(x64):
    """A conditional on the platform, of which each platform compiles one branch, stays as it is."""
    params, x = zoo.normal(4, 4), zoo.normal(2, 4)

    def stage(params, x):
        return jax.lax.platform_dependent(params, x, cuda=lambda w, x: x @ w * 2, default=lambda w, x: x @ w)

    split = split_stage(stage, params, x)
    assert split.opaque == ("cond",)
    prepared = split.prepare(params)
    out, residuals = split.forward(prepared, x)
    assert_trees_close(split.backward(prepared, residuals, out), jax.vjp(stage, params, x)[1](out), rtol=1e-12)
    for name in ("mlp", "cond"):
        stage, params, x, args = zoo.CASES[name]()
        assert split_stage(stage, params, x, *args).opaque == ()


def mesh_case(inside):
    """Runs a function of this device's (params, x) under shard_map over 4 devices."""
    mesh = jaxpipe.make_mesh(ep=4)
    params, x = {"w": zoo.normal(4, zoo.WIDTH, zoo.WIDTH)}, zoo.normal(16, zoo.WIDTH)
    return jax.shard_map(inside, mesh=mesh, in_specs=(P("ep"), P("ep")), out_specs=P("ep"), check_vma=False), params, x


def exchange_stage(params, x):
    """all_to_all there, an expert, all_to_all back, and a psum of a norm."""
    sent = jax.lax.all_to_all(x.reshape(4, -1, zoo.WIDTH), "ep", 0, 0)
    back = jax.lax.all_to_all(jnp.tanh(sent @ params["w"][0]), "ep", 0, 0)
    return x + back.reshape(x.shape) / (1 + jax.lax.psum((x * x).sum(), "ep"))


def test_collectives_over_another_axis(x64):
    counted = []

    def halves(params, x):
        split = split_stage(exchange_stage, params, x)
        prepared = split.prepare(params)
        out, residuals = split.forward(prepared, x)
        x_ct, crossing = split.backward_input(prepared, residuals, out)
        params_ct = split.backward_weight(prepared, residuals.weight, crossing)
        vjp = jax.vjp(exchange_stage, params, x)[1]
        counted.extend(
            matmul_flops(*call)
            for call in (
                (split.backward_input, prepared, residuals, out),
                (split.backward_weight, prepared, residuals.weight, crossing),
                (vjp, out),
            )
        )
        return params_ct, x_ct

    def whole(params, x):
        out, vjp = jax.vjp(exchange_stage, params, x)
        return vjp(out)

    divided, params, x = mesh_case(halves)
    assert_trees_close(divided(params, x), mesh_case(whole)[0](params, x), rtol=1e-12)
    assert counted[0] + counted[1] == counted[2]
    assert counted[0] == counted[1]


def mixed_scan(params, x):
    """float32 masters, each layer cast inside the loop."""

    def layer(x, p):
        return x + jnp.tanh(x @ p.astype(x.dtype)), None

    return jax.lax.scan(layer, x, params)[0]


def mixed_shared(params, x):
    """One float32 matrix, cast again in every iteration."""

    def layer(x, _):
        return x + jnp.tanh(x @ params.astype(x.dtype)), None

    return jax.lax.scan(layer, x, None, length=3)[0]


@pytest.mark.parametrize(
    "stage, shape",
    [(lambda p, x: jnp.tanh(x @ p.astype(x.dtype)), (16, 16)), (mixed_scan, (3, 16, 16)), (mixed_shared, (16, 16))],
    ids=["once", "in a scan", "the same in a scan"],
)
def test_casts_of_parameters_are_not_stashed(stage, shape):
    params, x = jnp.ones(shape), jnp.ones((2, 16), jnp.bfloat16)
    split = split_stage(stage, params, x)
    stashed = jax.tree.leaves((split.residuals, split.crossing))
    assert all(leaf.shape[-2:] != (16, 16) for leaf in stashed)
    prepared = split.prepare(params)
    _, residuals = split.forward(prepared, x)
    x_ct, crossing = split.backward_input(prepared, residuals, x)
    expected = jax.vjp(stage, params, x)[1](x)
    assert_trees_close((split.backward_weight(prepared, residuals.weight, crossing), x_ct), expected, rtol=1e-2)


def test_casts_are_made_once(x64):
    params, x = jnp.ones((3, 16, 16), jnp.float32), jnp.ones((2, 16), jnp.bfloat16)
    split = split_stage(mixed_scan, params, x)
    prepared = split.prepare(params)
    assert {(leaf.shape, leaf.dtype.name) for leaf in prepared} >= {((3, 16, 16), "bfloat16")}
    text = str(jax.make_jaxpr(split.forward)(prepared, x))
    assert "new_dtype=bfloat16" not in text


def test_masks_of_positions_are_not_stashed(x64):
    stage, params, x, args = zoo.CASES["attention"]()
    split = split_stage(stage, params, x, *args)
    square = (zoo.POSITIONS, zoo.POSITIONS)
    assert all(leaf.dtype != jnp.bool_ or leaf.shape[-2:] != square for leaf in jax.tree.leaves(split.residuals))


def test_residuals_are_distinct_and_plain(x64):
    for name in zoo.CASES:
        stage, params, x, args = zoo.CASES[name]()
        split = split_stage(stage, params, x, *args)
        prepared = split.prepare(params)
        _, residuals = split.forward(prepared, x, *args)
        leaves = jax.tree.leaves(residuals)
        assert len({id(leaf) for leaf in leaves}) == len(leaves), name
        assert all(not jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in leaves), name


def test_leaves_that_are_not_arrays_are_refused():
    with pytest.raises(ValueError, match=r"'relu' of type str is not an array.*functools\.partial"):
        split_stage(lambda p, x: x, {"activation": "relu"}, jnp.ones(2))


def test_auxiliary_output_is_not_differentiated(x64):
    split = split_stage(lambda w, x: (x @ w, {"max": (x @ w).max()}), zoo.normal(4, 4), zoo.normal(2, 4), has_aux=True)
    prepared = split.prepare(zoo.normal(4, 4))
    out, aux, residuals = split.forward(prepared, zoo.normal(2, 4))
    assert float(aux["max"]) == float(out.max())
    assert split.backward(prepared, residuals, out)[1].shape == (2, 4)
