"""Exchanges one inside another: between nodes, then within each.

A link within a node is several times as fast as one between nodes. With ``exchange="nodes"`` a token travels at most
once to each node that has experts of it, to the device there that has the sender's place; that one hands it on to the
devices of its node. Results come back the same way: each node sends one row for a token, the sum over its devices. Of
a router that chooses among the groups of few nodes, as DeepSeek-V3's does with 4 of 8, few copies cross the network.

Each level is the same exchange (`eplb_jax.moe.dispatch`), of what the level before has delivered. Sums are made in
another order than by the exchange of all devices, and choices are the same.

Source: the DeepSeek-V3 report, arXiv 2412.19437, 3.2.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from eplb_jax.kernels.grouped_gemm.layout import round_up
from eplb_jax.moe.dispatch import Capacities, make_capacities, visited_members
from eplb_jax.moe.dispatchers import DISPATCHERS, NODES, Dense, Dispatcher
from eplb_jax.moe.exchange import Groups
from eplb_jax.moe.replica import node_size
from eplb_jax.moe.router import RouterConfig


class Level(NamedTuple):
    """One exchange; static.

    Attributes:
      dispatcher: carries rows to the members of a group and back.
      groups: devices that exchange with each other; None: all of the axis are one group.
      size: members of a group.
      slots: that each member stands for: its own, or those of its node.
      capacity: rows that one member may send to another.
    """

    dispatcher: Dispatcher
    groups: Groups | None
    size: int
    slots: int
    capacity: int


def make_levels(
    exchange: str,
    router: RouterConfig,
    capacity_factor: float | None,
    tokens: int,
    devices: int,
    slots: int,
    devices_per_node: int | None,
) -> tuple[tuple[Level, ...], Capacities]:
    """The exchanges of a layer, the outermost first, and the capacities of the whole.

    Args:
      exchange: a name of `DISPATCHERS`, or "nodes".
      router: how tokens choose.
      capacity_factor: as `make_capacities` takes it. Of the rows between nodes it is a factor of what a router needs
        whose groups of experts are each on one node, with more groups than nodes on neighbouring ones.
      tokens: of each device.
      devices: of the axis.
      slots: of each device.
      devices_per_node: consecutive devices that share a node; None: all.

    Raises:
      ValueError: devices that do not divide into nodes.

    >>> levels, _ = make_levels("nodes", RouterConfig(), 1.0, 4096, 64, 4, 8)
    >>> [(level.size, level.slots, level.capacity) for level in levels]  # 3.63 of 8 nodes, and 7.68 of 64 devices
    [(8, 32, 1864), (8, 4, 3968)]
    >>> levels[0].groups[0], levels[1].groups[0]
    ((0, 8, 16, 24, 32, 40, 48, 56), (0, 1, 2, 3, 4, 5, 6, 7))
    """
    capacities = make_capacities(tokens, router.top_k, devices, slots, capacity_factor)
    per_node = node_size(devices, devices_per_node)
    nodes = devices // per_node
    if exchange != NODES or 1 in (nodes, per_node):
        dispatcher = DISPATCHERS["dense" if exchange == NODES else exchange]
        return (Level(dispatcher, None, devices, slots, capacities.exchange),), capacities
    across = tuple(tuple(range(place, devices, per_node)) for place in range(per_node))
    within = tuple(tuple(range(first, first + per_node)) for first in range(0, devices, per_node))
    first, second = tokens, nodes * tokens
    if capacity_factor is not None:
        visited = visited_nodes(router, nodes)
        first = min(tokens, round_up(math.ceil(capacity_factor * tokens * visited / nodes)))
        second = min(nodes * first, nodes * capacities.exchange)
    return (
        Level(Dense(across), across, nodes, slots * per_node, first),
        Level(Dense(within), within, per_node, slots, second),
    ), capacities


def visited_nodes(router: RouterConfig, nodes: int) -> float:
    """Nodes that a token has experts on, on average, of choices that are even among those that its groups allow.

    >>> round(visited_nodes(RouterConfig(256, 8, 8, 4), 8), 2), round(visited_nodes(RouterConfig(256, 8, 1, 1), 8), 2)
    (3.63, 5.29)
    """
    allowed = min(nodes, max(router.top_groups, nodes * router.top_groups / router.num_groups))
    return visited_members(allowed, router.num_experts * router.top_groups / router.num_groups, router.top_k)
