"""When to change the placement while a model trains."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Num

from eplb_jax.plan.cluster import make_cluster
from eplb_jax.plan.metrics import balancedness, moved
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.policies.balanced import balanced
from eplb_jax.plan.policies.sticky import sticky
from eplb_jax.plan.worth import worth_moving


@dataclasses.dataclass(frozen=True)
class RebalanceConfig:
    """When placements change, and within what sizes; static.

    Attributes:
      num_replicas, num_groups, num_nodes, num_gpus: as in `eplb_jax.rebalance_experts`.
      interval: steps between decisions.
      min_gain: how much lighter the heaviest GPU must get, as a share of its load, or a layer stays as it is.
      tolerance: how much heavier than with a fresh plan the heaviest GPU may be, to move less; as in `sticky`.
      must_pay: whether a layer changes only where `worth_moving` predicts that it pays until the next decision.

    Raises:
      ValueError: an interval below 1, negative shares.
    """

    num_replicas: int
    num_groups: int
    num_nodes: int
    num_gpus: int
    interval: int = 100
    min_gain: float = 0.05
    tolerance: float = 0.01
    must_pay: bool = False

    def __post_init__(self) -> None:
        """Checks interval and shares."""
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: it must be at least 1 step")
        if not (self.min_gain >= 0 and self.tolerance >= 0):
            raise ValueError(f"min_gain={self.min_gain}, tolerance={self.tolerance}: both are shares of at least 0")


class Prices(NamedTuple):
    """What tokens and moves cost, as measured; see `eplb_jax.worth_moving`.

    Attributes:
      seconds_per_token: of a layer, forward and backward, for one choice of a token.
      expert_bytes: of a working copy of an expert.
      bytes_per_second: that reach a GPU.
    """

    seconds_per_token: float
    expert_bytes: int
    bytes_per_second: float


class Decision(NamedTuple):
    """What `decide` found.

    Attributes:
      placement: for the next step, `Placement.padded`, so of the same shapes at every step; if nothing changes, the one
        that was given, padded if it was not.
      changed: layers whose placement changed.
      moved: replicas that travel, all layers together.
      before: mean over maximal load of the GPUs, mean of layers, as it was.
      after: as it will be for the same loads.
      saved: seconds that the steps until the next decision are predicted to save; None where no prices were given.
      cost: seconds that the replicas are predicted to travel.
      left: layers whose change was left out because it would not pay.
    """

    placement: Placement
    changed: int
    moved: int
    before: float
    after: float
    saved: float | None = None
    cost: float | None = None
    left: int = 0


def initial_placement(num_layers: int, num_experts: int, config: RebalanceConfig) -> Placement:
    """A placement for the start of training, when all experts are expected to have the same load.

    Where the experts divide over the GPUs each GPU holds its own, those whose masters it has, and as spares the first
    experts of the GPUs that follow it on its node: as even as can be, and few experts are fetched from others
    (`eplb_jax.most_fetched`). Elsewhere it is `balanced`'s plan.

    Raises:
      ValueError: as `eplb_jax.rebalance_experts`.

    >>> initial_placement(1, 4, RebalanceConfig(6, 1, 1, 2)).phy2log
    array([[0, 1, 2, 2, 3, 0]], dtype=int32)
    """
    cluster = make_cluster(num_experts, *_sizes(config))
    own, off = divmod(num_experts, cluster.num_gpus)
    if off:
        return balanced(np.ones((num_layers, num_experts)), *_sizes(config)).padded()
    gpu, spare = np.arange(cluster.num_gpus)[:, None], np.arange(cluster.replicas_per_gpu - own)
    first, place = gpu - gpu % cluster.gpus_per_node, gpu % cluster.gpus_per_node
    others = max(cluster.gpus_per_node - 1, 1)
    other = first + (place + 1 + spare % others) % cluster.gpus_per_node
    which = (spare + spare // math.lcm(own, others)) % own  # each expert of each GPU once, before any comes again
    slots = np.concatenate([gpu * own + np.arange(own), other * own + which], axis=1).reshape(1, -1)
    return Placement.from_phy2log(np.repeat(slots, num_layers, axis=0), num_experts).padded()


def decide(
    step: int,
    loads: Num[Array, "layers experts"],
    placement: Placement,
    config: RebalanceConfig,
    prices: Prices | None = None,
) -> Decision | None:
    """Whether to change the placement after a step, and to what; runs on the host.

    Args:
      step: steps done so far.
      loads: recent load of each expert, of all devices: `eplb_jax.plan.load.SlidingWindow.loads`, say.
      placement: the one in use, from `initial_placement`, any policy, or a file. A step compiled for `Placement.padded`
        takes all that follow; one compiled for a placement that is not padded is compiled once more.
      config: when and within what sizes.
      prices: of tokens and moves, measured; with them the decision says what it is predicted to save and to cost. Then
        loads are those of one step.

    Returns:
      None between decisions, after every ``interval`` steps a decision.

    Raises:
      ValueError: as `eplb_jax.sticky`; a placement of another number of replicas than the configuration's;
        ``must_pay`` without prices.

    >>> config = RebalanceConfig(6, 1, 1, 2, interval=10)
    >>> start = initial_placement(1, 4, config)
    >>> decide(9, np.array([[9, 1, 1, 1]]), start, config) is None
    True
    >>> loads = np.array([[1, 90, 1, 1]])
    >>> decide(10, loads, start, config).changed
    1
    >>> prices = Prices(seconds_per_token=1e-6, expert_bytes=10**6, bytes_per_second=1e10)
    >>> found = decide(10, loads, start, config, prices)
    >>> f"saves {1e3 * found.saved:.2f} ms in 10 steps, and moving takes {1e3 * found.cost:.2f}"
    'saves 0.44 ms in 10 steps, and moving takes 0.10'
    """
    if config.must_pay and prices is None:
        raise ValueError("must_pay=True without prices: give Prices, or let every better placement be taken")
    if step < 1 or step % config.interval:
        return None
    if placement.num_replicas != config.num_replicas:
        raise ValueError(
            f"the placement has {placement.num_replicas} replicas, the configuration {config.num_replicas}: plan for "
            "as many, or change num_replicas"
        )
    placement = _as_wide_as_any(placement, config)
    host = Placement(*(np.asarray(array) for array in placement))
    found = sticky(loads, host, *_sizes(config)[1:], tolerance=config.tolerance, min_gain=config.min_gain)
    changed, left = (found.phy2log != host.phy2log).any(1), 0
    saved = cost = None if prices is None else 0.0
    if prices is not None and changed.any():
        worth = worth_moving(loads, host, found, config.num_gpus, steps=config.interval, **prices._asdict())
        if config.must_pay:
            left, changed, found = int((changed & ~worth.pays).sum()), changed & worth.pays, worth.placement
        saved, cost = (float(seconds[changed].sum()) for seconds in (worth.saved, worth.cost))
    before, after = (float(balancedness(plan, loads, config.num_gpus).mean()) for plan in (host, found))
    if not changed.any():
        return Decision(placement, 0, 0, before, before, saved, cost, left)
    moves = int(moved(host, found, config.num_gpus).sum())
    found = found.padded(host.log2phy.shape[-1])
    return Decision(found, int(changed.sum()), moves, before, after, saved, cost, left)


def _as_wide_as_any(placement: Placement, config: RebalanceConfig) -> Placement:
    """Padded, unless log2phy has a column for each replica that an expert could get on its node."""
    nodes = 1 if config.num_groups % config.num_nodes else config.num_nodes
    most = (placement.num_replicas - placement.num_experts) // nodes + 1
    return placement if placement.log2phy.shape[-1] >= most else placement.padded()


def _sizes(config: RebalanceConfig) -> tuple[int, int, int, int]:
    return config.num_replicas, config.num_groups, config.num_nodes, config.num_gpus
