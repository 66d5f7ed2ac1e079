"""Timelines of training steps: captured, read, measured, drawn and predicted."""

from profiling.event import Event, Step, Trace

__all__ = ["Event", "Step", "Trace"]
