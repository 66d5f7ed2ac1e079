"""Rotations: against complex numbers, and frequencies against the papers' formulas."""

import cmath
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.deepseek import Rope, Yarn, causal_attention, rotate
from jaxpipe.deepseek.stand_in import attention

YARN = Yarn(factor=40.0, original=4096, mscale=0.707, mscale_all_dim=0.707)


def yarn_frequencies(width, theta, factor, original, fast, slow):
    """ArXiv 2309.00071, equations 17, 18 and 23, one pair at a time, with bounds rounded outwards."""

    def pair_of(rotations):
        return width * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), width - 1)
    found = []
    for pair in range(width // 2):
        plain = theta ** (-2 * pair / width)
        share = min(max((pair - low) / max(high - low, 1e-3), 0), 1)
        found.append(plain / factor * share + plain * (1 - share))
    return found


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize(("factor", "original"), [(40.0, 4096), (4.0, 64), (1.0, 64)])
def test_frequencies_are_yarns(width, factor, original):
    rope = Rope(yarn=Yarn(factor=factor, original=original))
    expected = yarn_frequencies(width, 10_000.0, factor, original, 32, 1)
    np.testing.assert_allclose(rope.frequencies(width), expected, rtol=1e-14)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("yarn", [None, YARN, dataclasses.replace(YARN, mscale=1.0)])
def test_pairs_rotate_as_complex_numbers(interleaved, yarn):
    rope = Rope(theta=500.0, interleaved=interleaved, yarn=yarn)
    x = np.random.default_rng(0).normal(size=(3, 2, 6))
    with jax.enable_x64(True):
        made = np.asarray(rotate(jnp.asarray(x), jnp.array([0, 5, 9], jnp.int32)[:, None], rope))
    frequencies = rope.frequencies(6)
    for place, position in enumerate((0, 5, 9)):
        for head in range(2):
            for pair in range(3):
                left, right = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
                turned = complex(x[place, head, left], x[place, head, right]) * rope.amplitude
                turned *= cmath.exp(1j * position * frequencies[pair])
                np.testing.assert_allclose(made[place, head, [pair, pair + 3]], [turned.real, turned.imag], atol=1e-12)


def test_scales_of_scores():
    assert Rope(yarn=YARN).amplitude == 1 and Rope(yarn=YARN).score_scale == pytest.approx(
        (1 + 0.1 * 0.707 * math.log(40)) ** 2
    )
    paper = Rope(yarn=Yarn(factor=40.0, original=4096))  # 3.4: scores grow by the square of 0.1 ln s + 1
    assert paper.score_scale == 1 and paper.amplitude == pytest.approx(0.1 * math.log(40) + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rope(theta=1.0), r"theta=1.0: the base of rotations is above 1"),
        (lambda: Yarn(factor=0.5, original=64), r"factor=0.5, original=64: both are at least 1"),
        (lambda: Yarn(factor=2.0, original=64, beta_fast=0.5), r"beta_fast=0.5, beta_slow=1.0"),
        (lambda: Yarn(factor=2.0, original=64, mscale=math.inf), r"mscale=inf"),
    ],
)
def test_bad_rotations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attention_has_a_scale_of_its_own_and_is_exact_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        query, key, value = (jnp.asarray(rng.normal(size=(2, 5, 3, width))) for width in (6, 6, 4))
        made = causal_attention(query[:, 2:], key, value, scale=0.3)
        for batch, place, head in np.ndindex(2, 3, 3):
            scores = np.exp(0.3 * np.asarray(key)[batch, : place + 3, head] @ np.asarray(query)[batch, place + 2, head])
            expected = scores / scores.sum() @ np.asarray(value)[batch, : place + 3, head]
            np.testing.assert_allclose(made[batch, place, head], expected, atol=1e-14)
    single = [x.astype(jnp.float32) for x in (query, key, value)]
    single[0] = single[0][:, 2:]
    np.testing.assert_allclose(causal_attention(*single, scale=0.3), made, atol=1e-5)
    assert jax.eval_shape(attention, *single, 0.3).shape == made.shape
