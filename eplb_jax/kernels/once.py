"""Kernels are traced once for each of their shapes, however often a program calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for functions that call a kernel: calls alike share one jaxpr of its body.

    A kernel's body becomes Mosaic code where the call is lowered, in about a second. JAX does that once for equations
    whose parameters are the same objects, which they are only where the body was not traced anew. The equations are
    inlined, by JAX before 0.12 already where they are traced.

    Args:
      static: names of arguments that are no arrays; they must be hashable.

    >>> @traced_once("n")
    ... def power(x, n):
    ...     print("traced")
    ...     return x**n
    >>> print(jax.jit(lambda x: power(x, n=3) + power(x, n=3))(2.0))
    traced
    16.0
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)
