"""The arithmetic of weighted SwiGLU, number by number in float32: the same in XLA's forms and in kernels."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import lax
from jaxtyping import Array, Float


def gated(gate: Float[Array, "*s"], value: Float[Array, "*s"], weight: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``silu(gate) * value * weight``.

    Source: arXiv 2002.05202.
    """
    return gate * lax.logistic(gate) * value * weight


class Gradients(NamedTuple):
    """What the backward pass of `gated` makes, and its result again.

    Attributes:
      gate, value: gradients of these arguments.
      act: the result.
      weight: what the gradient of a row's weight sums.
    """

    gate: jax.Array
    value: jax.Array
    act: jax.Array
    weight: jax.Array


def gradients(
    gate: Float[Array, "*s"], value: Float[Array, "*s"], weight: Float[Array, "*s"], ct: Float[Array, "*s"]
) -> Gradients:
    """The backward pass of `gated` for ``ct``, the gradient of its result."""
    share = lax.logistic(gate)
    active = gate * share
    weighted = ct * weight
    slope = share * (1 + gate * (1 - share))
    act = active * value
    return Gradients(weighted * value * slope, weighted * active, act * weight, ct * act)
