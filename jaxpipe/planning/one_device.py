"""What one device of a mesh runs in a pipeline's step, as a function for one device alone.

So a plan for many devices is checked on one: the program, its tables, its buffers and its shapes are those of the mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from jaxpipe._jax import ClosedJaxpr
from jaxpipe.api import Pipeline
from jaxpipe.params import Params
from jaxpipe.planning.without_mesh import WithoutMesh
from jaxpipe.runtime import execute


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OneDevice:
    """A device's part of a pipeline; made by `one_device`.

    Attributes:
      pipeline: the whole.
      params, batch: shapes and dtypes of the device's; all devices have the same.
    """

    pipeline: Pipeline
    params: Params
    batch: Any
    _jaxpr: ClosedJaxpr
    _result: Any

    def __repr__(self) -> str:
        return f"<OneDevice of {self.pipeline!r}>"

    def __call__(
        self,
        places: Mapping[str, Any],
        params: Params,
        batch: Any,
        rng: jax.Array | None = None,
        step_inputs: Any = None,
        *,
        received: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Any:
        """What the device computes of a step, without the others: to be jitted.

        Shapes are those of the device's result on the mesh, numbers are not: see `jaxpipe.planning.without_mesh`.

        Args:
          places: the device's place on each axis that the pipeline handles; numbers, or traced, so that one compiled
            program is that of each rank.
          params, batch: the device's.
          rng, step_inputs: as the pipeline is called with.
          received: makes what arrives from another rank of what is sent there; None: that itself.

        Returns:
          What the pipeline returns.

        Raises:
          ValueError: a place that is missing or does not exist.
        """
        axes, program = self.pipeline.axes, self.pipeline.program
        for name, size in axes.sizes.items():
            place = places.get(name)
            if place is None or (isinstance(place, int) and not 0 <= place < size):
                raise ValueError(f"place {place} on axis {name!r} of size {size}: give each of {list(axes.sizes)} one")
        places = {name: jnp.asarray(places[name], jnp.int32) for name in axes.sizes}
        tables, common = execute.make_tables(program, self.pipeline.dispatch)
        rank = places[axes.pipeline]
        mine = jax.tree.map(lambda table: lax.dynamic_slice_in_dim(jnp.asarray(table), rank, 1, 1), tables)
        batch = jax.tree.map(lambda leaf: leaf.reshape(program.schedule.num_microbatches, -1, *leaf.shape[1:]), batch)
        arguments = jax.tree.leaves((params, batch, rng, step_inputs, (mine, common)))
        run = WithoutMesh(axes.sizes, places, received)
        leaves = run.run(self._jaxpr.jaxpr, self._jaxpr.consts, arguments)
        result = jax.tree.unflatten(self._result, leaves)
        if program.forward_only:
            return result
        value, grads = result
        return value, jax.tree.map(_finish, params, grads)


def _finish(param: Any, grad: Any) -> Any:
    """A gradient; of what is not differentiated, JAX's zeros of dtype float0."""
    return np.zeros(np.shape(param), jax.dtypes.float0) if grad is None else grad


def one_device(pipeline: Pipeline, params: Params, batch: Any, rng: Any = None, step_inputs: Any = None) -> OneDevice:
    """The part of a pipeline that each device of its mesh runs, traced; the mesh may be abstract.

    Args:
      pipeline: from `jaxpipe.value_and_grad` or `jaxpipe.forward`.
      params, batch: arrays or shapes of the whole, as for the pipeline.
      rng, step_inputs: as the pipeline is called with, or their shapes.

    Raises:
      ValueError: a pipeline whose compiler has axes of the mesh to itself.

    >>> import jaxpipe
    >>> from jax.sharding import AbstractMesh, AxisType
    >>> schedule = jaxpipe.schedule.build("1f1b", 4, 8)
    >>> step = jaxpipe.value_and_grad(
    ...     lambda w, x, ctx: jnp.tanh(x @ w), schedule, AbstractMesh((4,), ("pp",), axis_types=(AxisType.Auto,)),
    ...     head=lambda outer, y, data, ctx: (y**2).mean())
    >>> whole = jaxpipe.Params(jax.ShapeDtypeStruct((4, 16, 16), "float32"))
    >>> device = one_device(step, whole, jax.ShapeDtypeStruct((32, 16), "float32"))
    >>> params, batch = jax.tree.map(jnp.ones_like, (device.params, device.batch))
    >>> (loss, aux), grads = jax.jit(device)({"pp": 2}, params, batch)
    >>> grads.stages.shape
    (1, 16, 16)
    """
    axes, program = pipeline.axes, pipeline.program
    others = {name: size for name, size in pipeline.mesh.shape.items() if name not in axes.names and size > 1}
    if others:
        raise ValueError(
            f"mesh axes {others} are the compiler's, which alone knows what a device has of each array: take sizes "
            "of 1, or name them in data_axes"
        )
    params, batch, rng, step_inputs = jax.tree.map(_shape, (params, batch, rng, step_inputs))
    own = jax.tree.map(_local, params, pipeline.shardings(params))
    rows = NamedSharding(pipeline.mesh, pipeline.batch_spec)
    own_batch = jax.tree.map(lambda leaf: _local(leaf, rows), batch)
    count = program.schedule.num_microbatches
    split = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, leaf.shape[0] // count, *leaf.shape[1:]), leaf.dtype), own_batch
    )
    tables, common = jax.tree.map(_shape, execute.make_tables(program, pipeline.dispatch))
    mine = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], 1, *leaf.shape[2:]), leaf.dtype), tables)
    trace = jax.make_jaxpr(pipeline.body(params), axis_env=list(axes.sizes.items()), return_shape=True)
    jaxpr, result = trace(own, split, rng, step_inputs, (mine, common))
    return OneDevice(pipeline, own, own_batch, jaxpr, jax.tree.structure(result))


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def _local(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """One device's part."""
    return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)
