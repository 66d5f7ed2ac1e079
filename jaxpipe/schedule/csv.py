"""Schedules as text, in the notation of PyTorch's schedule files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from jaxpipe.schedule.action import Action, Group
from jaxpipe.schedule.check import check
from jaxpipe.schedule.schedule import Schedule

_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


def to_csv(schedule: Schedule) -> str:
    """A line for each rank, its groups separated by commas; an overlapped pair is ``(0F7;7B3)OVERLAP_F_B``.

    >>> from jaxpipe.schedule.gpipe import gpipe
    >>> print(to_csv(gpipe(2, 1)), end="")
    0F0,0B0
    1F0,1B0
    """
    return "".join(",".join(map(_cell, groups)) + "\n" for groups in schedule.ranks)


def from_csv(text: str, *, name: str = "csv") -> Schedule:
    """Reads a schedule in the notation of `to_csv`.

    The numbers of stages and microbatches and the routes follow from the actions. A stage that is on two ranks makes
    two directions, as in DualPipe: the first half of the microbatches travels in direction 0, the rest in direction 1.

    Args:
      text: a line for each rank, groups separated by commas. Empty cells and lines are skipped.
      name: the schedule's name.

    Raises:
      ValueError: a cell that is no group of actions (the message has its line and column, counted from 1), an empty
        text, a stage that never runs, or a schedule that `jaxpipe.schedule.check` finds unsound.

    >>> from_csv("0F0,,0B0\\n1F0,1B0").routes
    ((0, 1),)
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip(" \t,")]
    ranks = tuple(_groups(number, line) for number, line in lines)
    if not ranks:
        raise ValueError("the text has no actions; write a line for each rank, such as '0F0,0B0'")
    actions = [(rank, action) for rank, groups in enumerate(ranks) for group in groups for action in group]
    num_stages = 1 + max(action.stage for _, action in actions)
    num_microbatches = 1 + max(action.microbatch for _, action in actions)
    stages = {action.stage for _, action in actions}
    if len(stages) < num_stages:
        missing = next(stage for stage in itertools.count() if stage not in stages)
        raise ValueError(f"stage {missing} of {num_stages} never runs; number the stages 0, 1, 2, ... without gaps")
    routes = _routes(actions, num_stages, num_microbatches)
    schedule = Schedule(name, num_stages, num_microbatches, ranks, routes)
    check(schedule)
    return schedule


def _cell(group: Group) -> str:
    return str(group[0]) if len(group) == 1 else f"({';'.join(map(str, group))})OVERLAP_F_B"


def _groups(line: int, text: str) -> tuple[Group, ...]:
    """The groups of one line."""
    cells = ((column, cell.strip()) for column, cell in enumerate(text.split(","), 1))
    return tuple(_group(line, column, cell) for column, cell in cells if cell)


def _group(line: int, column: int, cell: str) -> Group:
    pair = _PAIR.fullmatch(cell)
    try:
        return tuple(map(Action.parse, pair.groups() if pair else (cell,)))
    except ValueError as error:
        raise ValueError(
            f"line {line}, column {column}: {cell!r} is neither an action such as '2F0' (stage; F, B, I or W; "
            "microbatch) nor an overlapped pair such as '(0F7;7B3)OVERLAP_F_B'; correct the cell or leave it empty"
        ) from error


def _routes(
    actions: Iterable[tuple[int, Action]], num_stages: int, num_microbatches: int
) -> tuple[tuple[int, ...], ...]:
    """``[num_directions][num_stages]``: the rank where each stage is first seen in each direction, or in the other."""
    seen = [dict[int, int](), dict[int, int]()]
    for rank, action in actions:
        seen[action.microbatch * 2 // num_microbatches].setdefault(action.stage, rank)
    first, second = seen
    either = second | first
    crossed = any(first.get(stage, rank) != rank for stage, rank in second.items())
    directions = seen if crossed else [either]
    return tuple(tuple((either | at)[stage] for stage in range(num_stages)) for at in directions)
