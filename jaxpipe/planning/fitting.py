"""`fit_stash`: as many bytes for what stages keep as a device has left."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jaxpipe.api import Pipeline
from jaxpipe.params import Params
from jaxpipe.planning import chips
from jaxpipe.planning.chips import Chip
from jaxpipe.planning.planner import Plan, plan
from jaxpipe.runtime.by_rank import as_dispatched
from jaxpipe.runtime.stash import slots_of

SHARE = 0.95
"""Of a chip's memory, what a step may take; the rest is for code and the network's buffers."""

_UNLIMITED = 1 << 60
_TRIES = 6


class FittedStash(NamedTuple):
    """What `fit_stash` returns.

    Attributes:
      stash: bytes of a microbatch and stage.
      pipeline: with this ``stash``.
      plan: of it.
    """

    stash: int
    pipeline: Pipeline
    plan: Plan


def fit_stash(
    pipeline: Pipeline, params: Params, batch: Any, chip: Chip | str, *, memory: float | None = None, **options: Any
) -> FittedStash:
    """The pipeline with as large a ``stash`` as fits the memory that the plan leaves for it.

    What a step takes besides depends on what is computed again, so this plans it a few times.

    Args:
      pipeline: from `jaxpipe.value_and_grad`, with any ``stash``.
      params, batch, chip: as of `jaxpipe.plan`.
      memory: bytes that a step may take; default: 0.95 of the chip's.
      **options: of `jaxpipe.plan`: ``optimizer``, ``rng``, ``kernels`` and others.

    Raises:
      ValueError: no stash fits, with the fewest bytes that one takes or all that is needed besides; a pipeline that is
        forward alone; all that `jaxpipe.plan` raises.

    >>> import jax, jaxpipe
    >>> from jax.sharding import AbstractMesh, AxisType
    >>> mesh = AbstractMesh((4,), ("pp",), axis_types=(AxisType.Auto,))
    >>> schedule = jaxpipe.schedule.build("zb1p", 4, 16)
    >>> step = jaxpipe.value_and_grad(
    ...     lambda w, x, ctx: jax.numpy.tanh(x @ w) @ w, schedule, mesh,
    ...     head=lambda outer, y, data, ctx: (y**2).mean())
    >>> weights = jax.ShapeDtypeStruct((4, 4096, 4096), "bfloat16")
    >>> shapes = jaxpipe.Params(weights), jax.ShapeDtypeStruct((262144, 4096), "bfloat16")
    >>> plenty, little = (jaxpipe.fit_stash(step, *shapes, "H100", memory=memory) for memory in (80e9, 5e9))
    >>> plenty.plan.memory.stash > little.plan.memory.stash, little.plan.memory.total <= 5e9
    (True, True)
    """
    if not isinstance(pipeline, Pipeline):
        raise ValueError(f"pipeline is {pipeline!r:.80}: pass what jaxpipe.value_and_grad returned")
    if pipeline.program.forward_only:
        raise ValueError(f"{pipeline!r} is forward alone and keeps nothing: pass what jaxpipe.value_and_grad returned")
    if isinstance(chip, str):
        chip = chips.chip(chip)
    limit = SHARE * chip.memory if memory is None else memory
    slots = slots_of(as_dispatched(pipeline.program, pipeline.dispatch)).microbatches

    def at(stash: int) -> FittedStash:
        changed = dataclasses.replace(pipeline, options=dataclasses.replace(pipeline.options, stash=stash))
        return FittedStash(stash, changed, plan(changed, params, batch, chip, **options))

    found = at(_UNLIMITED)
    memory_then = found.plan.memory
    if memory_then.total <= limit:
        return found
    least = memory_then.total - memory_then.stash - memory_then.transient
    if least >= limit:
        raise ValueError(
            f"a step takes at least {least:,} bytes besides its stash, and may take "
            f"{limit:,.0f} in all: spread the model over more devices, or use smaller microbatches"
        )
    fitting: FittedStash | None = None
    refusal: ValueError | None = None
    # What is on the host counts as kept, too.
    below, above = 0, (memory_then.stash + memory_then.host) // slots + 1
    for _ in range(_TRIES):
        # Besides the stash a step takes about as much with a little more or less of it.
        besides = found.plan.memory.total - found.plan.memory.stash
        stash = int((limit - besides + found.plan.memory.host) // slots)
        if not below < stash < above:
            stash = (below + above) // 2
        if stash < 1.02 * below or stash == 0:
            break
        try:
            found = at(stash)
        except ValueError as error:
            refusal, below = error, stash
            continue
        if found.plan.memory.total <= limit:
            fitting, below = found, stash
        else:
            above = stash
    if fitting is None and refusal is not None:
        raise ValueError(f"{limit:,.0f} bytes are too few for a step: {refusal}") from refusal
    if fitting is None:
        raise ValueError(f"no stash was found whose step takes {limit:,.0f} bytes; the last of {above:,} bytes did not")
    return fitting
