"""Live load balancing of experts: when the placement changes, and to what."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from typing import Any

import jax
import numpy as np

from eplb_jax import (
    Decision,
    MovingAverage,
    Placement,
    PlanAhead,
    Planned,
    Prices,
    RebalanceConfig,
    decide,
    initial_placement,
)
from eplb_jax.moe.fetch import fetches_needed
from jaxpipe.deepseek import DeepSeekModel, ModelConfig

REMEMBERED = 20
"""Steps whose median time is what a step takes."""


class Rebalancer:
    """Watches the loads of a model's experts and moves their copies between devices.

    It runs on the host, plans in a thread beside the steps, and waits for no device: a plan for the loads up to a step
    is used ``lag`` steps later. Only arrays of the training state change, never their shapes, so that nothing is
    compiled again. Each process of a run makes the same decisions, because all see the same loads.

    Args:
      model: with redundant slots, ``config.redundant > 0``.
      devices: that the experts are sharded over, the size of the mesh's axis.
      interval: steps between decisions.
      decay: share of the average that a step's counts leave; see `eplb_jax.MovingAverage`.
      nodes: that the devices are on.
      ranks: of the pipeline, which run their layers at once: what a plan saves and costs in a step is the mean of them.
      lag: steps from a plan's loads to its use, see `eplb_jax.PlanAhead`; None: 2, and where fake devices take the
        threads that plans need, half the interval.
      min_gain, must_pay: see `eplb_jax.RebalanceConfig`; ``must_pay`` makes placements depend on measured times.
      token_share: of a step's time, what one choice of a token takes on its device; with ``bytes_per_second`` plans say
        what they save and cost.
      bytes_per_second: that reach a device.

    Raises:
      ValueError: a model without redundant slots; slots that do not divide over the devices; ``must_pay`` without what
        it depends on.
    """

    def __init__(
        self,
        model: DeepSeekModel,
        devices: int,
        *,
        interval: int = 10,
        decay: float = 0.8,
        nodes: int = 1,
        ranks: int = 1,
        lag: int | None = None,
        min_gain: float = RebalanceConfig.min_gain,
        must_pay: bool = False,
        token_share: float | None = None,
        bytes_per_second: float | None = None,
    ):
        config = model.config
        slots = config.experts + config.redundant
        if not config.redundant or slots % devices:
            raise ValueError(
                f"{config.experts} experts and redundant={config.redundant} slots on {devices} devices: take a "
                "positive number of redundant slots, with which the sum divides over the devices"
            )
        self.model = model
        if must_pay and (token_share is None or bytes_per_second is None):
            raise ValueError("must_pay=True: give token_share and bytes_per_second, or what pays is not known")
        self.config = rebalance_config(
            config, devices, nodes=nodes, interval=interval, min_gain=min_gain, must_pay=must_pay
        )
        self._ranks, self._token_share, self._bytes_per_second = ranks, token_share, bytes_per_second
        self._seconds: collections.deque[float] = collections.deque(maxlen=REMEMBERED)
        self._prices: Prices | None = None
        self.average = MovingAverage.create(decay, config.routed_layers, config.experts, on_host=True)
        self.last: Planned | None = None
        if lag is None:
            lag = max(2, interval // 2) if jax.default_backend() == "cpu" else 2
        self._ahead = PlanAhead(self._decide, lag)
        self._spent = self._ahead.spent
        self._due: collections.deque[tuple[int, np.ndarray]] = collections.deque()
        self._free = 0  # the first step whose loads are planned for, once the plan before them is used
        self.placement: Placement | None = None
        # What planning compiles is compiled while the first step is.
        self._ahead.warm(initial_placement(config.routed_layers, config.experts, self.config), interval)

    def observe(self, loads: Any, step: int, seconds: float | None = None) -> None:
        """Remembers a step's tokens of each expert, ``int[layers with experts, experts]``, and its time."""
        if seconds is not None:
            self._seconds.append(seconds)
        self.average = self.average.update(np.asarray(loads))
        # By steps alone, whenever their loads are seen: so a run does the same however often it is saved.
        if step % self.config.interval == 0 and step >= self._free:
            self._plan_for(step, np.asarray(self.average.loads()))

    def maybe_rebalance(self, state: Any, step: int) -> Any:
        """The state for the next step, when ``step`` steps have begun; the same one where nothing is to change.

        ``last`` then holds the plan that was used, or None.
        """
        self.last = None
        if self.placement is None:
            before = self.model.placements(state.params)  # waits for the step, once
            assert before is not None
            self.placement = Placement(*(_local(array) for array in before))
        state = self._use_plan(state, step)
        while self._due:
            self._prices = self._known_prices()
            self._ahead.begin(*self._due.popleft(), self.placement)
            state = self._use_plan(state, step)  # one that is due already
        return state

    def _plan_for(self, step: int, loads: np.ndarray) -> None:
        self._due.append((step, loads))
        self._free = step + self._ahead.lag

    def _use_plan(self, state: Any, step: int) -> Any:
        if (planned := self._ahead.take(step)) is None:
            return state
        self.last = planned
        if not planned.decision.changed:
            return state
        self.placement = planned.decision.placement
        return state._replace(params=self.model.with_placements(state.params, self.placement))

    def metrics(self) -> dict[str, float]:
        """What `maybe_rebalance` has just used: of which step's loads, how long that took, and what moved.

        Bytes are those of working copies that a device has and had not before.
        """
        if self.last is None:
            return {}
        step, decision, seconds, waited = self.last
        found: dict[str, float] = {
            "plan_of_step": step,
            "plan_seconds": seconds,
            "plan_waited_seconds": waited,
            "layers_moved": decision.changed,
            "replicas_moved": decision.moved,
            "moved_bytes": decision.moved * self.expert_bytes,
            "gathered_layers": self.gathered_layers(),
        }
        if (told := self._seconds_of(decision)) is not None:
            found |= {"saved_seconds": told[0], "move_seconds": told[1], "layers_left": decision.left}
        return found

    def planning(self) -> dict[str, float]:
        """Metrics of plans since the last call: how long one ran, and what those that ended took of the processor.

        Empty where none ran.
        """
        before, self._spent = self._spent, self._ahead.spent
        seconds, cpu_seconds = (now - then for now, then in zip(self._spent, before, strict=True))
        return {"planning_seconds": seconds, "planning_cpu_seconds": cpu_seconds} if seconds else {}

    def described(self) -> str | None:
        """The same in words; None where nothing has moved."""
        if self.last is None or not self.last.decision.changed:
            return None
        step, decision, seconds, _ = self.last
        text = (
            f"{decision.moved} copies of experts moved in {decision.changed} layers for the loads up to step {step}, "
            f"balance {decision.before:.2f} -> {decision.after:.2f}; planned in {1e3 * seconds:.0f} ms"
        )
        if (told := self._seconds_of(decision)) is not None:
            saved, cost = (f"{1e3 * seconds:,.4g} ms" for seconds in told)
            text += f"; should save {saved} in {self.config.interval} steps, for {cost} of moving"
        if gathered := self.gathered_layers():
            text += (
                f"; {gathered} layers need more than fetched={self.model.config.moe.fetched} experts, and gather all"
            )
        return text

    def _seconds_of(self, decision: Decision) -> tuple[float, float] | None:
        """What a decision saves until the next one and costs, of a run's time; None where that is not known."""
        if decision.saved is None or decision.cost is None:
            return None
        return decision.saved / self._ranks, decision.cost / self._ranks

    def gathered_layers(self) -> int:
        """Layers whose placement needs more experts of a device than ``MoEConfig.fetched``: all are gathered there."""
        moe = self.model.config.moe
        if moe.fetched is None or self.placement is None:
            return 0
        masters = moe.masters or self.model.config.experts
        needed = fetches_needed(self.placement.phy2log, masters, self.config.num_gpus)
        return int((needed > moe.fetched).sum())

    @property
    def expert_bytes(self) -> int:
        """Of a working copy of an expert, in the dtype that is computed with."""
        moe = self.model.config.moe
        return 3 * moe.width * moe.hidden * jax.numpy.dtype(self.model.dtype).itemsize

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps; placements are among the parameters."""
        found = {"average": np.asarray(self.average.average), "steps": np.asarray(self.average.steps)}
        if (pending := self._due[0] if self._due else self._ahead.pending) is not None:
            found |= {"planned_step": np.asarray(pending[0], np.int32), "planned_loads": np.asarray(pending[1])}
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`.

        Raises:
          ValueError: loads of another number of layers or experts.
        """
        average = np.asarray(state["average"], np.float32)
        if average.shape != self.average.average.shape:
            raise ValueError(
                f"loads of [layers, experts] = {average.shape} do not fit a model of {self.average.average.shape}"
            )
        self.average = MovingAverage(average, np.asarray(state["steps"], np.int32), self.average.decay)
        if "planned_step" in state:  # begun before the checkpoint, and not yet used
            self._plan_for(int(state["planned_step"]), np.asarray(state["planned_loads"], np.float32))

    def _decide(self, step: int, loads: Any, placement: Placement) -> Decision | None:
        config = self.config
        if self._prices is None:  # before a step was timed
            config = dataclasses.replace(config, must_pay=False)
        return decide(step, loads, placement, config, self._prices)

    def _known_prices(self) -> Prices | None:
        if not self._seconds or self._token_share is None or self._bytes_per_second is None:
            return None
        return Prices(self._token_share * statistics.median(self._seconds), self.expert_bytes, self._bytes_per_second)


def rebalance_config(config: ModelConfig, devices: int, *, nodes: int = 1, **options: Any) -> RebalanceConfig:
    """The sizes of a model's placements, with options of `eplb_jax.RebalanceConfig`."""
    groups = config.moe.router.num_groups
    return RebalanceConfig(config.experts + config.redundant, groups, nodes, devices, **options)


def _local(array: Any) -> np.ndarray:
    """The array on this process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        # Each process needs all layers, and has those of its own pipeline ranks.
        from jax.experimental import multihost_utils  # noqa: PLC0415

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
