"""The table of policies that plan from loads and sizes alone."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Num

from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.policies.balanced import balanced
from eplb_jax.plan.policies.no_duplicate import no_duplicate
from eplb_jax.plan.rebalance import rebalance_experts


class Policy(Protocol):
    """Places the replicas of experts; a line of `POLICIES`.

    It checks its loads with `eplb_jax.plan.arguments.check_loads` and its sizes with
    `eplb_jax.plan.cluster.make_cluster`, which raise the ValueErrors that all policies share. Every expert gets a slot,
    and where the nodes divide the groups each group stays on one node. Layers are independent. NumPy loads give a
    NumPy placement; traced loads may be refused with a ValueError.
    """

    def __call__(
        self,
        weight: Num[Array, "layers experts"],
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_gpus: int,
    ) -> Placement:
        """A placement for these loads, by the sizes that `eplb_jax.rebalance_experts` explains."""
        ...


POLICIES: dict[str, Policy] = {"deepseek": rebalance_experts, "balanced": balanced, "no-duplicate": no_duplicate}
"""By the name that the command line has for them; `sticky` and `elastic` also need to know what was before."""
