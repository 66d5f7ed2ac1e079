"""What a timeline amounts to, per device and over all: every figure in microseconds, None where it would be 0 / 0."""

from profiling.metrics.bounds import Bounds, bounds
from profiling.metrics.measure import Bubble, Measurement, Metrics, Summary, measure
from profiling.metrics.overlap import (
    DEFINITIONS,
    Breakdown,
    Overlap,
    Sides,
    breakdown,
    communication_lanes,
    members,
    overlap,
    sides,
)
from profiling.metrics.skew import DeviceSkew, Skew, skew
from profiling.metrics.times import (
    LaneRow,
    LayerRow,
    LayerSpan,
    TimeRow,
    concurrency,
    lanes,
    layer_spans,
    layers,
    phase_durations,
    time_by,
    unattributed_share,
)

__all__ = [
    "DEFINITIONS",
    "Bounds",
    "Breakdown",
    "Bubble",
    "DeviceSkew",
    "LaneRow",
    "LayerRow",
    "LayerSpan",
    "Measurement",
    "Metrics",
    "Overlap",
    "Sides",
    "Skew",
    "Summary",
    "TimeRow",
    "bounds",
    "breakdown",
    "communication_lanes",
    "concurrency",
    "lanes",
    "layer_spans",
    "layers",
    "measure",
    "members",
    "overlap",
    "phase_durations",
    "sides",
    "skew",
    "time_by",
    "unattributed_share",
]
