"""Live load balancing of experts: when the placement changes, and to what."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from eplb_jax import Decision, MovingAverage, RebalanceConfig, decide
from jaxpipe.deepseek import DeepSeekModel


class Rebalancer:
    """Watches the loads of a model's experts and moves their copies between devices; runs on the host.

    Only arrays of the training state change, never their shapes, so that nothing is compiled again. Each process of a
    run makes the same decisions, because all see the same loads.

    Args:
      model: with redundant slots, ``config.redundant > 0``.
      devices: that the experts are sharded over, the size of the mesh's axis.
      interval: steps between decisions.
      decay: share of the average load that a step's counts leave; see `MovingAverage`.
      nodes: that the devices are on.

    Raises:
      ValueError: a model without redundant slots; slots that do not divide over the devices.
    """

    def __init__(self, model: DeepSeekModel, devices: int, *, interval: int = 10, decay: float = 0.8, nodes: int = 1):
        config = model.config
        slots = config.experts + config.redundant
        if not config.redundant or slots % devices:
            raise ValueError(
                f"{config.experts} experts and redundant={config.redundant} slots on {devices} devices: take a "
                "positive number of redundant slots, with which the sum divides over the devices"
            )
        self.model = model
        self.config = RebalanceConfig(slots, config.moe.router.num_groups, nodes, devices, interval=interval)
        self.average = MovingAverage.create(decay, config.routed_layers, config.experts)
        self.last: Decision | None = None

    def observe(self, loads: Any) -> None:
        """Remembers a step's tokens of each expert, ``int[layers with experts, experts]``."""
        self.average = self.average.update(jax.numpy.asarray(np.asarray(loads), jax.numpy.int32))

    def maybe_rebalance(self, state: Any, step: int) -> Any:
        """The state for the next step, after ``step`` steps; the same one where nothing is to change.

        ``last`` then holds the decision, or None between decisions.
        """
        self.last = None
        if step < 1 or step % self.config.interval:
            return state
        before = self.model.placements(state.params)
        assert before is not None
        host = type(before)(*(_local(array) for array in before))
        self.last = decide(step, np.asarray(self.average.loads()), host, self.config)
        if not self.last or not self.last.changed:
            return state
        return state._replace(params=self.model.with_placements(state.params, self.last.placement))

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps; placements are among the parameters."""
        return {"average": np.asarray(self.average.average), "steps": np.asarray(self.average.steps)}

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
        steps = jax.numpy.asarray(np.asarray(state["steps"]), jax.numpy.int32)
        self.average = MovingAverage(jax.numpy.asarray(average), steps, self.average.decay)


def _local(array: Any) -> np.ndarray:
    """The array on this process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        # Each process needs all layers, and has those of its own pipeline ranks.
        from jax.experimental import multihost_utils  # noqa: PLC0415

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
