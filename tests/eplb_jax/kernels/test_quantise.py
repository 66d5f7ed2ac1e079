"""Quantisation by XLA against NumPy in float64, and by the Mosaic kernels against XLA, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from eplb_jax.kernels.quantise import columns_of, gate, gate_backward, quantise, quantise_weights
from eplb_jax.kernels.scaled import ScaledRows

E4M3 = ml_dtypes.float8_e4m3fn


def values(rows, width, seed=0, dtype="bfloat16"):
    """Normal values of sizes that differ from block to block, with a block of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)) * np.exp2(rng.integers(-8, 8, (rows, 1)) + rng.integers(-4, 4, (1, width)))
    x[: rows // 2, :128] = 0
    return jnp.asarray(x, dtype)


def rounded(blocks, power_of_two):
    """Numbers and scales of blocks, the last axis of each, by NumPy in float64."""
    blocks = np.asarray(blocks, np.float64)
    scale = np.abs(blocks).max(-1) / 448
    if power_of_two:
        scale = np.where(scale > 0, np.exp2(np.ceil(np.log2(np.where(scale > 0, scale, 1)))), 0)
    numbers = blocks / np.where(scale > 0, scale, 1)[..., None]
    return numbers, scale


def check_rows(found, x, power_of_two=True):
    """That `ScaledRows` hold these values, as near as e4m3 comes."""
    rows, width = x.shape
    numbers, scale = rounded(np.asarray(x, np.float64).reshape(rows, -1, 128), power_of_two)
    assert found.numbers.dtype == E4M3 and found.numbers.shape == (rows, width)
    assert found.scales.dtype == np.float32 and found.scales.shape == (width // 128, rows)
    np.testing.assert_allclose(found.scales.T, scale, rtol=0 if power_of_two else 1e-6)
    got = np.asarray(found.numbers, np.float64).reshape(numbers.shape)
    np.testing.assert_allclose(got, numbers, rtol=2**-4 * (1 + 1e-5), atol=2**-10 * (1 + 1e-5))


def used(rows, valid):
    return (np.arange(128) < np.asarray(valid)[:, None]).reshape(rows, 1)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_quantised_rows_and_columns(dtype, power_of_two):
    x = values(256, 384, dtype=dtype)
    rows, columns = quantise(x, power_of_two=power_of_two)
    check_rows(rows, x, power_of_two)
    check_rows(columns, x.T, power_of_two)


def test_rows_of_no_group_count_as_zeros_in_columns():
    x, valid = values(384, 256), jnp.array([128, 0, 5], jnp.int32)
    rows, columns = quantise(jnp.where(used(384, valid), x, jnp.nan), valid)
    check_rows(columns, np.where(used(384, valid), x, 0).T)
    belong = used(384, valid)[:, 0]
    check_rows(ScaledRows(rows.numbers[belong], rows.scales[:, belong]), x[belong])


def test_columns_of_quantised_rows_hold_the_same_values():
    """Powers of two: all but what became subnormal is as it was, so rows and columns multiply out to the same."""
    x, valid = values(256, 256, 1), jnp.array([128, 77], jnp.int32)
    rows, _ = quantise(jnp.where(used(256, valid), x, jnp.inf), valid)
    held = np.asarray(rows.numbers, np.float64) * np.repeat(np.asarray(rows.scales, np.float64).T, 128, 1)
    held = np.where(used(256, valid), held, 0)
    columns = columns_of(rows, valid)
    check_rows(columns, held.T)
    again = np.asarray(columns.numbers, np.float64) * np.repeat(np.asarray(columns.scales, np.float64).T, 128, 1)
    large = np.abs(held.T) >= 2**-6 * np.repeat(np.asarray(columns.scales, np.float64).T, 128, 1)
    assert large.mean() > 0.3
    np.testing.assert_array_equal(again[large], held.T[large])


@pytest.mark.parametrize("power_of_two", [True, False])
def test_weights_in_both_layouts(power_of_two):
    w = values(2 * 256, 128, 2, "float32").reshape(2, 256, 128)
    forward, backward = quantise_weights(w, power_of_two=power_of_two)
    blocks = np.asarray(w, np.float64).reshape(2, 2, 128, 1, 128).swapaxes(2, 3).reshape(2, 2, 1, -1)
    numbers, scales = rounded(blocks, power_of_two)
    np.testing.assert_allclose(backward.scales, scales, rtol=1e-6)
    got = np.asarray(backward.numbers, np.float64).reshape(2, 2, 128, 1, 128).swapaxes(2, 3).reshape(numbers.shape)
    np.testing.assert_allclose(got, numbers, rtol=2**-4 * (1 + 1e-5), atol=2**-10 * (1 + 1e-5))
    np.testing.assert_array_equal(forward.numbers.swapaxes(1, 2).view(np.uint8), backward.numbers.view(np.uint8))
    np.testing.assert_array_equal(forward.scales.swapaxes(1, 2), backward.scales)


def held(rows):
    """What `ScaledRows` hold, in float64."""
    return np.asarray(rows.numbers, np.float64) * np.repeat(np.asarray(rows.scales, np.float64).T, 128, 1)


def swiglu(hidden, weight):
    """`gate`'s result in float64."""
    first, second = np.split(hidden, 2, 1)
    return first / (1 + np.exp(-first)) * second * weight[:, None]


def gate_operands(rows, width, seed=3):
    rng = np.random.default_rng(seed)
    hidden, ct = rng.standard_normal((rows, 2 * width)) * 2, rng.standard_normal((rows, width))
    return jnp.asarray(hidden, "bfloat16"), jnp.asarray(rng.random(rows), "float32"), jnp.asarray(ct, "bfloat16")


def check_held(found, wanted):
    """Within half of a step of e4m3 and of what the scale cannot resolve."""
    scales = np.repeat(np.asarray(found.scales, np.float64).T, 128, 1)
    off = np.abs(held(found) - wanted)
    assert (off <= np.maximum(2**-4 * np.abs(wanted), 2**-10 * scales) * (1 + 1e-4)).all()


def test_gate():
    hidden, weight, _ = gate_operands(72, 256)
    act, kept = gate(hidden, weight)
    check_rows(kept, hidden)
    check_held(act, swiglu(np.asarray(hidden, np.float64), np.asarray(weight, np.float64)))
    assert act.scales.shape == (2, 72)


def test_gradients_of_the_gate():
    """Against differences of the plain formula in float64, at the values that are kept in 8 bits."""
    hidden, weight, ct = gate_operands(256, 128)
    valid = jnp.array([128, 9], jnp.int32)
    belong = used(256, valid)
    _, kept = gate(jnp.where(belong, hidden, jnp.nan), weight)
    found = gate_backward(kept, weight, jnp.where(belong, ct, jnp.nan), valid)
    first, second = np.split(np.where(belong, held(kept), 0), 2, 1)
    weight, ct = np.asarray(weight, np.float64), np.where(belong, np.asarray(ct, np.float64), 0)

    def total(first, second, weight):  # of the independent elements
        return swiglu(np.concatenate([first, second], 1), weight) * ct

    step = 1e-6
    wanted = np.concatenate([
        (total(first + step, second, weight) - total(first - step, second, weight)) / (2 * step),
        (total(first, second + step, weight) - total(first, second - step, weight)) / (2 * step),
    ], 1)  # fmt: skip
    check_held(found.hidden_columns, wanted.T)
    check_held(found.act_columns, np.where(belong, swiglu(np.concatenate([first, second], 1), weight), 0).T)
    rows = belong[:, 0]
    check_held(ScaledRows(found.hidden.numbers[rows], found.hidden.scales[:, rows]), wanted[rows])
    np.testing.assert_allclose(
        found.weight[rows], total(first, second, np.ones(256)).sum(1)[rows], rtol=1e-4, atol=1e-4
    )


def test_what_is_not_finite_shows_in_its_own_blocks():
    x = values(256, 256, 4).at[130, 5].set(jnp.inf).at[7, 200].set(jnp.nan)
    rows, columns = quantise(x)
    assert np.argwhere(~np.isfinite(rows.scales)).tolist() == [[0, 130], [1, 7]]
    assert np.argwhere(~np.isfinite(columns.scales)).tolist() == [[0, 200], [1, 5]]
    assert np.isnan(np.asarray(rows.numbers, np.float32)).sum() == 256


@pytest.mark.parametrize("call, message", [
    (lambda: quantise(jnp.ones((100, 128))), r"x has shape \(100, 128\): it must be \[rows, width\], both mult"),
    (lambda: quantise(jnp.ones((128, 128), jnp.int32)), "x is int32: it must be bfloat16 or float16 or float32; "),
    (lambda: quantise(jnp.ones((256, 128)), jnp.ones(1, jnp.int32)), r"valid is int32\[1\]: it must be int32\[2\], "),
    (lambda: columns_of(ScaledRows(jnp.ones((128, 128)), jnp.ones((1, 128)))), "rows is float32: it must be float8"),
    (lambda: quantise_weights(jnp.ones((128, 128))), r"\[groups, K, N\]; take w\[None\] for a single matrix"),
    (lambda: quantise_weights(jnp.ones((1, 128, 64))), "K and N must be multiples of 128"),
    (lambda: gate(jnp.ones((8, 128)), jnp.ones(8)), r"hidden has shape \(8, 128\): it must be \[rows, 2 \* F\]"),
    (lambda: gate(jnp.ones((8, 256)), jnp.ones(4)), r"weight is float32\[4\]: it must be float32\[8\]"),
    (lambda: gate_backward(gate(jnp.ones((128, 256)), jnp.ones(128))[1], jnp.ones(128), jnp.ones((128, 256))),
     r"ct has shape \(128, 256\): it must be \(128, 128\), half as wide"),
])  # fmt: skip
def test_what_cannot_be_quantised(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_batched_and_jitted():
    x = values(256, 256, 5).reshape(2, 128, 256)
    for found, one in zip(
        jax.tree.leaves(jax.jit(jax.vmap(quantise))(x)), jax.tree.leaves(quantise(x[1])), strict=True
    ):
        np.testing.assert_array_equal(found[1], one)
