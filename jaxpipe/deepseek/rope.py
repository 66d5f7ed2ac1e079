"""Rotary position embeddings: plain ones, and YaRN's for sequences longer than those a model was trained on."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
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
        (1.0, 1.8738)
        """
        return 1.0 if self.yarn is None else self.yarn.temperature(self.yarn.mscale_all_dim) ** 2
