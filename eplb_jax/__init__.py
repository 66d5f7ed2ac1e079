"""Expert-parallel load balancing, and the mixture-of-experts layer that it feeds.

What `__all__` names is public; all modules below are internal and may change without notice.

Plans: `rebalance_experts` is DeepSeek's balancer, bit for bit, made of `balanced_packing` and `replicate_experts`;
`balanced`, `no_duplicate`, `sticky` and `elastic` go beyond it. All return a `Placement`. `gpu_loads`, `balancedness`,
`moved`, `moved_bytes`, `duplicates` and `lower_bound` say what a plan is worth, `draw_loads` shows it, ``save_`` and
``read_`` keep it in files, and ``python -m eplb_jax plan`` does all of that from the command line.

The layer: `moe_layer` on `MoEParams` with a `MoEConfig`, or the Flax modules `MoE` and `LinenMoE`. Its parts:
`grouped_matmul` in the layout of `group_starts`, `local_experts` with `make_capacities`, `split_tokens`, which
divides each expert's tokens over its replicas, and `split_exactly`, which divides all tokens evenly.

While it trains: `count_tokens`, `SlidingWindow` and `MovingAverage` collect loads, `decide` finds the next placement,
`PlanAhead` does so beside the steps, `worth_moving` says where it pays, `capacity_from` how much room layers need,
`update_bias` moves a router's bias.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from eplb_jax.kernels.grouped_gemm.interface import grouped_matmul
from eplb_jax.kernels.grouped_gemm.layout import group_starts
from eplb_jax.moe.capacity import capacity_from, heaviest_by_split
from eplb_jax.moe.dispatch import Capacities, make_capacities
from eplb_jax.moe.exact import ExactSplit, split_exactly
from eplb_jax.moe.experts import ExpertParams, working_copies
from eplb_jax.moe.fetch import most_fetched
from eplb_jax.moe.layer import (
    MoEConfig,
    MoEParams,
    MoEStats,
    init_moe,
    local_experts,
    moe_layer,
    param_specs,
    working_copies_for,
)
from eplb_jax.moe.router import RouterConfig, Routing, balance_loss, route, router_logits, update_bias
from eplb_jax.moe.split import split_tokens
from eplb_jax.plan.ahead import PlanAhead, Planned, PlanningTime
from eplb_jax.plan.bounds import lower_bound
from eplb_jax.plan.files import read_loads, read_placement, read_sizes, save_loads, save_placement
from eplb_jax.plan.live import Decision, Prices, RebalanceConfig, decide, initial_placement
from eplb_jax.plan.load import MovingAverage, SlidingWindow, count_tokens
from eplb_jax.plan.metrics import balancedness, duplicates, gpu_loads, moved, moved_bytes
from eplb_jax.plan.packing import balanced_packing, replicate_experts
from eplb_jax.plan.placement import Placement
from eplb_jax.plan.plot import draw_loads
from eplb_jax.plan.policies.balanced import balanced
from eplb_jax.plan.policies.elastic import elastic
from eplb_jax.plan.policies.no_duplicate import no_duplicate
from eplb_jax.plan.policies.sticky import sticky
from eplb_jax.plan.rebalance import rebalance_experts
from eplb_jax.plan.worth import Worth, worth_moving

if TYPE_CHECKING:
    from eplb_jax.moe.flax import LinenMoE, MoE, PlacementParam, RouterBias

__all__ = [
    "Capacities",
    "Decision",
    "ExactSplit",
    "ExpertParams",
    "LinenMoE",
    "MoE",
    "MoEConfig",
    "MoEParams",
    "MoEStats",
    "MovingAverage",
    "Placement",
    "PlacementParam",
    "PlanAhead",
    "Planned",
    "PlanningTime",
    "Prices",
    "RebalanceConfig",
    "RouterBias",
    "RouterConfig",
    "Routing",
    "SlidingWindow",
    "Worth",
    "balance_loss",
    "balanced",
    "balanced_packing",
    "balancedness",
    "capacity_from",
    "count_tokens",
    "decide",
    "draw_loads",
    "duplicates",
    "elastic",
    "gpu_loads",
    "group_starts",
    "grouped_matmul",
    "heaviest_by_split",
    "init_moe",
    "initial_placement",
    "local_experts",
    "lower_bound",
    "make_capacities",
    "moe_layer",
    "most_fetched",
    "moved",
    "moved_bytes",
    "no_duplicate",
    "param_specs",
    "read_loads",
    "read_placement",
    "read_sizes",
    "rebalance_experts",
    "replicate_experts",
    "route",
    "router_logits",
    "save_loads",
    "save_placement",
    "split_exactly",
    "split_tokens",
    "sticky",
    "update_bias",
    "working_copies",
    "working_copies_for",
    "worth_moving",
]

_FLAX = ("LinenMoE", "MoE", "PlacementParam", "RouterBias")


def __getattr__(name: str) -> Any:
    """The Flax modules, imported when they are asked for: all else works without Flax."""
    if name in _FLAX:
        return getattr(importlib.import_module("eplb_jax.moe.flax"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
