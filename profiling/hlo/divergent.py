"""Finds collectives in a pipeline's branches that wait for ranks in another branch; such a program never ends.

The compiler decides which axes of a mesh it shards and with which collectives, so only a compiled program shows them.
Devices that share a pipeline rank run the same branch, and may reduce, gather and exchange in it. A collective-permute
has no groups: XLA lists its pairs on all ranks, and all of them must run it together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from profiling.hlo.collective import KINDS, groups
from profiling.hlo.text import Computation, Instruction, Module, parse

_BRANCH = re.compile(r"/branch_\d+/")
"""Part of the names of operations that each rank runs at its own time; all ranks run ``/send/`` together."""

_TOGETHER = re.compile(r"/branch_\d+/together/")
"""Parts of the names of branches that all ranks run in the same step: shared embeddings and heads."""

_SHOWN = 8


class Divergent(NamedTuple):
    """A collective in a branch, and the pipeline ranks that it needs together.

    Attributes:
      kind: opcode.
      ranks: pipeline ranks of the largest group of devices.
      op_name: path that it was traced under: the branch, the action, the JAX primitive.
    """

    kind: str
    ranks: tuple[int, ...]
    op_name: str


def find_divergent(hlo: str | Module, mesh: Any, axis: str = "pp") -> tuple[Divergent, ...]:
    """The collectives in branches of a pipeline that span several of its ranks.

    Args:
      hlo: ``compiled.as_text()`` of a step that holds a pipeline, or the module that `hlo_text.parse` made of it.
      mesh: the pipeline's.
      axis: the mesh axis of the pipeline ranks.
    """
    module = parse(hlo) if isinstance(hlo, str) else hlo
    shape = mesh.devices.shape if hasattr(mesh, "devices") else tuple(mesh.shape.values())
    rank_of = np.indices(shape)[tuple(mesh.axis_names).index(axis)].ravel()
    found = []
    for instruction in _in_branches(module, module[module.entry]):
        together = (
            [[device for pair in instruction.pairs for device in pair]]
            if instruction.opcode.startswith("collective-permute")
            else groups(instruction, module.devices)
        )
        ranks = max((tuple(sorted({int(rank_of[d]) for d in devices})) for devices in together), key=len, default=())
        if len(ranks) > 1:
            found.append(Divergent(instruction.opcode.removesuffix("-start"), ranks, instruction.op_name))
    return tuple(dict.fromkeys(found))


def check_collectives(hlo: str | Module, mesh: Any, axis: str = "pp") -> None:
    """Checks that a compiled pipeline does not wait for ever.

    Only axes that a pipeline leaves to the compiler can cause that. A pipeline without such axes needs no check.

    Raises:
      ValueError: the pipeline would wait for ever; the message shows which collectives are the cause.

    >>> import jax, jax.numpy as jnp, jaxpipe
    >>> mesh, schedule = jaxpipe.make_mesh(pp=2, tp=2), jaxpipe.schedule.build("1f1b", 2, 2)
    >>> step = jaxpipe.value_and_grad(lambda w, x, ctx: jnp.tanh(x @ w), schedule, mesh,
    ...     head=lambda outer, y, data, ctx: y.mean(), specs=jaxpipe.Params(jax.P("pp", None, "tp"), jax.P()))
    >>> compiled = jax.jit(step).lower(jaxpipe.Params(jnp.ones((2, 4, 4))), jnp.ones((4, 4))).compile()
    >>> check_collectives(compiled.as_text(), mesh)

    Args:
      hlo: ``compiled.as_text()`` of a step that holds a pipeline, or the module that `hlo_text.parse` made of it.
      mesh: the pipeline's.
      axis: the mesh axis of the pipeline ranks.
    """
    found = find_divergent(hlo, mesh, axis)
    if found:
        lines = [f"  {one.kind}, ranks {list(one.ranks)}: {one.op_name}" for one in found[:_SHOWN]]
        others = [name for name in mesh.axis_names if name != axis]
        raise ValueError(
            f"this program would wait for ever: {len(found)} collectives in its branches need several ranks of "
            f"{axis!r}, each of which is in a branch of its own\n"
            + "\n".join(lines + ["  ..."] * (len(found) > _SHOWN))
            + f"\nXLA makes them where a dimension that it shards over one of {others} is sliced, concatenated, "
            "rolled, padded or reshaped. Split such a dimension so that shards stay whole (gate and up as two "
            "parameters, heads rather than their halves), make it whole before (jax.lax.with_sharding_constraint), or "
            "name the axis in data_axes or replicated_axes and communicate by hand."
        )


def _in_branches(module: Module, computation: Computation) -> Iterator[Instruction]:
    """Collectives in loops and conditionals that ranks may enter at different times."""
    for instruction in computation.instructions:
        inside = _inside(module, module.called(instruction))
        if any("/send/" in each.op_name and each.pairs for each in inside):
            for called in module.called(instruction):
                yield from _in_branches(module, called)
        elif instruction.opcode in ("while", "conditional") and any(_BRANCH.search(each.op_name) for each in inside):
            collectives = (each for each in inside if each.opcode.removesuffix("-start") in KINDS)
            yield from (each for each in collectives if not _TOGETHER.search(each.op_name))


def _inside(module: Module, called: Sequence[Computation]) -> list[Instruction]:
    """All instructions of computations and of those that they call."""
    waiting, seen = list(called), {each.name for each in called}
    found: list[Instruction] = []
    while waiting:
        for instruction in waiting.pop().instructions:
            found.append(instruction)
            new = [each for each in module.called(instruction) if each.name not in seen]
            seen |= {each.name for each in new}
            waiting += new
    return found
