"""Reads the compiled modules in a profile: the opcode of every instruction and the scope it was traced under.

`jax.profiler.ProfileData` does not show them, so they are read from the file: XSpace.planes = 1, XPlane.name = 2,
event_metadata = 4, stat_metadata = 5; XEventMetadata.name = 2, stats = 5; XStat.metadata_id = 1, bytes = 6
(tsl/profiler/protobuf/xplane.proto); HloProto.hlo_module = 1; HloModuleProto.computations = 3;
HloComputationProto.instructions = 2, id = 5; HloInstructionProto.name = 1, opcode = 2, metadata = 7,
called_computation_ids = 38; OpMetadata.op_name = 2 (xla/service/hlo.proto).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from profiling.read.wire import integer, integers, messages, text
from profiling.read.xspace import Doubts, plane_name

CONTAINERS = frozenset({"while", "conditional", "call"})
"""Opcodes of instructions that only run others, which have events of their own."""


class ModuleInstruction(NamedTuple):
    """One instruction in a module; if XLA added it, its scope is that of its computation."""

    opcode: str
    scope: str


PLANE = "/host:metadata"
"""The plane that holds the modules."""

DAMAGED = "compiled modules in the profile are damaged: their operations lack scopes"

Modules = dict[str, dict[str, ModuleInstruction]]
"""``{"jit_step(7)": {instruction: ...}}``, by the module's name and the program's id."""


def read_modules(xspace: bytes, doubts: Doubts | None = None) -> Modules:
    """The modules of all programs that ran while the profile was taken; empty if it holds none.

    Args:
      xspace: bytes of the profile.
      doubts: counts the damaged modules, which are left out; with None, a damaged module is an error.

    Raises:
      ValueError: the profile or one of its modules is damaged.
    """
    found: Modules = {}
    for plane in messages(xspace, 1):
        for program, module in _programs(plane) if plane_name(plane) == PLANE else ():
            try:
                found[text(program, 2)] = _instructions(messages(module, 6)[-1])
            except (ValueError, IndexError) as error:
                if doubts is None:
                    raise ValueError(f"a module of the profile is damaged: {error}") from error
                doubts[DAMAGED] += 1
    return found


def _programs(plane: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
    """The metadata of each program of a plane, with the stat that holds its module."""
    stats = (stat for entry in messages(plane, 5) for stat in messages(entry, 2))
    names = {integer(stat, 1): text(stat, 2) for stat in stats}
    for program in (program for entry in messages(plane, 4) for program in messages(entry, 2)):
        for stat in messages(program, 5):
            if names.get(integer(stat, 1)) == "Hlo Proto":
                yield program, stat


def _instructions(hlo_proto: memoryview) -> dict[str, ModuleInstruction]:
    computations: dict[int, list[memoryview]] = {}
    for module in messages(hlo_proto, 1):
        for computation in messages(module, 3):
            computations[integer(computation, 5)] = messages(computation, 2)
    found = {}
    for instructions in computations.values():
        scopes = [_scope(instruction) or _scope_within(instruction, computations) for instruction in instructions]
        around = _common([scope for scope in scopes if "/" in scope])  # a parameter has its name, no path
        for instruction, scope in zip(instructions, scopes, strict=True):
            found[text(instruction, 1)] = ModuleInstruction(text(instruction, 2), scope or around)
    return found


def _common(scopes: list[str]) -> str:
    """The path that all scopes of a computation begin with; operations that XLA added there belong to it."""
    together = zip(*(scope.split("/") for scope in scopes), strict=False)
    return "/".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, together))


def _scope(instruction: memoryview) -> str:
    metadata = messages(instruction, 7)
    return text(metadata[-1], 2) if metadata else ""


def _scope_within(instruction: memoryview, computations: dict[int, list[memoryview]]) -> str:
    """The scope of the last instruction of a fusion that has one, which is the nearest to its result."""
    inner = [
        scope
        for computation in integers(instruction, 38)
        for fused in computations.get(computation, [])
        if (scope := _scope(fused))
    ]
    return inner[-1] if inner else ""
