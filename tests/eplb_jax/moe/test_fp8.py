"""Activations alone in 8 bits: how far they are off, what stays exact, how far a layer is off."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import ExpertParams, MoEConfig, MoEParams, RouterConfig, init_moe, moe_layer
from eplb_jax.kernels.fp8 import BLOCK, FP8, BlocksOfE4M3, dequantise, quantise
from eplb_jax.moe.exchange import all_to_all, all_to_all_encoded, all_to_all_encoded_back
from tests.cases import cases
from tests.eplb_jax.moe.test_layer import make_mesh

TINY = 448 * float(np.finfo(np.float32).tiny)
"""Blocks below this have scales that are no normal numbers; they may become zero."""
CONFIG = MoEConfig(width=256, hidden=32, router=RouterConfig(8, 3, 4, 2, scale=1.5), backend="xla")
TOKENS = 64


first, second = jax.jit(quantise), jax.jit(dequantise, static_argnums=2)


def there_and_back(x):
    """In two programs: within one, XLA may leave the rounding out."""
    numbers, scales = first(x)
    return numbers, scales, second(numbers, scales, x.dtype)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-3, 1.0, 777.0, 1e30, 3e38])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_of_a_block(size, dtype):
    """Half a step of e4m3: 2**-4 of a number, or 2**-10 of the scale where numbers have no exponent left."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (6, 3 * BLOCK)) * np.where(rng.random((6, 3 * BLOCK)) < 0.5, 1, 10 ** rng.uniform(-6, 0))
    x[1] = 0
    x[2, ::BLOCK] = 1
    x = jnp.asarray(np.asarray(x * size, np.float32)).astype(dtype)
    numbers, scales, back = there_and_back(x)
    assert numbers.dtype == FP8 and scales.dtype == jnp.float32 and back.dtype == x.dtype
    assert numbers.shape == x.shape and scales.shape == (6, 3)
    x, back = np.asarray(x, np.float64), np.asarray(back, np.float64)
    most = np.abs(x.reshape(6, 3, BLOCK)).max(-1)
    step = np.repeat(most / 448, BLOCK, axis=-1)
    rounding = 0 if dtype == "float32" else 2**-8  # of the result to bfloat16
    bound = np.maximum(np.abs(x) * 2**-4, step * 2**-10) * (1 + 2**-20) + np.abs(x) * rounding
    assert (np.abs(back - x) <= np.where(step * 448 < TINY * (1 + 1e-6), np.abs(x), bound)).all()
    assert not back[1].any() and not np.asarray(scales)[1].any()
    if size > 1e-36:
        np.testing.assert_allclose(scales, most / 448, rtol=1e-6)
        largest = np.abs(np.asarray(numbers, np.float32)).reshape(6, 3, BLOCK).max(-1)
        assert (largest == np.where(most > 0, 448, 0)).all()
        assert (back != x).any()


def test_blocks_have_their_own_scale():
    """A huge block leaves the tiny one beside it as exact as it is; powers of two are exact."""
    powers = 2.0 ** -np.arange(BLOCK).clip(0, 8)
    x = jnp.asarray(np.concatenate([7 * 2.0**100 * powers, 7 * 2.0**-100 * powers, 0 * powers])[None], jnp.float32)
    numbers, scales, back = there_and_back(x)
    assert np.array_equal(back, x)
    assert np.array_equal(numbers[:, :BLOCK], numbers[:, BLOCK : 2 * BLOCK])
    assert scales.tolist() == [[2.0**94, 2.0**-106, 0]]


@pytest.mark.parametrize("size", [5e-36, 1e-38, 1e-40, 5e-42, 1e-42, 5e-43, 1e-45, 3.4028235e38])
def test_ends_of_the_range_are_finite(size):
    """Blocks so small that their scale has few bits, or none, and the largest number there is."""
    x = np.full((1, BLOCK), size, np.float32)
    x[0, 1::2] *= -0.3
    _, _, back = there_and_back(jnp.asarray(x))
    assert np.isfinite(back).all()
    assert (np.abs(np.asarray(back, np.float64) - x) <= np.abs(x.astype(np.float64)) * 2**-4 + (size < 1) * TINY).all()


def test_width_must_be_blocks():
    with pytest.raises(ValueError, match="width 200 is not a multiple of 128"):
        quantise(jnp.ones((2, 200)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_direction_is_exact_and_the_other_rounds_once(dtype):
    """Dispatch rounds forward, combine rounds backward; each the numbers that `quantise` gives, each just once."""
    mesh = make_mesh(4)
    x, ct = jax.random.normal(jax.random.key(0), (2, 16, 5, 2 * BLOCK)).astype(dtype)
    spec = P("ep")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    def both(x, ct):
        def run(move, *encoding):
            y, pull = jax.vjp(lambda x: move(x, "ep", *encoding), x)
            return y, pull(ct)[0]

        blocks = BlocksOfE4M3()
        return run(all_to_all), run(all_to_all_encoded, blocks), run(all_to_all_encoded_back, blocks)

    exact, dispatch, combine = both(x, ct)

    def swapped(x):
        return np.asarray(x).reshape(4, 4, 5, -1).swapaxes(0, 1).reshape(x.shape)

    for got, want in zip(exact, (x, ct), strict=True):
        assert np.array_equal(got, swapped(want))
    rounded = [swapped(there_and_back(a)[2]) for a in (x, ct)]
    assert np.array_equal(dispatch[0], rounded[0]) and np.array_equal(dispatch[1], exact[1])
    assert np.array_equal(combine[0], exact[0]) and np.array_equal(combine[1], rounded[1])
    assert all(0 < relative(a, b) < 0.04 for a, b in zip(rounded, map(swapped, (x, ct)), strict=True))


def relative(a, b):
    """Norm of the difference, of the norm of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def make(dtype, config=CONFIG):
    params = init_moe(jax.random.key(0), config, jnp.dtype(dtype))
    x, ct = jax.random.normal(jax.random.key(1), (2, TOKENS, config.width)).astype(dtype)
    return params, x, ct


def run(config, ep, params, x, ct):
    """(output, (gradients of parameters, of x)); ep=None: no axis."""
    axis = None if ep is None else "ep"

    def body(params, x, ct):
        (y, stats), pull = jax.vjp(lambda params, x: moe_layer(params, x, config, axis=axis), params, x)
        return y, pull((ct, jax.tree.map(zero, stats)))

    if ep is None:
        return jax.jit(body)(params, x, ct)
    specs = MoEParams(P(), P(), ExpertParams(P("ep"), P("ep")), ExpertParams(P(), P()))
    split = P("ep")
    mapped = jax.shard_map(body, mesh=make_mesh(ep), in_specs=(specs, split, split), out_specs=(split, (specs, split)))
    return jax.jit(mapped)(params, x, ct)


def zero(leaf):
    """The cotangent of a result that is not used."""
    return jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else np.zeros(leaf.shape, jax.dtypes.float0)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_layer_is_off_by_a_few_percent(dtype):
    """As the rounding of its inputs to 8 bits explains; more than nothing, or they would not travel in 8 bits."""
    params, x, ct = make(dtype)
    y, (grads, dx) = run(CONFIG, 4, params, x, ct)
    rough, (rough_grads, rough_dx) = run(dataclasses.replace(CONFIG, precision="fp8_exchange"), 4, params, x, ct)
    errors = {"y": relative(rough, y), "x": relative(rough_dx, dx)}
    for name in ("router", "experts", "shared"):
        for i, (a, b) in enumerate(
            zip(*(jax.tree.leaves(getattr(g, name)) for g in (rough_grads, grads)), strict=True)
        ):
            errors[f"{name}{i}"] = relative(a, b)
    shared = [errors.pop(name) for name in ("shared0", "shared1")]
    assert shared == [0, 0]  # its tokens do not travel
    assert all(0.005 < error < 0.06 for error in errors.values()), errors


@cases("ep", [None, 1], quick=[1])
def test_nothing_changes_where_nothing_travels(ep):
    params, x, ct = make("float32")
    exact, rough = (
        run(dataclasses.replace(CONFIG, precision=name), ep, params, x, ct) for name in ("bf16", "fp8_exchange")
    )
    for (path, a), b in zip(jax.tree.leaves_with_path(rough), jax.tree.leaves(exact), strict=True):
        assert np.array_equal(a, b), jax.tree_util.keystr(path)
