"""Whether two functions compute the same: their jaxprs compared, equation by equation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe._jax import CALLS, CUSTOM_RULES, ClosedJaxpr, Jaxpr, Literal, Tracer


def same_program(a: ClosedJaxpr, b: ClosedJaxpr) -> bool:
    """Whether two jaxprs have the same equations with the same constants: then they return the same.

    The answer is False where that is not certain: functions among an equation's parameters, such as callbacks, count as
    the same only where they are equal. Derivative rules and policies of `jax.checkpoint` are not compared, so both
    jaxprs must be of functions that are not differentiated any more.

    >>> f, g = (jax.make_jaxpr(lambda x, c=c: jnp.tanh(x) * c)(1.0) for c in (2.0, 3.0))
    >>> same_program(f, f), same_program(f, g)
    (True, False)
    """
    return _same_jaxpr(a.jaxpr, b.jaxpr) and same(a.consts, b.consts)


def returns_input(jaxpr: Jaxpr, output: int, given: int) -> bool:
    """Whether an output of a jaxpr is one of its inputs, handed on as it is or through calls.

    >>> jaxpr = jax.make_jaxpr(lambda x, y: jax.checkpoint(lambda x, y: (x, x + y))(x, y))(1.0, 2.0).jaxpr
    >>> returns_input(jaxpr, 0, 0), returns_input(jaxpr, 1, 0)
    (True, False)
    """
    return _source(jaxpr, output) == given


def _source(jaxpr: Jaxpr, output: int) -> int | None:
    """The input that an output is; None where it is computed."""
    made = {var: (eqn, i) for eqn in jaxpr.eqns for i, var in enumerate(eqn.outvars)}
    var = jaxpr.outvars[output]
    while not isinstance(var, Literal) and var in made:
        eqn, index = made[var]
        if eqn.primitive.name not in CALLS:
            return None
        inner = eqn.params[CALLS[eqn.primitive.name]]
        source = _source(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner, index)
        if source is None:
            return None
        var = eqn.invars[source]
    return jaxpr.invars.index(var) if var in jaxpr.invars else None


def _same_jaxpr(a: Jaxpr, b: Jaxpr) -> bool:
    if a is b:
        return True
    if len(a.eqns) != len(b.eqns):
        return False
    number: list[dict[Any, int]] = [{}, {}]

    def define(*both: Sequence[Any]) -> bool:
        for names, variables in zip(number, both, strict=True):
            names.update(dict(zip(variables, range(len(names), len(names) + len(variables)), strict=True)))
        return [variable.aval for variable in both[0]] == [variable.aval for variable in both[1]]

    def same_atoms(left: Sequence[Any], right: Sequence[Any]) -> bool:
        return len(left) == len(right) and all(map(same_atom, left, right))

    def same_atom(x: Any, y: Any) -> bool:
        if isinstance(x, Literal) or isinstance(y, Literal):
            return isinstance(x, Literal) and isinstance(y, Literal) and x.aval == y.aval and same(x.val, y.val)
        return number[0][x] == number[1][y]

    return (
        define((*a.constvars, *a.invars), (*b.constvars, *b.invars))
        and all(
            x.primitive is y.primitive
            and same_atoms(x.invars, y.invars)
            and _same_params(x.primitive.name, x.params, y.params)
            and define(x.outvars, y.outvars)
            for x, y in zip(a.eqns, b.eqns, strict=True)
        )
        and same_atoms(a.outvars, b.outvars)
    )


def _same_params(primitive: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if primitive in CUSTOM_RULES:
        return same(a[CALLS[primitive]], b[CALLS[primitive]])
    return a.keys() == b.keys() and all(name == "policy" or same(a[name], b[name]) for name in a)


def same(a: Any, b: Any) -> bool:
    """Whether two constants, or parameters of an equation, are the same; arrays have equal bytes, dtypes and types.

    >>> same(jnp.array([0, jnp.nan]), jnp.array([0, jnp.nan])), same(jnp.int32(0), jnp.float32(0))
    (True, False)
    """
    if a is b:
        return True
    if isinstance(a, ClosedJaxpr) and isinstance(b, ClosedJaxpr):
        return same_program(a, b)
    if isinstance(a, Jaxpr) and isinstance(b, Jaxpr):
        return _same_jaxpr(a, b)
    if hasattr(a, "__array__") and hasattr(b, "__array__"):
        return _same_array(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes()
    return bool(a == b)


def _same_array(a: Any, b: Any) -> bool:
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    if isinstance(a, np.ndarray) != isinstance(b, np.ndarray) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
