"""Models the network of a cluster: how long tokens take to reach their experts."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ClusterNetwork:
    """Rates that a device gets in each direction while it uses both, and the other costs of exchanges.

    The defaults are what DeepSeek's DeepEP reports for H800s with 400 Gb/s InfiniBand: 51 GB/s between nodes at 64
    devices, 155 GB/s within a node. Their kernels run on 20 SMs in training, 24 in prefill, none in decode.

    Attributes:
      internode, intranode: rates of a device between and within nodes, in bytes/s.
      latency_us: microseconds that the smallest exchange takes.
      node_size: number of devices in a node.
      sms: number of SMs that exchanges occupy while they run; products do without them.

    Raises:
      ValueError: a rate or a size is not positive.
    """

    internode: float = 51e9
    intranode: float = 155e9
    latency_us: float = 10.0
    node_size: int = 8
    sms: int = 20

    def __post_init__(self) -> None:
        """Checks the rates."""
        if min(self.internode, self.intranode) <= 0 or self.node_size < 1 or min(self.latency_us, self.sms) < 0:
            raise ValueError(f"{self}: rates and node_size are positive, latency_us and sms not negative")


def exchange_us(
    network: ClusterNetwork,
    devices: int,
    tokens: int,
    top_k: int,
    most_nodes: int,
    token_bytes: float,
    *,
    direct: bool = False,
) -> float:
    """Microseconds in which the tokens of all devices reach their experts, or come back, under balanced routing.

    A token crosses once to each of its nodes and is passed on there, so the slower of the two ways decides. With
    `direct` it is sent to each of its experts, as in decode, where latency matters more than bytes.

    Args:
      network: rates of the network.
      devices: number of devices that the experts are spread over.
      tokens: number of tokens on each device.
      top_k: number of experts of a token.
      most_nodes: most nodes that the experts of a token may be on.
      token_bytes: bytes of one token.
      direct: whether a token is sent to each expert by itself.

    Raises:
      ValueError: a size is below 1.

    >>> low_latency = ClusterNetwork(internode=39e9, latency_us=0.0, sms=0)
    >>> round(exchange_us(low_latency, 128, 128, 8, 4, 7168 * (1 + 4 / 128), direct=True))  # DeepEP reports 192
    182
    """
    if min(devices, tokens, top_k, most_nodes) < 1:
        raise ValueError(f"devices={devices}, tokens={tokens}, top_k={top_k}, most_nodes={most_nodes}: at least 1")
    nodes = math.ceil(devices / network.node_size)
    away = 1 - 1 / nodes  # of the nodes, or of the experts, that a token goes to
    hops = top_k if direct else min(most_nodes, nodes)
    between = tokens * hops * away * token_bytes / network.internode
    within_node = tokens * (top_k * (1 - away) if direct else top_k) * token_bytes
    within = within_node * (1 - 1 / min(devices, network.node_size)) / network.intranode
    return network.latency_us + 1e6 * max(between, within)
