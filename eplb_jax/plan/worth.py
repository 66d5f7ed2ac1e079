"""Whether another placement pays: seconds that it saves against seconds that its replicas need to travel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num

from eplb_jax.plan.metrics import arriving, gpu_loads
from eplb_jax.plan.placement import Array, Placement


class Worth(NamedTuple):
    """What `worth_moving` predicts.

    Attributes:
      placement: the new one in layers where it pays, the old one elsewhere; NumPy.
      pays: in which layers the new placement saves more than it costs.
      saved: seconds that the layer's heaviest GPU is quicker, in all steps together; negative where it is slower.
      cost: seconds that the replicas of the layer travel to the GPU that gets most.
    """

    placement: Placement
    pays: Bool[np.ndarray, " layers"]
    saved: Float[np.ndarray, " layers"]
    cost: Float[np.ndarray, " layers"]


def worth_moving(
    loads: Num[Array, "*microbatches layers experts"],
    old: Placement,
    new: Placement,
    num_gpus: int,
    *,
    seconds_per_token: float,
    expert_bytes: int,
    bytes_per_second: float,
    steps: int = 100,
) -> Worth:
    """Predicts for each layer whether a change of placement pays until the next one.

    A microbatch takes a layer as long as its heaviest GPU, whose tokens are counted with those of a replica as an even
    share of its expert's; so the gain is found for each microbatch, and added up. All GPUs of a layer receive their
    replicas at once, each as fast as its link.

    Args:
      loads: tokens of each expert: of each microbatch of a step, or of a whole step.
      old: the placement so far.
      new: what it would change to, from any policy.
      num_gpus: as in `eplb_jax.rebalance_experts`.
      seconds_per_token: of a layer, forward and backward, for one choice of a token: time over tokens of a GPU.
      expert_bytes: of a working copy of an expert.
      bytes_per_second: that reach a GPU.
      steps: that loads stay like this, as between two decisions.

    Raises:
      ValueError: loads of no microbatch, of other layers or experts; costs that are not positive.

    >>> old, new = (Placement.from_phy2log(np.array([slots]), 4) for slots in ([0, 1, 2, 3], [0, 3, 1, 2]))
    >>> found = worth_moving(np.array([[9, 8, 1, 2]]), old, new, 2, seconds_per_token=1e-6, expert_bytes=10**6,
    ...                      bytes_per_second=1e10, steps=10)
    >>> found.saved.round(6).tolist(), found.cost.round(6).tolist(), found.pays.tolist()
    ([6e-05], [0.0001], [False])
    """
    array = np.asarray(loads)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"loads have shape {array.shape}: they must be [layers, experts] or [microbatches, layers, experts], and "
            "not empty"
        )
    costs = {"seconds_per_token": seconds_per_token, "bytes_per_second": bytes_per_second, "steps": steps}
    for name, value in {**costs, "expert_bytes": expert_bytes}.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name}={value}: it must be positive and finite")
    if np.shape(new.phy2log) != np.shape(old.phy2log):
        raise ValueError(f"placements of {old.num_replicas} and {new.num_replicas} replicas: plan for as many")
    saved = np.zeros(old.num_layers)
    for counts in array.reshape(-1, *array.shape[-2:]):
        before, after = (gpu_loads(placement, counts, num_gpus).max(1) for placement in (old, new))
        saved += (before - after) * seconds_per_token * steps
    cost = arriving(old, new, num_gpus).max(1) * (expert_bytes / bytes_per_second)
    pays = saved > cost
    slots = np.where(pays[:, None], np.asarray(new.phy2log), np.asarray(old.phy2log))
    return Worth(Placement.from_phy2log(slots, old.num_experts), pays, saved, cost)
