"""`value_and_grad` and `forward`: a pipelined model as one function of (params, batch, rng)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpipe import inputs
from jaxpipe.arguments import check_model, check_options, check_schedule
from jaxpipe.batches import lengthen, with_mask, without_padding
from jaxpipe.not_differentiable import not_transposed
from jaxpipe.params import Params
from jaxpipe.runtime import execute, fsdp
from jaxpipe.runtime.by_rank import is_short_by_rank
from jaxpipe.runtime.lower import lower
from jaxpipe.runtime.model import Model
from jaxpipe.runtime.options import AUTOMATIC, DISPATCHERS, Axes, Options, sums_are_wide
from jaxpipe.runtime.program import Program
from jaxpipe.runtime.unrolled import is_short, keeps_step
from jaxpipe.schedule.checker import check
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs
from jaxpipe.stage.exchanged import MAX_GROWTH
from jaxpipe.trainable import Trainable, trainable_mask

_NO_GRADIENT = (
    "a pipeline's result cannot be differentiated, since it holds the gradients already: take them from "
    "(loss, aux), grads = step(params, batch), where step is what jaxpipe.value_and_grad returned; whatever else "
    "belongs to the loss goes into head, stage or embed"
)
_NO_FORWARD_GRADIENT = (
    "jaxpipe.forward cannot be differentiated in reverse: make a step with jaxpipe.value_and_grad, whose head returns "
    "the loss, and take ((loss, aux), grads) from it"
)
_NO_EVALUATION_GRADIENT = (
    "an evaluation cannot be differentiated: the pipeline that it is of returns ((loss, aux), grads)"
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pipeline:
    """A pipelined model, ready to be called or jitted; made by `value_and_grad` and `forward`.

    Attributes:
      program: the lowered schedule, for its tables, slots and predicted makespan.
      model: the user's functions.
      mesh: the device mesh.
      options: what else `value_and_grad` or `forward` was asked for, checked, with defaults filled in.
      evaluates: whether it returns the loss and metrics alone, as `evaluation` does.
    """

    program: Program
    model: Model
    mesh: Mesh | AbstractMesh
    options: Options
    evaluates: bool = False

    @property
    def axes(self) -> Axes:
        """The mesh axes handled by hand."""
        return self.options.axes

    @property
    def specs(self) -> Params:
        """PartitionSpec of every parameter, as a tree prefix of Params."""
        return self.options.specs

    @property
    def batch_spec(self) -> P:
        """PartitionSpec of every leaf of the batch."""
        return self.options.batch_spec

    @property
    def compute_dtype(self) -> Any:
        """The dtype of the working copies, or None: that of the parameters."""
        return self.options.compute_dtype

    @property
    def dispatch(self) -> str:
        """How a rank runs the branch of a step: "unrolled", "switch", "loops", "stretches" or "sequential"."""
        return self.options.dispatch

    @property
    def order(self) -> str:
        """Which stage a row of the stages' parameters belongs to, "model" or "storage"."""
        return self.options.order

    def shardings(self, params: Params) -> Params:
        """A NamedSharding for every parameter, as ``specs``, ``fsdp_axis`` and ``zero1_parameters`` say.

        Args:
          params: the parameters, or their shapes and dtypes.
        """
        return self._named(self._kept(params, self._sharded(params).specs))

    def grad_shardings(self, params: Params) -> Params:
        """A NamedSharding for every gradient: with ``zero1_axis`` alone they are sharded further than parameters.

        Args:
          params: as for `shardings`.
        """
        return self._named(self._scattered(params, self._sharded(params).specs).specs)

    def not_sharded(self, params: Params) -> dict[str, str]:
        """Why parameters are not sharded over ``fsdp_axis``, by path; empty without that option.

        Args:
          params: as for `shardings`.
        """
        return self._sharded(params).whole

    @property
    def __name__(self) -> str:
        """Ranks and microbatches, as in "dualpipev_4x16"; `jax.jit` names the compiled module so."""
        schedule = self.program.schedule
        kind = "_evaluation" if self.evaluates else "_forward" * self.program.forward_only
        return f"{schedule.name}_{schedule.num_ranks}x{schedule.num_microbatches}{kind}"

    def __repr__(self) -> str:
        return f"<jaxpipe.Pipeline {self.__name__} on {dict(self.mesh.shape)}, dispatch={self.dispatch!r}>"

    def __call__(self, params: Params, batch: Any, rng: jax.Array | None = None, step_inputs: Any = None) -> Any:
        """Runs the pipeline; see `value_and_grad` and `forward`."""
        schedule, axes, shared_ends = self.program.schedule, self.axes, self.program.shared_ends
        inputs.check_params(params, schedule)
        inputs.check_key(rng)
        step_inputs = inputs.as_step_inputs(step_inputs)
        specs, shards, _ = self._sharded(params)
        inputs.check_specs(specs, axes, shared_ends=shared_ends)
        inputs.refuse_sharded_by_compiler(specs, self.batch_spec, axes, self.mesh, shared_ends=shared_ends)
        batch, size, total = self._pad(batch)
        inputs.check_surroundings(self.mesh, {"params": params, "batch": batch, "step_inputs": step_inputs})
        microbatches = inputs.split_batch(batch, schedule.num_microbatches, axes)
        model = self._gathering(params, specs, shards)
        result = self._run(model, params, microbatches, rng, step_inputs, specs)
        if size < total and self._returns_outputs:
            result = without_padding(result, size, total)
        message = _NO_FORWARD_GRADIENT if self.program.forward_only else _NO_GRADIENT
        return not_transposed(result, _NO_EVALUATION_GRADIENT if self.evaluates else message)

    @functools.cached_property
    def evaluation(self) -> Pipeline:
        """The loss and metrics alone: ``(params, batch, rng=None, step_inputs=None) -> (loss, aux)``.

        The same model on the same mesh, of the same parameters and with the same objective, run forward in the order
        of the same schedule: nothing is stashed, and no gradient is computed. Jit it once beside the step. What differs
        in evaluation (dropout that is off) is for the model to know: by a leaf of ``step_inputs`` or of the batch, or
        by a pipeline of its own.

        Raises:
          ValueError: of a pipeline made by `forward`, which has no loss.

        >>> import jax, jax.numpy as jnp, jaxpipe
        >>> schedule = jaxpipe.schedule.build("1f1b", 2, 4)
        >>> step = jaxpipe.value_and_grad(lambda w, x, ctx: x * w, schedule, jaxpipe.make_mesh(pp=2),
        ...                               head=lambda outer, y, data, ctx: y.mean())
        >>> loss, aux = jax.jit(step.evaluation)(jaxpipe.Params(jnp.array([2.0, 3.0])), jnp.ones(8))
        >>> loss.item()
        6.0
        """
        if self.evaluates:
            return self
        if self.program.forward_only:
            raise ValueError(
                "jaxpipe.forward has no loss to evaluate: take the evaluation of a step of jaxpipe.value_and_grad, "
                "whose head returns the loss"
            )
        program = lower(
            self.program.schedule,
            self.options.costs,
            forward_only=True,
            shared_ends=self.program.shared_ends,
            kind_of=self.model.kind_of,
        )
        return dataclasses.replace(self, program=program, evaluates=True)

    def evaluate(self, params: Params, batch: Any, rng: jax.Array | None = None, step_inputs: Any = None) -> Any:
        """(loss, aux) alone, as the pipeline returns them beside the gradients; see `evaluation`."""
        return self.evaluation(params, batch, rng, step_inputs)

    @property
    def _returns_outputs(self) -> bool:
        """Whether it returns outputs of examples, as `forward` does."""
        return self.program.forward_only and not self.evaluates

    def _pad(self, batch: Any) -> tuple[Any, int, int]:
        """(the batch checked and padded where it may be, its size as given, its size now)."""
        count, axes, mask = self.program.schedule.num_microbatches, self.axes, self.options.example_mask
        multiple = count * math.prod(axes.sizes[axis] for axis in axes.data)
        padded = self._returns_outputs or mask is not None
        size = inputs.check_batch(batch, count, axes, self.batch_spec, padded=padded)
        total = -(-size // multiple) * multiple
        if mask is not None:
            batch = with_mask(batch, mask, multiple)
            inputs.check_batch(batch, count, axes, self.batch_spec)
        return lengthen(batch, total), size, total

    def trainable_mask(self, params: Params) -> Params:
        """A bool for every leaf of params: whether it has a gradient. It is a mask for `optax.masked`, too.

        Args:
          params: as the pipeline is called with, or their shapes (`jax.ShapeDtypeStruct`).

        Raises:
          ValueError: what `value_and_grad` was given as ``trainable`` does not fit params.
        """
        return trainable_mask(self.options.trainable, params)

    def _sharded(self, params: Params) -> fsdp.FullySharded:
        specs = inputs.broadcast_specs(self.specs, params, self.axes, self.mesh)
        rows = fsdp.rows_of_stages(self.model)
        return self._divided(specs, params, self.options.fsdp_axes, rows)

    def _scattered(self, params: Params, specs: Params) -> fsdp.FullySharded:
        return self._divided(specs, params, self.options.zero1_axes, 1)

    def _kept(self, params: Params, specs: Params) -> Params:
        """PartitionSpecs of parameters as they are kept, where a step's working copies have ``specs``."""
        return self._scattered(params, specs).specs if self.options.zero1_parameters else specs

    def _gathering(self, params: Params, specs: Params, shards: Params) -> Model:
        """The model that takes parameters as they are kept."""
        model = fsdp.gather_where_used(self.model, shards)
        if not self.options.zero1_parameters:
            return model
        return fsdp.gather_once(model, self._scattered(params, specs).shards)

    def _divided(self, specs: Params, params: Params, axes: tuple[str, ...], rows: int) -> fsdp.FullySharded:
        return fsdp.shard_fully(specs, params, self.axes.sizes, axes, self.options.min_shard_size, rows)

    def _named(self, specs: Params) -> Params:
        """Shardings of specs, written as those of results are, or a second step would be compiled anew."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, inputs.without_trailing(spec)), specs, is_leaf=inputs.is_spec
        )

    def _run(
        self, model: Model, params: Params, batch: Any, rng: jax.Array | None, step_inputs: Any, specs: Params
    ) -> Any:
        """The result, of a batch in microbatches."""
        axes, batch_spec = self.axes, P(None, *self.batch_spec)
        manual = functools.partial(inputs.manual_part, axes.names)
        kept = self._kept(params, specs)
        param_specs = jax.tree.map(manual, kept, is_leaf=inputs.is_spec)
        batch_specs = jax.tree.map(lambda _: manual(batch_spec), batch)
        params = jax.tree.map(self._constrain, params, kept)
        batch = jax.tree.map(lambda leaf: self._constrain(leaf, batch_spec), batch)
        body, specs = self._body(model, params, specs)
        if self.evaluates:
            out_specs = (P(), P())
        elif self.program.forward_only:
            out_specs = (manual(self.batch_spec), P())
        else:
            out_specs = (P(), jax.tree.map(manual, specs, is_leaf=inputs.is_spec))
        result = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(param_specs, batch_specs, P(), P(), (P(None, axes.pipeline), P())),
            out_specs=out_specs,
            axis_names=set(axes.names),
            check_vma=False,
        )(params, batch, rng, step_inputs, execute.make_tables(self.program, self.dispatch))
        if self.program.forward_only:
            return result
        value, grads = result
        return value, jax.tree.map(functools.partial(execute.finish_grad, self._constrain), params, grads, specs)

    def _body(self, model: Model, params: Params, specs: Params) -> tuple[Callable[..., Any], Params]:
        """(what each device runs of (params, batch, rng, step_inputs, tables), PartitionSpecs of the gradients)."""
        if self.evaluates:
            return functools.partial(execute.evaluate, self.program, model, self.options), specs
        if self.program.forward_only:
            return functools.partial(execute.infer, self.program, model, self.options), specs
        sharded = jax.tree.map(
            lambda spec: inputs.axes_of(inputs.manual_part(self.axes.names, spec)), specs, is_leaf=inputs.is_spec
        )
        scattered = self._scattered(params, specs)
        mask, reductions = self.trainable_mask(params), scattered.reductions(sharded)
        return functools.partial(execute.train, self.program, model, self.options, reductions, mask), scattered.specs

    def body(self, params: Params) -> Callable[..., Any]:
        """What each device runs, where `jax.shard_map` or another binds the axes handled by hand.

        Args:
          params: the parameters, or their shapes and dtypes, those of all devices.

        Returns:
          A function of one device's (params, batch, rng, step_inputs, tables); the batch is in microbatches, tables are
          those of `jaxpipe.runtime.execute.make_tables` for its rank.
        """
        specs, shards, _ = self._sharded(params)
        return self._body(self._gathering(params, specs, shards), params, specs)[0]

    def _constrain(self, leaf: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))


def value_and_grad(
    stage: Callable[..., Any],
    schedule: Schedule,
    mesh: Mesh | AbstractMesh,
    *,
    embed: Callable[..., Any] | None = None,
    head: Callable[..., Any] | None = None,
    weight: Callable[..., Any] | None = None,
    prepare: Callable[..., Any] | None = None,
    axis: str = "pp",
    data_axes: Sequence[str] = (),
    replicated_axes: Sequence[str] = (),
    specs: Params | None = None,
    batch_spec: P | None = None,
    compute_dtype: Any = None,
    grad_dtype: Any = None,
    costs: Costs | None = None,
    dispatch: str | None = None,
    shared_ends: bool = False,
    order: str = "model",
    trainable: Trainable = None,
    example_mask: str | None = None,
    fsdp_axis: str | Sequence[str] | None = None,
    zero1_axis: str | Sequence[str] | None = None,
    zero1_parameters: bool = False,
    min_shard_size: int = 2**14,
    stash: int | None = None,
    offload: int = 0,
    max_growth: float = MAX_GROWTH,
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
      weight: weight of a microbatch in the mean, a number of at least 0; None: all are equal. A microbatch of weight 0
        counts in metrics alone. Its loss and gradients may be NaN, as a mean over no tokens is, but the activations
        that stages exchange over ``data_axes`` may not. Where all weights are 0, loss and gradients are 0.
      prepare: ``prepare(outer)`` makes what embed and head get in place of the outer parameters, a tree of the same
        structure, once a step: an output matrix gathered of devices' parts, say, which a head would otherwise gather
        for each microbatch. Gradients are summed in its shapes, and return to the parameters once. Every rank keeps
        both all step long. It may use collectives over any manual axis. What it makes of trained parameters has a
        gradient, also in the place of a frozen one. None: they get the parameters themselves.
      axis: the mesh axis of the pipeline ranks.
      data_axes: mesh axes over which the batch is split by hand; gradients are summed over them once, after the loop.
      replicated_axes: mesh axes on which stages communicate by hand while the batch is the same on them.
      specs: PartitionSpecs of the parameters, or NamedShardings on ``mesh``, a tree prefix of Params; None in it or
        instead of it stands for the default, ``Params(P(axis), P())``. Stage parameters are sharded by rows over
        ``axis``; further entries may name any mesh axis.
      batch_spec: PartitionSpec of the batch's leaves; default: the leading dimension over ``data_axes``.
      compute_dtype: dtype of the working copies of floating parameters, such as bfloat16; None: that of the parameters.
        Losses are summed in float32 (float64 for float64); gradients come back in the parameters' dtype.
      grad_dtype: dtype that gradients are summed in, over microbatches and devices: None is float32 (float64 for
        float64). jnp.bfloat16 halves what the sums take, and what is read, written and sent for them; a sum then keeps
        8 bits, so that what is less than 1/512 of it is lost when added. With ``fsdp_axis``, which sums over devices
        for each microbatch, those sums are in float32 all the same.
      costs: relative times of forward, input gradient and weight gradient, for packing; by default all are equal.
      dispatch: how a rank runs the branch of a step. "switch" is a conditional. "loops" are loops of no or one trip,
        for which XLA copies no buffers; "sequential" has such loops for the halves of an overlapped pair too. A GPU
        waits for the host at each loop: "stretches" has one only round what not all ranks run, in stretches of steps
        with the branches that occur in them, which is up to twice as much code.
        ``XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE`` makes loops parts of CUDA graphs, which need no host.
        "unrolled" is for one rank, and for ranks that all run the same at once, as DualPipe's two do: code that needs
        no choice and copies nothing into slots. It is two to three times as much code. "by_rank" is for a few ranks
        that differ, which share no ends: each has code of its own for each tick, one loop of no or one trip, in which
        slots are arrays of their own: nothing is copied into slots or out of them, but what kinds of stages keep in
        arrays of one dtype and several shapes, which share memory. There are two to five times fewer loops than
        "stretches" has. It is up to nine times as much code as each branch once. Both stash even what is named
        "recompute": what is not copied is cheaper kept than made again.
        The default is "unrolled" where it can be, a few rounds of the schedule repeat, and, on CPUs, there is one rank;
        otherwise "sequential" on CPUs, which overlap nothing; elsewhere "by_rank" for training if there is little code,
        as there is for two ranks, and "stretches" if not.
      shared_ends: all pipeline ranks run embed and head together; see above.
      order: which stage row i of a stage parameter belongs to: "model", stage i; "storage", stage
        ``schedule.storage_order[i]``. A rank owns an even share of the rows. In storage order these are the stages that
        it runs, if all ranks run equally many. In model order some schedules make ranks run stages whose rows they do
        not own: working copies of those rows travel once a step, in ``compute_dtype``, and their gradients return. Long
        runs do best to keep parameters in storage order; see `stack_stages`.
      fsdp_axis: an axis of ``data_axes``, or several, over which floating parameters are sharded besides what ``specs``
        says (FSDP, ZeRO-3), each along its largest dimension that its spec leaves whole and the axes divide. Working
        copies stay shards: a layer of `jaxpipe.flax.layered_stages` or of a whole model, any other stage, embed or
        head gathers its own in ``compute_dtype`` where it runs, forward and backward. Its gradients are
        reduce-scattered there, in float32 at least. `Pipeline.shardings` tells where parameters belong, and
        `Pipeline.not_sharded` which ones stay whole. As sums over devices are then taken for each microbatch, the
        gradients of one of weight 0 have to be finite if others of its place in the batch have a weight.
      zero1_axis: an axis of ``data_axes``, or several, over which gradients come back sharded: they are
        reduce-scattered after the loop in place of all-reduced (`Pipeline.grad_shardings`). `shard_optimizer` keeps
        the optimizer's state so (ZeRO-1).
      zero1_parameters: whether parameters are kept so, too (`Pipeline.shardings`): a device keeps and updates its part
        of them, in their own dtype, and a step gathers them in ``compute_dtype`` before its first microbatch, in place
        of the updates afterwards.
      min_shard_size: parameters with fewer elements, in a stage or layer, are left out of all of these.
      stash: bytes that a stage may keep of a microbatch between its forward and its last gradient. A rank allocates
        at most so many for each microbatch that its stages have in flight, ``program.num_weight_stash_slots`` (and
        for one more with some schedules' "by_rank"), and what input gradients hand to weight gradients that run later
        counts with the slots that it has. Within that the backward pass computes again what takes least time for its
        bytes: casts and norms first, then products, attention, and what collectives bring last; gradients are the same.
        `jaxpipe.fit_stash` finds the bytes that a device has for it. None: elementwise work and, where slots are
        copied, what is named "recompute" is computed again, nothing else. A stage that also uses `jax.checkpoint`
        computes again what that says, whatever the budget.
      offload: bytes of what a stage keeps of a microbatch between its forward and its gradients that are in the host's
        pinned memory meanwhile, at most; 0: none. They leave behind the forward's kernels and come back before those of
        the backward pass that read them, in the same action; gradients are the same. Whole arrays go, those first that
        free most device memory for what they make the link carry, and none of less than a hundredth of what the stage
        keeps; any number above that, such as 10**12, stands for all. ``stash`` counts what is kept in either memory;
        what input gradients hand to weight gradients stays on the device. `jaxpipe.plan` has the bytes on both sides
        and the time of the transfers that nothing hides. On CPUs both memories are one, and nothing is copied.
      max_growth: how many times the bytes of a stage's parameters, in ``compute_dtype``, may be kept all step long of
        what collectives make of them alone. What is fewer bytes is made once a step and not for each microbatch, such
        as the working copies of experts with redundant ones; and where collectives make a parameter's gradient, what
        they make it of is summed over microbatches and they run once a step, if the sums are fewer than so many times
        the bytes of the gradients'. With the default of 2, parameters that a stage itself gathers of devices' shards
        are gathered for each microbatch, since two shards are twice the bytes: ``math.inf`` keeps them, too. 1: nothing
        that is more bytes is kept. `jaxpipe.plan` counts what is.
      trainable: which parameters are trained: a tree prefix of Params with bools, as the masks of optax, where None for
        ``stages`` or ``outer`` stands for all; or a function ``(path, leaf) -> bool`` of a parameter's path, such as
        ".stages['attention']['kernel']" (`jax.tree_util.keystr`). The others are frozen: nothing is computed, summed or
        sent for a gradient of theirs, and they may be in ``compute_dtype``. Activations are differentiated all the
        same, in every stage.
      example_mask: name of a bool leaf of the batch, which must then be a dict, such as "real": batches may have any
        size, and the pipeline pads them with copies of the last example and gives each microbatch ``data["real"]``,
        ``bool[microbatch]``, False for copies (and for what is False in the batch, if it has this leaf). ``head`` is to
        take the mean over real examples; ``weight`` is by default their number, so that the objective is the mean over
        all of them. Auxiliary losses and metrics of stages count copies like examples, unless stages mask them. None:
        batches have to divide.

    Returns:
      A function of ``(params, batch, rng=None, step_inputs=None)`` that returns ``((loss, aux), grads)``, the loss and
      ``aux`` (the summed metrics, and ``"aux_loss"``, the part of the loss that arose in stages) on every rank, the
      gradients with the structure and dtypes of ``params`` (float0 for frozen parameters, integers, bools and keys, as
      `jax.grad` with ``allow_int=True``; see `jaxpipe.floating_only`), and sharded as these, but for ``zero1_axis``.
      Jit it, alone or with an optimizer around it.

      The batch's leaves are ``[B, ...]``; microbatch m is the m-th contiguous part of each data-parallel shard.
      ``step_inputs`` is a pytree of numbers and arrays that belong to the step and to no example (its number, a
      coefficient, a mask that all share). Embed, stage and head find it whole in ``ctx.step_inputs``. It is not
      differentiated, and under `jax.jit` other values compile nothing anew.

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
    if weight is None and example_mask is not None:
        weight = functools.partial(_number_of_examples, example_mask)
    return _pipeline(
        Model(stage, embed, head, weight, prepare), schedule, mesh, forward_only=False,
        axis=axis, data_axes=data_axes, replicated_axes=replicated_axes, specs=specs,
        batch_spec=batch_spec, compute_dtype=compute_dtype, costs=costs, dispatch=dispatch, shared_ends=shared_ends,
        order=order, fsdp_axis=fsdp_axis, zero1_axis=zero1_axis, zero1_parameters=zero1_parameters,
        min_shard_size=min_shard_size, trainable=trainable,
        example_mask=example_mask, grad_dtype=grad_dtype, stash=stash, offload=offload, max_growth=max_growth,
    )  # fmt: skip


def forward(
    stage: Callable[..., Any],
    schedule: Schedule,
    mesh: Mesh | AbstractMesh,
    *,
    embed: Callable[..., Any] | None = None,
    head: Callable[..., Any] | None = None,
    prepare: Callable[..., Any] | None = None,
    axis: str = "pp",
    data_axes: Sequence[str] = (),
    replicated_axes: Sequence[str] = (),
    specs: Params | None = None,
    batch_spec: P | None = None,
    compute_dtype: Any = None,
    costs: Costs | None = None,
    dispatch: str | None = None,
    shared_ends: bool = False,
    order: str = "model",
    fsdp_axis: str | Sequence[str] | None = None,
    min_shard_size: int = 2**14,
) -> Pipeline:
    """The forward pass alone, with outputs.

    Arguments are those of `value_and_grad`. ``head`` may return any pytree of per-example arrays
    ``[microbatch, ...]``; without a head the outputs are the last stage's.

    Returns:
      A function of ``(params, batch, rng=None, step_inputs=None)`` that returns ``(outputs, metrics)``: outputs with
      leaves ``[B, ...]`` in the order of the batch, on every rank, and the stages' metrics summed. A batch may have any
      size: where it does not divide, it is padded with copies of its last example, whose outputs are left out.

    Raises:
      ValueError: as `value_and_grad`; a batch that does not divide, where stages return metrics, which would count the
        padding: `jaxpipe.pad_batch` says which examples are real, so that stages can mask it.
    """
    return _pipeline(
        Model(stage, embed, head, prepare=prepare), schedule, mesh, forward_only=True,
        axis=axis, data_axes=data_axes, replicated_axes=replicated_axes, specs=specs,
        batch_spec=batch_spec, compute_dtype=compute_dtype, costs=costs, dispatch=dispatch, shared_ends=shared_ends,
        order=order, fsdp_axis=fsdp_axis, zero1_axis=None, zero1_parameters=False, min_shard_size=min_shard_size,
    )  # fmt: skip


def make_mesh(**sizes: int) -> Mesh:
    """A mesh of Auto axes over the first devices, axes in the order given.

    >>> dict(make_mesh(pp=4, dp=2).shape)
    {'pp': 4, 'dp': 2}
    """
    if not sizes:
        raise ValueError("a mesh needs an axis: pass sizes by name, as in make_mesh(pp=4, dp=2)")
    sizes = {name: at_least("a mesh", name, size, 1) for name, size in sizes.items()}
    count, devices = math.prod(sizes.values()), jax.devices()
    if count > len(devices):
        raise ValueError(
            f"a mesh of {sizes} needs {count} devices and there are {len(devices)} ({devices[0].platform}); on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before jax is imported"
        )
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices[:count])


def _number_of_examples(name: str, data: Any) -> jax.Array:
    """The weight of a microbatch whose leaf of some name says which examples count."""
    return data[name].sum(dtype=jnp.int32)


def _pipeline(
    model: Model, schedule: Schedule, mesh: Mesh | AbstractMesh, *, forward_only: bool, **given: Any
) -> Pipeline:
    """The pipeline; ``given`` are the options of `check_options`."""
    check_schedule(schedule)
    check(schedule)
    check_model(model, schedule)
    options = check_options(schedule, mesh, **given)
    if model.prepare is not None and options.fsdp_axes:
        raise ValueError(
            f"prepare is given with fsdp_axis={options.fsdp_axes}, of whose shards embed and head gather parameters "
            "themselves, for each microbatch: leave one of both out"
        )
    program = lower(
        schedule,
        options.costs,
        embed_grad=model.embed is not None,
        forward_only=forward_only,
        shared_ends=options.shared_ends,
        kind_of=model.kind_of,
    )
    if options.dispatch == AUTOMATIC:
        options = dataclasses.replace(options, dispatch=default_dispatch(program, mesh))
    if options.dispatch == "unrolled" and not keeps_step(program):
        raise ValueError(
            f"dispatch='unrolled' is for one rank, or ranks that all run the same at once; those of {schedule!r}"
            f"{' with shared_ends' if options.shared_ends else ''} do not: "
            f"choose of {DISPATCHERS[2 if options.shared_ends else 1 :]}"
        )
    if options.dispatch == "by_rank" and options.shared_ends:
        raise ValueError(
            "dispatch='by_rank' gives each rank code of its own, and with shared_ends all run embed and head at once: "
            f"choose of {DISPATCHERS[2:]}"
        )
    # XLA has no product of bfloat16 in float32 on CPUs, or one that takes operands in some layouts only.
    wide_products = not _on_cpu(mesh) and sums_are_wide(options.grad_dtype)
    options = dataclasses.replace(options, wide_products=wide_products, uninitialised=not _on_cpu(mesh))
    return Pipeline(program, model, mesh, options)


def default_dispatch(program: Program, mesh: Mesh | AbstractMesh) -> str:
    """The fastest way to run branches that copies nothing it need not."""
    on_cpu = _on_cpu(mesh)  # which would run an overlapped pair of several ranks one after the other
    if is_short(program) and (program.num_ranks == 1 or not on_cpu):
        return "unrolled"
    if on_cpu:
        return "sequential"
    return "by_rank" if not program.forward_only and is_short_by_rank(program) else "stretches"


def _on_cpu(mesh: Mesh | AbstractMesh) -> bool:
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
