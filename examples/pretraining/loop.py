"""The loop: steps, evaluation, checkpoints, rebalancing, and when to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from pretraining.checkpoint import Checkpoints
from pretraining.observe import Observer


class TooManySkips(RuntimeError):
    """Gradients were not finite in many steps in a row."""


class Rebalances(Protocol):
    """What the loop asks of live load balancing; `pretraining.trainer.Rebalancer` does it."""

    config: Any

    def observe(self, loads: Any) -> None:
        """Remembers the loads of a step."""

    def maybe_rebalance(self, state: Any, step: int) -> Any:
        """The state for the next step."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When the loop does what.

    Attributes:
      steps: of the whole run.
      save_every: steps between checkpoints; there is always one at the end.
      eval_every: steps between evaluations.
      max_skipped: steps skipped in a row that end the run.

    Raises:
      ValueError: a number below 1.
    """

    steps: int
    save_every: int = 100
    eval_every: int = 100
    max_skipped: int = 10

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if min(sizes := dataclasses.astuple(self)) < 1:
            names = [field.name for field in dataclasses.fields(self)]
            raise ValueError(f"{dict(zip(names, sizes, strict=True))}: all must be at least 1")


@dataclasses.dataclass(frozen=True)
class Program:
    """What the loop calls.

    Attributes:
      step: ``(state, batch, rng) -> (state, metrics)``; the state has a ``step``, the metrics a ``loss``,
        ``skipped_in_a_row`` and perhaps other scalars and ``loads``.
      batch: the batch of a step.
      rng: key of the run; the step makes its own of it.
      evaluate: the loss of a state on held-out data, or None.
      balance: of a state, a function of a step's loads: how even they are over devices, from 0 to 1; or None. Asked
        for at the beginning, and again when experts have moved.
      around: a context in which a step runs, given its number; the profiler's.
    """

    step: Callable[[Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
    batch: Callable[[int], Any]
    rng: jax.Array
    evaluate: Callable[[Any], float] | None = None
    balance: Callable[[Any], Callable[[np.ndarray], float]] | None = None
    around: Callable[[int], contextlib.AbstractContextManager[Any]] = lambda step: contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Result:
    """How the loop ended.

    Attributes:
      state: after the last step.
      losses: of the steps that ran, in order.
      interrupted: whether it was asked to stop before its last step.
    """

    state: Any
    losses: list[float]
    interrupted: bool


def train(
    config: LoopConfig,
    program: Program,
    state: Any,
    observer: Observer,
    *,
    checkpoints: Checkpoints | None = None,
    facts: dict[str, Any] | None = None,
    rebalancer: Rebalances | None = None,
    stop: Callable[[int], bool] = lambda step: False,
) -> Result:
    """Runs steps from the state's own up to the last.

    Metrics of a step are read while the next one runs, except where something depends on them.

    Args:
      config: when to do what.
      program: what to call.
      state: as begun or restored.
      observer: open; gets metrics.
      checkpoints: where to save, or None.
      facts: kept beside the state in each checkpoint, with "balance", the rebalancer's state.
      rebalancer: of experts, or None.
      stop: asked after every step; where it says yes, the state is saved and the loop ends.

    Raises:
      TooManySkips: see ``config.max_skipped``; the last checkpoint is whole then.
      SaveError: a checkpoint cannot be written.
    """
    losses: list[float] = []
    done = saved = int(state.step)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    balance = None if program.balance is None else program.balance(state)

    def settle() -> None:
        nonlocal pending
        if pending is None:
            return
        (step, metrics), pending = pending, None
        host = {name: np.asarray(value) for name, value in metrics.items()}
        loads = host.pop("loads", None)
        scalars = {name: float(value) for name, value in host.items() if value.ndim == 0}
        if loads is not None and rebalancer is not None:
            rebalancer.observe(loads)
        if loads is not None and balance is not None:
            scalars["balancedness"] = balance(loads)
        losses.append(scalars["loss"])
        # JSON has no word for what is not a number.
        observer.step(step, {name: value if math.isfinite(value) else None for name, value in scalars.items()})
        in_a_row = int(scalars.get("skipped_in_a_row", 0))
        if in_a_row:
            observer.note(f"step {step}: loss or gradients are not finite; skipped, {in_a_row} in a row")
        if in_a_row >= config.max_skipped:
            if checkpoints is not None:
                checkpoints.wait()
            raise TooManySkips(
                f"{in_a_row} steps in a row, up to step {step}, had a loss or gradients that are not finite: lower the "
                "learning rate or look at the data of these steps; the last checkpoint is as it was"
            )

    while done < config.steps:
        with program.around(done):
            state, metrics = program.step(state, program.batch(done), program.rng)
        done += 1
        settle()
        pending = (done, metrics)
        interrupted = stop(done)
        last = done == config.steps or interrupted
        saves = checkpoints is not None and (last or done % config.save_every == 0)
        evaluates = program.evaluate is not None and not interrupted and done % config.eval_every == 0
        rebalances = rebalancer is not None and done % rebalancer.config.interval == 0
        if saves or evaluates or rebalances or last:
            settle()
        if rebalances and rebalancer is not None:
            old, state = state, _rebalance(rebalancer, state, done, observer)
            if state is not old and program.balance is not None:
                balance = program.balance(state)
        if saves and checkpoints is not None:
            known = {} if rebalancer is None else {"balance": rebalancer.state_dict()}
            checkpoints.save(done, state, {**(facts or {}), **known})
            saved = done
            observer.pause()
        elif checkpoints is not None:
            checkpoints.check()
        if evaluates and program.evaluate is not None:
            observer.evaluation(done, program.evaluate(state))
            observer.pause()
        if interrupted:
            break
    if checkpoints is not None:
        checkpoints.wait()
    interrupted = done < config.steps
    if interrupted:
        observer.note(f"asked to stop: saved after step {saved} of {config.steps}, --resume auto continues")
    return Result(state, losses, interrupted)


def _rebalance(rebalancer: Rebalances, state: Any, step: int, observer: Observer) -> Any:
    state = rebalancer.maybe_rebalance(state, step)
    decision = getattr(rebalancer, "last", None)
    if decision is not None and decision.changed:
        observer.note(
            f"step {step}: {decision.moved} copies of experts moved in {decision.changed} layers, balance "
            f"{decision.before:.2f} -> {decision.after:.2f}"
        )
    return state
