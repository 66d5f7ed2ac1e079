"""A schedule lowered to integer tables that one scan on every rank reads."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from jaxpipe.schedule.schedule import Schedule


class Op(enum.Enum):
    """What a rank can run in a step: the four kinds of a schedule, and the ends of the model.

    >>> Op("E")
    <Op.EMBED: 'E'>
    """

    F = "F"  # forward
    B = "B"  # whole backward
    I = "I"  # input-gradient half of the backward
    W = "W"  # weight-gradient half of the backward
    EMBED = "E"  # makes the input of stage 0, right before its forward
    HEAD = "H"  # loss and its gradient at the output of the last stage, right after its forward
    EMBED_GRAD = "G"  # gradient of the embedding, right after the backward of stage 0


class Field(enum.IntEnum):
    """The columns of ``Program.operands``.

    The pool of messages has one extra dummy slot. Its index, and that of other pools' slot behind their last, is
    the pool's ``num_*_slots``, and named wherever a column does not apply to the operation.

    ==============  ===================================================================================
    MICROBATCH      the microbatch worked on; 0 for an idle rank
    STAGE           the stage worked on; 0 for an idle rank
    SOURCE          message slot read: x of F, dy of B and I, y of HEAD, dx of EMBED_GRAD
    TARGET          message slot written: y of F, dx of B and I, x of EMBED, dy of HEAD; may be SOURCE
    STASH           written by F, read and freed by B or I
    WEIGHT_STASH    written by F, read and freed by B or W, read and kept by I
    CROSS           written by I, read and freed by W
    ==============  ===================================================================================
    """

    MICROBATCH = 0
    STAGE = 1
    SOURCE = 2
    TARGET = 3
    STASH = 4
    WEIGHT_STASH = 5
    CROSS = 6


Branch = tuple[tuple[Op, int], ...]
"""The one or two operations that a rank runs in a step, each with its part, an index into ``Program.parts``.

``()`` is idle.
"""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """Tables for an executor: in every step each rank runs one branch, then messages may move.

    A step has two moments. First every rank runs its branch, in which neither operation of a pair writes a
    slot that the other reads; EMBED, HEAD and EMBED_GRAD are branches of their own. Where these are shared, all
    ranks run the same one in the same step, and all of their message slots are the dummy except those of the rank
    with the stage beside it. Then, on the channels flagged for the step, every rank sends and receives; all sends read
    before any receive writes. A message between two stages of the same rank stays in its slot.

    Attributes:
      schedule: what was lowered.
      forward_only: whether only forwards (and EMBED and HEAD, which then writes no gradient) remain.
      shared_ends: whether all ranks run EMBED, HEAD and EMBED_GRAD together.
      parts: the distinct (local chunk, kind of stage); where all stages are of one kind, part i is chunk i.
      branches: the distinct branches; ``branches[0]`` is idle.
      branch: ``int32[steps, ranks]``, indices into ``branches``.
      operands: ``int32[steps, ranks, 2, len(Field)]``, one row per operation of the branch, the
        forward first in an overlapped pair. Rows without an operation hold zeros and dummy slots.
      channels: the (source rank, destination rank) pairs of each channel, each fit for one ``ppermute``. Two
        channels may be the same permutation: they carry two messages of a rank after one step.
      communicate: ``bool[steps, channels]``, whether messages move after the step; equal on all ranks.
      send: ``int32[steps, ranks, channels]``, the message slot that leaves; the dummy if none does.
      receive: ``int32[steps, ranks, channels]``, the message slot written; the dummy if nothing arrives.
      ticks: ``int32[steps]``, the tick that each step belongs to; ticks end with communication.
      num_message_slots: message slots of a rank, each one message between stages, without the dummy.
      num_stash_slots: slots for what the input gradient needs, from F to B or I; without the dummy.
      num_weight_stash_slots: slots for what the weight gradient needs, from F to B or W; likewise.
      num_cross_slots: slots for what crosses from I to W; likewise.
      makespan: the lockstep makespan in units of the costs that the schedule was packed with.
    """

    schedule: Schedule
    forward_only: bool
    shared_ends: bool
    parts: tuple[tuple[int, int], ...]
    branches: tuple[Branch, ...]
    branch: np.ndarray
    operands: np.ndarray
    channels: tuple[tuple[tuple[int, int], ...], ...]
    communicate: np.ndarray
    send: np.ndarray
    receive: np.ndarray
    ticks: np.ndarray
    num_message_slots: int
    num_stash_slots: int
    num_weight_stash_slots: int
    num_cross_slots: int
    makespan: float

    def __repr__(self) -> str:
        return f"<Program of {self.schedule!r}: {self.num_steps} steps, {len(self.branches)} branches>"

    def together(self, branch: Branch) -> bool:
        """Whether all ranks run a branch in the same step."""
        return self.shared_ends and any(op in (Op.EMBED, Op.HEAD, Op.EMBED_GRAD) for op, _ in branch)

    @property
    def num_steps(self) -> int:
        """Steps of the scan."""
        return self.branch.shape[0]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return self.branch.shape[1]
