"""Lowers a schedule to a Program: the int32 tables that the executor's scan reads.

Three passes, each on all operations at once: what runs in which step, when each message leaves, and where each message
and residual lives.
"""

from __future__ import annotations

import dataclasses

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
    moves = route(values, schedule.num_ranks)
    return _fill(
        schedule, actions, packing.makespan, operations, values, moves, forward_only=forward_only,
        shared_ends=shared_ends,
    )  # fmt: skip


def forwards(schedule: Schedule) -> Schedule:
    """The schedule's forwards alone, in its order; groups with nothing left vanish."""
    rows = tuple(
        tuple(kept for group in row if (kept := tuple(a for a in group if a.kind is Kind.F))) for row in schedule.ranks
    )
    return dataclasses.replace(schedule, ranks=rows)


def _stash_slots(
    actions: Actions, operations: Operations, writer: int, readers: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """``int[stages, microbatches]``: slots from the writer to the last reader, and how many the neediest rank uses.

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
    return slots, count


def _message_slots(operations: Operations, values: Values, sent: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The slots that each value is written to and read from, one for both within a rank; how many a rank uses.

    ``sent`` is the step after which a value moves; -1 within a rank.
    """
    written, read = operations.step[values.writer], operations.step[values.reader]
    # The operations of a pair share no slot, so that they may run in either order or interleaved.
    paired = np.bincount(operations.cell)[operations.cell[values.reader]] > 1
    away, arrives = sent >= 0, 2 * sent + 1
    rank = np.stack([values.source, values.target])
    begin = np.stack([2 * written, np.where(away, arrives, 2 * written)])
    end = np.stack([arrives, 2 * read + paired])
    needed = np.stack([away, np.ones_like(away)])
    slots = np.full(rank.shape, -1)
    slots.T[needed.T], count = colour(rank.T[needed.T], begin.T[needed.T], end.T[needed.T])
    return np.where(away, slots[0], slots[1]), slots[1], count


def _branches(operations: Operations) -> tuple[tuple[Branch, ...], np.ndarray]:
    """The distinct branches, idle first, and ``int[operations]``: which of them the operation's cell runs."""
    chunks = int(operations.chunk.max(initial=0)) + 1
    number = 1 + operations.op * chunks + operations.chunk
    cells, most = int(operations.cell.max(initial=-1)) + 1, len(Op) * chunks + 1
    first, second = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
    first[operations.cell[operations.row == 0]] = number[operations.row == 0]
    second[operations.cell[operations.row == 1]] = number[operations.row == 1]
    distinct, which = np.unique(first * most + second, return_inverse=True)
    ops = list(Op)

    def branch(code: int) -> Branch:
        return tuple((ops[(n - 1) // chunks], (n - 1) % chunks) for n in divmod(code, most) if n)

    return ((), *map(branch, distinct.tolist())), which[operations.cell] + 1


def _fill(
    schedule: Schedule,
    actions: Actions,
    makespan: float,
    operations: Operations,
    values: Values,
    moves: Messages,
    *,
    forward_only: bool,
    shared_ends: bool,
) -> Program:
    """Allocates the slots and writes the tables. Moments: 2 * step is the branch, 2 * step + 1 communication."""
    ranks, num_steps, step = schedule.num_ranks, len(operations.ticks), operations.step
    last_step = np.searchsorted(operations.ticks, np.arange(operations.ticks.max(initial=-1) + 1), side="right") - 1
    moved = last_step[moves.tick]
    sent = np.full(len(values.boundary), -1)
    sent[moves.value] = moved
    sent_from, kept_in, num_messages = _message_slots(operations, values, sent)
    stash, num_stash = _stash_slots(actions, operations, F, (B, I))
    weight, num_weight = _stash_slots(actions, operations, F, (B, W))
    cross, num_cross = _stash_slots(actions, operations, I, (W,))

    branches, which = _branches(operations)
    branch = np.zeros((num_steps, ranks), np.int32)
    operands = np.zeros((num_steps, ranks, 2, len(Field)), np.int32)
    dummies = (num_messages, num_messages, num_stash, num_weight, num_cross)
    operands[..., Field.SOURCE :] = dummies
    everywhere = operations.shared
    branch[step[everywhere]] = which[everywhere, None]
    operands[step[everywhere], :, 0, Field.MICROBATCH] = operations.microbatch[everywhere, None]
    operands[step[everywhere], :, 0, Field.STAGE] = operations.stage[everywhere, None]
    branch[step, operations.rank] = which
    slots = np.full((len(step), 5), -1)
    slots[values.reader, 0], slots[values.writer, 1] = kept_in, sent_from
    for column, pool, kinds in ((2, stash, (F, B, I)), (3, weight, (F, B, I, W)), (4, cross, (I, W))):
        mine = np.isin(operations.op, kinds)
        slots[mine, column] = pool[operations.stage[mine], operations.microbatch[mine]]
    rows = np.column_stack([operations.microbatch, operations.stage, np.where(slots < 0, dummies, slots)])
    operands[step, operations.rank, operations.row] = rows

    shape = num_steps, ranks, len(moves.channels)
    communicate = np.zeros((num_steps, len(moves.channels)), np.bool_)
    send, receive = np.full(shape, num_messages, np.int32), np.full(shape, num_messages, np.int32)
    communicate[moved, moves.channel] = True
    send[moved, values.source[moves.value], moves.channel] = sent_from[moves.value]
    receive[moved, values.target[moves.value], moves.channel] = kept_in[moves.value]
    return Program(
        schedule=schedule,
        forward_only=forward_only,
        shared_ends=shared_ends,
        branches=branches,
        branch=branch,
        operands=operands,
        channels=moves.channels,
        communicate=communicate,
        send=send,
        receive=receive,
        ticks=operations.ticks,
        num_message_slots=num_messages,
        num_stash_slots=num_stash,
        num_weight_stash_slots=num_weight,
        num_cross_slots=num_cross,
        makespan=makespan,
    )
