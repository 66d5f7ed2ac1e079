"""Muon for stacked layers: momentum, made orthogonal matrix by matrix.

optax's own Muon flattens the axes over which matrices are stacked into one. Here rows of stages and experts are apart,
so that each device works on the matrices that it keeps.

Sources: K. Jordan et al., github.com/KellerJordan/Muon; that updates are scaled so that AdamW's learning rate and
weight decay hold for both: Moonlight, arXiv 2502.16982, 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
"""Of a polynomial with these coefficients; Jordan's."""

SIZE = 0.2
"""The root mean square of an update, about AdamW's."""

NOT_MATRICES = ("embedding", "output", "scale")
"""Parameters that AdamW updates: rows that are looked up, or stand for one token each, and vectors."""

HALVES = ("w_in", "shared_in")
"""Two matrices side by side."""

HEADS_LAST = ("query", "query_up", "key_up", "value_up")
HEADS_FIRST = ("out",)
"""Matrices of attention whose outputs, or inputs, are divided into heads: three axes for two."""


def scale_by_muon(labels: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Momentum and orthogonal matrices.

    Args:
      labels: of a tree of parameters the name of each, as "w_in".
    """

    def orthogonal(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(orthogonalise, labels(updates), updates)

    return optax.chain(optax.trace(MOMENTUM, nesterov=True), optax.stateless(orthogonal))


def orthogonalise(name: str, update: jax.Array) -> jax.Array:
    """The matrices of a parameter, each replaced by nearly the nearest orthogonal one, times its size.

    Args:
      name: of the parameter; it says which axes are those of a matrix.
      update: ``[..., rows, columns]``, or with heads.

    >>> found = orthogonalise("router", jnp.diag(jnp.array([5.0, 0.1])))
    >>> bool(jnp.all(jnp.abs(jnp.diag(found) / (SIZE * 2**0.5) - 1) < 0.4))
    True
    """
    matrices = as_matrices(name, update)
    rows, columns = matrices.shape[-2:]
    found = newton_schulz(matrices) * (SIZE * math.sqrt(max(rows, columns)))
    return from_matrices(name, found.astype(update.dtype), update.shape)


def newton_schulz(x: jax.Array) -> jax.Array:
    """``[..., rows, columns]``: the same singular vectors, with singular values between 0.7 and 1.2; zeros stay zeros.

    The polynomial a x + b (x x^T) x + c (x x^T)^2 x grows small singular values fast and does not quite converge.
    """
    a, b, c = COEFFICIENTS
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT).mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def as_matrices(name: str, array: jax.Array) -> jax.Array:
    """A parameter as ``[..., inputs, outputs]``.

    >>> as_matrices("w_in", jnp.zeros((2, 8, 16, 6))).shape, as_matrices("out", jnp.zeros((2, 4, 3, 16))).shape
    ((2, 8, 2, 16, 3), (2, 12, 16))
    """
    *front, rows, columns = array.shape
    if name in HALVES:
        return jnp.moveaxis(array.reshape(*front, rows, 2, columns // 2), -2, -3)
    if name in HEADS_LAST:
        return array.reshape(*front[:-1], front[-1], rows * columns)
    if name in HEADS_FIRST:
        return array.reshape(*front[:-1], front[-1] * rows, columns)
    return array


def from_matrices(name: str, matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `as_matrices`."""
    return (jnp.moveaxis(matrices, -3, -2) if name in HALVES else matrices).reshape(shape)
