"""What each rank runs in which step, and the activations and cotangents that pass from one to another.

A *boundary* is an activation or its cotangent between two operations; boundary s is the input of stage s, and the last
one the output of the last stage.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxpipe.runtime.actions import Actions, B, F, I
from jaxpipe.runtime.pack import Packing
from jaxpipe.runtime.program import Op

_OPS = tuple(Op)
EMBED, HEAD, EMBED_GRAD = (_OPS.index(op) for op in (Op.EMBED, Op.HEAD, Op.EMBED_GRAD))
BEFORE, GROUP, AFTER = range(3)
"""The parts of a tick: what runs before a group, the group, and what runs after it."""

# What operations read from their message slots and write to them, in the order of Op: (how many boundaries after the
# stage's input, whether it is the cotangent there); (-1, 0) for nothing.
_READS = np.array([[0, 0], [1, 1], [1, 1], [-1, 0], [-1, 0], [1, 0], [0, 1]])
_WRITES = np.array([[1, 0], [0, 1], [0, 1], [-1, 0], [0, 0], [1, 1], [-1, 0]])


@dataclasses.dataclass(frozen=True, eq=False)
class Operations:
    """All operations, as columns ``int[operations]``, in an order that is that of each rank.

    Attributes:
      op: the kind, a number in the order of `Op`.
      stage, microbatch, chunk: what it works on.
      rank: the rank that runs it; of a shared one, the rank that holds the stage beside it.
      tick, step: when.
      instruction: the number of the instruction, one branch of one rank, that the operation is part of.
      place: 0, or 1 for the second operation of an instruction.
      shared: whether all ranks run it, in a step in which they do nothing else.
      ticks: ``int[steps]``, the tick of each step.
      num_microbatches: of the schedule.
    """

    op: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    chunk: np.ndarray
    rank: np.ndarray
    tick: np.ndarray
    step: np.ndarray
    instruction: np.ndarray
    place: np.ndarray
    shared: np.ndarray
    ticks: np.ndarray
    num_microbatches: int

    @property
    def reads(self) -> np.ndarray:
        """The number of the boundary that an operation reads from its message slot; -1 for none."""
        return self._boundary(_READS)

    @property
    def writes(self) -> np.ndarray:
        """The number of the boundary that an operation writes to its message slot; -1 for none."""
        return self._boundary(_WRITES)

    def _boundary(self, table: np.ndarray) -> np.ndarray:
        after, cotangent = table[self.op].T
        return np.where(after < 0, -1, ((self.stage + after) * self.num_microbatches + self.microbatch) * 2 + cotangent)

    def text(self, instruction: int | np.ndarray) -> str:
        """The operations of an instruction, as in ``3F0&2B1``."""
        among = np.flatnonzero(self.instruction == instruction)
        return "&".join(f"{self.stage[i]}{_OPS[self.op[i]].value}{self.microbatch[i]}" for i in among)


@dataclasses.dataclass(frozen=True, eq=False)
class Values:
    """All boundaries that an operation reads, as columns ``int[values]``.

    Attributes:
      boundary: its number; see `Operations.reads`.
      writer, reader: the operations that write and read it.
      source, target: their ranks.
      release, deadline: their ticks.
    """

    boundary: np.ndarray
    writer: np.ndarray
    reader: np.ndarray
    source: np.ndarray
    target: np.ndarray
    release: np.ndarray
    deadline: np.ndarray


def make_operations(actions: Actions, packing: Packing, *, embed_grad: bool, shared_ends: bool) -> Operations:
    """The operations of every tick.

    A rank runs EMBED right before a group that needs it, HEAD and EMBED_GRAD right after one. Where they are shared
    a tick has three parts: every EMBED that a group of the tick needs, one after the other; the groups, each rank
    running its own; every HEAD and EMBED_GRAD that follows from one, one after the other.

    Raises:
      ValueError: the packing is not one of this schedule.
    """
    tick = _tick_of_groups(actions, packing)
    op, action, part = _with_ends(actions, embed_grad=embed_grad)
    group = actions.group[action]
    # Ordered by tick (where ends are shared, by its parts), rank and group; within the group as the rank runs it.
    phase = tick[group] * 3 + part * shared_ends
    within = part * 16 + np.where(part == GROUP, actions.place[action], op)
    order = np.argsort((phase * len(tick) + group) * 64 + within, kind="stable")
    op, action, part, group, phase = (column[order] for column in (op, action, part, group, phase))

    place = np.where(part == GROUP, actions.place[action], 0)
    instruction = np.cumsum(place == 0) - 1
    rank, shared = actions.rank[group], shared_ends & (part != GROUP)
    step, steps = _steps(phase, instruction, np.where(shared, len(actions.lengths), rank), packing.num_ticks)
    return Operations(
        op=op,
        stage=actions.stage[action],
        microbatch=actions.microbatch[action],
        chunk=np.where(shared, 0, _chunks(actions.routes)[actions.direction[action], actions.stage[action]]),
        rank=rank,
        tick=tick[group],
        step=step,
        instruction=instruction,
        place=place,
        shared=shared,
        ticks=np.repeat(np.arange(packing.num_ticks, dtype=np.int32), steps),
        num_microbatches=actions.num_microbatches,
    )


def _tick_of_groups(actions: Actions, packing: Packing) -> np.ndarray:
    """``int[groups]``: the tick in which each group runs."""
    ranks, lengths = len(actions.lengths), tuple(actions.lengths.tolist())
    if (packing.progress[-1] if packing.progress else (0,) * ranks) != lengths:
        raise ValueError(
            f"the packing ends at {packing.progress[-1:]} groups, but the schedule's ranks have {lengths}; pack the "
            "same schedule (with forward_only, pack forwards(schedule))"
        )
    progress = np.array(packing.progress, np.int64).reshape(packing.num_ticks, -1)
    return np.concatenate(
        [np.searchsorted(progress[:, rank], np.arange(n), side="right") for rank, n in enumerate(actions.lengths)]
    )


def _with_ends(actions: Actions, *, embed_grad: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(op, the action that has it, the part of the tick) of all actions and of the ends that go with them."""
    backward = (actions.kind == B) | (actions.kind == I)
    first, last = actions.stage == 0, actions.stage == actions.num_stages - 1
    operations = [
        (EMBED, np.flatnonzero((actions.kind == F) & first), BEFORE),
        (None, np.arange(len(actions.kind)), GROUP),
        (HEAD, np.flatnonzero((actions.kind == F) & last), AFTER),
        (EMBED_GRAD, np.flatnonzero(backward & first & embed_grad), AFTER),
    ]
    return (
        np.concatenate([actions.kind if op is None else np.full(len(index), op) for op, index, _ in operations]),
        np.concatenate([index for _, index, _ in operations]),
        np.concatenate([np.full(len(index), part) for _, index, part in operations]),
    )


def _steps(
    phase: np.ndarray, instruction: np.ndarray, counter: np.ndarray, num_ticks: int
) -> tuple[np.ndarray, np.ndarray]:
    """(``int[operations]``, the step of each; ``int[ticks]``, how many steps each tick has).

    Args:
      phase: ``int[operations]``, three a tick; each begins once the longest row of instructions of the last one ends.
      instruction: ``int[operations]``, in ascending order.
      counter: ``int[operations]``, whose instructions follow one another: those of a rank, or those that all share.
      num_ticks: ticks of the packing.
    """
    begins = np.diff(phase * (counter.max(initial=0) + 1) + counter, prepend=-1) != 0
    after_begin = instruction - np.maximum.accumulate(np.where(begins, instruction, 0))
    steps = np.zeros(3 * num_ticks, np.int64)
    np.maximum.at(steps, phase, after_begin + 1)
    return (np.cumsum(steps) - steps)[phase] + after_begin, steps.reshape(-1, 3).sum(1)


def _chunks(routes: np.ndarray) -> np.ndarray:
    """``int[directions, stages]``: which of its rank's stages that is; see `Schedule.rank_stages`."""
    ranks = routes.T.reshape(-1)  # stage by stage
    return np.array([(ranks[:i] == rank).sum() for i, rank in enumerate(ranks)]).reshape(routes.T.shape).T


def find_values(operations: Operations) -> Values:
    """Every boundary that an operation reads. One that no operation reads (perhaps dx of stage 0) goes nowhere.

    Raises:
      ValueError: what an operation needs is not made, or arrives too late.
    """
    reads, writes = operations.reads, operations.writes
    (writing,), (reader,) = np.nonzero(writes >= 0), np.nonzero(reads >= 0)
    made_by = np.full(1 + max(reads.max(initial=0), writes.max(initial=0)), -1)
    made_by[writes[writing]] = writing
    boundary = reads[reader]
    writer = made_by[boundary]
    source, target = operations.rank[writer], operations.rank[reader]
    release, deadline = operations.tick[writer], operations.tick[reader]
    made_in, read_in = operations.instruction[writer], operations.instruction[reader]
    late = np.where(source != target, release >= deadline, made_in >= read_in)
    for i in np.flatnonzero((writer < 0) | late)[:1]:
        need = f"{operations.text(read_in[i])} on rank {target[i]}"
        if writer[i] < 0:
            raise ValueError(f"no action produces what {need} needs")
        made = operations.text(made_in[i])
        raise ValueError(
            f"{need} in tick {deadline[i]} needs {made} of rank {source[i]}, which runs in tick {release[i]}; messages "
            "move only between ticks, where shared ends run too"
        )
    return Values(boundary, writer, reader, source, target, release, deadline)
