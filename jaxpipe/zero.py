"""ZeRO-1: the optimizer's state divided over devices that have the same parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    import optax

    from jaxpipe.api import Pipeline
    from jaxpipe.whole import PipelinedModel


def shard_optimizer(
    transformation: optax.GradientTransformation, step: Pipeline | PipelinedModel
) -> optax.GradientTransformation:
    """The optimizer, with state sharded as the step's gradients are: over ``zero1_axis``, and where parameters are.

    A step with ``zero1_axis="dp"`` returns gradients that are reduce-scattered over the data axis in place of
    all-reduced. Each device of that axis then updates its part of the parameters with its part of the state, and the
    updates are gathered: as much is sent as for an all-reduce, and a device keeps ``1 / dp`` of the state. Results are
    the optimizer's own, whatever it computes, since only shardings change.

    What of the state belongs to a parameter is found by its path: ``...mu.stages['w']`` is sharded as the gradient of
    ``.stages['w']``, and so are rows of such arrays. Moments of fewer dimensions (Adafactor's) keep the first
    dimension's part of that if they have the dimension. All else is as the optimizer makes it.

    Args:
      transformation: an optax optimizer.
      step: made by `value_and_grad`, `jaxpipe.flax.from_nnx` or `jaxpipe.flax.from_linen`.

    Returns:
      An optimizer for the step's parameters. Call ``init`` under `jax.jit`, so that no device makes the whole state.

    >>> import jaxpipe, optax
    >>> mesh, schedule = jaxpipe.make_mesh(pp=2, dp=2), jaxpipe.schedule.build("1f1b", 2, 4)
    >>> stage = lambda w, x, ctx: x + jnp.tanh(x @ w)
    >>> head = lambda outer, y, data, ctx: (y**2).mean()
    >>> options = {"data_axes": ("dp",), "zero1_axis": "dp"}
    >>> step = jaxpipe.value_and_grad(stage, schedule, mesh, head=head, **options)
    >>> params = jaxpipe.Params(jnp.ones((2, 128, 128)))
    >>> params = jax.device_put(params, step.shardings(params))
    >>> optimizer = shard_optimizer(optax.adamw(1e-3), step)
    >>> tuple(jax.jit(optimizer.init)(params)[0].mu.stages.sharding.spec)
    ('pp', 'dp')
    """
    pipeline: Any = getattr(step, "pipeline", step)  # a PipelinedModel has one

    def init(params: Any) -> Any:
        return _constrain(transformation.init(params), params, pipeline.grad_shardings(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        like = updates if params is None else params
        shardings = pipeline.grad_shardings(like)
        given = (_constrain(tree, like, shardings) for tree in (updates, state, params))
        found, state = transformation.update(*given, **extra)
        return _constrain(found, like, pipeline.shardings(like)), _constrain(state, like, shardings)

    return type(transformation)(init, update)


def _constrain(tree: Any, params: Any, shardings: Any) -> Any:
    """The tree, in which whatever has a parameter's path at the end of its own is sharded as told for that one."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    told = {
        tuple(map(str, path)): (jnp.shape(leaf), sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }

    def constrain(path: Any, leaf: Any) -> Any:
        if not jnp.issubdtype(getattr(leaf, "dtype", jnp.int32), jnp.inexact):
            return leaf
        names = tuple(map(str, path))
        found = next((told[names[i:]] for i in range(len(names)) if names[i:] in told), None)
        if found is None:
            return leaf
        shape, sharding = found
        spec = _spec_of(jnp.shape(leaf), shape, sharding.spec)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))

    return jax.tree_util.tree_map_with_path(constrain, tree)


def _spec_of(shape: tuple[int, ...], of: tuple[int, ...], spec: P) -> P:
    """The spec of what belongs to an array of another shape and spec: rows of such arrays, or its moments."""
    extra = len(shape) - len(of)
    if extra >= 0 and shape[extra:] == of:
        return P(*(None,) * extra, *spec)
    return P(*spec[:1]) if shape[:1] == of[:1] else P()
