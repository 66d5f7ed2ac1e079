"""Matrix-multiplication FLOPs of a function, counted from its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxpipe._jax import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxpipe.flops import convolution_flops, dot_flops


def matmul_flops(function: Callable[..., Any] | ClosedJaxpr, *args: Any, branch: int | None = None) -> int:
    """FLOPs (a multiplication and an addition are two) of all matrix products and convolutions.

    Scans count length times, conds as their largest branch, while loops once, what a custom call or a Pallas kernel
    does not at all.

    The two halves of a divided conditional may each have another branch that is the largest. With ``branch`` they
    count as the same one, and together as much as the whole backward.

    Args:
      function: a function to trace, or a closed jaxpr.
      *args: the function's arguments, arrays or shapes.
      branch: of each cond the branch that counts, the last one of a cond that has fewer; None: the largest.

    >>> import jax.numpy as jnp
    >>> matmul_flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 4)))
    48
    >>> choose = lambda i, a, b: jax.lax.switch(i, [lambda a, b: a, lambda a, b: a @ b], a, b)
    >>> [matmul_flops(choose, 0, jnp.ones((2, 3)), jnp.ones((3, 3)), branch=branch) for branch in (0, 1, None)]
    [0, 36, 36]
    """
    closed = function if isinstance(function, ClosedJaxpr) else jax.make_jaxpr(function)(*args)
    return _jaxpr_flops(closed.jaxpr, branch)


def _jaxpr_flops(jaxpr: Jaxpr, branch: int | None) -> int:
    return sum(eqn_flops(eqn, branch) for eqn in jaxpr.eqns)


def eqn_flops(eqn: JaxprEqn, branch: int | None = None) -> int:
    """FLOPs of one equation, with all inside of it; ``branch`` as `matmul_flops` takes it."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        return dot_flops(_shape(eqn.invars[0]), contract, _shape(eqn.outvars[0]))
    if name == "conv_general_dilated":
        feature = eqn.params["dimension_numbers"].rhs_spec[0]
        return convolution_flops(_shape(eqn.invars[1]), feature, _shape(eqn.outvars[0]))
    if name in ("ragged_dot", "ragged_dot_general"):
        return _ragged_flops(eqn)
    subs = [_jaxpr_flops(sub, branch) for sub in subjaxprs(eqn)]
    if name == "cond":
        return max(subs) if branch is None else subs[min(branch, len(subs) - 1)]
    return sum(subs) * (eqn.params["length"] if name == "scan" else 1)


def _ragged_flops(eqn: JaxprEqn) -> int:
    """Each row of the left operand meets one group's matrix: as many products as without groups."""
    left, right, out = _shape(eqn.invars[0]), _shape(eqn.invars[1]), _shape(eqn.outvars[0])
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return dot_flops(left, [-1], out)
    (contract, _), _ = numbers.dot_dimension_numbers
    if numbers.rhs_group_dimensions:
        return dot_flops(left, contract, out)
    # The ragged dimension is contracted: each of its rows contributes to one group's output.
    return 2 * math.prod(left) * math.prod(right) // math.prod(left[d] for d in contract)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def subjaxprs(eqn: JaxprEqn) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [getattr(value, "jaxpr", value) for value in values if isinstance(value, (Jaxpr, ClosedJaxpr))]
