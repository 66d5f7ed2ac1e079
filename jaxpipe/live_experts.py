"""Experts of a pipelined model that are balanced while it trains: placements and router biases of all its blocks.

What `__all__` names is public; all else here is internal and may change without notice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from eplb_jax.moe.router import update_bias
from eplb_jax.plan.ahead import PlanAhead
from eplb_jax.plan.live import Decision, RebalanceConfig, decide, initial_placement
from eplb_jax.plan.load import MovingAverage
from eplb_jax.plan.placement import Placement
from jaxpipe.params import Params
from jaxpipe.whole import PipelinedModel

__all__ = ["LiveExperts"]

PLACEMENT = ("phy2log", "log2phy", "logcnt")
"""What `eplb_jax.MoE` calls the arrays of its placement."""


class LiveExperts:
    """Balances the experts of a pipelined NNX model whose blocks have an `eplb_jax.MoE`; one call a step.

    Each call moves the routers' biases towards equal loads, on the devices, and remembers the loads. After every
    ``config.interval`` calls the host plans where copies of busy experts go, in a thread beside the steps that follow;
    ``lag`` calls later the plan is used. Only values of arrays change, never their shapes or shardings: nothing is
    compiled again, and masters, gradients and the optimizer's state do not move.

    Placements and biases are among the parameters, so that a checkpoint has them; the optimizer must not change them:
    wrap it in `jaxpipe.floating_only`, and let biases not decay (``mask=pipe.stacking.weight_decay_mask``).

    A run that goes on does as one without a pause, if `state_dict` is saved beside the parameters.

    Attributes:
      average: recent loads, of all steps with decreasing weight; a pytree.
      steps: calls so far.
      last: what was decided of the plan that the last call used; None where it used none.

    Args:
      pipe: made by `jaxpipe.flax.from_nnx`, its layers with a placement, `eplb_jax.initial_placement` say.
      config: when and within what sizes; ``num_gpus`` is the size of the experts' axis.
      bias_rate: what a router's bias changes by in a step; 0: never.
      decay: share of the average that a step's loads leave; see `eplb_jax.MovingAverage`.
      lag: see `eplb_jax.PlanAhead`; 0: each plan is waited for, and used at once.

    Raises:
      ValueError: a negative lag; blocks without such a layer or with several, layers without a placement, or one of
        another size.

    Blocks return ``stats.loads`` of their layer, and the loss ``{"loads": jnp.stack(...)}`` of them. Then::

        (loss, aux), grads = step(params, batch)
        ...
        params = live(params, aux["loads"])
    """

    def __init__(
        self,
        pipe: PipelinedModel,
        config: RebalanceConfig,
        *,
        bias_rate: float = 1e-3,
        decay: float = 0.8,
        lag: int = 2,
    ):
        self.config, self.steps = config, 0
        self.last: Decision | None = None
        self._bias_rate = bias_rate
        self._ahead = PlanAhead(lambda step, loads, placement: decide(step, loads, placement, self.config), lag)
        self._restored: tuple[int, np.ndarray] | None = None
        self._placement: Placement | None = None
        self._path = _find_layer(pipe.params.stages)
        leaves = _at(pipe.params.stages, self._path)
        experts = leaves["logcnt"].shape[-1]
        if leaves["phy2log"].shape[-1] != config.num_replicas:
            raise ValueError(
                f"the blocks' placements have {leaves['phy2log'].shape[-1]} slots, and num_replicas is "
                f"{config.num_replicas}: make both of one RebalanceConfig, with eplb_jax.initial_placement"
            )
        number = [leaf is leaves["bias"] for leaf in jax.tree.leaves(pipe.params.stages)].index(True)
        table = pipe.stacking.leaf_tables(pipe.params.stages)[number]
        layers = sorted({*table.flat} - {-1})  # those blocks that have experts
        self._slots = np.searchsorted(layers, np.maximum(table, layers[0]))
        first = [int(np.flatnonzero(table == layer)[0]) for layer in layers]
        self._places = np.divmod(first, table.shape[1])
        self.average = MovingAverage.create(decay, len(layers), experts)
        self._ahead.warm(initial_placement(len(layers), experts, config), config.interval)
        self._observe = jax.jit(self._observed, out_shardings=(None, leaves["bias"].sharding))

    def __call__(self, params: Params, loads: jax.Array) -> Params:
        """The parameters for the next step.

        Args:
          params: after the optimizer's update.
          loads: ``[blocks, experts]`` of the step, of those blocks that have experts; summed over microbatches and
            devices, as the pipeline's metrics are.

        Raises:
          ValueError: loads of another shape.
        """
        wanted = self.average.average.shape
        if loads.shape != wanted:
            raise ValueError(
                f"loads have shape {loads.shape}: they must be [blocks, experts] = {wanted}, jnp.stack of what each "
                "block's layer counted, in order"
            )
        leaves = dict(_at(params.stages, self._path))
        self.average, leaves["bias"] = self._observe(self.average, leaves["bias"], loads)
        self.steps += 1
        self._rebalance(leaves)
        return params._replace(stages=_put(params.stages, self._path, leaves))

    def placement(self, params: Params) -> Placement:
        """The placement of all blocks, on the host."""
        leaves = _at(params.stages, self._path)
        return Placement(*(_on_host(leaves[name])[self._places] for name in PLACEMENT))

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps beside the parameters, on the host: loads, calls, and a plan that is not yet used."""
        found = {"average": self.average.average, "updates": self.average.steps, "steps": np.asarray(self.steps)}
        if (pending := self._restored or self._ahead.pending) is not None:
            found |= {"planned_step": np.asarray(pending[0]), "planned_loads": pending[1]}
        return {name: _on_host(array) for name, array in found.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on after `state_dict`, before the first call.

        Raises:
          ValueError: loads of other blocks or experts.
        """
        wanted = self.average.average.shape
        for name in {"average", "planned_loads"} & set(state):
            if state[name].shape != wanted:
                raise ValueError(f"{name} has shape {state[name].shape}: this model's is [blocks, experts] = {wanted}")
        average, updates = jnp.asarray(state["average"], jnp.float32), jnp.asarray(state["updates"], jnp.int32)
        self.average, self.steps = MovingAverage(average, updates, self.average.decay), int(state["steps"])
        if "planned_step" in state:
            self._restored = int(state["planned_step"]), state["planned_loads"]

    def _observed(self, average: MovingAverage, bias: jax.Array, loads: jax.Array) -> tuple[MovingAverage, jax.Array]:
        """(the average with a step's loads, the biases after it)."""
        rows = loads[self._slots].reshape(bias.shape)
        return average.update(loads), update_bias(bias, rows, self._bias_rate) if self._bias_rate else bias

    def _rebalance(self, leaves: dict[str, Any]) -> None:
        """Begins a plan where one is due, and puts the placement of one that is to be used into the leaves."""
        if self._placement is None:  # from then on the host knows it, and no step is waited for
            self._placement = Placement(*(_on_host(leaves[name])[self._places] for name in PLACEMENT))
        self.last = None
        if self._restored is not None:  # begun before the checkpoint, and not yet used
            (step, loads), self._restored = self._restored, None
            self._ahead.begin(step, loads, self._placement)
        self._use_plan(leaves)
        if self.steps % self.config.interval == 0:
            loads: Any = self.average.loads()
            # What this process has the thread waits for; what others have is fetched by all in the same order.
            here = loads.is_fully_addressable or loads.is_fully_replicated
            self._ahead.begin(self.steps, loads if here else _on_host(loads), self._placement)
            self._use_plan(leaves)  # without a lag

    def _use_plan(self, leaves: dict[str, Any]) -> None:
        if (planned := self._ahead.take(self.steps)) is None:
            return
        self.last = planned.decision
        if not self.last.changed:
            return
        self._placement = self.last.placement
        for name, array in zip(PLACEMENT, self._placement, strict=True):
            old = leaves[name]
            rows = np.asarray(array, old.dtype)[self._slots]
            if rows.shape != old.shape:
                raise ValueError(
                    f"{name} has shape {old.shape} and would get {rows.shape}: start with a placement that is padded, "
                    "as eplb_jax.initial_placement makes it, so that its shape never changes"
                )
            leaves[name] = jax.device_put(rows, old.sharding)


def _find_layer(stages: Any) -> tuple[str, ...]:
    """The path of the one layer in a block that has a router's bias and a placement."""

    def walk(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
        if isinstance(tree, Mapping):
            if {"router", "bias", "w_in", "w_out"} <= set(tree):
                yield path, tree
            for name, value in tree.items():
                yield from walk(value, (*path, name))

    found = list(walk(stages, ()))
    if len(found) != 1:
        raise ValueError(
            f"the pipeline's blocks have {len(found)} eplb_jax.MoE layers each, at {[path for path, _ in found]}: "
            "live balancing is for one in each block"
        )
    (path, layer), *_ = found
    if not set(PLACEMENT) <= set(layer):
        raise ValueError(
            "the blocks' layers have no placement to change: make them as MoE(config, rngs, axis='ep', "
            "placement=eplb_jax.initial_placement(1, experts, rebalance_config).of_layer(0))"
        )
    return path


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, name: node[name], path, tree)


def _put(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    return {**tree, path[0]: _put(tree[path[0]], path[1:], value)} if path else value


def _on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on this process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        array = multihost_utils.process_allgather(array, tiled=True)  # others have other ranks' blocks
    return np.asarray(array)
