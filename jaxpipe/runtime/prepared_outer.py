"""What is made of outer parameters once a step, for embed and head; and the way back for sums of gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.model import Model
from jaxpipe.runtime.operations import merge, partition
from jaxpipe.stage.effects import dependents
from jaxpipe.stage.graph import make_graph, read
from jaxpipe.stage.trace import inexact
from jaxpipe.stage.wide import evaluate_wide


def run_prepare(model: Model, outer: Any) -> Any:
    """What embed and head get of outer parameters.

    Raises:
      ValueError: ``prepare`` returns a tree of another structure, or a leaf that is floating where its parameter is
        not.
    """
    if model.prepare is None:
        return outer
    made = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf), model.prepare(outer))
    given, returned = jax.tree.structure(outer), jax.tree.structure(made)
    if given != returned:
        raise ValueError(
            f"prepare maps {given} to {returned}: it returns a tree of the same structure, with parameters that it "
            "leaves alone as they are"
        )
    for (path, before), after in zip(jax.tree.leaves_with_path(outer), jax.tree.leaves(made), strict=True):
        if inexact(before) != inexact(after):
            raise ValueError(
                f"prepare makes {after.dtype} of outer{jax.tree_util.keystr(path)}, which is {before.dtype}: floating "
                "parameters stay floating, since gradients go back to them, and others stay what they are"
            )
    return jax.tree.map(
        lambda before, after: after if after is before else lax.optimization_barrier(after), outer, made
    )


def trainable_of_prepared(model: Model, outer: Any, trainable: Any) -> Any:
    """Which leaves of what `run_prepare` makes have a gradient, a tree of bools: those made of parameters that have.

    A frozen matrix to which ``prepare`` adds trained adapters has one; what it makes of frozen parameters alone, or
    of none, has not.
    """
    if model.prepare is None:
        return trainable
    diff, rest = partition(outer, trainable)
    closed, shapes = jax.make_jaxpr(lambda diff: run_prepare(model, merge(diff, rest)), return_shape=True)(diff)
    graph = make_graph(closed)
    made = dependents(graph.nodes, set(graph.inputs))
    leaves, structure = jax.tree.flatten(shapes)
    pairs = zip(leaves, graph.outputs, strict=True)
    return jax.tree.unflatten(structure, [inexact(leaf) and value in made for leaf, value in pairs])


def pull_back_prepare(model: Model, outer: Any, trainable: Any, summed: Any, sums: Any) -> Any:
    """Gradients of the outer parameters, of the sums of those of what `run_prepare` made, None for frozen ones.

    ``summed`` are those of its leaves that have one, as `trainable_of_prepared` finds them. Gradients are in the dtypes
    of the sums or in wider ones: casts to narrower dtypes in ``prepare`` have none on the way back.
    """
    if model.prepare is None:
        return sums
    prepare, (diff, rest) = model.prepare, partition(outer, trainable)

    def floating(diff: Any) -> Any:
        return partition(prepare(merge(diff, rest)), summed)[0]

    shapes = jax.eval_shape(floating, diff)
    closed, shape = jax.make_jaxpr(lambda diff, cts: jax.vjp(floating, diff)[1](cts)[0], return_shape=True)(
        diff, shapes
    )
    graph = make_graph(closed)
    cts = jax.tree.leaves(sums)
    env = dict(zip(graph.inputs, (*jax.tree.leaves(diff), *cts), strict=True))
    evaluate_wide(graph.nodes, env, graph.inputs[len(graph.inputs) - len(cts) :])
    return jax.tree.unflatten(jax.tree.structure(shape), [read(env, value) for value in graph.outputs])
