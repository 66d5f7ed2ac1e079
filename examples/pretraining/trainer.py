"""Optimizer, training step and loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import jaxpipe


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train."""

    steps: int
    learning_rate: float = 3e-3
    warmup: int = 10
    clip: float = 1.0
    weight_decay: float = 0.1


class TrainState(NamedTuple):
    """What one step hands to the next."""

    params: Any
    opt_state: Any
    step: jax.Array


StepFunction = Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay to a tenth, and clipping by the global norm."""
    warmup = min(config.warmup, max(1, config.steps // 2))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / warmup,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(config.steps, warmup + 1),
        end_value=config.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay),
    )


def init_state(params: jaxpipe.Params, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_step(value_and_grad: Callable[..., Any], optimizer: optax.GradientTransformation) -> StepFunction:
    """A jitted training step from any function with the signature of `jaxpipe.value_and_grad`'s result."""

    def step(state: TrainState, batch: Any, rng: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, _), grads = value_and_grad(state.params, batch, jax.random.fold_in(rng, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def plain_value_and_grad(functions: Any, schedule: jaxpipe.schedule.Schedule) -> Callable[..., Any]:
    """The same loss and gradients without a pipeline: one device, a loop over microbatches."""
    count = schedule.num_microbatches

    def objective(params: jaxpipe.Params, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        stages = jaxpipe.unstack_stages(params.stages, schedule)

        def body(_: None, inputs: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
            microbatch, data = inputs
            ctx = jaxpipe.Context(jnp.int32(-1), microbatch, None, data)
            x = functions.embed(params.outer, data, ctx)
            for index, stage in enumerate(stages):
                x = functions.stage(stage, x, ctx._replace(stage=jnp.int32(index)))
            weight = functions.weight(data)
            return None, (functions.head(params.outer, x, data, ctx) * weight, weight)

        micro = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
        _, (losses, weights) = jax.lax.scan(body, None, (jnp.arange(count, dtype=jnp.int32), micro))
        return losses.sum() / weights.sum(), {}

    return jax.value_and_grad(objective, has_aux=True)


def place(params: jaxpipe.Params, mesh: Mesh) -> jaxpipe.Params:
    """Parameters on the mesh: stages by rows over the pipeline axis, the rest everywhere."""
    return jax.device_put(params, jaxpipe.Params(NamedSharding(mesh, P("pp")), NamedSharding(mesh, P())))


def train(
    step: StepFunction,
    state: TrainState,
    make_batch: Callable[[int], Any],
    rng: jax.Array,
    steps: int,
    *,
    every: int = 10,
) -> tuple[TrainState, list[float]]:
    """Runs the loop with a progress bar; returns the final state and the loss of every step."""
    losses: list[float] = []
    counter, text = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}")
    with Progress(counter, BarColumn(), text, TimeRemainingColumn()) as progress:
        task = progress.add_task("compiling", total=steps)
        start, tokens = time.perf_counter(), 0
        for index in range(steps):
            batch = make_batch(index)
            state, metrics = step(state, batch, rng)
            losses.append(float(metrics["loss"]))
            if index == 0:
                # The first step compiles; throughput is counted from the second.
                start = time.perf_counter()
            else:
                tokens += batch["tokens"].size
            rate = tokens / (time.perf_counter() - start) if tokens else 0.0
            text = f"loss {losses[-1]:.3f}  {rate:,.0f} tokens/s"
            progress.update(task, advance=1, description=text)
            if not progress.console.is_terminal and (index % every == 0 or index == steps - 1):
                progress.console.print(f"step {index + 1}/{steps}  {text}  grad norm {float(metrics['grad_norm']):.2f}")
    return state, losses
