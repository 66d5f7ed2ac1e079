"""Kernels are traced once for each of their shapes, however often a program calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for functions that call a kernel: calls alike share one jaxpr of its body.

    A kernel's body becomes Mosaic code where the call is lowered, in about a second. JAX does that once for equations
    whose parameters are the same objects, which they are only where the body was not traced anew. Nothing else shows:
    the equations stand in the caller's jaxpr as if the function were undecorated.

    Args:
      static: names of arguments that are no arrays; they must be hashable.

    >>> @traced_once("n")
    ... def power(x, n):
    ...     print("traced")
    ...     return x**n
    >>> jax.make_jaxpr(lambda x: power(x, n=3) + power(x, n=3))(1.0)
    traced
    { lambda ; a:f32[]. let
        b:f32[] = integer_pow[y=3] a
        c:f32[] = integer_pow[y=3] a
        d:f32[] = add b c
      in (d,) }
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)
