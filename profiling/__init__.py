"""Timelines of training steps: captured, read, measured, drawn and predicted.

What `__all__` names is public; all modules below are internal and may change without notice.
"""

from jaxpipe.planning.chips import Achieved, Chip, chip
from profiling.classify.rules import Rule, load_rules
from profiling.event import Collective, Event, Step, Trace
from profiling.hlo.divergent import check_collectives
from profiling.hlo.hiding import CompiledOverlap, overlap
from profiling.hlo.topologies import target_names, topology
from profiling.metrics import Measurement, measure
from profiling.predict.replaying import Task, replay
from profiling.read.kineto import read_kineto
from profiling.read.pipeline import attribute, group_actions, measured_costs, pipeline_ranks
from profiling.read.reader import Reader
from profiling.read.timeline import read_timeline
from profiling.read.trace import READERS, read_trace
from profiling.read.xplane import read_xplane
from profiling.recording import annotate_step, capture
from profiling.reports.html import write_html
from profiling.reports.making import Report, report
from profiling.write.chrome import write_chrome
from profiling.write.perfetto import write_perfetto
from profiling.write.trace import WRITERS, write_trace
from profiling.write.tracks import MOE_LINKS, PhaseLink
from profiling.write.writer import Writer

__all__ = [
    "MOE_LINKS",
    "READERS",
    "WRITERS",
    "Achieved",
    "Chip",
    "Collective",
    "CompiledOverlap",
    "Event",
    "Measurement",
    "PhaseLink",
    "Reader",
    "Report",
    "Rule",
    "Step",
    "Task",
    "Trace",
    "Writer",
    "annotate_step",
    "attribute",
    "capture",
    "check_collectives",
    "chip",
    "group_actions",
    "load_rules",
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
    "target_names",
    "topology",
    "write_chrome",
    "write_html",
    "write_perfetto",
    "write_trace",
]
