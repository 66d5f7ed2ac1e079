"""The sizes that a plan is for: replicas, groups, nodes and GPUs, checked once."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Sizes that fit each other, from `make_cluster`; static, so a jitted function takes them as one argument.

    Attributes:
      num_replicas: slots of a layer on all GPUs.
      num_groups: groups of experts, as many on each node; 1 where experts may be on any node.
      num_nodes: nodes that groups are packed onto; 1 where experts may be on any.
      num_gpus: GPUs on all nodes.

    >>> make_cluster(12, 16, 4, 2, 8).gpus_per_node
    4
    >>> make_cluster(12, 16, 3, 2, 8)
    Cluster(num_replicas=16, num_groups=1, num_nodes=1, num_gpus=8)
    """

    num_replicas: int
    num_groups: int
    num_nodes: int
    num_gpus: int

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each node."""
        return self.num_gpus // self.num_nodes

    @property
    def replicas_per_node(self) -> int:
        """Slots of each node."""
        return self.num_replicas // self.num_nodes

    @property
    def replicas_per_gpu(self) -> int:
        """Slots of each GPU."""
        return self.num_replicas // self.num_gpus


def make_cluster(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Cluster:
    """The sizes for a plan of so many experts.

    Where the nodes do not divide the groups, both are 1, as in DeepSeek's balancer: experts may be on any node.

    Raises:
      ValueError: experts, replicas, groups, nodes and GPUs that do not fit each other.
    """
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, value in sizes.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(f"{name}={value!r}: it must be a positive int below 2**31")
    if num_replicas < num_experts:
        raise ValueError(
            f"num_replicas={num_replicas} is less than the {num_experts} experts: each needs one, "
            f"so ask for at least {-(-num_experts // num_gpus) * num_gpus}"
        )
    if num_replicas % num_gpus:
        below = num_replicas // num_gpus * num_gpus
        choices = f"{below} or {below + num_gpus}" if below >= num_experts else below + num_gpus
        raise ValueError(
            f"num_replicas={num_replicas} is not a multiple of num_gpus={num_gpus}: take {choices}, "
            "so that every GPU has as many slots"
        )
    if num_experts % num_groups:
        raise ValueError(f"the {num_experts} experts do not divide into num_groups={num_groups}; 1 group always fits")
    if num_gpus % num_nodes:
        raise ValueError(f"num_gpus={num_gpus} do not divide over num_nodes={num_nodes}: nodes have equally many GPUs")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    return Cluster(int(num_replicas), int(num_groups), int(num_nodes), int(num_gpus))


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless the value, a share of a load, is at least 0."""
    if not value >= 0:
        raise ValueError(f"{name}={value}: it must be at least 0")
