"""What is stashed depends on the microbatch, is kept once, and fits in any buffer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.stage import split_stage
from tests.cases import cases
from tests.jaxpipe.stage import zoo
from tests.plain import assert_trees_close


def cast_layers(params, x):
    """float32 masters, cast in a scan: one matrix per layer and one that all layers share."""

    def layer(x, p):
        shared = jnp.tanh(x @ params["shared"].astype(x.dtype))
        return x + shared @ p.astype(x.dtype).T * jnp.exp(params["scale"]).astype(x.dtype), None

    return jax.lax.scan(layer, x, params["layers"])[0]


def causal_layers(params, x):
    """The same mask and positions in every layer."""
    return jax.lax.scan(lambda x, p: (zoo.attention_stage(p, x), None), x, params)[0]


def dropout_layers(params, x, key):
    """Keys that follow from one by position."""

    def layer(x, inputs):
        index, p = inputs
        keep = jax.random.bernoulli(jax.random.fold_in(key, index), 0.5, x.shape)
        return x + jnp.where(keep, jnp.tanh(x @ p), 0), None

    return jax.lax.scan(jax.checkpoint(layer), x, (jnp.arange(len(params)), params))[0]


def cast_params():
    params = {"shared": (4, 4), "layers": (3, 4, 4), "scale": (4,)}
    return {name: zoo.normal(*shape).astype(jnp.float32) for name, shape in params.items()}


def stacked_attention():
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2, -leaf]), zoo.attention_params())


WIDE = {
    "casts in a scan": lambda: (cast_layers, cast_params(), zoo.normal(2, 4), ()),
    "casts in a remat of a scan": lambda: (jax.checkpoint(cast_layers), cast_params(), zoo.normal(2, 4), ()),
    "masks in a scan": lambda: (causal_layers, stacked_attention(), zoo.normal(2, 5, 4), ()),
    "dropout in a scan": lambda: (dropout_layers, zoo.normal(3, 4, 4), zoo.normal(2, 4), (jax.random.key(1),)),
    "dropout": lambda: (
        lambda w, x, key: jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jnp.sin(x @ w), 0),
        zoo.normal(4, 4),
        zoo.normal(2, 4),
        (jax.random.key(1),),
    ),
    "two keys in remat": lambda: (
        jax.checkpoint(
            lambda w, x, keys: (
                jnp.where(jax.random.bernoulli(keys[0], 0.5, x.shape), jnp.sin(x @ w), 0)
                + jax.random.normal(keys[1], x.shape, x.dtype) * jnp.cos(x @ w)
            )
        ),
        zoo.normal(4, 4),
        zoo.normal(2, 4),
        (jax.random.split(jax.random.key(1)),),
    ),
    "policy in a scan": lambda: (
        lambda p, x: zoo.scan_stage(
            p, x, wrap=lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.checkpoint_dots)
        ),
        zoo.scan_params(),
        zoo.normal(2, 4),
        (),
    ),
    "scan in a scan": lambda: (
        lambda p, x: jax.lax.scan(lambda x, p: (zoo.scan_stage(p, x), None), x, p)[0],
        jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), zoo.scan_params()),
        zoo.normal(2, 4),
        (),
    ),
    "reverse scan with outputs": lambda: (
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.sin(c @ w), c.sum(0)), x, p, reverse=True),
        zoo.normal(3, 4, 4),
        zoo.normal(2, 4),
        (),
    ),
    "while inside": lambda: (
        lambda w, x: (
            jnp.sin(x @ w)
            * jax.lax.while_loop(lambda i: i < 9, lambda i: i * 2, jax.lax.stop_gradient(abs(x[0, 0]) + 1))
        ),
        zoo.normal(4, 4),
        zoo.normal(2, 4),
        (),
    ),
    "convolution": lambda: (
        lambda w, x: jnp.tanh(
            jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        ),
        zoo.normal(3, 4, 4),
        zoo.normal(2, 6, 4),
        (),
    ),
    "input passed on": lambda: (lambda w, x: x, zoo.normal(4), zoo.normal(2, 4), ()),
    "output of parameters alone": lambda: (lambda w, x: (jnp.sin(w), x * 2), zoo.normal(4), zoo.normal(2, 4), ()),
    "constant output": lambda: (lambda w, x: (jnp.ones(3), x * w), zoo.normal(4), zoo.normal(2, 4), ()),
}
ALL = {**zoo.CASES, **WIDE}


def other_arrays(tree):
    """Arrays unlike those of a tree: floats negated and scaled, integers shifted, other keys."""

    def other(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(leaf, 3)[2] if leaf.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(leaf, 7)
        return -1.5 * leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else (leaf + 1) % 5

    return jax.tree.map(other, tree)


SIMILAR = (
    "linen",
    "nnx",
    "remat of a scan",
    "scan of remat",
    "scan in a scan",
    "casts in a scan",
    "casts in a remat of a scan",
    "dropout in a scan",
    "dropout in remat",
    "policy in a scan",
    "remat saving dots",
)
"""As others that run by default, and slow."""


@cases("name", ALL, quick=[name for name in ALL if name not in SIMILAR])
def test_only_what_depends_on_the_microbatch_is_kept_and_once(x64, name):
    """With another input each array kept or handed over changes: no parameters, masks or positions are among them."""
    stage, params, x, args = ALL[name]()
    split = split_stage(stage, params, x, *args)
    prepared = jax.jit(split.prepare)(params)

    @jax.jit
    def run(prepared, x, args, factor):  # prepared as a constant would be folded, and the compiler's exp is not a GPU's
        out, residuals = split.forward(prepared, x, *args)
        out_ct = jax.tree.map(lambda leaf: factor * jnp.cos(leaf), out) if name in WIDE else out
        x_ct, crossing = split.backward_input(prepared, residuals, out_ct)
        halves = split.backward_weight(prepared, residuals.weight, crossing), x_ct
        return out, residuals, crossing, halves, split.backward(prepared, residuals, out_ct)

    one, two = run(prepared, x, args, 1.0), run(prepared, *other_arrays((x, args)), 2.0)
    for a, b in zip(jax.tree.leaves(one[1:3]), jax.tree.leaves(two[1:3]), strict=True):
        # Where a clip does not clip, its derivative is one for any input.
        assert np.all(np.asarray(a) == 1) or not np.array_equal(a, b), (a.shape, a.dtype)
    for a, b in itertools.combinations(jax.tree.leaves(one[1]), 2):
        assert a.dtype != b.dtype or not np.array_equal(a, b), (a.shape, a.dtype)
    for leaf in jax.tree.leaves(one[1:3]):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    given = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(leaf.nbytes for leaf in prepared) <= 3 * given
    if name in WIDE:
        expected = jax.jit(lambda p, x, args: plain(stage, p, x, args))(params, x, args)
        rtol = 1e-6 if "cast" in name else 1e-12  # gradients of float32 masters are rounded to float32
        assert_trees_close(one[0], expected[0], rtol=1e-12)
        assert_trees_close(one[3], expected[1], rtol=rtol)
        assert_trees_close(one[4], expected[1], rtol=rtol)


def plain(stage, params, x, args):
    """(out, (params' cotangent, x's cotangent)) for the cosine of the output."""
    out, vjp = jax.vjp(lambda p, x: stage(p, x, *args), params, x)
    return out, vjp(jax.tree.map(jnp.cos, out))


@pytest.mark.parametrize("name", ["dropout in remat"])
def test_keys_are_stashed_as_their_data(x64, name):
    stage, params, x, args = ALL[name]()
    split = split_stage(stage, params, x, *args)
    assert any(leaf.dtype == jnp.uint32 and leaf.shape == (2,) for leaf in jax.tree.leaves(split.residuals))
    for leaf in jax.tree.leaves((split.residuals, split.crossing)):
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def test_widened_parameters_are_not_kept():
    """bfloat16 parameters widened to float32 take twice the room: each half widens them again."""

    def stage(params, x):
        def layer(x, p):
            return jnp.tanh(x * jnp.exp(p["scale"].astype(x.dtype)) @ p["w"].astype(x.dtype)), None

        return jax.lax.scan(layer, x, params)[0]

    params = {"w": jnp.ones((3, 16, 16), jnp.bfloat16), "scale": jnp.ones((3, 16), jnp.bfloat16)}
    split = split_stage(stage, params, jnp.ones((2, 16)))
    kept = jax.tree.leaves((split.residuals, split.crossing))
    assert {leaf.shape for leaf in kept} == {(3, 2, 16)}


def test_products_of_parameters_are_made_once(x64):
    """Its result is prepared: the forward multiplies by it, and holds no other product."""
    stage, params, x, _ = zoo.CASES["product of parameters"]()
    split = split_stage(stage, params, x)
    prepared = split.prepare(params)
    text = str(jax.make_jaxpr(split.forward)(prepared, x))
    assert text.count("dot_general") == 1


def test_unused_parameters_cost_nothing(x64):
    stage, params, x, _ = zoo.CASES["unused"]()
    split = split_stage(stage, params, x)
    prepared = split.prepare(params)
    assert [leaf.shape for leaf in prepared] == [(zoo.WIDTH, zoo.WIDTH)]
    out, residuals = split.forward(prepared, x)
    assert not np.any(split.backward(prepared, residuals, out)[0]["unused"])


def test_a_linear_stage_keeps_its_input_for_the_weight_half_only(x64):
    split = split_stage(lambda w, x: x @ w, zoo.normal(4, 4), zoo.normal(2, 4))
    assert [[leaf.shape for leaf in leaves] for leaves in split.residuals] == [[], [(2, 4)]]
