"""Marks the results of a pipeline, so that whoever differentiates them in reverse reads why that cannot be done."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe._jax import Primitive, ad, batching, mlir


def not_transposed(tree: Any, message: str) -> Any:
    """The same tree. A cotangent of it raises ValueError with the message; tangents pass.

    >>> function = lambda x: not_transposed(x**2, "its gradient is in the second result")
    >>> jax.jvp(function, (3.0,), (1.0,))[1].item()
    6.0
    >>> try:
    ...     jax.grad(function)(3.0)
    ... except ValueError as error:
    ...     print(error.args[0].splitlines()[0])
    its gradient is in the second result
    """

    def mark(leaf: Any) -> Any:
        return _marked.bind(leaf, message=message) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(mark, tree)


def _refuse(ct: Any, x: Any, *, message: str) -> Any:
    raise ValueError(message)


_marked = Primitive("not_transposed")
_marked.def_impl(lambda x, *, message: x)
_marked.def_abstract_eval(lambda x, *, message: x)
batching.defvectorized(_marked)
ad.deflinear2(_marked, _refuse)
mlir.register_lowering(_marked, lambda ctx, x, *, message: [x])
