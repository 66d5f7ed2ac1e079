"""Lowers a schedule to a Program: the int32 tables that the executor's scan reads.

Three passes: cells (the branches of every rank, tick by tick), communication (when each message leaves), and
slots (where each message and residual lives).

Names: a *cell* is one branch of one rank, a *boundary* an activation or its cotangent between two operations.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from jaxpipe.runtime.cells import Cell, Value, find_values, make_cells
from jaxpipe.runtime.pack import Packing, pack
from jaxpipe.runtime.program import Branch, Field, Op, Program
from jaxpipe.runtime.slots import colour
from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulate import Costs


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
    kept = forwards(schedule) if forward_only else schedule
    packing = pack(kept, costs, shared_ends=shared_ends) if packing is None else packing
    cells = make_cells(kept, packing, embed_grad=embed_grad, shared_ends=shared_ends)
    values = find_values(cells)
    channels, moves = _communicate(values, packing.num_ticks)

    lengths = np.zeros(packing.num_ticks, np.int32)
    for cell in cells:
        lengths[cell.tick] = max(lengths[cell.tick], cell.place + 1)
    ends = np.cumsum(lengths)
    steps = [int(ends[cell.tick] - lengths[cell.tick]) + cell.place for cell in cells]
    moves = [(int(ends[tick]) - 1, channel, value) for tick, channel, value in moves]
    ticks = np.repeat(np.arange(packing.num_ticks, dtype=np.int32), lengths)
    return _fill(schedule, forward_only, shared_ends, packing.makespan, cells, steps, values, channels, moves, ticks)


def forwards(schedule: Schedule) -> Schedule:
    """The schedule's forwards alone, in its order; groups with nothing left vanish."""
    rows = tuple(
        tuple(kept for group in row if (kept := tuple(a for a in group if a.kind is Kind.F))) for row in schedule.ranks
    )
    return dataclasses.replace(schedule, ranks=rows)


Permutation = tuple[tuple[int, int], ...]
"""(source, destination) pairs of ranks; each rank at most once on either side."""

Moves = list[tuple[int, int, Value]]
"""(tick after which it moves, channel, value) of every message."""


def _communicate(values: list[Value], num_ticks: int) -> tuple[tuple[Permutation, ...], Moves]:
    """Channels, and what moves on them after each tick, by the permutations that need fewer messages in all.

    Shifts of the ring suit schedules whose ranks all send one way at a time. Exchanges between neighbours suit
    DualPipe: in its steady state even ranks send both messages of a tick up while odd ranks send both down.
    """
    messages = [value for value in values if value.source != value.target]
    edges = sorted({(value.source, value.target) for value in messages})
    options = [_route(messages, permutations, num_ticks) for permutations in (_shifts(edges), _exchanges(edges))]
    return min(options, key=lambda option: len({move[:2] for move in option[1]}))


def _shifts(edges: list[tuple[int, int]]) -> list[Permutation]:
    """Groups edges by how far they go: all steps to higher ranks, all steps to lower ranks, the wrap-arounds.

    >>> _shifts([(0, 1), (1, 0), (1, 2), (2, 1)])
    [((0, 1), (1, 2)), ((1, 0), (2, 1))]
    """
    distances = sorted({target - source for source, target in edges}, key=lambda d: (abs(d), -d))
    return [tuple(edge for edge in edges if edge[1] - edge[0] == distance) for distance in distances]


def _exchanges(edges: list[tuple[int, int]]) -> list[Permutation]:
    """Groups edges so that in a group each rank has one partner, to which it sends and from which it receives.

    >>> _exchanges([(0, 1), (1, 0), (1, 2), (2, 1)])
    [((0, 1), (1, 0)), ((1, 2), (2, 1))]
    """
    groups: list[dict[int, int]] = []
    for low, high in sorted({(min(edge), max(edge)) for edge in edges}):
        group = next((g for g in groups if low not in g and high not in g), None)
        if group is None:
            groups.append(group := {})
        group[low], group[high] = high, low
    return [tuple(edge for edge in edges if group.get(edge[0]) == edge[1]) for group in groups]


def _route(
    messages: list[Value], permutations: list[Permutation], num_ticks: int
) -> tuple[tuple[Permutation, ...], Moves]:
    """Decides when each message moves: earliest deadline first, on one channel of its permutation if that does.

    Where a rank must send more than one message of a permutation after a tick, because otherwise, with one after
    each later tick, one would be late, the permutation gets as many channels as that takes.
    """
    channels: list[Permutation] = []
    moves: Moves = []
    for permutation in permutations:
        lanes: list[int] = []
        released: dict[int, list[Value]] = {}
        for value in messages:
            if (value.source, value.target) in permutation:
                released.setdefault(value.release, []).append(value)
        waiting: dict[int, list[tuple[int, int, Value]]] = {source: [] for source, _ in permutation}
        for tick in range(num_ticks):
            for value in released.get(tick, ()):
                heapq.heappush(waiting[value.source], (value.deadline, value.writer, value))
            for lane in range(max(_urgent(queue, tick) for queue in waiting.values())):
                if lane == len(lanes):
                    lanes.append(len(channels))
                    channels.append(permutation)
                moves += [(tick, lanes[lane], heapq.heappop(queue)[2]) for queue in waiting.values() if queue]
    return tuple(channels), moves


def _urgent(queue: list[tuple[int, int, Value]], tick: int) -> int:
    """How many must leave after this tick if one may leave after each later tick; at least one if any waits."""
    late = (place - (deadline - 1 - tick) for place, (deadline, _, _) in enumerate(sorted(queue), start=1))
    return max(1, *late) if queue else 0


def _allocate(num_ranks: int, intervals: dict[tuple, tuple[int, int]]) -> tuple[dict[tuple, int], int]:
    """Slots for intervals whose keys begin with the rank, and how many the neediest rank uses."""
    slots: dict[tuple, int] = {}
    for rank in range(num_ranks):
        keys = [key for key in intervals if key[0] == rank]
        slots.update(zip(keys, colour([intervals[key] for key in keys]), strict=True))
    return slots, max(slots.values(), default=-1) + 1


def _stash_intervals(
    cells: list[Cell], steps: list[int], writer: Op, readers: tuple[Op, ...]
) -> dict[tuple, tuple[int, int]]:
    """The closed interval of steps from the writer to the last reader, by (rank, stage, microbatch).

    As half-open moments, so that an operation may not write what another of the same step still reads. What
    nobody reads (forwards without backwards) needs no slot.
    """
    written, intervals = {}, {}
    for cell, step in zip(cells, steps, strict=True):
        for operation in cell.operations:
            key = (cell.rank, operation.stage, operation.microbatch)
            if operation.op is writer:
                written[key] = 2 * step
            elif operation.op in readers:
                intervals[key] = (written[key], 2 * step + 1)
    return intervals


def _fill(
    schedule: Schedule,
    forward_only: bool,
    shared_ends: bool,
    makespan: float,
    cells: list[Cell],
    steps: list[int],
    values: list[Value],
    channels: tuple[Permutation, ...],
    moves: Moves,
    ticks: np.ndarray,
) -> Program:
    """Allocates the slots and writes the tables. Moments: 2 * step is the branch, 2 * step + 1 communication."""
    ranks, num_steps = schedule.num_ranks, len(ticks)
    sent = {value.boundary: step for step, _, value in moves}
    mail: dict[tuple, tuple[int, int]] = {}
    for value in values:
        # The operations of a pair share no slot, so that they may run in either order or interleaved.
        begin, end = 2 * steps[value.writer], 2 * steps[value.reader] + (len(cells[value.reader].operations) > 1)
        if value.source != value.target:
            mail[(value.source, value.boundary)] = (begin, 2 * sent[value.boundary] + 1)
            begin = 2 * sent[value.boundary] + 1
        mail[(value.target, value.boundary)] = (begin, end)
    mail_slots, num_mail = _allocate(ranks, mail)
    stash, num_stash = _allocate(ranks, _stash_intervals(cells, steps, Op.F, (Op.B, Op.I)))
    weight, num_weight = _allocate(ranks, _stash_intervals(cells, steps, Op.F, (Op.B, Op.W)))
    cross, num_cross = _allocate(ranks, _stash_intervals(cells, steps, Op.I, (Op.W,)))

    order = list(Op)
    used = {cell.branch for cell in cells} - {()}
    branches: tuple[Branch, ...] = ((), *sorted(used, key=lambda b: [(order.index(op), chunk) for op, chunk in b]))
    branch = np.zeros((num_steps, ranks), np.int32)
    operands = np.zeros((num_steps, ranks, 2, len(Field)), np.int32)
    operands[..., Field.SOURCE :] = (num_mail, num_mail, num_stash, num_weight, num_cross)
    for cell, step in zip(cells, steps, strict=True):
        branch[step, slice(None) if cell.shared else cell.rank] = branches.index(cell.branch)
        if cell.shared:
            (operation,) = cell.operations
            operands[step, :, 0, Field.MICROBATCH] = operation.microbatch
            operands[step, :, 0, Field.STAGE] = operation.stage
        for row, operation in enumerate(cell.operations):
            key = (cell.rank, operation.stage, operation.microbatch)
            stashes = operation.op in (Op.F, Op.B, Op.I)
            operands[step, cell.rank, row] = (
                operation.microbatch,
                operation.stage,
                mail_slots.get((cell.rank, operation.source), num_mail),
                mail_slots.get((cell.rank, operation.target), num_mail),
                stash.get(key, num_stash) if stashes else num_stash,
                weight.get(key, num_weight) if stashes or operation.op is Op.W else num_weight,
                cross.get(key, num_cross) if operation.op in (Op.I, Op.W) else num_cross,
            )
    communicate = np.zeros((num_steps, len(channels)), np.bool_)
    send = np.full((num_steps, ranks, len(channels)), num_mail, np.int32)
    receive = np.full((num_steps, ranks, len(channels)), num_mail, np.int32)
    for step, channel, value in moves:
        communicate[step, channel] = True
        send[step, value.source, channel] = mail_slots[(value.source, value.boundary)]
        receive[step, value.target, channel] = mail_slots[(value.target, value.boundary)]
    return Program(
        schedule=schedule,
        forward_only=forward_only,
        shared_ends=shared_ends,
        branches=branches,
        branch=branch,
        operands=operands,
        channels=channels,
        communicate=communicate,
        send=send,
        receive=receive,
        ticks=ticks,
        num_mail_slots=num_mail,
        num_stash_slots=num_stash,
        num_weight_stash_slots=num_weight,
        num_cross_slots=num_cross,
        makespan=makespan,
    )
