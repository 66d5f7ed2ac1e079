"""Placements that are planned beside the running steps, in a thread, and used a fixed number of steps later."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num

from eplb_jax.plan.arguments import in_callers_width
from eplb_jax.plan.live import Decision
from eplb_jax.plan.placement import Array, Placement

Decide = Callable[[int, Any, Placement], Decision | None]
"""Step, loads and the placement in use -> a decision, or None where none is due: `eplb_jax.decide`, say."""


class Planned(NamedTuple):
    """What `PlanAhead.take` hands over.

    Attributes:
      step: whose loads, and those before, were planned for.
      decision: what was decided.
      seconds: that planning took, beside the steps.
      waited: seconds of them that the caller had to wait for.
    """

    step: int
    decision: Decision
    seconds: float
    waited: float


class PlanningTime(NamedTuple):
    """What planning has taken so far, beside the steps.

    Attributes:
      seconds: of plans, up to now where one runs.
      cpu_seconds: of the processor, in the thread of plans that have ended.
    """

    seconds: float
    cpu_seconds: float


class PlanAhead:
    """Plans in a thread of its own while steps run; one plan at a time.

    A plan for the loads up to some step is used ``lag`` steps later, never sooner and never later: so runs that are
    repeated, resumed, or of several processes place experts alike. Where a plan takes longer than that, `take` waits.

    Args:
      lag: steps between the last one whose loads are planned for and the first after which the plan may be used.

    Raises:
      ValueError: a negative lag.

    >>> from eplb_jax import RebalanceConfig, decide, initial_placement
    >>> config = RebalanceConfig(6, 1, 1, 2, interval=10)
    >>> ahead = PlanAhead(lambda *given: decide(*given, config), lag=2)
    >>> ahead.begin(10, np.array([[1, 90, 1, 1]]), initial_placement(1, 4, config))
    True
    >>> ahead.take(11), ahead.take(12).decision.changed, ahead.take(13)
    (None, 1, None)
    """

    def __init__(self, plan: Decide, lag: int = 2):
        if lag < 0:
            raise ValueError(f"lag={lag}: a plan is used at least 0 steps after the loads that it is for")
        self.lag = lag
        self._decide = plan
        self._threads = ThreadPoolExecutor(1, "placement")  # begun with the first plan, and ended with the last
        self._warming: Future[Any] | None = None
        self._begun: tuple[int, Num[Array, "layers experts"], Future[Any]] | None = None
        # Time of the plans that ended, and when the one began that runs.
        self._spent: tuple[PlanningTime, float | None] = PlanningTime(0.0, 0.0), None

    @property
    def spent(self) -> PlanningTime:
        """Time of all plans that were begun, but not of `warm`; the difference of two is what lies between them."""
        ended, begun = self._spent
        return ended if begun is None else ended._replace(seconds=ended.seconds + time.perf_counter() - begun)

    @property
    def pending(self) -> tuple[int, Num[Array, "layers experts"]] | None:
        """(step, loads) of the plan that is begun and not yet used, as `begin` got them; a checkpoint keeps them."""
        return None if self._begun is None else self._begun[:2]

    def warm(self, placement: Placement, interval: int) -> None:
        """Has the thread plan once for nothing, before there is anything to plan for: what it compiles is kept.

        The first call of `take` waits for it, whatever the step: so the first plan is as quick as all others.

        Args:
          placement: of the sizes of those to come.
          interval: a step after which a decision is due.
        """
        loads = np.random.default_rng(0).lognormal(size=(placement.num_layers, placement.num_experts))

        def rehearse() -> None:
            with contextlib.suppress(ImportError):  # some plans need SciPy, and say so
                importlib.import_module("scipy.optimize")
            self._decide(interval, loads, placement)

        self._warming = self._threads.submit(in_callers_width(rehearse))

    def begin(self, step: int, loads: Any, placement: Placement) -> bool:
        """Begins a plan, unless one is begun that was not yet used; returns whether it did.

        Args:
          step: steps whose loads were seen.
          loads: ``[layers, experts]``; those of a device are waited for in the thread.
          placement: the one in use until then, on the host.
        """
        if self._begun is not None:
            return False
        self._begun = step, loads, self._threads.submit(in_callers_width(self._timed), step, loads, placement)
        return True

    def take(self, step: int) -> Planned | None:
        """The plan to use after ``step`` steps; None where none is due.

        Raises:
          ValueError: as what plans does, of loads that cannot be planned for.
        """
        if self._warming is not None:
            warming, self._warming = self._warming, None
            warming.result()
        if self._begun is None or step < self._begun[0] + self.lag:
            return None
        (planned_for, _, future), self._begun = self._begun, None
        begun = time.perf_counter()
        decision, seconds = future.result()
        waited = time.perf_counter() - begun
        return None if decision is None else Planned(planned_for, decision, seconds, waited)

    def _timed(self, step: int, loads: Any, placement: Placement) -> tuple[Decision | None, float]:
        loads = np.asarray(loads)  # waits for a device
        before, begun, cpu = self._spent[0], time.perf_counter(), time.thread_time()
        self._spent = before, begun
        try:
            decision = self._decide(step, loads, placement)
        finally:
            seconds = time.perf_counter() - begun
            self._spent = PlanningTime(before.seconds + seconds, before.cpu_seconds + time.thread_time() - cpu), None
        return decision, seconds
