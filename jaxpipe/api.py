"""`value_and_grad` and `forward`: a pipelined model as one function of (params, batch, rng)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpipe.runtime import execute
from jaxpipe.runtime.execute import Axes
from jaxpipe.runtime.lower import lower
from jaxpipe.runtime.model import Model, Params
from jaxpipe.runtime.program import Program
from jaxpipe.runtime.straight import is_short
from jaxpipe.schedule.check import check
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulate import Costs

DISPATCHERS = ("straight", "switch", "loops", "one by one")


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A pipelined model, ready to be called or jitted; made by `value_and_grad` and `forward`.

    Attributes:
      program: the lowered schedule, for its tables, slots and predicted makespan.
      model: the user's functions.
      mesh: the device mesh.
      axes: the mesh axes handled by hand.
      specs: PartitionSpec of every parameter, as a tree prefix of Params.
      batch_spec: PartitionSpec of every leaf of the batch.
      compute_dtype: dtype of the working copies, or None.
      dispatch: one of `DISPATCHERS`.
    """

    program: Program
    model: Model
    mesh: Mesh
    axes: Axes
    specs: Params
    batch_spec: P
    compute_dtype: Any
    dispatch: str

    def __call__(self, params: Params, batch: Any, rng: jax.Array | None = None) -> Any:
        """Runs the pipeline; see `value_and_grad` and `forward`."""
        self._check_params(params)
        batch = self._split_batch(batch)
        specs = jax.tree.map(_broadcast_spec, self.specs, params, is_leaf=_is_spec)
        self._check_specs(specs)
        tables = execute.make_tables(self.program)
        manual = functools.partial(_manual_part, self.axes.names)
        param_specs = jax.tree.map(manual, specs, is_leaf=_is_spec)
        batch_specs = jax.tree.map(lambda _: manual(P(None, *self.batch_spec)), batch)
        params = jax.tree.map(self._constrain, params, specs)
        batch = jax.tree.map(lambda leaf: self._constrain(leaf, P(None, *self.batch_spec)), batch)
        common = (self.program, self.model, self.axes, self.compute_dtype, self.dispatch)
        if self.program.forward_only:
            body = functools.partial(execute.infer, *common)
            out_specs = (manual(self.batch_spec), P())
        else:
            spec_axes = jax.tree.map(_axes_of, param_specs, is_leaf=_is_spec)
            body = functools.partial(execute.train, *common, spec_axes)
            out_specs = (P(), param_specs)
        result = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(param_specs, batch_specs, P(), (P(None, self.axes.pipeline), P())),
            out_specs=out_specs,
            axis_names=set(self.axes.names),
            check_vma=False,
        )(params, batch, rng, tables)
        if self.program.forward_only:
            return result
        value, grads = result
        return value, jax.tree.map(self._constrain, grads, specs)

    def _check_params(self, params: Params) -> None:
        if not isinstance(params, Params):
            raise ValueError(f"params is a {type(params).__name__}; pass jaxpipe.Params(stages=..., outer=...)")
        stages = self.program.schedule.num_stages
        for path, leaf in jax.tree_util.tree_leaves_with_path(params.stages):
            if np.ndim(leaf) == 0 or np.shape(leaf)[0] != stages:
                raise ValueError(
                    f"params.stages{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but schedule "
                    f"{self.program.schedule.name!r} has {stages} stages: stack the parameters of all stages in rows, "
                    f"[{stages}, ...], with jaxpipe.stack_stages"
                )

    def _check_specs(self, specs: Params) -> None:
        for path, spec in jax.tree_util.tree_leaves_with_path(specs.stages, is_leaf=_is_spec):
            if not spec or spec[0] != self.axes.pipeline:
                raise ValueError(
                    f"specs.stages{jax.tree_util.keystr(path)} is {spec}: a stage parameter's PartitionSpec must "
                    f"start with {self.axes.pipeline!r}, the axis its rows are sharded over"
                )
        for path, spec in jax.tree_util.tree_leaves_with_path(specs.outer, is_leaf=_is_spec):
            if self.axes.pipeline in _axes_of(spec) and not self.program.shared_ends:
                raise ValueError(
                    f"specs.outer{jax.tree_util.keystr(path)} is {spec}, but each pipeline rank that runs embed or "
                    f"head needs the whole parameter: pass shared_ends=True, and all ranks of {self.axes.pipeline!r} "
                    "run them together, each with its shard; or shard it over another axis"
                )

    def _split_batch(self, batch: Any) -> Any:
        """Leaves ``[B, ...]`` -> ``[num_microbatches, B / num_microbatches, ...]``, contiguous on each data shard."""
        count = self.program.schedule.num_microbatches
        sizes = [self.axes.sizes[axis] for axis in self.axes.data]
        shards = int(np.prod(sizes, dtype=int))
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        if not leaves:
            raise ValueError("the batch has no arrays; pass a pytree whose leaves have the batch as leading dimension")
        rows = {np.shape(leaf)[:1] for _, leaf in leaves}
        if len(rows) != 1 or () in rows:
            shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
            raise ValueError(f"the batch's leaves have shapes {shapes}: all need the same leading (batch) dimension")
        (size,) = rows.pop()
        if size == 0 or size % (count * shards):
            raise ValueError(
                f"a batch of {size} does not divide into {count} microbatches on each of {shards} data-parallel "
                f"shards {dict(zip(self.axes.data, sizes, strict=True))}: use a multiple of {count * shards}"
            )

        def split(leaf: jax.Array) -> jax.Array:
            rest = leaf.shape[1:]
            micro = leaf.reshape(shards, count, size // (count * shards), *rest).swapaxes(0, 1)
            return micro.reshape(count, size // count, *rest)

        return jax.tree.map(lambda leaf: split(jax.numpy.asarray(leaf)), batch)

    def _constrain(self, leaf: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))


def value_and_grad(
    stage: Callable[..., Any],
    schedule: Schedule,
    mesh: Mesh,
    *,
    embed: Callable[..., Any] | None = None,
    head: Callable[..., Any] | None = None,
    weight: Callable[..., Any] | None = None,
    axis: str = "pp",
    data_axes: Sequence[str] = (),
    replicated_axes: Sequence[str] = (),
    specs: Params | None = None,
    batch_spec: P | None = None,
    compute_dtype: Any = None,
    costs: Costs | None = None,
    dispatch: str | None = None,
    shared_ends: bool = False,
) -> Pipeline:
    """Like `jax.value_and_grad` of a model's loss, computed by a pipeline.

    The model is ``embed``, then ``schedule.num_stages`` times ``stage``, then ``head``, on each of
    ``schedule.num_microbatches`` microbatches::

        x = embed(params.outer, data, ctx)               # without embed: x = data
        y = stage(stage_params, x, ctx)                  # y like x; or jaxpipe.Output(y, aux_loss, metrics)
        loss = head(params.outer, y, data, ctx)          # scalar; or jaxpipe.Output(loss, metrics=metrics)

    and the objective is ``sum(weight(data) * (loss + aux losses)) / sum(weight(data))`` over microbatches and
    data-parallel devices. With ``weight`` the number of real tokens and ``loss`` their mean, that is the mean
    over all real tokens. ``ctx`` is a `jaxpipe.Context`.

    Collectives inside the functions: axes named in ``data_axes`` or ``replicated_axes`` are manual, and any
    ``jax.lax`` collective over them may be used; the mesh's other axes belong to the compiler, which shards the
    computation as ``specs`` and sharding constraints inside the functions say. Each device's loss counts once in
    the mean, so a head returns the mean over its own tokens and does not reduce over axes.

    Side effects (`jax.debug.print`, callbacks) run once for each stage and microbatch, in the schedule's order.

    A large vocabulary makes the ranks that run ``embed`` and ``head`` the slowest. With ``shared_ends=True`` all ranks
    of the pipeline call ``embed`` together, for the same microbatch, and ``head`` together, with the same ``y``:

    * Both may use collectives over ``axis``, and ``specs.outer`` may shard parameters over it: each rank then holds,
      multiplies and updates its part. `jaxpipe.vocabulary` has embedding and cross-entropy of a sharded vocabulary.
    * ``embed`` must return the same x on every rank, ``head`` the same loss and metrics: whole ones, which count once.
    * Gradients are the whole model's, whatever is sharded, and nothing is to be scaled. JAX differentiates one rank's
      copy of x and of the loss; the others' cotangents are zeros. A custom derivative of something that is the same
      on every rank therefore sums its cotangent over ``axis`` first, as the transpose of ``jax.lax.psum`` does.

    Args:
      stage: one stage of the model, pure.
      schedule: from one of the builders, such as ``jaxpipe.schedule.build("dualpipev", 4, 16)``.
      mesh: a mesh with Auto axis types, whose ``axis`` has size ``schedule.num_ranks``.
      embed: makes the first stage's input, or None.
      head: makes the loss, or None: the objective is then the stages' auxiliary losses alone.
      weight: weight of a microbatch in the mean, or None: all equal.
      axis: the mesh axis of the pipeline ranks.
      data_axes: mesh axes over which the batch is split by hand; gradients are summed over them once, after the loop.
      replicated_axes: mesh axes on which stages communicate by hand while the batch is the same on them.
      specs: PartitionSpecs of the parameters, a tree prefix of Params; default ``Params(P(axis), P())``. Stage
        parameters are sharded by rows over ``axis``; further entries may name any mesh axis.
      batch_spec: PartitionSpec of the batch's leaves; default: the leading dimension over ``data_axes``.
      compute_dtype: dtype of the working copies of floating parameters, such as bfloat16, or None: as they are.
        Gradients accumulate in float32 (float64 for float64) and come back in the parameters' dtype.
      costs: relative times of forward, input gradient and weight gradient, for packing; default all equal.
      dispatch: how a rank runs the branch of a step: "switch", a conditional; "loops", loops of no or one trip, for
        which XLA copies no buffers; "one by one", such loops also for the halves of an overlapped pair; "straight", on
        one rank, as code that needs no choice and copies nothing into slots, so that it stashes what functions named
        ``made_again`` made. That is two to three times as much code. Default: "straight" on one rank where a few rounds
        of the schedule repeat, else "one by one" on CPU, which overlaps nothing, and "loops" on others.
      shared_ends: all pipeline ranks run embed and head together; see above.

    Returns:
      A function of ``(params, batch, rng=None)`` that returns ``((loss, aux), grads)``, the loss and ``aux`` (the
      summed metrics, and ``"aux_loss"``, the part of the loss that arose in stages) on every rank, the gradients with
      the structure, sharding and dtypes of ``params``. The batch's leaves are ``[B, ...]``; microbatch m is the m-th
      contiguous part of each data-parallel shard. Jit it, alone or with an optimizer around it.

    Raises:
      ValueError: before compilation, where schedule, mesh, parameters, batch or stage do not fit together.

    >>> import jax, jax.numpy as jnp, jaxpipe
    >>> mesh = jaxpipe.make_mesh(pp=4)
    >>> schedule = jaxpipe.schedule.build("dualpipev", 4, 8)
    >>> def stage(params, x, ctx):
    ...     return jnp.tanh(x @ params["w"])
    >>> def head(outer, y, data, ctx):
    ...     return jnp.mean(y**2)
    >>> weights = jax.random.normal(jax.random.key(0), (schedule.num_stages, 16, 16)) / 4
    >>> params = jaxpipe.Params(stages={"w": weights})
    >>> step = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, head=head))
    >>> (loss, aux), grads = step(params, jnp.ones((16, 16)))
    >>> grads.stages["w"].shape
    (8, 16, 16)
    """
    return _pipeline(
        Model(stage, embed, head, weight), schedule, mesh, axis, data_axes, replicated_axes, specs, batch_spec,
        compute_dtype, costs, dispatch, shared_ends, forward_only=False,
    )  # fmt: skip


def forward(
    stage: Callable[..., Any],
    schedule: Schedule,
    mesh: Mesh,
    *,
    embed: Callable[..., Any] | None = None,
    head: Callable[..., Any] | None = None,
    axis: str = "pp",
    data_axes: Sequence[str] = (),
    replicated_axes: Sequence[str] = (),
    specs: Params | None = None,
    batch_spec: P | None = None,
    compute_dtype: Any = None,
    costs: Costs | None = None,
    dispatch: str | None = None,
    shared_ends: bool = False,
) -> Pipeline:
    """The forward pass alone, with outputs.

    Arguments are those of `value_and_grad`. ``head`` may return any pytree of per-example arrays
    ``[microbatch, ...]``; without a head the outputs are the last stage's.

    Returns:
      A function of ``(params, batch, rng=None)`` that returns ``(outputs, metrics)``: outputs with leaves
      ``[B, ...]`` in the order of the batch, on every rank, and the stages' metrics summed.
    """
    return _pipeline(
        Model(stage, embed, head), schedule, mesh, axis, data_axes, replicated_axes, specs, batch_spec,
        compute_dtype, costs, dispatch, shared_ends, forward_only=True,
    )  # fmt: skip


def make_mesh(**sizes: int) -> Mesh:
    """A mesh of Auto axes over the first devices, axes in the order given.

    >>> dict(make_mesh(pp=4, dp=2).shape)
    {'pp': 4, 'dp': 2}
    """
    count = int(np.prod(list(sizes.values()), dtype=int))
    devices = jax.devices()
    if min(sizes.values(), default=0) < 1 or count > len(devices):
        raise ValueError(
            f"a mesh of {sizes} needs {count} devices and there are {len(devices)} ({devices[0].platform}); on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before jax is imported"
        )
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices[:count])


def stack_stages(stages: Sequence[Any], schedule: Schedule) -> Any:
    """Stacks the parameters of stages 0, 1, ... into rows in the schedule's storage order.

    >>> from jaxpipe.schedule import build
    >>> import numpy as np
    >>> stack_stages([np.float32(stage) for stage in range(4)], build("dualpipev", 2, 4)).tolist()
    [0.0, 3.0, 1.0, 2.0]
    """
    if len(stages) != schedule.num_stages:
        raise ValueError(f"{len(stages)} stages for schedule {schedule.name!r}, which has {schedule.num_stages}")
    return jax.tree.map(lambda *rows: jax.numpy.stack(rows), *(stages[stage] for stage in schedule.storage_order))


def unstack_stages(stacked: Any, schedule: Schedule) -> list[Any]:
    """The inverse of `stack_stages`: the parameters (or gradients) of stages 0, 1, ... as a list."""
    rows = {stage: row for row, stage in enumerate(schedule.storage_order)}
    return [jax.tree.map(lambda leaf, row=rows[stage]: leaf[row], stacked) for stage in range(schedule.num_stages)]


def _pipeline(
    model: Model,
    schedule: Schedule,
    mesh: Mesh,
    axis: str,
    data_axes: Sequence[str],
    replicated_axes: Sequence[str],
    specs: Params | None,
    batch_spec: P | None,
    compute_dtype: Any,
    costs: Costs | None,
    dispatch: str | None,
    shared_ends: bool,
    *,
    forward_only: bool,
) -> Pipeline:
    check(schedule)
    axes = _check_mesh(schedule, mesh, axis, tuple(data_axes), tuple(replicated_axes))
    if dispatch is not None and dispatch not in DISPATCHERS:
        raise ValueError(f"dispatch={dispatch!r}; choose one of {DISPATCHERS}")
    if dispatch == "straight" and schedule.num_ranks != 1:
        raise ValueError(
            f"dispatch={dispatch!r} is for one rank; for {schedule.num_ranks}, choose of {DISPATCHERS[1:]}"
        )
    program = lower(
        schedule, costs or Costs(), embed_grad=model.embed is not None, forward_only=forward_only,
        shared_ends=shared_ends,
    )  # fmt: skip
    if dispatch is None:
        on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
        dispatch = "straight" if is_short(program) else "one by one" if on_cpu else "loops"
    return Pipeline(
        program=program,
        model=model,
        mesh=mesh,
        axes=axes,
        specs=specs if specs is not None else Params(P(axis), P()),
        batch_spec=batch_spec if batch_spec is not None else P(axes.data or None),
        compute_dtype=compute_dtype,
        dispatch=dispatch,
    )


def _check_mesh(
    schedule: Schedule, mesh: Mesh, axis: str, data_axes: tuple[str, ...], replicated_axes: tuple[str, ...]
) -> Axes:
    sizes = dict(mesh.shape)
    manual = (axis, *data_axes, *replicated_axes)
    missing = [name for name in manual if name not in sizes]
    if missing or len(set(manual)) != len(manual):
        raise ValueError(f"axes {list(manual)} must be distinct axes of the mesh, which has {sizes}")
    if sizes[axis] != schedule.num_ranks:
        raise ValueError(
            f"schedule {schedule.name!r} is for {schedule.num_ranks} ranks, but mesh axis {axis!r} has size "
            f"{sizes[axis]}: build the schedule for {sizes[axis]} ranks, or the mesh with {axis}={schedule.num_ranks}"
        )
    if schedule.num_stages % schedule.num_ranks:
        raise ValueError(f"{schedule.num_stages} stages do not divide over {schedule.num_ranks} ranks")
    not_auto = [str(name) for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto]
    if not_auto:
        raise ValueError(
            f"mesh axes {not_auto} are not Auto: make the mesh with axis_types=(AxisType.Auto,) * {len(sizes)}, "
            "or with jaxpipe.make_mesh"
        )
    return Axes(axis, data_axes, replicated_axes, {name: sizes[name] for name in manual})


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def _broadcast_spec(spec: P, tree: Any) -> Any:
    """The spec at every leaf of a subtree."""
    return jax.tree.map(lambda _: spec, tree)


def _manual_part(manual: frozenset[str], spec: P) -> P:
    """A PartitionSpec with the compiler's axes left out."""

    def keep(entry: Any) -> Any:
        names = tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name in manual)
        return names if len(names) > 1 else (names[0] if names else None)

    return P(*(keep(entry) for entry in spec))


def _axes_of(spec: P) -> frozenset[str]:
    """The mesh axes that a PartitionSpec names."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    return frozenset(name for entry in entries for name in entry if name is not None)
