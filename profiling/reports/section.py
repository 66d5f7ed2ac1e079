"""What a section of a report must do. `profiling.reports.tables.SECTIONS` lists the sections."""

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
    """Everything that the sections of a report may show.

    Attributes:
      trace: the measured trace, cut to the window if one was asked for.
      measured: metrics of the trace.
      expected: metrics of the prediction; None without one.
      comparison: the prediction against the trace; None without one.
      compiled: communication of the compiled program; None if it was not given.
    """

    trace: Trace
    measured: Measurement
    expected: Measurement | None = None
    comparison: Comparison | None = None
    compiled: CompiledOverlap | None = None


class Section(Protocol):
    """Makes tables of what was found."""

    def __call__(self, found: Findings, /) -> Table | Sequence[Table]:
        """Makes one table or several; the report leaves out tables without rows."""
        ...
