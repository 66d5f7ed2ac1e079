"""Optimizer, training step and evaluation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.deepseek import DeepSeekModel, ModelConfig
from jaxpipe.deepseek.model import names
from jaxpipe.planning.chips import chip_of
from jaxpipe.planning.liveness import nbytes
from jaxpipe.runtime.fsdp import shard_fully
from jaxpipe.schedule import Schedule
from pretraining.muon import NOT_MATRICES, scale_by_muon
from pretraining.rebalancer import Rebalancer as Rebalancer
from pretraining.rebalancer import rebalance_config as rebalance_config

OPTIMIZERS = ("adamw", "muon")
RATES = ("cosine", "wsd")
"""Courses of the learning rate after its warm-up; "wsd", warm-up, stable, decay: arXiv 2404.06395, 4."""

SMALLEST_PART = 2**16
"""Elements of a parameter whose moments are worth dividing."""

SMALLEST_CHANGE = 0.02
"""What a step must be able to change a second moment in bfloat16 by: five times the half of its last place."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      steps: of the whole run; the learning rate reaches its end after them.
      learning_rate: the highest.
      warmup: steps until then.
      final: the last learning rate as a share of the highest.
      clip: largest norm of all gradients together.
      weight_decay: of matrices.
      b1, b2: decays of AdamW's moments.
      optimizer: "adamw"; or "muon", which then updates matrices, and AdamW the rest; see `pretraining.muon`.
      rates: "cosine" from the highest rate to the last one; or "wsd", which stays at the highest until it goes to the
        last one in a straight line.
      decay: the share of the steps for which "wsd" decays.

    Raises:
      ValueError: no steps; an unknown optimizer or course of rates; a share outside (0, 1].
    """

    steps: int
    learning_rate: float = 3e-3
    warmup: int = 10
    final: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    optimizer: str = "adamw"
    rates: str = "cosine"
    decay: float = 0.2

    def __post_init__(self) -> None:
        """Checks the number of steps."""
        if self.steps < 1 or self.warmup < 0:
            raise ValueError(f"steps={self.steps}, warmup={self.warmup}: at least one step, and no negative warm-up")
        if self.optimizer not in OPTIMIZERS or self.rates not in RATES or not 0 < self.decay <= 1:
            raise ValueError(
                f"optimizer={self.optimizer!r} is one of {OPTIMIZERS}, rates={self.rates!r} of {RATES}, and "
                f"decay={self.decay} a share of the steps, above 0 and at most 1"
            )

    def rate(self, step: Any) -> Any:
        """The learning rate of a step."""
        warmup = max(1, min(self.warmup, self.steps // 2))
        if self.rates == "wsd":
            decaying = max(1, min(round(self.steps * self.decay), self.steps - warmup))
            least = self.learning_rate * self.final
            pieces = [
                optax.linear_schedule(self.learning_rate / warmup, self.learning_rate, warmup),
                optax.constant_schedule(self.learning_rate),
                optax.linear_schedule(self.learning_rate, least, decaying),
            ]
            return optax.join_schedules(pieces, [warmup, max(warmup, self.steps - decaying)])(step)
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / warmup,
            peak_value=self.learning_rate,
            warmup_steps=warmup,
            decay_steps=max(self.steps, warmup + 1),
            end_value=self.learning_rate * self.final,
        )(step)


class TrainState(NamedTuple):
    """What one step hands to the next.

    Attributes:
      params: float32 masters, biases and placements.
      opt_state: the optimizer's.
      step: steps so far, skipped ones included; int32.
      skipped: steps skipped in all because gradients were not finite; int32.
      skipped_in_a_row: how many of the last steps; int32.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def make_optimizer(config: TrainConfig, model: DeepSeekModel) -> optax.GradientTransformation:
    """AdamW or Muon with warm-up, decay and clipping by the norm of all gradients, of what the model trains.

    Raises:
      ValueError: second moments that change too little in a step for the dtype that they are kept in.
    """
    adam = optax.scale_by_adam(config.b1, config.b2)
    if model.config.moments != "float32":
        if 1 - config.b2 < SMALLEST_CHANGE:
            raise ValueError(
                f"b2={config.b2} with moments in {model.config.moments}: a step changes second moments by less than "
                f"{1 - config.b2:.1%}, which rounding swallows; take b2={1 - SMALLEST_CHANGE} or less, as 0.95, or "
                'moments="float32"'
            )
        adam = stored_as(adam, jnp.dtype(model.config.moments))
    direction = adam
    if config.optimizer == "muon":
        orthogonal = scale_by_muon(_last_names)
        if model.config.moments != "float32":
            orthogonal = stored_as(orthogonal, jnp.dtype(model.config.moments))
        direction = optax.chain(
            optax.masked(orthogonal, _of_muon(model, True)), optax.masked(adam, _of_muon(model, False))
        )
    return optax.masked(
        optax.chain(
            optax.clip_by_global_norm(config.clip),
            direction,
            optax.add_decayed_weights(config.weight_decay, _without_masked(model)),
            optax.scale_by_learning_rate(config.rate),
        ),
        model.trained,
    )


def stored_as(transform: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """The transformation with its floating state kept in another dtype, and computed with in float32.

    Of Adam both moments, where optax's own ``mu_dtype`` is for the first alone. Parameters and updates stay as they
    are.
    """

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: Any) -> Any:
        return cast(transform.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = transform.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def init_state(model: DeepSeekModel, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step, each part made on the devices that keep it.

    Args:
      model: with or without parameters (``abstract``); its seed decides.
      optimizer: from `make_optimizer`.
      mesh: of the pipeline; None: one device.
    """
    make = _maker(model, optimizer)
    if mesh is None:
        return jax.jit(make)()
    return jax.jit(make, out_shardings=state_shardings(model, jax.eval_shape(make), mesh))()


def state_from(
    params: jaxpipe.Params, model: DeepSeekModel, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first step, of parameters that are there already, on the mesh."""

    def make(params: jaxpipe.Params) -> TrainState:
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            opt_state = optimizer.init(params)
        return TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))

    shardings = state_shardings(model, jax.eval_shape(make, params), mesh)
    given = () if model.config.zero1 else (0,)  # parts of parameters take no memory of whole ones
    return jax.jit(make, out_shardings=shardings, donate_argnums=given)(params)


def abstract_state(
    model: DeepSeekModel, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    state = jax.eval_shape(_maker(model, optimizer))
    shardings = state_shardings(model, state, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, shardings
    )


def abstract_params(model: DeepSeekModel, mesh: Mesh | AbstractMesh) -> jaxpipe.Params:
    """Shapes, dtypes and shardings of the parameters."""
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        model.params,
        kept_specs(model, mesh),
    )


def abstract_batch(config: ModelConfig, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of that many sequences."""
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "mask": jnp.float32}
    return {name: jax.ShapeDtypeStruct((rows, config.sequence), kind) for name, kind in kinds.items()}


def _maker(model: DeepSeekModel, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    def make() -> TrainState:
        params = model.init(model.seed)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            opt_state = optimizer.init(params)
        return TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))

    return make


def state_shardings(model: DeepSeekModel, state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Where each part of a state (arrays or shapes) is kept: what has gradients where these are, scalars everywhere."""

    def kept(specs: Any, tree: Any) -> Any:
        def of(node: Any) -> Any:
            if not isinstance(node, jaxpipe.Params):
                return NamedSharding(mesh, P())
            return jax.tree.map(
                lambda leaf, spec: leaf if _is_masked(leaf) else NamedSharding(mesh, spec),
                node,
                specs,
                is_leaf=_is_masked,
            )

        return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, jaxpipe.Params))

    return kept(kept_specs(model, mesh), state)


def kept_specs(model: DeepSeekModel, mesh: Mesh | AbstractMesh) -> jaxpipe.Params:
    """PartitionSpec of every parameter and its moments between steps, as `jaxpipe.Pipeline.shardings` has it."""
    if not model.config.zero1:
        return model.specs
    return shard_fully(model.specs, model.params, dict(mesh.shape), _data_axes(mesh), SMALLEST_PART, 1).specs


def pipelined(
    model: DeepSeekModel,
    schedule: Schedule,
    mesh: Any,
    *,
    dispatch: str | None = None,
    grad_dtype: Any = None,
    stash: int | None = None,
    offload: int = 0,
) -> jaxpipe.Pipeline:
    """The model's loss and gradients through a pipeline; the batch is split over all axes of the mesh but "pp".

    The mesh may be abstract: such a pipeline can be traced, not run. Gradients are summed in ``grad_dtype``, by default
    in float32; ``stash`` and ``offload`` are as of `jaxpipe.value_and_grad`.
    """
    return jaxpipe.value_and_grad(
        model.stage,
        schedule,
        mesh,
        embed=model.embed,
        head=model.head,
        weight=model.weight,
        prepare=model.prepare,
        data_axes=_data_axes(mesh),
        specs=model.specs,
        grad_dtype=grad_dtype,
        dispatch=dispatch,
        shared_ends=model.shared_ends,
        order="storage",
        zero1_axis=_data_axes(mesh) if model.config.zero1 else None,
        zero1_parameters=model.config.zero1,
        min_shard_size=SMALLEST_PART,
        stash=stash,
        offload=offload,
        trainable=None if model.config.lora is None else model.trained,
    )


def microbatch_loss(model: DeepSeekModel) -> Callable[..., Any]:
    """The whole model without a pipeline, on one microbatch.

    Returns:
      ``loss(params, data, index, rng) -> (loss, (auxiliary part of it, weight, metrics))``, losses times the weight.
    """
    shape = model.arrangement
    rows = {stage: row for row, stage in enumerate(shape.storage_order)}

    def weighted(params: jaxpipe.Params, data: Any, index: jax.Array, rng: jax.Array | None) -> Any:
        def ctx(stage: int) -> jaxpipe.Context:
            return jaxpipe.Context.make(stage, index, rng, data, num_stages=shape.stages)

        x, aux_loss, metrics = model.embed(params.outer, data, ctx(-1)), jnp.zeros((), jnp.float32), []
        for stage in range(shape.stages):
            own = jax.tree.map(lambda leaf, row=rows[stage]: leaf[row], params.stages)
            x, extra, counted = model.stage_of(stage)(own, x, ctx(stage))
            aux_loss, metrics = aux_loss + extra, [*metrics, counted]
        loss, weight = model.head(params.outer, x, data, ctx(shape.stages)), model.weight(data)
        if isinstance(loss, jaxpipe.Output):
            loss = loss.value + loss.aux_loss
        total = jax.tree.map(lambda *leaves: sum(leaves), *metrics)
        return weight * (loss + aux_loss), (weight * aux_loss, weight, total)

    return weighted


def plain_value_and_grad(model: DeepSeekModel, *, parts: int) -> Callable[..., Any]:
    """The same loss and gradients without a pipeline: one device, a loop over parts of the batch.

    Of filled sequences the balance loss is a mean over the real tokens of a part, where the pipeline's is one over all
    devices of the experts' axis.

    Args:
      model: with all experts on one device, ``axis=None``.
      parts: microbatches times data-parallel devices of the pipeline that it is compared with.
    """
    loss_of = microbatch_loss(model)

    def objective(params: jaxpipe.Params, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, Any]:
        def body(_: None, inputs: Any) -> tuple[None, Any]:
            part, data = inputs
            loss, others = loss_of(params, data, part, rng)
            return None, (loss, *others)

        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
        # Recomputed in the backward pass, or the activations of all parts would be kept at once.
        _, sums = jax.lax.scan(jax.checkpoint(body), None, (jnp.arange(parts, dtype=jnp.int32), split))
        losses, aux_losses, weights, metrics = jax.tree.map(lambda leaf: leaf.sum(0, dtype=leaf.dtype), sums)
        return losses / weights, {**metrics, "aux_loss": aux_losses / weights}

    def value_and_grad(params: jaxpipe.Params, batch: Any, rng: jax.Array | None = None) -> Any:
        return jax.value_and_grad(objective, has_aux=True, allow_int=True)(params, batch, rng)

    return value_and_grad


def make_step(
    value_and_grad: Callable[..., Any],
    model: DeepSeekModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Any:
    """A jitted training step, which takes its state over.

    Args:
      value_and_grad: from `pipelined` or `plain_value_and_grad`.
      model: whose parameters are trained.
      optimizer: from `make_optimizer`.
      mesh: of the pipeline, or None.

    Returns:
      ``step(state, batch, rng) -> (state, metrics)``. Where the loss or a gradient is not finite, parameters, moments
      and biases stay as they are, and the step is counted as skipped. Metrics: scalars ``loss``, ``aux_loss`` (the
      part of the loss that arose in the stages: the balance loss), ``grad_norm`` before clipping, ``finite``,
      ``skipped``, ``skipped_in_a_row``, ``dropped``, ``loads`` ``[layers with experts, experts]`` and
      ``microbatch_loads`` ``[microbatches, layers with experts, experts]``; in FP8
      ``not_finite_blocks``, of the operands of experts' products, which everything before them reaches.
    """

    def step(state: TrainState, batch: Any, rng: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, aux), grads = value_and_grad(state.params, batch, jax.random.fold_in(rng, state.step))
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):  # optax promotes
            floats = [g for g, trained in zip(*map(jax.tree.leaves, (grads, model.trained)), strict=True) if trained]
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in floats))
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)
            grads = jax.tree.map(lambda g, p: g if g.dtype == p.dtype else jnp.zeros_like(p), grads, state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            # What is not trained stays the same array, and costs nothing below.
            params = jax.tree.map(
                lambda new, old, trained: new if trained else old, params, state.params, model.trained
            )
        loads = model.loads_of(aux)
        params = model.with_bias(params, loads)
        params, opt_state = jax.tree.map(
            lambda new, old: old if new is old else jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        bad = jnp.where(finite, 0, 1).astype(jnp.int32)
        in_a_row = (state.skipped_in_a_row + bad) * bad
        new = TrainState(params, opt_state, state.step + 1, state.skipped + bad, in_a_row)
        if mesh is not None:
            new = jax.lax.with_sharding_constraint(new, state_shardings(model, new, mesh))
        metrics = {
            "loss": loss,
            "aux_loss": aux["aux_loss"],
            "grad_norm": norm,
            "finite": finite,
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
            "loads": loads,
            "microbatch_loads": model.microbatch_loads_of(aux),
            "dropped": model.dropped_of(aux),
        }
        if (blocks := model.not_finite_of(aux)) is not None:
            metrics["not_finite_blocks"] = blocks
        return new, metrics

    return jax.jit(step, donate_argnums=0, compiler_options=_compiler_options(value_and_grad, model, optimizer, mesh))


def _compiler_options(
    value_and_grad: Any, model: DeepSeekModel, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> dict[str, int | bool] | None:
    """For known GPUs, what `jaxpipe.compiler_options` says, but for what XLA_FLAGS say already."""
    chip = None if mesh is None else chip_of(mesh.devices.flat[0].device_kind)
    if mesh is None or chip is None:
        return None
    state = abstract_state(model, optimizer, mesh)
    offload = isinstance(value_and_grad, jaxpipe.Pipeline) and value_and_grad.options.offload > 0
    options = jaxpipe.compiler_options(nbytes(jax.tree.leaves(state), local=True), chip.memory, offload=offload)
    given = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in given}


def make_evaluate(model: DeepSeekModel, schedule: Schedule, mesh: Mesh, *, dispatch: str | None = None) -> Any:
    """A jitted ``evaluate(params, batch) -> loss``: the mean over the targets that count, by forward passes alone.

    ``schedule`` is the one that the parameters are arranged for; the batch's size is that of training.
    """
    run = jaxpipe.forward(
        model.stage,
        schedule,
        mesh,
        embed=model.embed,
        head=model.losses,
        prepare=model.prepare,
        data_axes=_data_axes(mesh),
        specs=model.specs,
        dispatch=dispatch,
        shared_ends=model.shared_ends,
        order="storage",
    )

    def evaluate(params: jaxpipe.Params, batch: Any) -> jax.Array:
        (losses, counts), _ = run(params, batch)
        return losses.sum() / jnp.maximum(counts.sum(), 1)

    return jax.jit(evaluate)


def _data_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(str(name) for name in mesh.axis_names if name != "pp")


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _last_names(tree: Any) -> Any:
    """Of every parameter the last part of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: names(path)[-1], tree)


def _of_muon(model: DeepSeekModel, wanted: bool) -> Callable[[Any], Any]:
    """The mask of what Muon updates, or of the rest, for a tree in which untrained parameters are already left out."""
    chosen = jax.tree.map(lambda name: (name not in NOT_MATRICES) == wanted, _last_names(model.params))

    def mask(params: Any) -> Any:
        return jax.tree.map(lambda leaf, one: leaf if _is_masked(leaf) else one, params, chosen, is_leaf=_is_masked)

    return mask


def _without_masked(model: DeepSeekModel) -> Callable[[Any], Any]:
    """The mask of what decays, for a tree in which untrained parameters are already left out."""

    def mask(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf, decayed: leaf if _is_masked(leaf) else decayed, params, model.decayed, is_leaf=_is_masked
        )

    return mask
