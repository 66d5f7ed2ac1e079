"""What a pipeline was asked for besides its model, schedule and mesh, in one record."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxpipe.params import Params
from jaxpipe.schedule.simulator import Costs
from jaxpipe.stage.exchanged import MAX_GROWTH

DISPATCHERS = ("unrolled", "by_rank", "switch", "loops", "stretches", "sequential")
"""How a rank can run the branch of a step; see `jaxpipe.value_and_grad`."""

COPY_NOTHING = frozenset({"unrolled", "by_rank"})
"""Those whose slots are values of their own: what is kept stays where it was made."""

AUTOMATIC = "automatic"
"""Stands for one of `DISPATCHERS` until the program is there that it is chosen for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Axes:
    """The mesh axes that the executor handles itself; all others are the compiler's.

    Attributes:
      pipeline: the axis of the pipeline ranks.
      data: axes that split the batch: the loss is a mean over them, gradients are summed over them.
      replicated: further axes that a stage communicates on by hand while the batch is the same on them.
      sizes: the size of every axis above.
      complete: whether the mesh has no further axis, or of size 1 alone: then nothing is the compiler's to divide.
    """

    pipeline: str
    data: tuple[str, ...]
    replicated: tuple[str, ...]
    sizes: dict[str, int]
    complete: bool

    @property
    def names(self) -> frozenset[str]:
        """All manual axes."""
        return frozenset({self.pipeline, *self.data, *self.replicated})


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """The options of `jaxpipe.value_and_grad` and `jaxpipe.forward`, checked, with defaults filled in.

    Attributes:
      axes: the mesh axes handled by hand.
      specs: PartitionSpec of every parameter, as a tree prefix of Params.
      batch_spec: PartitionSpec of every leaf of the batch.
      compute_dtype: dtype of the working copies, or None: as the parameters are.
      costs: the times that the schedule is packed for.
      dispatch: one of `DISPATCHERS`, or `AUTOMATIC`.
      shared_ends: whether all ranks run embed and head together.
      order: which stage a row of the stages' parameters belongs to, "model" or "storage".
      trainable: which parameters have a gradient, as the user says it; see `jaxpipe.value_and_grad`.
      example_mask: the batch's leaf that says which examples count, or None: all do.
      grad_dtype: dtype that gradients are summed in, or None: `accumulation_dtype` of the working copies'.
      fsdp_axes: data axes over which parameters are sharded and gathered where they are used.
      zero1_axes: data axes over which gradients are reduce-scattered after the loop.
      zero1_parameters: whether parameters are kept divided as these gradients are.
      stash: bytes that a microbatch and stage may keep, or None: what light work cannot make again.
      offload: bytes of what a microbatch and stage keep that go to host memory.
      wide_products: whether products that are gradients of stages come in float32, to be added to sums that are wide.
      uninitialised: whether `jax.lax.empty` leaves memory as it is, as on GPUs; on CPUs it is zeros.
      min_shard_size: elements of the smallest parameter that either is done to.
      max_growth: how many times the bytes of parameters what collectives make of them may take all step long.
    """

    axes: Axes
    specs: Params
    batch_spec: P
    compute_dtype: Any
    costs: Costs
    dispatch: str
    shared_ends: bool
    order: str
    trainable: Any = None
    example_mask: str | None = None
    grad_dtype: Any = None
    fsdp_axes: tuple[str, ...] = ()
    zero1_axes: tuple[str, ...] = ()
    zero1_parameters: bool = False
    min_shard_size: int = 0
    stash: int | None = None
    offload: int = 0
    wide_products: bool = False
    uninitialised: bool = False
    max_growth: float = MAX_GROWTH


def sums_are_wide(grad_dtype: Any) -> bool:
    """Whether sums of narrow gradients are float32 or wider, in the dtype of `Options`."""
    return grad_dtype is None or jnp.dtype(grad_dtype).itemsize >= 4
