"""Schedules in PyTorch's CSV notation: a line per rank, ``0F0``, ``7I0``, ``(0F7;7B3)OVERLAP_F_B``."""

from __future__ import annotations

import csv
import io
import itertools
import re

from jaxpipe.schedule.action import Action, Group
from jaxpipe.schedule.checker import check
from jaxpipe.schedule.schedule import Schedule


def to_csv(schedule: Schedule) -> str:
    """The schedule as CSV.

    >>> from jaxpipe.schedule.builders.gpipe import gpipe
    >>> print(to_csv(gpipe(2, 1)), end="")
    0F0,0B0
    1F0,1B0
    """
    return "".join(",".join(map(_cell, groups)) + "\n" for groups in schedule.ranks)


def from_csv(text: str, name: str = "csv") -> Schedule:
    """Reads and checks a schedule; empty cells, which are idle times, are skipped, and so are empty lines.

    Quoted cells, spaces, lower case, a byte-order mark and any line ends are accepted.

    Stages, microbatches and ranks are those that the actions name. Where two ranks run the same stage, the first half
    of the microbatches travels in one direction and the second half in the other, as DualPipe's do.

    Raises:
      ValueError: a cell that is not an action, or a schedule that `check` refuses.

    >>> from_csv("0F0,0B0\\n1F0,,1B0\\n").num_stages
    2
    """
    if not isinstance(text, str):
        raise ValueError(f"a CSV of type {type(text).__name__}: pass its text, such as pathlib.Path(...).read_text()")
    lines = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), skipinitialspace=True)
    ranks = tuple(
        tuple(_parse(cell, row, column) for column, cell in enumerate(cells) if cell.strip())
        for row, cells in enumerate(lines)
        if any(cell.strip() for cell in cells)
    )
    actions = [(rank, action) for rank, groups in enumerate(ranks) for group in groups for action in group]
    if not actions:
        raise ValueError("the CSV holds no actions; each line is a rank's, as in '0F0,0F1,0B0,0B1'")
    num_stages = 1 + max(action.stage for _, action in actions)
    num_microbatches = 1 + max(action.microbatch for _, action in actions)
    stages = {action.stage for _, action in actions}
    if len(stages) < num_stages:
        missing = next(stage for stage in itertools.count() if stage not in stages)
        raise ValueError(f"stage {missing} of {num_stages} never runs; number the stages 0, 1, 2, ... without gaps")
    places = {(action.stage, rank) for rank, action in actions}
    directions = 1 if len(places) == len(stages) else 2
    routes = [[0] * num_stages for _ in range(directions)]
    for rank, action in actions:
        routes[action.microbatch * directions // num_microbatches][action.stage] = rank
    schedule = Schedule(name, num_stages, num_microbatches, ranks, tuple(map(tuple, routes)))
    check(schedule)
    return schedule


def _cell(group: Group) -> str:
    if len(group) == 1:
        return str(group[0])
    kinds = "_".join(action.kind.value for action in group)
    return f"({';'.join(map(str, group))})OVERLAP_{kinds}"


def _parse(cell: str, row: int, column: int) -> Group:
    overlapped = re.fullmatch(r"\(([^();]+);([^();]+)\)\s*OVERLAP_F_[BI]", cell.strip().upper())
    try:
        return tuple(Action.parse(part.strip()) for part in (overlapped.groups() if overlapped else (cell.upper(),)))
    except ValueError:
        raise ValueError(
            f"line {row + 1}, column {column + 1}: {cell!r} is not an action; write stage, kind (F, B, I or W) and "
            "microbatch, as in '2F0', or an overlapped pair as in '(0F7;7B3)OVERLAP_F_B', or leave the cell empty"
        ) from None
