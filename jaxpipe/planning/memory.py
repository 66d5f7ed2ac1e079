"""How much memory each part of a pipelined step takes on a device, from the traced step alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxpipe._jax import Jaxpr, Literal
from jaxpipe.api import Pipeline
from jaxpipe.planning.liveness import nbytes, peak
from jaxpipe.stage.graph import scan_counts


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device in a training step.

    Attributes:
      masters: parameters.
      working: copies of them in the compute dtype or by slot, made once a step.
      gradients: their sums over microbatches.
      stash: of microbatches between forward and backward.
      in_flight: activations and cotangents between stages.
      transient: what the busiest moment needs besides: the work of one action, or what is made of gradients.
      optimizer: moments.
      batch: a step's tokens.
      layers: of a stage.
      replicated: of the masters, those that every device of the experts' axis has.
    """

    masters: int
    working: int
    gradients: int
    stash: int
    in_flight: int
    transient: int
    optimizer: int = 0
    batch: int = 0
    layers: int = 0
    replicated: int = 0

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


def pipeline_memory(pipeline: Pipeline, params: Any, batch: Any, *, cpu: bool) -> Memory:
    """What a pipelined step allocates on each device.

    Args:
      pipeline: for a mesh with or without devices.
      params: shapes with shardings.
      batch: shapes.
      cpu: see `jaxpipe.planning.liveness.peak`.
    """
    outer = jax.make_jaxpr(pipeline)(params, batch)
    (mapped,) = (eqn for eqn in outer.eqns if eqn.primitive.name == "shard_map")
    body = mapped.params["jaxpr"]
    # The order is that of jaxpipe.runtime.buffers.Buffers: messages first, at the end gradients and a few sums.
    chunks = len(pipeline.program.schedule.rank_stages[0])
    num_grads = chunks * len(jax.tree.leaves(params.stages)) + len(jax.tree.leaves(params.outer))
    sums = len(jax.tree.leaves(jax.eval_shape(pipeline, params, batch)[0]))
    pools, buffers = _buffers(body, pipeline.dispatch, num_grads + sums)
    in_flight, stash, grads = buffers[:pools], buffers[pools : -num_grads - sums], buffers[-num_grads - sums : -sums]
    working = _working(body)
    total = peak(body, cpu=cpu)
    return Memory(
        masters=nbytes(jax.tree.leaves(params), local=True),
        working=working,
        gradients=nbytes(grads),
        stash=nbytes(stash),
        in_flight=nbytes(in_flight),
        transient=total - working - nbytes((*grads, *stash, *in_flight)),
    )


def _buffers(body: Jaxpr, dispatch: str, after: int) -> tuple[int, list[Any]]:
    """(how many buffers hold messages, all buffers); of code without pools, those of the step that leaves most bytes.

    ``after``: how many buffers there are besides messages and stash. Of code without pools, messages count as stash.
    """
    loops = [eqn for eqn in body.eqns if eqn.primitive.name == "scan"]
    if dispatch != "unrolled":
        loop = max(loops, key=lambda eqn: scan_counts(eqn)[1])
        consts, carried = scan_counts(loop)
        return 1, [var.aval for var in loop.invars[consts : consts + carried]]
    eqns = [*body.eqns, *(eqn for loop in loops for eqn in loop.params["jaxpr"].jaxpr.eqns)]
    barriers = [eqn for eqn in eqns if eqn.primitive.name == "optimization_barrier" and len(eqn.invars) >= after]
    return 0, max(([atom.aval for atom in eqn.invars] for eqn in barriers), key=nbytes)


def _working(body: Jaxpr) -> int:
    """Bytes of what is made of parameters before the first step."""
    made: set[Any] = set()
    read: set[Any] = set()
    for eqn in body.eqns:
        if "prepare" in str(eqn.source_info.name_stack).split("/"):
            made.update(eqn.outvars)
        else:
            read.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return nbytes(var.aval for var in made & read)
