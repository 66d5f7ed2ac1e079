"""What ranks run alone, each at its own time, may not wait for other ranks: it is refused when it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.runtime.model import Context, Model
from jaxpipe.runtime.operations import merge, partition
from jaxpipe.runtime.program import Program
from jaxpipe.stage.axes import axes_of_jaxpr


def refuse_axis(name: str, axis: str, used: frozenset[str]) -> None:
    """Raises ValueError if a function that one rank runs alone communicates over the pipeline axis."""
    if axis in used:
        remedy = (
            "a stage may communicate over any other axis of the mesh"
            if name == "stage"
            else "pass shared_ends=True, and all ranks run it together"
        )
        raise ValueError(
            f"{name} uses mesh axis {axis!r}, but one pipeline rank runs it while others do something else, and it "
            f"would wait for them for ever: {remedy}"
        )


def check_weight(weight: Callable[..., Any] | None, axis: str, batch: Any) -> None:
    """Raises ValueError if the weight of a microbatch is not made from its data alone."""
    if weight is None:
        return
    jaxpr = jax.make_jaxpr(jax.vmap(weight))(batch)
    if axis in axes_of_jaxpr(jaxpr) or any(getattr(effect, "name", None) == axis for effect in jaxpr.effects):
        raise ValueError(
            f"weight uses mesh axis {axis!r}, but a microbatch has one weight, the same on all pipeline ranks: compute "
            "it from the microbatch's data alone"
        )


def check_gradients_of_ends(program: Program, axis: str, model: Model, outer: Any, y: Any, ctx: Context) -> None:
    """Raises ValueError where the gradient of an end that one rank runs alone uses the pipeline axis."""
    if program.shared_ends:
        return
    for name, end in (("embed", model.embed and model.run_embed), ("head", model.head and model.run_head)):
        if end is not None:
            refuse_axis(name, axis, _axes_of_gradient(end, *((outer,) if name == "embed" else (outer, y)), ctx=ctx))


def _axes_of_gradient(end: Callable[..., Any], *args: Any, ctx: Context) -> frozenset[str]:
    """The mesh axes over which a function of ``(*args, ctx)`` and its gradient communicate."""
    diff, rest = partition(args)

    def gradient(diff: Any, rest: Any, ctx: Context) -> Any:
        def floating(diff: Any) -> Any:
            return partition(end(*merge(diff, rest), ctx))[0]

        out, vjp = jax.vjp(floating, diff)
        return vjp(jax.tree.map(jnp.ones_like, out))

    return axes_of_jaxpr(jax.make_jaxpr(gradient)(diff, rest, ctx))
