"""Finds which devices take part in the collectives of a compiled program, and how much each sends."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy as np

from jaxpipe.planning.chips import Achieved, Chip
from profiling.hlo.text import Computation, Instruction, Module

KINDS = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute",
         "collective-broadcast", "send", "recv")  # fmt: skip
"""Opcodes that move data between devices, without the "-start" of their asynchronous forms."""

_ITSELF = ("send", "recv")  # asynchronous although their names do not say "-start"
_WRAPPERS = ("async-start", "fusion", "fusion-start")
_NUMBERS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What one device sends in a collective, or in several that one instruction starts together.

    Attributes:
      kind: one of `KINDS`, joined by "+" if there are several.
      devices: number of devices in the largest group.
      local: bytes to devices of the same node.
      remote: bytes to devices of other nodes.
      example: one group of devices, or the source and target of a pair; on several nodes if there are such, since they
        decide.
    """

    kind: str
    devices: int
    local: float
    remote: float
    example: tuple[int, ...] = dataclasses.field(default=(), compare=False)

    @property
    def bytes(self) -> float:
        """All bytes that the device sends."""
        return self.local + self.remote

    def us(self, chip: Chip, achieved: Achieved) -> float:
        """Microseconds of the exchange. Both ways are used at once, and the slower one decides."""
        if not self.bytes:
            return 0.0
        local = self.local / (chip.interconnect * achieved.interconnect)
        remote = self.remote / (chip.internode * achieved.internode)
        return chip.latency_us + 1e6 * max(local, remote)


def groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that a collective runs in, from any of XLA's three notations.

    Args:
      instruction: instruction with replica_groups; missing or empty ones stand for one group of all devices.
      devices: number of devices of the program.

    >>> groups(Instruction("a", "all-gather", (), attributes={"replica_groups": "[2,2]<=[2,2]T(1,0)"}), 4)
    ((0, 2), (1, 3))
    >>> groups(Instruction("a", "all-gather", (), attributes={"replica_groups": "mesh['pp'=2,'ep'=2] {'ep'}"}), 4)
    ((0, 1), (2, 3))
    """
    text = instruction.attributes.get("replica_groups", "{}")
    if text.startswith("mesh"):
        return _of_mesh(text, instruction.attributes.get("device_ids", ""))
    if text.startswith("["):
        sizes, _, order = text.partition("<=")
        return _rows(_iota(order).reshape(_ints(sizes)))
    found = tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d, ]+)\}", text))
    return found or (tuple(range(devices)),)


def _ints(text: str) -> list[int]:
    return [int(number) for number in _NUMBERS.findall(text)]


def _rows(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(device) for device in row) for row in array)


def _iota(text: str) -> np.ndarray:
    """The devices of "[2,4]T(1,0)": 0 to 7 in rows of four, transposed."""
    sizes, _, order = text.partition("T")
    array = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
    return array.transpose(_ints(order)) if order else array


def _of_mesh(mesh: str, order: str) -> tuple[tuple[int, ...], ...]:
    """The groups of "mesh['pp'=2,'ep'=4] {'ep'}": one for each place on the axes that are not named.

    `order` lists the mesh's devices if they are not 0, 1, 2, ..., as in "(0,2,1,3) {'ep'}"; the axes then follow it.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(axes.values()))
    if order:
        listed = order[1 : order.rindex(")")]
        ids = _iota(listed) if listed.startswith("[") else np.array(_ints(listed))
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", (order or mesh).partition("{")[2])
    if not wanted:
        return (tuple(int(device) for device in ids.ravel()),)
    # An axis of which only a part is named, 'd':(4)2, is split in three: what lies before it, the part, the rest.
    parts = {name: (int(before or 1), int(size or axes[name])) for name, before, size in wanted}
    shape, chosen = [], {}
    for name, size in axes.items():
        before, part = parts.get(name, (size, 1))
        chosen[name] = len(shape) + 1
        shape += [before, part, size // (before * part)]
    inside = [chosen[name] for name, _, _ in wanted]
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    size = math.prod(shape[axis] for axis in inside)
    return _rows(ids.reshape(shape).transpose(outside + inside).reshape(-1, size))


def kind_of(opcode: str) -> str:
    """The kind of a collective's opcode; "" for other opcodes.

    >>> kind_of("all-to-all-start"), kind_of("all-to-all-done")
    ('all-to-all', '')
    """
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def collectives(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[tuple[Computation, Instruction], ...]:
    """The collectives that an instruction starts, itself or those that it wraps, each with its computation."""
    if kind_of(instruction.opcode):
        return ((computation, instruction),)
    if instruction.opcode not in _WRAPPERS:
        return ()
    return tuple(
        found
        for called in module.called(instruction)
        for inner in called.instructions
        for found in collectives(module, called, inner)
    )


def is_asynchronous(instruction: Instruction) -> bool:
    """Whether the device goes on while a collective runs, until its "-done"."""
    is_start = instruction.opcode.endswith("-start") or instruction.opcode in _ITSELF
    return is_start and not instruction.config.get("collective_backend_config", {}).get("is_sync", False)


def exchange(module: Module, computation: Computation, instruction: Instruction, node_size: int) -> Exchange | None:
    """What an instruction makes its device send; None if it starts no collective.

    Args:
      module, computation: module and computation of the instruction.
      instruction: any instruction.
      node_size: number of devices in a node; device `i` of the program is on node ``i // node_size``.
    """
    found = [_sent(module, *one, node_size) for one in collectives(module, computation, instruction)]
    if not found:
        return None
    return Exchange(
        kind="+".join(dict.fromkeys(one.kind for one in found)),
        devices=max(one.devices for one in found),
        local=sum(one.local for one in found),
        remote=sum(one.remote for one in found),
        example=max(found, key=lambda one: (one.remote > 0, len(one.example))).example,
    )


def _payload(computation: Computation, instruction: Instruction, kind: str) -> float:
    """Bytes that a device gives to a collective."""
    if kind == "recv":
        return instruction.arrays[0].bytes
    operands = computation.operands(instruction)
    if kind in ("ragged-all-to-all", "send"):
        operands = operands[:1]
    return sum(array.bytes for operand in operands for array in operand.arrays)


def _sent(module: Module, computation: Computation, instruction: Instruction, node_size: int) -> Exchange:
    kind = kind_of(instruction.opcode)
    payload = _payload(computation, instruction, kind)
    if kind in ("collective-permute", "send", "recv"):
        pairs = [pair for pair in instruction.pairs if pair[0] != pair[1]]
        crossing = [pair for pair in pairs if pair[0] // node_size != pair[1] // node_size]
        moves = payload if pairs or not instruction.pairs else 0.0
        example = next(iter(crossing or pairs), ())
        return Exchange(kind, 2, 0.0 if crossing else moves, moves if crossing else 0.0, example)
    group = max(groups(instruction, module.devices), key=lambda group: (len(group), _nodes(group, node_size)))
    n = len(group)
    nodes = collections.Counter(device // node_size for device in group)
    here = max(nodes.values())  # of a group spread unevenly, the devices of its fullest node
    whole = payload * n if kind == "all-gather" else payload  # the array that all devices together hold or make
    if kind == "collective-broadcast":
        return Exchange(kind, n, payload if len(nodes) == 1 else 0.0, 0.0 if len(nodes) == 1 else payload, group)
    times = 2 if kind == "all-reduce" else 1  # a reduce-scatter and an all-gather
    if kind.endswith("all-to-all"):
        return Exchange(kind, n, whole * (here - 1) / n, whole * (n - here) / n, group)
    # Rings pass every other node's part into the node once, shared among its devices, and round within the node.
    remote = times * whole * (n - here) / n / here
    return Exchange(kind, n, times * whole * (n - 1) / n - remote, remote, group)


def _nodes(group: tuple[int, ...], node_size: int) -> int:
    return len({device // node_size for device in group})
