"""Lowers a schedule to a Program: the int32 tables that the executor's scan reads.

Three passes, each on all operations at once: what runs in which step, when each message leaves, and where each message
and residual lives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxpipe.runtime.actions import Actions, B, F, I, W, read_actions
from jaxpipe.runtime.instructions import Operations, Values, find_values, make_operations
from jaxpipe.runtime.messages import Messages, route
from jaxpipe.runtime.pack import Packing, pack_actions
from jaxpipe.runtime.program import Branch, Field, Op, Program
from jaxpipe.runtime.slots import colour
from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs


def lower(
    schedule: Schedule,
    costs: Costs = Costs(),  # noqa: B008  (frozen)
    *,
    embed_grad: bool = True,
    forward_only: bool = False,
    shared_ends: bool = False,
    packing: Packing | None = None,
    kind_of: Sequence[int] | None = None,
) -> Program:
    """Lowers a schedule to the tables of one scan.

    Args:
      schedule: what every rank does, in which order; as ``jaxpipe.schedule.check`` accepts it.
      costs: what the schedule is packed for.
      embed_grad: emit an EMBED_GRAD after the backward of stage 0; otherwise its dx goes nowhere.
      forward_only: keep only the forwards, EMBED and HEAD; nothing is stashed.
      shared_ends: all ranks run EMBED, HEAD and EMBED_GRAD together, each in a step of its own.
      packing: the ticks, instead of those that ``pack`` finds, with the same ``shared_ends``. With ``forward_only``
        it is a packing of ``forwards(schedule)``.
      kind_of: of each stage its kind, each with code of its own; None: all are of one kind.

    Returns:
      The program; its stash slots are as few as the order of each rank allows.

    Raises:
      ValueError: the schedule cannot run, or the packing is not one of this schedule.

    >>> from jaxpipe.schedule import build
    >>> program = lower(build("gpipe", 2, 2))
    >>> ["+".join(op.value + str(chunk) for op, chunk in branch) for branch in program.branches]
    ['', 'F0', 'B0', 'E0', 'H0', 'G0']
    >>> program.branch[:4].tolist()  # rank 0 embeds and runs its first forward; rank 1 waits for it
    [[3, 0], [1, 0], [3, 1], [1, 4]]
    >>> lower(build("gpipe", 2, 2), shared_ends=True).branch[:6].tolist()  # EMBED and HEAD on both
    [[3, 3], [1, 0], [3, 3], [1, 1], [4, 4], [0, 1]]
    """
    actions = read_actions(forwards(schedule) if forward_only else schedule)
    packing = pack_actions(actions, costs, shared_ends=shared_ends) if packing is None else packing
    operations = make_operations(actions, packing, embed_grad=embed_grad, shared_ends=shared_ends)
    values = find_values(operations)
    messages = route(values, schedule.num_ranks)
    moved = _last_steps(operations.ticks)[messages.tick]
    slots = _allocate(actions, operations, values, messages, moved)
    parts, part = _parts(operations, np.asarray(kind_of or (0,) * schedule.num_stages))
    branches, which = _branches(operations, part)
    branch, operands = _write_operands(operations, values, slots, which, schedule.num_ranks)
    communicate, send, receive = _write_messages(operations, values, messages, moved, slots, schedule.num_ranks)
    return Program(
        schedule=schedule,
        forward_only=forward_only,
        shared_ends=shared_ends,
        parts=parts,
        branches=branches,
        branch=branch,
        operands=operands,
        channels=messages.channels,
        communicate=communicate,
        send=send,
        receive=receive,
        ticks=operations.ticks,
        num_message_slots=slots.num_messages,
        num_stash_slots=slots.stash.count,
        num_weight_stash_slots=slots.weight.count,
        num_cross_slots=slots.cross.count,
        makespan=packing.makespan,
    )


def forwards(schedule: Schedule) -> Schedule:
    """The schedule's forwards alone, in its order; groups with nothing left vanish."""
    ranks = tuple(
        tuple(kept for group in groups if (kept := tuple(a for a in group if a.kind is Kind.F)))
        for groups in schedule.ranks
    )
    return dataclasses.replace(schedule, ranks=ranks)


class _Pool(NamedTuple):
    """Slots for residuals: ``slots``, ``int[stages, microbatches]``, -1 for none; how many the neediest rank uses."""

    slots: np.ndarray
    count: int


class _SlotTables(NamedTuple):
    """Where each value lives.

    Attributes:
      sent_from: ``int[values]``, the message slot that the writer writes.
      kept_in: ``int[values]``, the message slot that the reader reads; within a rank it is the same.
      num_messages: how many message slots the neediest rank uses.
      stash, weight, cross: the pools of residuals, as `Program` has them.
    """

    sent_from: np.ndarray
    kept_in: np.ndarray
    num_messages: int
    stash: _Pool
    weight: _Pool
    cross: _Pool

    @property
    def dummies(self) -> tuple[int, int, int, int, int]:
        """The dummy slots of the columns SOURCE to CROSS of the operands."""
        return self.num_messages, self.num_messages, self.stash.count, self.weight.count, self.cross.count


def _last_steps(ticks: np.ndarray) -> np.ndarray:
    """``int[ticks]``: the last step of each tick."""
    return np.searchsorted(ticks, np.arange(ticks.max(initial=-1) + 1), side="right") - 1


def _allocate(
    actions: Actions, operations: Operations, values: Values, messages: Messages, moved: np.ndarray
) -> _SlotTables:
    """As few slots as the order of each rank allows.

    Moments: ``2 * step`` is the branch of a step, ``2 * step + 1`` its communication. ``moved``, ``int[messages]``, is
    the step after which each message moves.
    """
    sent = np.full(len(values.boundary), -1)
    sent[messages.value] = moved
    return _SlotTables(
        *_message_slots(operations, values, sent),
        stash=_stash_slots(actions, operations, F, (B, I)),
        weight=_stash_slots(actions, operations, F, (B, W)),
        cross=_stash_slots(actions, operations, I, (W,)),
    )


def _stash_slots(actions: Actions, operations: Operations, writer: int, readers: tuple[int, ...]) -> _Pool:
    """Slots from the writer to the last reader.

    Half-open in moments, so that an operation may not write what another of the same step still reads. What nobody
    reads (forwards without backwards) needs no slot, and has -1.
    """
    shape = actions.num_stages, actions.num_microbatches
    written, read = np.full(shape, -1), np.full(shape, -1)
    for steps, kinds in ((written, (writer,)), (read, readers)):
        mine = np.isin(operations.op, kinds)
        steps[operations.stage[mine], operations.microbatch[mine]] = operations.step[mine]
    slots = np.full(shape, -1)
    stage, microbatch = np.nonzero(read >= 0)
    rank = actions.routes[microbatch * len(actions.routes) // actions.num_microbatches, stage]
    begin, end = written[stage, microbatch], read[stage, microbatch]
    slots[stage, microbatch], count = colour(rank, 2 * begin, 2 * end + 1)
    return _Pool(slots, count)


def _message_slots(operations: Operations, values: Values, sent: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The slots that each value is written to and read from, one for both within a rank; how many a rank uses.

    ``sent`` is the step after which a value moves; -1 within a rank.
    """
    written, read = operations.step[values.writer], operations.step[values.reader]
    # The operations of a pair share no slot, so that they may run in either order or interleaved.
    paired = np.bincount(operations.instruction)[operations.instruction[values.reader]] > 1
    away, arrives = sent >= 0, 2 * sent + 1
    rank = np.stack([values.source, values.target])
    begin = np.stack([2 * written, np.where(away, arrives, 2 * written)])
    end = np.stack([arrives, 2 * read + paired])
    needed = np.stack([away, np.ones_like(away)])
    slots = np.full(rank.shape, -1)
    slots.T[needed.T], count = colour(rank.T[needed.T], begin.T[needed.T], end.T[needed.T])
    return np.where(away, slots[0], slots[1]), slots[1], count


def _parts(operations: Operations, kind_of: np.ndarray) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
    """The distinct (chunk, kind of stage) and ``int[operations]``: the part of each operation.

    The ends, which are of no chunk, have the first part.
    """
    kinds = int(kind_of.max(initial=0)) + 1
    code = np.where(np.isin(operations.op, (F, B, I, W)), operations.chunk * kinds + kind_of[operations.stage], -1)
    distinct = np.unique(code[code >= 0])
    part = np.where(code >= 0, np.searchsorted(distinct, code), 0)
    return tuple(divmod(each, kinds) for each in distinct.tolist()), part


def _branches(operations: Operations, part: np.ndarray) -> tuple[tuple[Branch, ...], np.ndarray]:
    """The distinct branches, idle first, and ``int[operations]``: which of them the operation is in."""
    parts = int(part.max(initial=0)) + 1
    number = 1 + operations.op * parts + part
    most = len(Op) * parts + 1
    numbers = np.zeros((int(operations.instruction.max(initial=-1)) + 1, 2), np.int64)  # 0 where there is no second
    numbers[operations.instruction, operations.place] = number
    distinct, which = np.unique(numbers @ [most, 1], return_inverse=True)
    ops = list(Op)

    def branch(code: int) -> Branch:
        return tuple((ops[(n - 1) // parts], (n - 1) % parts) for n in divmod(code, most) if n)

    return ((), *map(branch, distinct.tolist())), which[operations.instruction] + 1


def _write_operands(
    operations: Operations, values: Values, slots: _SlotTables, which: np.ndarray, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """(branch, operands) of the `Program`; ``which`` is the branch of each operation."""
    step, shape = operations.step, (len(operations.ticks), num_ranks)
    branch = np.zeros(shape, np.int32)
    operands = np.zeros((*shape, 2, len(Field)), np.int32)
    operands[..., Field.SOURCE :] = slots.dummies
    # A shared operation is every rank's; only the rank that it belongs to reads and writes slots that count.
    shared = operations.shared
    branch[step[shared]] = which[shared, None]
    operands[step[shared], :, 0, Field.MICROBATCH] = operations.microbatch[shared, None]
    operands[step[shared], :, 0, Field.STAGE] = operations.stage[shared, None]

    branch[step, operations.rank] = which
    operands[step, operations.rank, operations.place] = np.column_stack(
        [operations.microbatch, operations.stage, _slots_of_operations(operations, values, slots)]
    )
    return branch, operands


def _slots_of_operations(operations: Operations, values: Values, slots: _SlotTables) -> np.ndarray:
    """``int[operations, 5]``: the columns SOURCE to CROSS of each operation's operands."""
    found = np.full((len(operations.op), 5), -1)
    found[values.reader, 0], found[values.writer, 1] = slots.kept_in, slots.sent_from
    users = ((2, slots.stash, (F, B, I)), (3, slots.weight, (F, B, I, W)), (4, slots.cross, (I, W)))
    for column, pool, kinds in users:
        mine = np.isin(operations.op, kinds)
        found[mine, column] = pool.slots[operations.stage[mine], operations.microbatch[mine]]
    return np.where(found < 0, slots.dummies, found)


def _write_messages(
    operations: Operations, values: Values, messages: Messages, moved: np.ndarray, slots: _SlotTables, num_ranks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(communicate, send, receive) of the `Program`."""
    num_steps, num_channels = len(operations.ticks), len(messages.channels)
    shape = num_steps, num_ranks, num_channels
    communicate = np.zeros((num_steps, num_channels), np.bool_)
    send, receive = (np.full(shape, slots.num_messages, np.int32) for _ in range(2))
    communicate[moved, messages.channel] = True
    send[moved, values.source[messages.value], messages.channel] = slots.sent_from[messages.value]
    receive[moved, values.target[messages.value], messages.channel] = slots.kept_in[messages.value]
    return communicate, send, receive
