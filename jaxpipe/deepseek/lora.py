"""Low-rank adapters: what is learned of a matrix beside the frozen one, as two small ones.

``x @ w`` becomes ``x @ w + (x @ a) @ b * scale``. A parameter ``query`` has its adapters beside it in the same tree, as
``query_lora_a`` and ``query_lora_b``; `merge` adds them to it, so that nothing of them is left.

Source: LoRA, arXiv 2106.09685, 4.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from eplb_jax.kernels.dtypes import wide

TARGETS = ("query", "query_down", "query_up", "latent_down", "key_up", "value_up", "out")
"""Matrices of attention, which can have adapters."""

A, B = "_lora_a", "_lora_b"
"""Ends of the names of adapters."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which matrices have adapters, and how large these are.

    Attributes:
      rank: columns of each first matrix, rows of each second.
      alpha: the product of both is multiplied by ``alpha / rank``; None: by 2.
      targets: of `TARGETS`, those of attention; a model has of "query" or "query_down" and "query_up" what its query is
        made of.

    Raises:
      ValueError: a rank below 1, an alpha that is not positive, no targets or unknown ones.

    >>> LoRA(16).scale, LoRA(16, alpha=16.0).scale
    (2.0, 1.0)
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} of adapters: at least 1, usually 8 to 64")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} of adapters: a positive number, usually twice the rank")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise ValueError(f"targets={self.targets} of adapters: some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class Adapted(NamedTuple):
    """A matrix with adapters, which `product` multiplies by.

    Attributes:
      base: ``[inputs.., outputs..]``, frozen.
      a: ``[inputs.., rank]``.
      b: ``[rank, outputs..]``, the scale in it.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array


def product(equation: str, x: Float[Array, "*batch _"], w: jax.Array | Adapted) -> Float[Array, "*out"]:
    """``jnp.einsum(equation, x, w)`` in x's dtype, with the adapters' part where the matrix has any.

    Args:
      equation: sums over x's last axes, which are the matrix' first.
      x: rows.
      w: matrix.

    >>> w = Adapted(jnp.eye(2), jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 3.0]]))
    >>> product("td,de->te", jnp.array([[1.0, 2.0]]), w).tolist()
    [[1.0, 5.0]]
    """
    if not isinstance(w, Adapted):
        return jnp.einsum(equation, x, w.astype(x.dtype))
    inputs = w.a.ndim - 1
    low = jnp.tensordot(x, w.a.astype(x.dtype), inputs)
    return jnp.einsum(equation, x, w.base.astype(x.dtype)) + jnp.tensordot(low, w.b.astype(x.dtype), 1)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is half of an adapter.

    >>> is_adapter("query_lora_a"), is_adapter("query")
    (True, False)
    """
    return name.endswith((A, B))


def merge(tree: Any, lora: LoRA) -> Any:
    """Parameters with adapters added to their matrices, which are then float32 (float64 for float64).

    Args:
      tree: nested dicts, and `jaxpipe.Params` of such; arrays of JAX or NumPy. Matrices and adapters may be stacked
        alike along first axes.
      lora: that they were trained with.

    >>> found = merge({"out": np.eye(2), "out_lora_a": np.ones((2, 1)), "out_lora_b": np.ones((1, 2))}, LoRA(1))
    >>> found["out"].tolist()
    [[3.0, 2.0], [2.0, 3.0]]
    """
    if not isinstance(tree, Mapping):
        return type(tree)(*(merge(part, lora) for part in tree)) if hasattr(tree, "_fields") else tree
    found = {name: merge(part, lora) for name, part in tree.items() if not is_adapter(name)}
    for name in [name.removesuffix(A) for name in tree if name.endswith(A)]:
        found[name] = merged(tree[name], tree[name + A], tree[name + B], lora)
    return found


def merged(base: Any, a: Any, b: Any, lora: LoRA) -> Any:
    """One matrix of `merge`."""
    if isinstance(base, np.ndarray):
        return _merged(np, base, a, b, lora.scale)
    # Products of adapters are as exact as their sums: a GPU's default for float32 has 10 bits.
    with jax.default_matmul_precision("highest"):
        return _merged(jnp, base, a, b, lora.scale)


def _merged(xp: Any, base: Any, a: Any, b: Any, scale: float) -> Any:
    dtype, rank = wide(base.dtype), a.shape[-1]
    stacked = a.shape[: a.ndim + b.ndim - 2 - base.ndim]
    left = xp.asarray(a, dtype).reshape(*stacked, -1, rank)
    right = xp.asarray(b, dtype).reshape(*stacked, rank, -1)
    return xp.asarray(base, dtype) + ((left @ right) * scale).reshape(base.shape)
