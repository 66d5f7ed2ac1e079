"""`choose`: the fastest schedule that fits, from times measured on the model's own stage."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxpipe.api import Pipeline, value_and_grad
from jaxpipe.params import Params
from jaxpipe.planning.chips import Chip, chip_of
from jaxpipe.planning.comparing import CandidateSearch, Make, ScheduleChoice
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.registry import BUILDERS
from jaxpipe.schedule.schedule import Schedule


def choose(
    stage: Callable[..., Any],
    params: Params | Callable[[Schedule], Params],
    batch: Any,
    mesh: Mesh,
    *,
    schedules: Sequence[str] = tuple(BUILDERS),
    microbatches: int | Sequence[int] | None = None,
    memory: float | None = None,
    optimizer: Any = None,
    rng: Any = None,
    step_inputs: Any = None,
    moves: int = 0,
    repeats: int = 5,
    progress: bool = True,
    **options: Any,
) -> ScheduleChoice:
    """The fastest schedule and number of microbatches that fit in memory, for this model on these devices.

    Forward, input gradient, weight gradient, whole backward, an overlapped pair, embedding, head and a message are
    measured on the devices, for two or three sizes of microbatches; other sizes are interpolated. Every schedule is
    packed into ticks with these times, as `jaxpipe.value_and_grad` packs it, and what is done once a step is added.
    Memory is that of `jaxpipe.plan`, worked out for schedules in the order of their speed until one fits, and for all
    with its number of microbatches. The search takes seconds beside the compilation of some ten programs for each
    number of stages and size.

    Args:
      stage: the stage function of `jaxpipe.value_and_grad`.
      params: arrays or shapes, in rows for a number of stages: schedules with another number are then left out. Or a
        function of the schedule that returns them, where ``stage`` takes stages of more or fewer layers.
      batch: of a step, arrays or shapes. Of shapes all but floats are taken as zeros, which is nothing that a router
        should be measured with.
      mesh: of devices.
      schedules: names that `jaxpipe.schedule.build` knows.
      microbatches: of a step: a number, several, or None for all that divide the batch and are no fewer than ranks.
        Where examples are masked others fit as well: name them.
      memory: bytes of a device that a step may take; None: all that the device has for JAX.
      optimizer: an optax transformation, or its state as arrays or shapes, which counts as memory.
      rng, step_inputs: as the step is called with.
      moves: local moves of the search for a better order than the builders', see `jaxpipe.schedule.improve`; 0: none.
      repeats: measurements of which the median counts.
      progress: whether standard error hears what is being done.
      **options: further arguments of `jaxpipe.value_and_grad`: ``embed``, ``head``, ``data_axes`` and so on.

    Returns:
      A `ScheduleChoice`. Of several processes all choose the same, from the measurements of the first.

    Raises:
      ValueError: nothing fits, with the least memory that does; no schedule exists for these numbers; arguments that do
        not fit together.

    >>> import jax, jax.numpy as jnp, jaxpipe
    >>> def stage(w, x, ctx):
    ...     return jnp.tanh(x @ w)
    >>> params = jaxpipe.Params(jnp.ones((2, 8, 8)))
    >>> choice = jaxpipe.choose(
    ...     stage, params, jnp.ones((16, 8)), jaxpipe.make_mesh(pp=2), schedules=["gpipe", "1f1b"], microbatches=4,
    ...     head=lambda outer, y, data, ctx: (y**2).mean(), repeats=1, progress=False)
    >>> (loss, aux), grads = jax.jit(choice.pipeline)(params, jnp.ones((16, 8)))
    >>> choice.schedule.name in ("gpipe", "1f1b") and len(choice.rows) == 2
    True
    """

    def make(schedule: Schedule) -> tuple[Pipeline, Params]:
        return value_and_grad(stage, schedule, mesh, **options), params(schedule) if callable(params) else params

    return choose_pipeline(
        make, batch, mesh, axis=options.get("axis", "pp"),
        schedules=schedules, microbatches=microbatches, memory=memory, optimizer=optimizer, rng=rng,
        step_inputs=step_inputs, moves=moves, repeats=repeats, progress=progress,
    )  # fmt: skip


def choose_pipeline(
    make: Make,
    batch: Any,
    mesh: Mesh,
    *,
    axis: str = "pp",
    schedules: Sequence[str] = tuple(BUILDERS),
    microbatches: int | Sequence[int] | None = None,
    memory: float | None = None,
    optimizer: Any = None,
    rng: Any = None,
    step_inputs: Any = None,
    moves: int = 0,
    repeats: int = 5,
    progress: bool = True,
) -> ScheduleChoice:
    """`choose` for a model that is made for a schedule: of `jaxpipe.flax.from_nnx`, say.

    Args:
      make: ``make(schedule)`` returns a `jaxpipe.flax.PipelinedModel`; or (pipeline, params), params being parameters,
        their shapes, or a function without arguments that makes them when they are needed; or (pipeline, params,
        optimizer). It is called once for each way in which schedules cut a model and store its parameters: for
        one stage a rank, for a V, for "interleaved". What it makes is held for one of them at a time.
      batch: as for `choose`, and so is all else.
      mesh: of devices, the one of the pipelines.
      axis: of the pipeline.
      schedules, microbatches, memory, optimizer, rng, step_inputs, moves, repeats, progress: as for `choose`.

    Raises:
      ValueError: as `choose`.

    >>> import jaxpipe, jaxpipe.flax
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> class Model(nnx.Module):
    ...     def __init__(self):
    ...         self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(4)])
    ...     def __call__(self, x):
    ...         for layer in self.layers:
    ...             x = layer(x)
    ...         return x
    >>> def make(schedule):
    ...     loss = lambda model, x: (model(x) ** 2).mean()
    ...     return jaxpipe.flax.from_nnx(Model, schedule, mesh, blocks="layers", loss=loss)
    >>> mesh = jaxpipe.make_mesh(pp=2)
    >>> choice = jaxpipe.choose_pipeline(
    ...     make, jnp.ones((8, 8)), mesh, schedules=["1f1b", "zbv"], microbatches=4, repeats=1, progress=False)
    >>> sorted(row.name for row in choice.rows)
    ['1f1b', 'zbv']
    """
    ranks, budget = _ranks(mesh, axis), _budget(mesh, memory)
    unknown = [name for name in schedules if name not in BUILDERS]
    if unknown or not schedules:
        raise ValueError(f"schedules={list(schedules)}: choose from {', '.join(BUILDERS)}")
    moves, repeats = at_least("choose", "moves", moves, 0), at_least("choose", "repeats", repeats, 1)
    tell = _tell if progress else lambda _: None
    counts = _microbatches(microbatches, batch, ranks)
    search = CandidateSearch(make, batch, optimizer, rng, step_inputs, repeats, budget, _chip(mesh), tell)
    search.add([(name, count) for name in schedules for count in counts], ranks)
    if not search.entries:
        told = "; ".join(f"{row.name} with {row.num_microbatches}: {row.reason}" for row in search.refused[:3])
        raise ValueError(f"no schedule exists for {ranks} ranks and microbatches {counts}: {told}")
    search.rank()
    best = search.first_that_fits()
    if moves:
        best = search.improve(best, moves)
    return search.choice(best)


def _ranks(mesh: Any, axis: str) -> int:
    """Pipeline ranks of a mesh."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh is {mesh!r:.80}: times are measured, so give a mesh of devices, as jaxpipe.make_mesh does"
        )
    if axis not in mesh.shape:
        raise ValueError(f"axis={axis!r} is none of the mesh's axes {dict(mesh.shape)}: name that of the pipeline")
    return mesh.shape[axis]


def _microbatches(given: int | Sequence[int] | None, batch: Any, ranks: int) -> list[int]:
    """The numbers of microbatches to look at; with fewer than ranks, some of them never work at the same time."""
    if given is None:
        sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.shape(leaf)}
        size = math.gcd(*sizes)
        found = [count for count in range(max(1, min(ranks, size)), size + 1) if size % count == 0]
    else:
        found = sorted(
            {at_least("choose", "microbatches", count, 1) for count in np.atleast_1d(np.asarray(given)).tolist()}
        )
    if not found:
        raise ValueError(
            f"microbatches={given!r} of a batch of {jax.tree.map(np.shape, batch)}: give a positive number, and "
            "a batch that has examples"
        )
    return found


def _chip(mesh: Mesh) -> Chip | None:
    return chip_of(mesh.devices.flat[0].device_kind)


def _budget(mesh: Mesh, given: float | None) -> float:
    """Bytes of a device that a step may take, the same in all processes."""
    if given is not None:
        if isinstance(given, str) or not given > 0:
            raise ValueError(f"memory={given!r}: bytes of a device, more than 0; None: all that it has")
        return float(given)
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
    known = [float(limit) for limit in limits if limit]
    chip = _chip(mesh)
    budget = min(known) if known else chip.memory if chip is not None else math.inf
    if jax.process_count() == 1:
        return budget
    return float(multihost_utils.process_allgather(np.float64(budget)).min())


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(f"jaxpipe.choose: {text}", file=sys.stderr, flush=True)
