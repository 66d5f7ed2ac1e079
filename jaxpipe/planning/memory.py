"""How much memory each part of a pipelined step takes on a device, from the traced step alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxpipe._jax import VIEWS, Jaxpr, Literal
from jaxpipe.planning.liveness import Size, for_gpus, peak, results_made_by
from jaxpipe.runtime.buffers import SUMS
from jaxpipe.stage.graph import scan_counts


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device in a training step.

    Attributes:
      masters: parameters.
      working: copies of them in the compute dtype or by slot, made once a step.
      gradients: their sums over microbatches; of a forward pass alone, its outputs.
      stash: of microbatches between forward and backward, at the busiest moment.
      in_flight: activations and cotangents between stages.
      transient: what the busiest moment needs besides: the work of one action, or what is made of gradients.
      optimizer: its state, such as moments.
      batch: a step's.
      host: of ``stash``'s microbatches, what is in the host's memory; it counts in no sum here.
    """

    masters: int
    working: int
    gradients: int
    stash: int
    in_flight: int
    transient: int
    optimizer: int = 0
    batch: int = 0
    host: int = 0

    @property
    def arguments(self) -> int:
        """Of the compiled step; its output is written into the same memory."""
        return self.masters + self.optimizer + self.batch

    @property
    def temporary(self) -> int:
        """What the compiled step allocates besides."""
        return self.working + self.gradients + self.stash + self.in_flight + self.transient

    @property
    def total(self) -> int:
        """Both."""
        return self.arguments + self.temporary


def body_memory(
    body: Jaxpr,
    size: Size,
    on_host: Size,
    *,
    unrolled: bool,
    messages: int,
    results: int,
    others: int,
    cpu: bool,
) -> Memory:
    """What the body of a pipeline's `jax.shard_map` allocates on each device; parameters and batch are left at 0.

    Args:
      body: as `jax.make_jaxpr` of the pipeline has it.
      size, on_host: bytes that a device has of a variable, in its own memory and in its host's.
      unrolled: whether the program has no slots; messages then count as stash.
      messages: arrays between two stages.
      results: buffers of gradients, or of outputs where nothing is differentiated.
      others: buffers of losses and metrics: behind the gradients, or before the outputs.
      cpu: see `jaxpipe.planning.liveness.peak`.
    """
    # The order is that of jaxpipe.runtime.buffers.Buffers: messages, stash, gradients, losses and metrics, outputs.
    messages = 0 if unrolled else messages
    buffers = _buffers(body, size, results + others) if unrolled else _carried(body)
    count = len(buffers)
    in_flight = sum(map(size, buffers[:messages]))
    stash = sum(map(size, buffers[messages : count - results - others]))
    kept = sum(map(size, buffers[count - results - others : count - others]))
    working = _working(body, size)
    transient = peak(body, cpu=cpu, size=size) - working - kept - stash - in_flight
    host = max(sum(map(on_host, atoms)) for atoms in _states(body)) if unrolled else sum(map(on_host, buffers))
    return Memory(0, working, kept, stash + min(transient, 0), in_flight, max(transient, 0), host=host)


def _carried(body: Jaxpr) -> Sequence[Any]:
    """The buffers of the loop over a program's steps: the loop that carries most."""
    loop = max((eqn for eqn in body.eqns if eqn.primitive.name == "scan"), key=lambda eqn: scan_counts(eqn)[1])
    consts, carried = scan_counts(loop)
    return loop.invars[consts : consts + carried]


def _buffers(body: Jaxpr, size: Size, least: int) -> Sequence[Any]:
    """The buffers of code without slots, after the step that leaves most bytes; there are at least so many."""
    return max((atoms for atoms in _states(body) if len(atoms) >= least), key=lambda atoms: sum(map(size, atoms)))


def _states(body: Jaxpr) -> list[Sequence[Any]]:
    """What barriers between the steps of code without slots hold."""
    loops = [eqn for eqn in body.eqns if eqn.primitive.name == "scan"]
    eqns = [*body.eqns, *(eqn for loop in loops for eqn in loop.params["jaxpr"].jaxpr.eqns)]
    return [eqn.invars for eqn in eqns if eqn.primitive.name == "optimization_barrier"]


def count_sums(body: Jaxpr) -> int:
    """How many sums of gradients the body begins with, of stages and of embedding and head."""
    return sum(SUMS in str(eqn.source_info.name_stack).split("/") for eqn in body.eqns)


def prepared_bytes(body: Jaxpr, size: Size) -> dict[int, int]:
    """Bytes of what is made of parameters before the first step, by the part of the program that it is for."""
    found: dict[int, int] = {}
    part_of: dict[Any, int] = {}
    for var, sources, part in _prepared(body):
        part = next((part_of[atom] for atom in sources if atom in part_of), part) if part is None else part
        if part is not None:
            part_of[var] = part
    for var in _kept(body):
        if var in part_of:
            found[part_of[var]] = found.get(part_of[var], 0) + size(var)
    return found


def _prepared(body: Jaxpr) -> list[tuple[Any, tuple[Any, ...], int | None]]:
    """(variable, what it is made of, the part that it is for) of what is made of parameters before the first step.

    Parameters in other words are none.
    """
    found, given = [], set[Any](body.invars)
    for eqn in body.eqns:
        scopes = str(eqn.source_info.name_stack).split("/")
        if "prepare" not in scopes:
            continue
        if eqn.primitive.name == "optimization_barrier":
            pairs = list(zip(eqn.invars, eqn.outvars, strict=True))
        else:
            pairs = [(atom, var) for atom in eqn.invars[:1] for var in eqn.outvars if eqn.primitive.name in VIEWS]
        views = {var for atom, var in pairs if not isinstance(atom, Literal) and atom in given}
        given |= views
        sources = dict.fromkeys(eqn.outvars, tuple(atom for atom in eqn.invars if not isinstance(atom, Literal)))
        if eqn.primitive.name == "optimization_barrier":
            sources = {var: (atom,) for atom, var in pairs if not isinstance(atom, Literal)}
        part = next((int(scope.removeprefix("part_")) for scope in scopes if scope.startswith("part_")), None)
        found += [(var, sources.get(var, ()), part) for var in eqn.outvars if var not in views]
    return found


def _read(body: Jaxpr) -> set[Any]:
    """The variables that something behind the preparation reads."""
    found: set[Any] = set()
    for eqn in body.eqns:
        if "prepare" not in str(eqn.source_info.name_stack).split("/"):
            found.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return found


def _kept(body: Jaxpr) -> set[Any]:
    """What is made of parameters before the first step and read behind it; of what is made twice, the first."""
    twins = _twins(body)
    return {twins.get(var, var) for var in {var for var, _, _ in _prepared(body)} & _read(body)}


def _twins(body: Jaxpr) -> dict[Any, Any]:
    """Of what kernels make of parameters again, that which they made first: XLA runs them once."""
    twins: dict[Any, Any] = {}
    first: dict[Any, Any] = {}
    for eqn in body.eqns:
        name = eqn.primitive.name
        if "prepare" not in str(eqn.source_info.name_stack).split("/"):
            continue
        operands = [repr(atom) if isinstance(atom, Literal) else twins.get(atom, atom) for atom in eqn.invars]
        if name == "cond" and len(for_gpus(eqn)) == 1:
            made = results_made_by(for_gpus(eqn)[0].jaxpr)
            keys = [None if key is None else (*operands[1:], key) for key in made]
        elif name in ("name", "optimization_barrier"):
            keys = [(name, operand) for operand in operands]
        else:
            continue
        for var, key in zip(eqn.outvars, keys, strict=True):
            if key is not None and first.setdefault(key, var) is not var:
                twins[var] = first[key]
    return twins


def _working(body: Jaxpr, size: Size) -> int:
    """Bytes of what is made of parameters before the first step; parameters in other words are none."""
    return sum(map(size, _kept(body)))
