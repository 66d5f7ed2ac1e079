"""`jax.vjp` of a function whose side effects run once each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxpipe._jax import NEW_REF_EFFECT
from jaxpipe.stage.divide import divide
from jaxpipe.stage.effects import effects_of, flat, silence, without_repeated
from jaxpipe.stage.graph import Node, evaluate, has_side_effects, read
from jaxpipe.stage.trace import inexact, trace


def vjp_once(function: Callable[..., Any], *primals: Any, has_aux: bool = False, ran: bool = False) -> Any:
    """Like `jax.vjp`, but what `jax.checkpoint` computes again has no side effects.

    Args:
      function: may close over arrays.
      *primals: pytrees of floating arrays.
      has_aux: as `jax.vjp`'s.
      ran: whether the function ran elsewhere with the same primals: its side effects are not run here.

    Raises:
      ValueError: the gradient needs what a side effect returned where the function ran.

    >>> import jax.numpy as jnp
    >>> def square(x):
    ...     jax.debug.print("{}", x)
    ...     return x * x
    >>> y, pull_back = vjp_once(square, jnp.float32(3), ran=True)
    >>> pull_back(jnp.float32(1))[0].item()
    6.0
    """
    effects = jax.make_jaxpr(function)(*primals).effects
    if not has_side_effects(effect for effect in effects if type(effect).__name__ != NEW_REF_EFFECT):
        return jax.vjp(function, *primals, has_aux=has_aux)
    traced = trace(lambda primals, _: function(*primals), primals, (), (), has_aux)
    nodes = traced.forward.nodes
    if ran:
        nodes = divide(silence(nodes), traced.forward.outputs, ()).first
        _check_silent(nodes)
    env = dict(zip(traced.forward.inputs, jax.tree.leaves(primals), strict=True))
    evaluate(nodes, env)
    results = [read(env, value) for value in traced.forward.outputs]
    count = len(jax.tree.leaves((traced.out, traced.aux)))
    out, aux = jax.tree.unflatten(jax.tree.structure((traced.out, traced.aux)), results[:count])
    backward = traced.backward
    repeated = without_repeated(backward.nodes, traced.forward.nodes, backward.inputs[len(results) - count :])
    pulled = divide(repeated, (*backward.outputs, *effects_of(repeated)), ()).first

    def pull_back(out_ct: Any) -> Any:
        pairs = zip(jax.tree.leaves(out_ct), jax.tree.leaves(traced.out), strict=True)
        cts = [ct for ct, aval in pairs if inexact(aval)]
        env = dict(zip(backward.inputs, (*results[count:], *cts), strict=True))
        evaluate(pulled, env)
        return jax.tree.unflatten(jax.tree.structure(primals), [read(env, value) for value in backward.outputs])

    return (out, pull_back, aux) if has_aux else (out, pull_back)


def _check_silent(nodes: tuple[Node, ...]) -> None:
    names = {node.name for node in flat(nodes) if node.eqn is not None and has_side_effects(node.eqn.effects)}
    if names:
        raise ValueError(
            f"the gradient of embed needs what {sorted(names)} returned when embed ran, and embed keeps nothing for "
            "it: call the host before the step and pass its values in the batch, or call it in the first stage"
        )
