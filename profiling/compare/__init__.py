"""Two traces side by side: a prediction and what was measured, or a measurement before and after a change."""

from profiling.compare.changes import Change, Changes, changes
from profiling.compare.prediction import Comparison, DeviceRow, TaskRow, compare

__all__ = ["Change", "Changes", "Comparison", "DeviceRow", "TaskRow", "changes", "compare"]
