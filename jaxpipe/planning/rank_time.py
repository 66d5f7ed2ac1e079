"""How long one rank of a planned pipeline works in a step: without waiting for other ranks, and without a network."""

from __future__ import annotations

from jaxpipe.api import Pipeline
from jaxpipe.planning import timing
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.planner import PROGRAMS, Plan
from jaxpipe.planning.work import DeviceWork
from jaxpipe.runtime.stretches import loop_reads

_PASSES = {"all-to-all": 2.0, "all-gather": 1.0}
"""How often a collective that stays on the device moves its whole array: read and written, or written alone."""


def rank_seconds(pipeline: Pipeline, plan: Plan, rank: int, *, achieved: Achieved = PROGRAMS) -> float:
    """Seconds that a rank's kernels take in a step, optimizer included, with collectives as passes over memory.

    It is what a plan says of the program that `jaxpipe.planning.one_device` makes, which waits for nobody: each branch
    of it is a loop of no or one trip, whose condition the host reads.

    Args:
      pipeline: that was planned.
      plan: of it.
      rank: of the pipeline.
      achieved: as the plan was made with.

    Raises:
      ValueError: there is no such rank.
    """
    ranks = pipeline.program.schedule.num_ranks
    if not 0 <= rank < ranks:
        raise ValueError(f"rank={rank} of {ranks} ranks: they are numbered from 0 to {ranks - 1}")
    runs = timing.count_runs(pipeline, plan.work, plan.timeline)[rank]
    actions = sum(
        count * _seconds(plan.work.of(letter, kind), plan.chip, achieved) for (letter, kind), count in runs.items()
    )
    reads = int(loop_reads(pipeline.program)[rank]) * achieved.read_us / 1e6
    return actions + _seconds(plan.work.once, plan.chip, achieved) + plan.update + reads


def _seconds(work: DeviceWork, chip: Chip, achieved: Achieved) -> float:
    moved = sum(_PASSES.get(message.kind, 0.0) * message.nbytes * message.times for message in work.messages)
    return work.compute(chip, achieved) + moved / (chip.hbm * achieved.memory)
