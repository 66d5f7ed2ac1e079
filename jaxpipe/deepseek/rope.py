"""Rotary position embeddings: plain ones, and YaRN's for sequences longer than those a model was trained on."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.dtypes import wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Frequencies for sequences ``factor`` times as long as those of the first training.

    Slow rotations are stretched, fast ones stay, and scores grow a little.

    Attributes:
      factor: how many times as long sequences are.
      original: tokens of a sequence of the first training.
      beta_fast, beta_slow: rotations within ``original`` tokens from which on frequencies stay, and up to which they
        are divided by ``factor``; a ramp between them.
      mscale, mscale_all_dim: queries and keys are multiplied by ``m(mscale) / m(mscale_all_dim)``, where they rotate,
        and all scores by ``m(mscale_all_dim)`` squared, with ``m(s) = 1 + 0.1 s log(factor)``.

    Raises:
      ValueError: values out of range.

    Source: YaRN, arXiv 2309.00071, 3.2 to 3.4; the two scales are DeepSeek-V2's, arXiv 2405.04434, 3.1.4.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        if not self.factor >= 1 or not math.isfinite(self.factor) or self.original < 1:
            raise ValueError(f"factor={self.factor}, original={self.original}: both are at least 1, and finite")
        if not self.beta_fast >= self.beta_slow > 0:
            raise ValueError(
                f"beta_fast={self.beta_fast}, beta_slow={self.beta_slow}: positive, and the fast one is not smaller"
            )
        if not (math.isfinite(self.mscale) and math.isfinite(self.mscale_all_dim)):
            raise ValueError(f"mscale={self.mscale}, mscale_all_dim={self.mscale_all_dim}: both are finite")

    def temperature(self, mscale: float) -> float:
        """``m(mscale)`` of above.

        >>> round(Yarn(factor=40.0, original=4096).temperature(0.707), 4)
        1.2608
        """
        return 1.0 + 0.1 * mscale * math.log(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How queries and keys rotate with their positions.

    Attributes:
      theta: the base of the frequencies, ``theta**(-i / (P / 2))`` for pair i of P / 2.
      interleaved: whether elements 2 i and 2 i + 1 are a pair, as in DeepSeek's files; otherwise i and i + P / 2.
        Rotated, they are in the latter order either way: the same of queries and keys changes no score.
      yarn: for longer sequences; None: as the frequencies are.

    Raises:
      ValueError: a base of 1 or less.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        """Checks the base."""
        if not 1 < self.theta < math.inf:
            raise ValueError(f"theta={self.theta}: the base of rotations is above 1, usually 10000.0")

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by besides one over the root of the keys' width.

        >>> Rope().score_scale, round(Rope(yarn=Yarn(factor=40.0, original=4096, mscale_all_dim=1.0)).score_scale, 4)
        (1.0, 1.8739)
        """
        return 1.0 if self.yarn is None else self.yarn.temperature(self.yarn.mscale_all_dim) ** 2

    def frequencies(self, width: int) -> np.ndarray:
        """``float64[width / 2]``: what each pair rotates by from one position to the next, in radians.

        >>> Rope().frequencies(4).tolist()
        [1.0, 0.01]
        """
        half = width // 2
        plain = self.theta ** (-np.arange(half) / half)
        yarn = self.yarn
        if yarn is None:
            return plain

        def pair(rotations: float) -> float:
            """Which pair makes so many rotations within the first training's sequences."""
            return half * math.log(yarn.original / (rotations * 2 * math.pi)) / math.log(self.theta)

        first = max(math.floor(pair(yarn.beta_fast)), 0)
        last = min(math.ceil(pair(yarn.beta_slow)), width - 1)
        slow = np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
        return plain * (1 - slow) + plain / yarn.factor * slow

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by, each.

        >>> Rope().amplitude
        1.0
        """
        yarn = self.yarn
        return 1.0 if yarn is None else yarn.temperature(yarn.mscale) / yarn.temperature(yarn.mscale_all_dim)


PLAIN = Rope()
"""Base 10,000, the first half of the elements against the second."""


def rotate(x: Float[Array, "*place P"], positions: Int[Array, "*any"], rope: Rope = PLAIN) -> Float[Array, "*place P"]:
    """Rotary position embedding: pairs of the last axis rotate, in float32 (float64 for float64).

    Args:
      x: queries or keys.
      positions: of shape that broadcasts to that of x but for its last axis.
      rope: base, and which elements are pairs.

    Returns:
      The first elements of all pairs, then the second ones.

    Source: arXiv 2104.09864.

    >>> rotate(jnp.ones((2, 4)), jnp.arange(2))[0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    half, dtype = x.shape[-1] // 2, wide(x.dtype)
    if rope.yarn is None:
        frequencies = rope.theta ** (-jnp.arange(half, dtype=dtype) / half)
    else:
        frequencies = jnp.asarray(rope.frequencies(x.shape[-1]), dtype)
    angles = positions.astype(dtype)[..., None] * frequencies
    if rope.interleaved:
        pairs = x.astype(dtype).reshape(*x.shape[:-1], half, 2)
        left, right = pairs[..., 0], pairs[..., 1]
    else:
        left, right = jnp.split(x.astype(dtype), 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.amplitude != 1:
        cos, sin = cos * rope.amplitude, sin * rope.amplitude
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1).astype(x.dtype)
