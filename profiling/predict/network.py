"""How long tokens travel to their experts on a cluster that is not here."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Network:
    """Rates that a device really gets, both ways at once, and what exchanges cost besides.

    The defaults are what DeepSeek's DeepEP reports for H800s with 400 Gb/s InfiniBand: 51 GB/s between nodes at 64
    devices, 155 GB/s within a node. Their kernels run on 20 SMs in training, 24 in prefill, none in decode.

    Attributes:
      internode, intranode: bytes/s.
      latency_us: of an exchange however little it moves.
      node_size: devices of a node.
      sms: of the device that exchanges occupy while they run, which products then lack.

    Raises:
      ValueError: rates or sizes that are not positive.
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
    network: Network,
    devices: int,
    tokens: int,
    top_k: int,
    most_nodes: int,
    token_bytes: float,
    *,
    direct: bool = False,
) -> float:
    """Microseconds in which every device's tokens reach their experts, or come back, under balanced routing.

    A token crosses once to each of its nodes and is handed on there, so that the slower of the two ways counts; or it
    goes to each of its experts by itself, the way of decode, where latency matters more than bytes.

    Args:
      network: rates.
      devices: that the experts are spread over.
      tokens: of each device.
      top_k: experts of a token.
      most_nodes: nodes that a token's experts may be on.
      token_bytes: of one token.
      direct: whether it goes to each expert by itself.

    Raises:
      ValueError: sizes below 1.

    >>> low_latency = Network(internode=39e9, latency_us=0.0, sms=0)
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
