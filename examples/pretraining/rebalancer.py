"""Live load balancing of experts: when the placement changes, and to what."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from eplb_jax import MovingAverage, Placement, PlanAhead, Planned, RebalanceConfig, decide, initial_placement
from jaxpipe.deepseek import DeepSeekModel


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
      lag: steps from a plan's loads to its use, see `eplb_jax.PlanAhead`; None: 2, and where fake devices take the
        threads that plans need, half the interval.
      min_gain: see `eplb_jax.RebalanceConfig`.

    Raises:
      ValueError: a model without redundant slots; slots that do not divide over the devices.
    """

    def __init__(
        self,
        model: DeepSeekModel,
        devices: int,
        *,
        interval: int = 10,
        decay: float = 0.8,
        nodes: int = 1,
        lag: int | None = None,
        min_gain: float = RebalanceConfig.min_gain,
    ):
        config = model.config
        slots = config.experts + config.redundant
        if not config.redundant or slots % devices:
            raise ValueError(
                f"{config.experts} experts and redundant={config.redundant} slots on {devices} devices: take a "
                "positive number of redundant slots, with which the sum divides over the devices"
            )
        self.model = model
        groups = config.moe.router.num_groups
        self.config = RebalanceConfig(slots, groups, nodes, devices, interval=interval, min_gain=min_gain)
        self.average = MovingAverage.create(decay, config.routed_layers, config.experts, on_host=True)
        self.last: Planned | None = None
        if lag is None:
            lag = max(2, interval // 2) if jax.default_backend() == "cpu" else 2
        self._ahead = PlanAhead(lambda step, loads, placement: decide(step, loads, placement, self.config), lag)
        self._due: tuple[int, np.ndarray] | None = None
        self.placement: Placement | None = None
        # What planning compiles is compiled while the first step is.
        self._ahead.warm(initial_placement(config.routed_layers, config.experts, self.config), interval)

    def observe(self, loads: Any, step: int) -> None:
        """Remembers the ``step``-th step's tokens of each expert, ``int[layers with experts, experts]``."""
        self.average = self.average.update(np.asarray(loads))
        if step % self.config.interval == 0:
            self._due = step, np.asarray(self.average.loads())

    def maybe_rebalance(self, state: Any, step: int) -> Any:
        """The state for the next step, when ``step`` steps have begun; the same one where nothing is to change.

        ``last`` then holds the plan that was used, or None.
        """
        self.last = None
        if self.placement is None:
            before = self.model.placements(state.params)  # waits for the step, once
            assert before is not None
            self.placement = Placement(*(_local(array) for array in before))
        if self._due is not None:
            self._ahead.begin(*self._due, self.placement)
            self._due = None
        self.last = self._ahead.take(step)
        if self.last is None or not self.last.decision.changed:
            return state
        self.placement = self.last.decision.placement
        return state._replace(params=self.model.with_placements(state.params, self.placement))

    def metrics(self) -> dict[str, float]:
        """What `maybe_rebalance` has just used: of which step's loads, how long that took, and what moved.

        Bytes are those of working copies that a device has and had not before.
        """
        if self.last is None:
            return {}
        step, decision, seconds, waited = self.last
        return {
            "plan_of_step": step,
            "plan_seconds": seconds,
            "plan_waited_seconds": waited,
            "layers_moved": decision.changed,
            "replicas_moved": decision.moved,
            "moved_bytes": decision.moved * self.expert_bytes,
        }

    def described(self) -> str | None:
        """The same in words; None where nothing has moved."""
        if self.last is None or not self.last.decision.changed:
            return None
        step, decision, seconds, _ = self.last
        return (
            f"{decision.moved} copies of experts moved in {decision.changed} layers for the loads up to step {step}, "
            f"balance {decision.before:.2f} -> {decision.after:.2f}; planned in {1e3 * seconds:.0f} ms"
        )

    @property
    def expert_bytes(self) -> int:
        """Of a working copy of an expert, in the dtype that is computed with."""
        moe = self.model.config.moe
        return 3 * moe.width * moe.hidden * jax.numpy.dtype(self.model.dtype).itemsize

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps; placements are among the parameters."""
        found = {"average": np.asarray(self.average.average), "steps": np.asarray(self.average.steps)}
        if (pending := self._due or self._ahead.pending) is not None:
            found |= {"planned_step": np.asarray(pending[0], np.int32), "planned_loads": pending[1]}
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
            self._due = int(state["planned_step"]), np.asarray(state["planned_loads"], np.float32)


def _local(array: Any) -> np.ndarray:
    """The array on this process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        # Each process needs all layers, and has those of its own pipeline ranks.
        from jax.experimental import multihost_utils  # noqa: PLC0415

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
