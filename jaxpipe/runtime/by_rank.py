"""Code of its own for each rank of a Program, in which every slot of a residual is a name: nothing is copied.

Ranks hold residuals for different times, so in the same tick they read different slots. A slot that comes from a table
is copied out of its pool before a library's kernel can read it, and into it after one has made it. Here each rank has
code of its own for each tick, one loop of no or one trip, in which its slots are constants. Ticks that come again with
other microbatches and the same slots are one loop; slots are numbered so that few ticks do not come again. That is code
for each rank and each tick of a round, so it is for few ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxpipe.runtime.program import Field, Op, Program
from jaxpipe.runtime.stretches import (
    Guarded,
    Piece,
    Sending,
    Stretch,
    Tick,
    TickTable,
    make_stretches,
    pieces,
    size_of_code,
)
from jaxpipe.runtime.unrolled import Repeat

MOST_CODE = 320
"""The most code, in halves of a forward's; a longer program takes too long to compile."""

MOST_TIMES = 16
"""The most code of stages, in units of each branch's once, of which stretches have less than two."""

LONGEST_ROUND = 12
"""The most microbatches after which slots come again, in the numberings that are tried."""


_LONGEST = 64
"""The longest round, in ticks."""


class _Residuals(NamedTuple):
    """A pool of residuals: its column, the name of its size in a `Program`, what writes a slot, and what reads it."""

    field: Field
    size: str
    writer: Op
    readers: tuple[Op, ...]


_POOLS = (
    _Residuals(Field.STASH, "num_stash_slots", Op.F, (Op.B, Op.I)),
    _Residuals(Field.WEIGHT_STASH, "num_weight_stash_slots", Op.F, (Op.B, Op.I, Op.W)),
    _Residuals(Field.CROSS, "num_cross_slots", Op.I, (Op.W,)),
)


class ByRank(NamedTuple):
    """A program as code of its own for each rank.

    Attributes:
      program: the same with other slots: at most one more in each pool, where a pool of arrays has a dummy slot.
      stretches: the code; each of its pieces is one rank's.
      size: of the code, in halves of a forward's.
    """

    program: Program
    stretches: tuple[Stretch, ...]
    size: int


@functools.lru_cache(16)
def divide_by_rank(program: Program) -> ByRank:
    """The code of a program whose ends are not shared, with slots numbered so that there is little of it.

    >>> from jaxpipe.schedule import build
    >>> from jaxpipe.runtime.lower import lower
    >>> [stretch.times for stretch in divide_by_rank(lower(build("1f1b", 2, 32))).stretches]
    [1, 15, 1]
    """
    table = TickTable(program)
    found = [(*_find_round(table, named), named) for named in _numberings(_with_ports(program))]
    size, repeat, named = min(found, key=lambda each: each[0])
    return ByRank(named, _stretches(table, named, repeat), size)


def as_dispatched(program: Program, dispatch: str) -> Program:
    """The program with the slots that a dispatcher's code has."""
    return divide_by_rank(program).program if dispatch == "by_rank" else program


def code_in_stretches(program: Program, dispatch: str) -> tuple[Program, tuple[Stretch, ...]]:
    """(the program with the slots of its code, the code) for dispatch "stretches" or "by_rank"."""
    if dispatch == "by_rank":
        return divide_by_rank(program)[:2]
    return program, make_stretches(program)


def first_additions(program: Program, stretches: Sequence[Stretch]) -> dict[tuple[int, int], frozenset[int]]:
    """The chunks whose sums of gradients a (rank, step) of the code begins.

    These are chunks whose first gradient comes, on each rank, in code that runs once: it is then written to the sum and
    not added, and nothing is read of the sum before.
    """
    once = {
        (rank, int(step))
        for stretch in stretches
        if stretch.times == 1
        for piece in pieces([stretch])
        for rank, step in enumerate(piece.steps[0])
        if step >= 0
    }
    first: dict[tuple[int, int], int] = {}
    for step, row in enumerate(program.branch.tolist()):
        for rank, index in enumerate(row):
            for op, part in program.branches[index]:
                if op in (Op.B, Op.W):
                    first.setdefault((program.parts[part][0], rank), step)
    chunks = {chunk for chunk, _ in program.parts}
    begun = {c for c in chunks if all((rank, first.get((c, rank))) in once for rank in range(program.num_ranks))}
    found: dict[tuple[int, int], frozenset[int]] = {}
    for (chunk, rank), step in first.items():
        if chunk in begun:
            found[rank, step] = found.get((rank, step), frozenset()) | {chunk}
    return found


def begun_chunks(program: Program) -> frozenset[int]:
    """The chunks of all `first_additions` of a program with the slots that its code by rank has."""
    return frozenset().union(*first_additions(*divide_by_rank(program)[:2]).values())


def is_short_by_rank(program: Program) -> bool:
    """Whether ranks that share no ends have little code if each has its own.

    >>> from jaxpipe.schedule import build
    >>> from jaxpipe.runtime.lower import lower
    >>> [is_short_by_rank(lower(build("dualpipev", ranks, 32))) for ranks in (2, 4)]
    [True, False]
    """
    if program.shared_ends or program.num_ranks == 1:
        return False
    table = TickTable(program)
    once = {(rank, mine) for sequences in table.sequences for rank, mine in enumerate(sequences)}
    if sum(size_of_code(program, mine) for _, mine in once) > MOST_CODE:
        return False
    found = divide_by_rank(program)
    of_stages = {
        i for i, branch in enumerate(program.branches) if any(op in (Op.F, Op.B, Op.I, Op.W) for op, _ in branch)
    }
    code = [piece.branch for piece in pieces(found.stretches) if piece.branch in of_stages]
    most = MOST_TIMES * size_of_code(program, of_stages)
    return found.size <= MOST_CODE and size_of_code(program, code) <= most


def _numberings(program: Program) -> Iterator[Program]:
    """The program, and the same with slots that come again after some number of microbatches."""
    lives = [(pool, rank, _lives(program, pool, rank)) for pool in _POOLS for rank in range(program.num_ranks)]
    yield program
    for microbatches in range(1, LONGEST_ROUND + 1):
        operands, counts = program.operands.copy(), {pool.size: getattr(program, pool.size) for pool in _POOLS}
        for pool, rank, mine in lives:
            slots, count = _number(mine, getattr(program, pool.size) + 1, microbatches)
            if slots is not None:
                operands[mine.step, rank, mine.place, pool.field] = slots[mine.value]
                counts[pool.size] = max(counts[pool.size], count)
        yield dataclasses.replace(program, operands=operands, **counts)


class _Message(NamedTuple):
    """What one rank holds of a message.

    Attributes:
      key: the same for those that are in one slot on all ranks: what moves after a step on a channel.
      rank: which rank holds it.
      begin, end: from when to when, twice the tick, and one more for what is between it and the next.
      uses: (step, place, field) of what writes it and reads it.
    """

    key: tuple[int, ...]
    rank: int
    begin: int
    end: int
    uses: list[tuple[int, int, Field]]


def _with_ports(program: Program) -> Program:
    """The program with slots of messages such that what moves at once on a channel is in the same slot on all ranks.

    A message has its slot until the end of the tick that reads it, so that a tick reads no slot that it writes.
    """
    groups: dict[tuple[int, ...], list[_Message]] = {}
    for message in _messages(program):
        groups.setdefault(message.key, []).append(message)
    held: list[list[list[tuple[int, int]]]] = []  # of each slot and rank

    def fits(slot: list[list[tuple[int, int]]], group: list[_Message]) -> bool:
        return all(end < m.begin or m.end < begin for m in group for begin, end in slot[m.rank])

    operands, send, receive = program.operands.copy(), program.send.copy(), program.receive.copy()
    slots: dict[tuple[int, ...], int] = {}
    for key, group in sorted(groups.items(), key=lambda item: (min(m.begin for m in item[1]), item[0])):
        number = next((i for i, slot in enumerate(held) if fits(slot, group)), len(held))
        if number == len(held):
            held.append([[] for _ in range(program.num_ranks)])
        for message in group:
            held[number][message.rank].append((message.begin, message.end))
        slots[key] = number
    ends = operands[..., Field.SOURCE : Field.TARGET + 1]
    ends[ends == program.num_message_slots] = len(held)
    for key, group in groups.items():
        for message in group:
            for step, place, field in message.uses:
                operands[step, message.rank, place, field] = slots[key]
        if len(key) == 3:
            (send, receive)[key[2]][key[0], :, key[1]] = slots[key]
    return dataclasses.replace(program, operands=operands, send=send, receive=receive, num_message_slots=len(held))


def _messages(program: Program) -> Iterator[_Message]:
    """All messages on all ranks; also what arrives on a rank that gets nothing."""
    dummy, ticks = program.num_message_slots, program.ticks.tolist()
    for rank in range(program.num_ranks):
        held: dict[int, _Message] = {}
        for step, index in enumerate(program.branch[:, rank].tolist()):
            now = 2 * ticks[step]
            for place, (op, _) in enumerate(program.branches[index]):
                source, target = program.operands[step, rank, place, Field.SOURCE : Field.TARGET + 1].tolist()
                if source != dummy and op not in (Op.EMBED, Op.W):
                    message = held.pop(source)
                    yield message._replace(end=now, uses=[*message.uses, (step, place, Field.SOURCE)])
                if target != dummy and op not in (Op.EMBED_GRAD, Op.W):
                    held[target] = _Message((step, place, rank, 0), rank, now, now, [(step, place, Field.TARGET)])
            channels = np.flatnonzero(program.communicate[step]).tolist()
            for channel in channels:
                if (slot := int(program.send[step, rank, channel])) != dummy:
                    yield held.pop(slot)._replace(key=(step, channel, 0), end=now + 1)
            for channel in channels:
                arrived = _Message((step, channel, 1), rank, now + 1, now + 1, [])
                if (slot := int(program.receive[step, rank, channel])) != dummy:
                    held[slot] = arrived
                else:
                    yield arrived


class _Lives(NamedTuple):
    """The values of a pool on a rank, as columns ``int[values]``, and what uses them, as columns ``int[uses]``.

    Attributes:
      part: whose a value is.
      begin, end: the steps that write it and read it last.
      value: which value is used,
      step, place: and by which operation.
    """

    part: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    value: np.ndarray
    step: np.ndarray
    place: np.ndarray


def _lives(program: Program, pool: _Residuals, rank: int) -> _Lives:
    values: list[list[int]] = []
    uses: list[tuple[int, int, int]] = []
    held: dict[int, int] = {}
    for step, index in enumerate(program.branch[:, rank].tolist()):
        for place, (op, part) in enumerate(program.branches[index]):
            slot = int(program.operands[step, rank, place, pool.field])
            if slot == getattr(program, pool.size) or op not in (pool.writer, *pool.readers):
                continue
            if op is pool.writer:
                held[slot] = len(values)
                values.append([part, step, step])
            values[held[slot]][2] = step
            uses.append((held[slot], step, place))
    return _Lives(*np.array(values, np.int64).reshape(-1, 3).T, *np.array(uses, np.int64).reshape(-1, 3).T)


def _number(lives: _Lives, most: int, microbatches: int) -> tuple[np.ndarray | None, int]:
    """Slots that each part has for itself and takes in turn, again after so many microbatches; how many there are.

    None where that takes more than ``most``.
    """
    slots, base = np.zeros_like(lives.part), 0
    for part in np.unique(lives.part):
        (mine,) = np.nonzero(lives.part == part)
        begin, end = lives.begin[mine], lives.end[mine]
        sizes = (n for n in range(1, microbatches + 1) if microbatches % n == 0)
        size = next((n for n in sizes if (end[:-n] < begin[n:]).all()), None)
        if size is None or base + size > most:
            return None, most
        slots[mine] = base + np.arange(len(mine)) % size
        base += size
    return slots, base


def _find_round(table: TickTable, program: Program) -> tuple[int, Repeat]:
    """(size of the code, the repetition of ticks that leaves the least of it)."""
    steps = program.num_steps
    tables = (program.branch, program.operands[..., Field.SOURCE :], program.send, program.receive)
    rows = np.concatenate([each.reshape(steps, -1) for each in tables], axis=1)
    _, kinds = np.unique(rows, axis=0, return_inverse=True)
    numbers: dict[tuple[object, ...], int] = {}
    begins = zip(table.begins[:-1], table.begins[1:], strict=True)
    keys = ((tuple(kinds[i:j].tolist()), moved) for (i, j), moved in zip(begins, table.moves, strict=True))
    ticks = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    sizes = np.array([sum(size_of_code(program, mine) for mine in each) for each in table.sequences])
    before = np.concatenate([[0], np.cumsum(sizes)])
    total = len(ticks)
    best, saved = Repeat(0, total, 1), 0
    for period in range(1, min(total // 2, _LONGEST) + 1):
        (others,) = np.nonzero(ticks[:-period] != ticks[period:])
        breaks = np.array([-1, *others, total - period])
        widest = np.diff(breaks).argmax()
        start, length = int(breaks[widest]) + 1, int(breaks[widest + 1] - breaks[widest]) - 1
        found = Repeat(start, period, length // period + 1)
        less = int(before[start + period * found.times] - before[start + period])
        if less > saved:
            best, saved = found, less
    return int(before[-1]) - saved, best


def _stretches(table: TickTable, program: Program, repeat: Repeat) -> tuple[Stretch, ...]:
    stop = repeat.start + repeat.period * repeat.times
    parts = [(0, repeat.start, 1), (repeat.start, repeat.period, repeat.times), (stop, len(table.moves) - stop, 1)]
    return tuple(
        Stretch(times, tuple(_tick(table, program, first + i + period * np.arange(times)) for i in range(period)))
        for first, period, times in parts
        if period
    )


def _in_place(program: Program, code: list[Piece], rank: int) -> list[list[Piece]]:
    """A rank's pieces in as few loops as write no slot of residuals that they have read.

    Within a loop nothing keeps the compiler from the reading after it writes, but a copy.
    """
    groups: list[list[Piece]] = []
    read: set[tuple[Field, int]] = set()
    for piece in code:
        operands = program.operands[piece.steps[0, rank], rank]
        uses = [
            (op, pool, (pool.field, int(operands[place, pool.field])))
            for place, (op, _) in enumerate(program.branches[piece.branch])
            for pool in _POOLS
        ]
        if not groups or read & {slot for op, pool, slot in uses if op is pool.writer}:
            groups.append([])
            read = set()
        groups[-1].append(piece)
        read |= {slot for op, pool, slot in uses if op in pool.readers}
    return groups


def _tick(table: TickTable, program: Program, ticks: np.ndarray) -> Tick:
    """The code of ticks that are the same but for the microbatches."""
    first, shape = int(ticks[0]), (len(ticks), program.num_ranks)
    begins = np.array(table.begins)[ticks]
    nodes = []
    for rank in range(program.num_ranks):
        chosen = np.zeros(shape, bool)
        chosen[:, rank] = True
        (mine,) = np.nonzero(program.branch[begins[0] : table.begins[first + 1], rank])
        code = [
            Piece(int(program.branch[begins[0] + step, rank]), np.where(chosen, begins[:, None] + step, -1))
            for step in mine
        ]
        nodes += [Guarded(tuple(group), chosen) for group in _in_place(program, code, rank)]
    last = np.array(table.begins)[ticks + 1] - 1
    exchanges = (Sending(table.moves[first], last),) if table.moves[first] else ()
    return Tick(tuple(nodes), exchanges)
