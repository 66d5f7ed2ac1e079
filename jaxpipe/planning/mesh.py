"""Sizes of a mesh's axes: as text, and who of a group of devices shares a node."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

from jaxpipe.planning.chips import Achieved, Chip

Groups = tuple[tuple[int, ...], ...]
"""Places along the axes of a collective, of those that take part together."""


def mesh_sizes(text: str) -> dict[str, int]:
    """``"pp=4,ep=2"`` as a dict.

    Raises:
      ValueError: it is written otherwise, or a size is not positive.

    >>> mesh_sizes("pp=4,ep=2")
    {'pp': 4, 'ep': 2}
    """
    try:
        sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"{text!r} is not a mesh; write sizes by axis, as in pp=4,ep=2") from None
    if min(sizes.values()) < 1:
        raise ValueError(f"{text!r}: the size of an axis is at least 1")
    return sizes


@dataclasses.dataclass(frozen=True)
class Network:
    """The devices of a mesh in nodes: device i, in the order of the mesh's axes, is on node ``i // node``.

    Attributes:
      axes: (name, size) of the mesh's axes, the last varies fastest.
      node: devices of a node.
      within, between: bytes/s that a device sends to others of its node, and to other nodes.
      latency: seconds of a collective however little it moves.
    """

    axes: tuple[tuple[str, int], ...]
    node: int
    within: float
    between: float
    latency: float

    @classmethod
    def make(cls, sizes: Mapping[str, int], chip: Chip, achieved: Achieved, node: int) -> Network:
        """The network of a mesh of such chips."""
        within, between = chip.interconnect * achieved.interconnect, chip.internode * achieved.internode
        return cls(tuple(sizes.items()), node, within, between, chip.latency_us * 1e-6)

    def size(self, names: Sequence[str]) -> int:
        """Devices that the named axes have together."""
        return math.prod(size for name, size in self.axes if name in names)

    def fullest(self, names: Sequence[str], groups: Groups | None = None) -> int:
        """Of a group of devices along the named axes, how many share a node at most.

        >>> network = Network((("pp", 2), ("ep", 8)), 4, 1.0, 1.0, 0.0)
        >>> network.fullest(["pp"]), network.fullest(["ep"]), network.fullest(["ep"], ((0, 4), (1, 5)))
        (1, 4, 1)
        """
        places = itertools.product(*(range(size if name in names else 1) for name, size in self.axes))
        strides = [math.prod(size for _, size in self.axes[i + 1 :]) for i in range(len(self.axes))]
        devices = [sum(map(int.__mul__, place, strides)) for place in places]
        several = [devices] if groups is None else [[devices[place] for place in group] for group in groups]
        return max(max(collections.Counter(device // self.node for device in group).values()) for group in several)

    def seconds(self, kind: str, names: Sequence[str], nbytes: float, groups: Groups | None = None) -> float:
        """How long a collective takes, both ways used at once: within the node or between nodes, whichever is longer.

        Args:
          kind: "all-to-all", "all-gather", "reduce-scatter", "all-reduce" or "permute".
          names: of the axes.
          nbytes: of the whole array that a device ends or begins with, the larger of both.
          groups: places along the axes of the devices that take part together; None: all do.
        """
        count, here = _members(self, tuple(names), groups)
        if count == 1:
            return 0.0
        if kind == "permute":
            return self.latency + nbytes / (self.within if here == count else self.between)
        if kind == "all-to-all":
            local, remote = nbytes * (here - 1) / count, nbytes * (count - here) / count
        else:  # a ring passes every other node's part into the node once, shared among its devices
            times = 2 if kind == "all-reduce" else 1
            remote = times * nbytes * (count - here) / count / here
            local = times * nbytes * (count - 1) / count - remote
        return self.latency + max(local / self.within, remote / self.between)


@functools.cache
def _members(network: Network, names: tuple[str, ...], groups: Groups | None) -> tuple[int, int]:
    """(devices that take part in a collective together, most of them that share a node)."""
    count = network.size(names) if groups is None else len(groups[0])
    return count, network.fullest(names, groups)
