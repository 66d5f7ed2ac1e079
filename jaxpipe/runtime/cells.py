"""What each rank runs in which tick, and the activations and cotangents that pass from one to another."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxpipe.runtime.pack import Packing
from jaxpipe.runtime.program import Branch, Op
from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.schedule import Schedule


class Boundary(NamedTuple):
    """What a mail slot holds: the activation at a boundary for a microbatch, or its cotangent.

    Boundary s is the input of stage s, and the last one the output of the last stage.
    """

    stage: int
    microbatch: int
    cotangent: bool


class Work(NamedTuple):
    """One operation of a rank."""

    op: Op
    chunk: int
    stage: int
    microbatch: int

    @property
    def source(self) -> Boundary | None:
        """What it reads from its mail slot."""
        match self.op:
            case Op.F:
                return Boundary(self.stage, self.microbatch, False)
            case Op.HEAD:
                return Boundary(self.stage + 1, self.microbatch, False)
            case Op.B | Op.I:
                return Boundary(self.stage + 1, self.microbatch, True)
            case Op.EMBED_GRAD:
                return Boundary(self.stage, self.microbatch, True)
        return None

    @property
    def target(self) -> Boundary | None:
        """What it writes to its mail slot."""
        match self.op:
            case Op.EMBED:
                return Boundary(self.stage, self.microbatch, False)
            case Op.F:
                return Boundary(self.stage + 1, self.microbatch, False)
            case Op.HEAD:
                return Boundary(self.stage + 1, self.microbatch, True)
            case Op.B | Op.I:
                return Boundary(self.stage, self.microbatch, True)
        return None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One branch of one rank.

    Attributes:
      rank: the rank that runs it; of a shared cell, the rank that holds the stage beside it.
      tick: when it runs.
      place: how many steps of the tick come before it.
      operations: one or two.
      shared: whether all ranks run it, in a step in which they do nothing else.
    """

    rank: int
    tick: int
    place: int
    operations: tuple[Work, ...]
    shared: bool = False

    @property
    def branch(self) -> Branch:
        """The branch. What is shared is the same beside every chunk, and is compiled once."""
        return tuple((work.op, 0 if self.shared else work.chunk) for work in self.operations)


class Value(NamedTuple):
    """Which cell writes a boundary and which reads it; both are indices of cells."""

    boundary: Boundary
    writer: int
    reader: int
    source: int  # rank of the writer
    target: int  # rank of the reader
    release: int  # tick of the writer
    deadline: int  # tick of the reader


def make_cells(schedule: Schedule, packing: Packing, *, embed_grad: bool, shared_ends: bool) -> list[Cell]:
    """The cells of every tick, in an order that is that of each rank.

    A rank runs EMBED right before a group that needs it, HEAD and EMBED_GRAD right after one. Where they are shared
    a tick has three parts: every EMBED that a group of the tick needs, one after the other; the groups, each rank
    running its own; every HEAD and EMBED_GRAD that follows from one, one after the other.

    Raises:
      ValueError: the packing is not one of this schedule.
    """
    lengths = tuple(len(row) for row in schedule.ranks)
    if (packing.progress[-1] if packing.progress else (0,) * len(lengths)) != lengths:
        raise ValueError(
            f"the packing ends at {packing.progress[-1:]} groups, but the ranks of schedule {schedule.name!r} have "
            f"{lengths}; pack the same schedule (with forward_only, pack forwards(schedule))"
        )
    chunks: dict[tuple[int, int], int] = {}

    def work(action: Action, op: Op) -> Work:
        key = (action.stage, schedule.direction(action.microbatch))
        if key not in chunks:
            chunks[key] = schedule.chunk_of(action)
        return Work(op, chunks[key], action.stage, action.microbatch)

    def before(group: Group) -> list[tuple[Work, ...]]:
        return [(work(a, Op.EMBED),) for a in group if a.kind is Kind.F and a.stage == 0]

    def itself(group: Group) -> tuple[Work, ...]:
        return tuple(work(action, Op(action.kind.value)) for action in group)

    def after(group: Group) -> list[tuple[Work, ...]]:
        heads = [(work(a, Op.HEAD),) for a in group if a.kind is Kind.F and a.stage == schedule.num_stages - 1]
        first = [a for a in group if a.kind in (Kind.B, Kind.I) and a.stage == 0 and embed_grad]
        return heads + [(work(a, Op.EMBED_GRAD),) for a in first]

    cells: list[Cell] = []
    begin = (0,) * len(lengths)
    for tick, progress in enumerate(packing.progress):
        groups = [row[b:e] for row, b, e in zip(schedule.ranks, begin, progress, strict=True)]
        begin = progress
        if shared_ends:
            first = [(rank, part) for rank, row in enumerate(groups) for group in row for part in before(group)]
            last = [(rank, part) for rank, row in enumerate(groups) for group in row for part in after(group)]
            middle, end = len(first), len(first) + max(map(len, groups))
            cells += [Cell(rank, tick, place, part, True) for place, (rank, part) in enumerate(first)]
            cells += [Cell(r, tick, i, itself(g)) for r, row in enumerate(groups) for i, g in enumerate(row, middle)]
            cells += [Cell(rank, tick, place, part, True) for place, (rank, part) in enumerate(last, end)]
        else:
            for rank, row in enumerate(groups):
                parts = [part for group in row for part in (*before(group), itself(group), *after(group))]
                cells += [Cell(rank, tick, place, part) for place, part in enumerate(parts)]
    return cells


def find_values(cells: list[Cell]) -> list[Value]:
    """Every boundary that an operation reads. One that none reads (dx of stage 0, perhaps) goes nowhere.

    Raises:
      ValueError: what an operation needs is not made, or arrives too late.
    """
    writer = {w.target: index for index, cell in enumerate(cells) for w in cell.operations if w.target is not None}
    values = []
    for index, cell in enumerate(cells):
        for boundary in (w.source for w in cell.operations if w.source is not None):
            if boundary not in writer:
                raise ValueError(f"no action produces what {cell.operations} on rank {cell.rank} needs")
            made = cells[writer[boundary]]
            value = Value(boundary, writer[boundary], index, made.rank, cell.rank, made.tick, cell.tick)
            late = value.release >= value.deadline if made.rank != cell.rank else writer[boundary] >= index
            if late:
                raise ValueError(
                    f"{cell.operations} on rank {cell.rank} in tick {cell.tick} needs {made.operations} of rank "
                    f"{made.rank}, which runs in tick {made.tick}; messages move only between ticks, where shared ends "
                    "run too"
                )
            values.append(value)
    return values
