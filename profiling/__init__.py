"""Timelines of training steps: captured, read, measured, drawn and predicted."""

from profiling.capture import annotate_step, capture
from profiling.event import Event, Step, Trace
from profiling.hlo_divergent import check_collectives
from profiling.hlo_overlap import overlap
from profiling.html import write_html
from profiling.metrics import measure
from profiling.pipeline import attribute, group_actions, measured_costs, pipeline_ranks
from profiling.read_kineto import read_kineto
from profiling.read_timeline import read_timeline
from profiling.read_trace import read_trace
from profiling.read_xplane import read_xplane
from profiling.replay import replay
from profiling.report import report
from profiling.write_chrome import write_chrome
from profiling.write_perfetto import write_perfetto

__all__ = [
    "Event",
    "Step",
    "Trace",
    "annotate_step",
    "attribute",
    "capture",
    "check_collectives",
    "group_actions",
    "measure",
    "measured_costs",
    "overlap",
    "pipeline_ranks",
    "read_kineto",
    "read_timeline",
    "read_trace",
    "read_xplane",
    "replay",
    "report",
    "write_chrome",
    "write_html",
    "write_perfetto",
]
