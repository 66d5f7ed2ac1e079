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

# What operations read from their message slots and write to them, in the order of Op: how many boundaries after that at
# the stage's input, and whether its cotangent. Nothing is -1.
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
      cell: operations of one cell are one branch of one rank.
      row: 0, or 1 for the second operation of a cell.
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
    cell: np.ndarray
    row: np.ndarray
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

    def text(self, cell: int | np.ndarray) -> str:
        """The operations of a cell, as in ``3F0&2B1``."""
        rows = np.flatnonzero(self.cell == cell)
        return "&".join(f"{self.stage[i]}{_OPS[self.op[i]].value}{self.microbatch[i]}" for i in rows)


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
    ranks = len(actions.lengths)
    progress = np.array(packing.progress, np.int64).reshape(packing.num_ticks, -1)
    lengths = tuple(actions.lengths.tolist())
    if (packing.progress[-1] if packing.progress else (0,) * ranks) != lengths:
        raise ValueError(
            f"the packing ends at {packing.progress[-1:]} groups, but the schedule's ranks have {lengths}; pack the "
            "same schedule (with forward_only, pack forwards(schedule))"
        )
    tick = np.concatenate(
        [np.searchsorted(progress[:, rank], np.arange(n), side="right") for rank, n in enumerate(actions.lengths)]
    )

    backward = (actions.kind == B) | (actions.kind == I)
    first, last = actions.stage == 0, actions.stage == actions.num_stages - 1
    parts = [  # operation, actions that have it, whether before, in or after the group
        (EMBED, np.flatnonzero((actions.kind == F) & first), 0),
        (None, np.arange(len(actions.kind)), 1),
        (HEAD, np.flatnonzero((actions.kind == F) & last), 2),
        (EMBED_GRAD, np.flatnonzero(backward & first & embed_grad), 2),
    ]
    action = np.concatenate([index for _, index, _ in parts])
    op = np.concatenate([actions.kind if op is None else np.full(len(index), op) for op, index, _ in parts])
    part = np.concatenate([np.full(len(index), part) for _, index, part in parts])
    group = actions.group[action]
    # Ordered by tick (where ends are shared, by its parts), rank and group; within the group as the rank runs it.
    outer = tick[group] * 3 + part * shared_ends
    within = part * 16 + np.where(part == 1, actions.place[action], op)
    order = np.argsort((outer * len(tick) + group) * 64 + within, kind="stable")
    action, op, part, group, outer = (column[order] for column in (action, op, part, group, outer))
    row = np.where(part == 1, actions.place[action], 0)
    cell = np.cumsum(row == 0) - 1
    rank, shared = actions.rank[group], shared_ends & (part != 1)

    # Steps are counted from the beginning of the tick, or of its part, by each rank, or by all that share.
    counter = outer * (ranks + 1) + np.where(shared, ranks, rank)
    starts = np.diff(counter, prepend=-1) != 0
    place = cell - np.maximum.accumulate(np.where(starts, cell, 0))
    steps = np.zeros(3 * packing.num_ticks, np.int64)
    np.maximum.at(steps, outer, place + 1)
    return Operations(
        op=op,
        stage=actions.stage[action],
        microbatch=actions.microbatch[action],
        chunk=np.where(shared, 0, _chunks(actions.routes)[actions.direction[action], actions.stage[action]]),
        rank=rank,
        tick=tick[group],
        step=(np.cumsum(steps) - steps)[outer] + place,
        cell=cell,
        row=row,
        shared=shared,
        ticks=np.repeat(np.arange(packing.num_ticks, dtype=np.int32), steps.reshape(-1, 3).sum(1)),
        num_microbatches=actions.num_microbatches,
    )


def _chunks(routes: np.ndarray) -> np.ndarray:
    """``int[directions, stages]``: which of its rank's stages that is; see `Schedule.rank_stages`."""
    ranks = routes.reshape(-1)
    return np.array([(ranks[:i] == rank).sum() for i, rank in enumerate(ranks)]).reshape(routes.shape)


def find_values(operations: Operations) -> Values:
    """Every boundary that an operation reads. One that none reads (dx of stage 0, perhaps) goes nowhere.

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
    late = np.where(source != target, release >= deadline, operations.cell[writer] >= operations.cell[reader])
    for i in np.flatnonzero((writer < 0) | late)[:1]:
        need = f"{operations.text(operations.cell[reader[i]])} on rank {target[i]}"
        if writer[i] < 0:
            raise ValueError(f"no action produces what {need} needs")
        made = operations.text(operations.cell[writer[i]])
        raise ValueError(
            f"{need} in tick {deadline[i]} needs {made} of rank {source[i]}, which runs in tick {release[i]}; messages "
            "move only between ticks, where shared ends run too"
        )
    return Values(boundary, writer, reader, source, target, release, deadline)
