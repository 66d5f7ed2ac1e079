"""Weighted SwiGLU number by number, in float32: the same for XLA's forms and for kernels; and its gradients' type."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import lax
from jaxtyping import Array, Float

from eplb_jax.kernels.scaled import ScaledRows


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


class GateGradients(NamedTuple):
    """What `eplb_jax.kernels.quantise.gate_backward` makes.

    Attributes:
      hidden: the gradient of the hidden activations, numbers [R, FF].
      hidden_columns: the same transposed and scaled along the rows, [FF, R].
      act_columns: the result of the forward pass, of what was kept in 8 bits, transposed and scaled likewise, [F, R].
      weight: the gradient of the weights; of rows of no group it is unspecified.
    """

    hidden: ScaledRows
    hidden_columns: ScaledRows
    act_columns: ScaledRows
    weight: Float[Array, " R"]
