"""What a section of a report must do; `profiling.reports.tables.SECTIONS` lists those that there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from profiling.event import Trace
from profiling.hlo.hiding import CompiledOverlap
from profiling.metrics import Measurement
from profiling.predict import Comparison
from profiling.table import Table


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything that a report knows.

    Attributes:
      trace: what was measured, cut to the window if one was asked for.
      measured: the metrics of the trace.
      expected: the metrics of the prediction; None without one.
      comparison: of the prediction with the trace; None without one.
      compiled: the communication of the compiled program; None if it was not given.
    """

    trace: Trace
    measured: Measurement
    expected: Measurement | None = None
    comparison: Comparison | None = None
    compiled: CompiledOverlap | None = None


class Section(Protocol):
    """Shows one side of what was found."""

    def __call__(self, found: Findings, /) -> Table | Sequence[Table]:
        """One table or several; a table without rows is left out of the report."""
        ...
