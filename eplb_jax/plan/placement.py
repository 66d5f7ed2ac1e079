"""Where the replicas of experts are: three integer arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Which expert each slot holds, layer by layer; unpacks as ``phy2log, log2phy, logcnt``.

    Slot ``s`` is on GPU ``s // (replicas / gpus)``. Slots of dead GPUs hold -1.

    Attributes:
      phy2log: the logical expert of each slot; int32.
      log2phy: the slots of each logical expert, in the order of its replicas, then -1; int32.
      logcnt: how many replicas each logical expert has; int32.

    >>> placement = Placement.from_phy2log(np.array([[0, 2, 1, 0]]), 3)
    >>> phy2log, log2phy, logcnt = placement
    >>> log2phy.tolist(), logcnt.tolist()
    ([[[0, 3], [2, -1], [1, -1]]], [[2, 1, 1]])
    """

    phy2log: Int[Array, "layers replicas"]
    log2phy: Int[Array, "layers experts most"]
    logcnt: Int[Array, "layers experts"]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.phy2log, self.log2phy, self.logcnt))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.phy2log.shape[0]

    @property
    def num_replicas(self) -> int:
        """Slots of a layer, on all GPUs."""
        return self.phy2log.shape[-1]

    @property
    def num_experts(self) -> int:
        """Logical experts of a layer."""
        return self.logcnt.shape[-1]

    def of_layer(self, layer: int) -> Placement:
        """One layer, without the axis of layers: what `eplb_jax.moe.layer` takes."""
        if self.phy2log.ndim != 2 or not 0 <= layer < self.num_layers:
            raise ValueError(f"layer={layer}: phy2log has shape {self.phy2log.shape}, [layers, replicas]")
        return Placement(self.phy2log[layer], self.log2phy[layer], self.logcnt[layer])

    def padded(self, most: int | None = None) -> Placement:
        """With ``log2phy`` of the same width for all placements of these sizes, so that a program takes any of them.

        Args:
          most: columns; None: spare replicas + 1, as many as one expert could have.

        Raises:
          ValueError: an expert with more replicas than columns.

        >>> Placement.from_phy2log(np.array([[0, 1, 0, 1]]), 2).padded().log2phy.tolist()
        [[[0, 2, -1], [1, 3, -1]]]
        """
        columns = self.log2phy.shape[-1]
        most = self.num_replicas - self.num_experts + 1 if most is None else most
        if columns > most:
            raise ValueError(f"log2phy has {columns} columns: most={most} is too few for an expert's replicas")
        xp = jnp if isinstance(self.log2phy, jax.Array) else np
        width = [(0, 0)] * (self.log2phy.ndim - 1) + [(0, most - columns)]
        return dataclasses.replace(self, log2phy=xp.pad(self.log2phy, width, constant_values=-1))

    @classmethod
    def from_phy2log(cls, phy2log: Int[Array, "layers replicas"], num_experts: int) -> Placement:
        """The placement on the host with these slots, replicas in the order of their slots.

        Raises:
          ValueError: an expert out of range, or one that no slot holds.
        """
        phy2log = np.asarray(phy2log, np.int32)
        if phy2log.ndim != 2:
            raise ValueError(f"phy2log has shape {phy2log.shape}: it must be [layers, replicas]")
        if phy2log.size and not -1 <= phy2log.min() <= phy2log.max() < num_experts:
            raise ValueError(
                f"phy2log holds experts {phy2log.min()} to {phy2log.max()}: there are {num_experts}, numbered from 0 "
                "(-1 is the slot of a dead GPU)"
            )
        # Sorted by expert, the replicas of one are neighbours, and the first of them tells their ranks. Numbers of 16
        # bits are sorted without comparisons.
        num_layers, replicas = phy2log.shape
        key = phy2log.astype(np.int16 if num_experts < 2**15 else np.int32)
        order = np.argsort(key, axis=1, kind="stable")
        row = np.arange(num_layers, dtype=np.int64)[:, None] * (num_experts + 1)
        counts = np.bincount((phy2log + 1 + row).reshape(-1), minlength=num_layers * (num_experts + 1))
        counts = counts.reshape(num_layers, num_experts + 1)  # the first column is of dead slots
        logcnt = counts[:, 1:].astype(np.int32)
        _every_expert_has_a_slot(logcnt)
        expert = np.take_along_axis(phy2log, order, axis=1)
        first = np.cumsum(counts, axis=1) - counts
        rank = np.arange(replicas) - np.take_along_axis(first, expert + 1, axis=1)
        log2phy = np.full((*logcnt.shape, logcnt.max(initial=0)), -1, np.int32)
        layers, places = np.nonzero(expert >= 0)
        log2phy[layers, expert[layers, places], rank[layers, places]] = order[layers, places]
        return cls(phy2log, log2phy, logcnt)

    def check(self, num_gpus: int) -> None:
        """Raises ValueError unless the three arrays agree and every expert has a replica."""
        phy2log, log2phy, logcnt = (np.asarray(array) for array in self)
        if (
            phy2log.ndim != 2
            or log2phy.ndim != 3
            or not logcnt.shape == log2phy.shape[:2] == (len(phy2log), logcnt.shape[-1] if logcnt.ndim else 0)
        ):
            raise ValueError(
                f"phy2log, log2phy and logcnt have shapes {phy2log.shape}, {log2phy.shape} and {logcnt.shape}: they "
                "must be [layers, replicas], [layers, experts, most] and [layers, experts]"
            )
        replicas, experts = phy2log.shape[1], logcnt.shape[1]
        for name, array, most in (("phy2log", phy2log, experts), ("log2phy", log2phy, replicas)):
            if array.size and not -1 <= array.min() <= array.max() < most:
                raise ValueError(f"{name} holds {array.min()} to {array.max()}: there are {most}, numbered from 0")
        if num_gpus < 1 or replicas % num_gpus:
            raise ValueError(f"{replicas} replicas do not divide over {num_gpus} GPUs")
        _every_expert_has_a_slot(logcnt)
        listed = log2phy >= 0
        if not np.array_equal(listed.sum(-1), logcnt) or not np.array_equal(
            listed, np.arange(log2phy.shape[-1]) < logcnt[..., None]
        ):
            raise ValueError("log2phy must list as many slots as logcnt says, and -1 after them")
        layer, expert, rank = np.nonzero(listed)
        again = np.full_like(phy2log, -1)
        again[layer, log2phy[layer, expert, rank]] = expert
        if listed.sum() != (phy2log >= 0).sum() or not np.array_equal(again, phy2log):
            bad = np.argwhere(again != phy2log)[:1].tolist()
            raise ValueError(f"log2phy does not list the slots of phy2log; first at [layer, slot] {bad}")


def list_slots(phy2log: jax.Array, rank: jax.Array, num_experts: int, most: int) -> jax.Array:
    """log2phy [layers, experts, most] of slots with these experts and replica ranks, both [layers, replicas]."""
    layers, replicas = phy2log.shape
    slots = jnp.broadcast_to(jnp.arange(replicas, dtype=jnp.int32), phy2log.shape)
    empty = jnp.full((layers, num_experts, most), -1, jnp.int32)
    rows = jnp.arange(layers, dtype=jnp.int32)[:, None]
    return empty.at[rows, phy2log, rank].set(slots, unique_indices=True, mode="promise_in_bounds")


def _every_expert_has_a_slot(logcnt: np.ndarray) -> None:
    missing = np.argwhere(logcnt < 1)
    if len(missing):
        layer, expert = missing[0].tolist()
        raise ValueError(f"{len(missing)} experts have no slot, the first is expert {expert} of layer {layer}")
