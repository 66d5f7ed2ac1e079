"""Checks that functions which one rank runs alone, at its own time, do not wait for other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.runtime.model import Context, Model
from jaxpipe.runtime.operations import merge, partition
from jaxpipe.runtime.program import Program
from jaxpipe.stage.axes import Collectives, collectives_of_jaxpr
from jaxpipe.stage.trace import inexact


def check_alone(name: str, program: Program, axis: str, used: Collectives) -> None:
    """Raises ValueError if a function that one rank runs alone communicates with other ranks of the pipeline.

    A permute over any axis does that, since it has no groups and its pairs are those of all ranks: XLA pairs it with
    whatever permute the other ranks are at.
    """
    if any(over == axis for _, over in used):
        remedy = (
            "a stage may communicate over any other axis of the mesh"
            if name == "stage"
            else "pass shared_ends=True, and all ranks run it together"
        )
        raise ValueError(
            f"{name} uses mesh axis {axis!r}, but one pipeline rank runs it while others do something else, and it "
            f"would wait for them for ever: {remedy}"
        )
    permuted = sorted(over for primitive, over in used if primitive == "ppermute")
    if permuted and program.num_ranks > 1:
        raise ValueError(
            f"{name} uses ppermute over mesh axis {permuted[0]!r}: it needs all {program.num_ranks} ranks of {axis!r} "
            f"at once, but each runs {name} at a time of its own. Use a collective with groups: for "
            f"jax.lax.ppermute(x, {permuted[0]!r}, ...) jax.lax.all_gather(x, {permuted[0]!r})[source], or all_to_all"
        )


def check_weight(weight: Callable[..., Any] | None, axis: str, batch: Any) -> None:
    """Raises ValueError if the weight of a microbatch is not made from its data alone."""
    if weight is None:
        return
    jaxpr = jax.make_jaxpr(jax.vmap(weight))(batch)
    named = {over for _, over in collectives_of_jaxpr(jaxpr)} | {getattr(e, "name", None) for e in jaxpr.effects}
    if axis in named:
        raise ValueError(
            f"weight uses mesh axis {axis!r}, but a microbatch has one weight, the same on all pipeline ranks: compute "
            "it from the microbatch's data alone"
        )


def check_gradients_of_ends(
    program: Program, axis: str, model: Model, outer: Any, trainable: Any, y: Any, ctx: Context
) -> None:
    """Raises ValueError where the gradient of an end that one rank runs alone uses the pipeline axis."""
    if program.shared_ends:
        return
    for name, end in (("embed", model.embed and model.run_embed), ("head", model.head and model.run_head)):
        if end is not None:
            args, chosen = (outer, y), (trainable, jax.tree.map(inexact, y))
            if name == "embed":
                args, chosen = args[:1], chosen[:1]
            check_alone(name, program, axis, _collectives_of_gradient(end, *args, chosen=chosen, ctx=ctx))


def _collectives_of_gradient(end: Callable[..., Any], *args: Any, chosen: Any, ctx: Context) -> Collectives:
    """The collectives of a function of ``(*args, ctx)`` and of its gradient with respect to chosen leaves."""
    diff, rest = partition(args, chosen)

    def gradient(diff: Any, rest: Any, ctx: Context) -> Any:
        def floating(diff: Any) -> Any:
            return partition(end(*merge(diff, rest), ctx))[0]

        out, vjp = jax.vjp(floating, diff)
        return vjp(jax.tree.map(jnp.ones_like, out))

    return collectives_of_jaxpr(jax.make_jaxpr(gradient)(diff, rest, ctx))
