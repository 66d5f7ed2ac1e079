"""Predicts timelines, and compares two traces: predicted and measured, or before and after a change; internal."""

from profiling.predict.comparison import Comparison, DeviceRow, TaskRow, compare
from profiling.predict.differences import Change, Changes, changes

__all__ = ["Change", "Changes", "Comparison", "DeviceRow", "TaskRow", "changes", "compare"]
