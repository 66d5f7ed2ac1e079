"""The unit of a pipeline schedule: one kind of work of one stage on one microbatch."""

from __future__ import annotations

import enum
import re
from typing import NamedTuple


class Kind(enum.Enum):
    """What an action computes; the values are the letters used in grids, CSV files and profiles."""

    F = "F"  # forward
    B = "B"  # whole backward: input and weight gradients together
    I = "I"  # input-gradient half of the backward
    W = "W"  # weight-gradient half of the backward

    __hash__ = object.__hash__  # members are single objects; Enum's own makes every set of actions several times slower


class Action(NamedTuple):
    """One kind of work of one stage on one microbatch.

    Written stage, kind, microbatch, as PyTorch does: ``Action(2, Kind.F, 0)`` is ``2F0``.

    >>> str(Action(2, Kind.F, 0))
    '2F0'
    >>> Action.parse("7I3")
    Action(stage=7, kind=<Kind.I: 'I'>, microbatch=3)
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads ``2F0``. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)([FBIW])(\d+)", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not an action; write stage, kind (F, B, I or W) and microbatch, as in '2F0'")
        return cls(int(match[1]), Kind(match[2]), int(match[3]))


Group = tuple[Action, ...]
"""Actions that one rank runs together: one action, or an overlapped forward and backward, in that order."""
