"""The loop: steps, evaluation, checkpoints, rebalancing, and when to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from pretraining.checkpoint import Checkpoints
from pretraining.load_report import Evenness, percentiles_of
from pretraining.observe import Observer


class TooManySkips(RuntimeError):
    """Gradients were not finite in many steps in a row."""


class Rebalances(Protocol):
    """What the loop asks of live load balancing; `pretraining.trainer.Rebalancer` does it."""

    placement: Any
    """The one in use, on the host, once `maybe_rebalance` was called."""

    def observe(self, loads: Any, step: int, seconds: float | None) -> None:
        """Remembers the loads of a step, and its time where that is known."""

    def maybe_rebalance(self, state: Any, step: int) -> Any:
        """The state for the next step, when so many have begun; waits for none of them."""

    def metrics(self) -> dict[str, float]:
        """What the plan was that `maybe_rebalance` has just used; empty where it used none."""
        ...

    def planning(self) -> dict[str, float]:
        """What plans took since the last call, beside a step; empty where none ran."""
        ...

    def described(self) -> str | None:
        """The same in words; None where no expert has moved."""

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
class TrainFunctions:
    """What the loop calls.

    Attributes:
      step: ``(state, batch, rng) -> (state, metrics)``; the state has a ``step``, the metrics a ``loss``,
        ``skipped_in_a_row`` and perhaps other scalars, ``loads`` and ``microbatch_loads``.
      batch: the batch of a step.
      rng: key of the run; the step makes its own of it.
      evaluate: the loss of a state on held-out data, or None.
      balance: of a state, or of a rebalancer's placement, how even loads are over devices; or None. Asked for at the
        beginning, and again when experts have moved.
      around: a context in which a step runs, given its number; the profiler's. Where it gives True, the step is waited
        for in it, and the times of this step and of the one before it are not those of training.
    """

    step: Callable[[Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
    batch: Callable[[int], Any]
    rng: jax.Array
    evaluate: Callable[[Any], float] | None = None
    balance: Callable[[Any], Evenness] | None = None
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
    program: TrainFunctions,
    state: Any,
    observer: Observer,
    *,
    checkpoints: Checkpoints | None = None,
    facts: dict[str, Any] | None = None,
    rebalancer: Rebalances | None = None,
    stop: Callable[[int], bool] = lambda step: False,
) -> Result:
    """Runs steps from the state's own up to the last.

    Metrics of a step are read while the next one runs, except where something depends on them. Among them are
    ``step_seconds``, from the end of the step before to its own, where nothing but steps ran between.

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
    run = _TrainLoop(config, program, observer, checkpoints, rebalancer, facts or {}, state, int(state.step))
    while run.done < config.steps:
        run.advance()
        interrupted = stop(run.done)
        due = run.due(interrupted)
        if due.settle:
            run.settle()
        run.rebalance()
        if due.save:
            run.save()
        elif checkpoints is not None:
            checkpoints.check()
        if due.evaluate:
            run.evaluate()
        if interrupted:
            break
    if checkpoints is not None:
        checkpoints.wait()
    interrupted = run.done < config.steps
    if interrupted:
        observer.note(f"asked to stop: saved after step {run.saved} of {config.steps}, --resume auto continues")
    return Result(run.state, run.losses, interrupted)


@dataclasses.dataclass(frozen=True)
class _Due:
    """What follows a step.

    Attributes:
      settle: whether metrics are read before the next step runs, because something depends on them.
      save, evaluate: what is done, in this order.
    """

    settle: bool
    save: bool
    evaluate: bool


class _Started(NamedTuple):
    """A step whose metrics nobody has read yet.

    Attributes:
      step: its number, counted from 1.
      metrics: its own, on devices.
      balance: of the placement that it has; see `TrainFunctions`.
      moved: metrics of the plan that it is the first to have, or empty.
    """

    step: int
    metrics: dict[str, jax.Array]
    balance: Evenness | None
    moved: dict[str, float]


class _TrainLoop:
    """A run on its way: the state, the steps done, and the metrics of the last step, which nobody has read yet."""

    def __init__(
        self,
        config: LoopConfig,
        program: TrainFunctions,
        observer: Observer,
        checkpoints: Checkpoints | None,
        rebalancer: Rebalances | None,
        facts: dict[str, Any],
        state: Any,
        done: int,
    ):
        """Begins after the ``done``-th step."""
        self.config, self.program, self.observer = config, program, observer
        self.checkpoints, self.rebalancer, self.facts = checkpoints, rebalancer, facts
        self.state, self.done, self.saved, self.losses = state, done, done, []
        self._pending: _Started | None = None
        self._moved: dict[str, float] = {}
        self._settled: float | None = None
        self._balance = None if program.balance is None else program.balance(state)

    def advance(self) -> None:
        """Starts one more step, and reads the metrics of the one before it meanwhile."""
        with self.program.around(self.done) as is_watched:
            self.state, metrics = self.program.step(self.state, self.program.batch(self.done), self.program.rng)
        self.done += 1
        if is_watched:
            self._pause()
        self.settle()
        if is_watched:
            self._pause()
        self._pending, self._moved = _Started(self.done, metrics, self._balance, self._moved), {}

    def due(self, interrupted: bool) -> _Due:
        """What follows the step that has just been started."""
        last = self.done == self.config.steps or interrupted
        save = self.checkpoints is not None and (last or self.done % self.config.save_every == 0)
        evaluate = self.program.evaluate is not None and not interrupted and self.done % self.config.eval_every == 0
        return _Due(save or evaluate or last, save, evaluate)

    def settle(self) -> None:
        """Waits for the last step that was started, and shows and remembers its metrics.

        Raises:
          TooManySkips: it was one of too many in a row.
        """
        if self._pending is None:
            return
        (step, metrics, balance, moved), self._pending = self._pending, None
        host = {name: np.asarray(value) for name, value in metrics.items()}
        now, before = time.perf_counter(), self._settled
        self._settled = now
        loads, microbatches = (host.pop(name, None) for name in ("loads", "microbatch_loads"))
        scalars = {name: float(value) for name, value in host.items() if value.ndim == 0} | moved
        if self.rebalancer is not None:
            scalars |= self.rebalancer.planning()
        if before is not None:
            scalars["step_seconds"] = now - before
        if loads is not None and self.rebalancer is not None:
            self.rebalancer.observe(loads, step, scalars.get("step_seconds"))
        if loads is not None and balance is not None:
            scalars["balancedness"] = balance.mean(loads)
        if microbatches is not None and balance is not None:
            ratios = balance.heaviest(microbatches)
            scalars |= percentiles_of(ratios)
            self.observer.loads(step, ratios)
        self.losses.append(scalars["loss"])
        # JSON has no word for what is not a number.
        self.observer.step(step, {name: value if math.isfinite(value) else None for name, value in scalars.items()})
        self._count_skips(step, int(scalars.get("skipped_in_a_row", 0)))

    def _count_skips(self, step: int, in_a_row: int) -> None:
        if in_a_row:
            self.observer.note(f"step {step}: loss or gradients are not finite; skipped, {in_a_row} in a row")
        if in_a_row >= self.config.max_skipped:
            if self.checkpoints is not None:
                self.checkpoints.wait()
            raise TooManySkips(
                f"{in_a_row} steps in a row, up to step {step}, had a loss or gradients that are not finite: lower the "
                "learning rate or look at the data of these steps; the last checkpoint is as it was"
            )

    def rebalance(self) -> None:
        """Lets the rebalancer move experts before the next step."""
        if self.rebalancer is None:
            return
        begun, old = time.perf_counter(), self.state
        self.state = self.rebalancer.maybe_rebalance(self.state, self.done)
        if moved := self.rebalancer.metrics():
            moved["rebalance_seconds"] = time.perf_counter() - begun
        self._moved = moved
        if (text := self.rebalancer.described()) is not None:
            self.observer.note(f"step {self.done}: {text}")
        if self.state is not old and self.program.balance is not None:
            self._balance = self.program.balance(self.rebalancer.placement)

    def save(self) -> None:
        """Begins a checkpoint."""
        assert self.checkpoints is not None
        known = {} if self.rebalancer is None else {"balance": self.rebalancer.state_dict()}
        self.checkpoints.save(self.done, self.state, {**self.facts, **known})
        self.saved = self.done
        self._pause()

    def evaluate(self) -> None:
        """Shows the loss on held-out data."""
        assert self.program.evaluate is not None
        self.observer.evaluation(self.done, self.program.evaluate(self.state))
        self._pause()

    def _pause(self) -> None:
        """Begins to measure time anew, after something that is no training."""
        self.observer.pause()
        self._settled = None
