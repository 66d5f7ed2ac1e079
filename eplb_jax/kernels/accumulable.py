"""Products that say how they are added to a sum: weight gradients, for who sums those of many microbatches.

A gradient that is made, read and added moves more bytes than one that a kernel adds to its sum in place. Who traces a
backward pass finds such a product as an equation of a primitive with two parameters:

    jaxpr         makes the product of the operands: what the equation is for everybody else
    accumulable   has ``accumulate(total, counts, *operands)``: the sum of a total and the product

`jaxpipe` reads them; nothing here knows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from eplb_jax._jax import ClosedJaxpr, Primitive, ad, batching, jaxpr_as_fun, mlir
from eplb_jax.kernels import registry
from eplb_jax.kernels.registry import ChosenBackend


@dataclasses.dataclass(frozen=True)
class OuterProduct:
    """The weight gradient of groups of rows, on a backend. Static: hashable, the same whenever it is traced.

    Its last operand is the sizes of the groups: with sizes of zero it is zeros.

    Attributes:
      chosen: who makes it.
      operation: for `eplb_jax.kernels.registry.dispatch`. Beside the operation of this name, which takes the ``dtype``
        of the result, a backend has "added_" and the name, which has a float32 total as its last operand and writes
        over it.
      by_xla: XLA's form of it.
      dtype: that both forms are given; None: they are given none, and the result's is that of the operands.

    >>> from eplb_jax.kernels.grouped_gemm import xla
    >>> outer = OuterProduct(registry.XLA, "outer", xla.outer)
    >>> rows, sizes = jnp.ones((8, 2)), jnp.array([5, 0])
    >>> outer(rows, rows, sizes)[:, 0, 0].tolist()
    [5.0, 0.0]
    >>> outer.accumulate(jnp.ones((2, 2, 2)), None, rows, rows, sizes)[:, 0, 0].tolist()
    [6.0, 1.0]
    """

    chosen: ChosenBackend
    operation: str
    by_xla: Callable[..., jax.Array]
    dtype: DTypeLike | None = None

    def __call__(self, *operands: Array) -> Float[Array, "groups K N"]:
        """The gradient, as an equation that who sums gradients finds."""
        made = jax.make_jaxpr(self.product)(*operands)
        return _product.bind(*operands, jaxpr=made, accumulable=self)

    def product(self, *operands: Array) -> Float[Array, "groups K N"]:
        """The gradient."""
        return registry.dispatch(self.chosen, self.operation, self.by_xla, *operands, **self._static)

    def accumulate(
        self,
        total: Float[Array, "groups K N"] | jax.ShapeDtypeStruct,
        counts: Bool[Array, ""] | None,
        *operands: Array,
    ) -> Float[Array, "groups K N"]:
        """The sum of a total and the gradient, in the total's dtype.

        Kernels add to float32 what they summed in float32, in the total's place if nobody reads that afterwards; XLA's
        form adds what `product` makes.

        Args:
          total: what was summed before; its shape and dtype, where that is nothing.
          counts: whether the gradient counts, whatever numbers it is made of; None: it does.
          operands: of the product.
        """
        if counts is not None:
            *rows, sizes = operands
            operands = *rows, jnp.where(counts, sizes, jnp.zeros_like(sizes))
        dtype = jnp.dtype(total.dtype)
        if dtype != jnp.float32:
            made = self.product(*operands).astype(dtype)
            return made if isinstance(total, jax.ShapeDtypeStruct) else total + made
        if isinstance(total, jax.ShapeDtypeStruct):
            return registry.dispatch(self.chosen, self.operation, self._wide_by_xla, *operands, dtype=dtype)
        return registry.dispatch(self.chosen, f"added_{self.operation}", self._added_by_xla, *operands, total)

    def _wide_by_xla(self, *operands: jax.Array, dtype: DTypeLike) -> jax.Array:
        return self.by_xla(*operands, **self._static).astype(dtype)

    def _added_by_xla(self, *arrays: jax.Array) -> jax.Array:
        *operands, total = arrays
        return total + self._wide_by_xla(*operands, dtype=total.dtype)

    @property
    def _static(self) -> dict[str, Any]:
        return {} if self.dtype is None else {"dtype": self.dtype}


def _run(*operands: jax.Array, jaxpr: ClosedJaxpr, accumulable: OuterProduct) -> jax.Array:
    del accumulable
    (result,) = jaxpr_as_fun(jaxpr)(*operands)
    return result


def _batch(operands: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    """One product after the other, as the dispatcher has it."""
    return jax.vmap(lambda *operands: _run(*operands, **params), in_axes=axes)(*operands), 0


def _differentiate(operands: Any, tangents: Any, **params: Any) -> tuple[jax.Array, jax.Array]:
    """Of XLA's form: kernels have no derivative."""
    filled = tuple(map(_tangent, operands, tangents))
    return jax.jvp(lambda *operands: _run(*operands, **params), tuple(operands), filled)


def _tangent(operand: jax.Array, tangent: Any) -> Any:
    if not jnp.issubdtype(operand.dtype, jnp.inexact):
        return np.zeros(operand.shape, jax.dtypes.float0)
    return ad.instantiate_zeros(tangent)


_product = Primitive("accumulable_product")
_product.def_impl(_run)
_product.def_abstract_eval(lambda *avals, jaxpr, accumulable: jaxpr.out_avals[0])
mlir.register_lowering(_product, mlir.lower_fun(_run, multiple_results=False))
batching.primitive_batchers[_product] = _batch
ad.primitive_jvps[_product] = _differentiate
