"""A report of PyTorch's kernels agrees with counting microseconds one by one, whatever the kernels are."""

import json
import pathlib

import numpy as np
import pytest

from profiling.read.kineto import read_kineto
from profiling.reports.making import report

KNOWN = [
    line.split("\t")
    for line in (pathlib.Path(__file__).parents[1] / "data" / "kernels.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#") and not line.endswith("other kernel")
]


def random_trace(seed, kernels, events=120, length=600):
    """Events of whole microseconds on four streams, and which microseconds hold transfers, waits and compute."""
    random = np.random.default_rng(seed)
    busy = {group: np.zeros(length, bool) for group in ("transfer", "wait", "compute")}
    found = []
    for _ in range(events):
        name, group, _ = kernels[random.integers(len(kernels))]
        start = int(random.integers(0, length - 12))
        duration = int(random.integers(1, 12))
        busy[group][start : start + duration] = True
        stream = int(random.integers(4))
        found.append(
            {
                "ph": "X",
                "cat": "kernel",
                "name": name,
                "pid": 0,
                "tid": stream,
                "ts": start,
                "dur": duration,
                "args": {"device": 0, "stream": stream},
            }
        )
    return found, busy


@pytest.mark.parametrize("seed", range(12))
def test_figures_are_counts_of_microseconds(seed, tmp_path):
    kernels = [row for row in KNOWN if row[1] == "compute"] if seed == 0 else KNOWN
    events, busy = random_trace(seed, kernels)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    made = report(read_kineto(path))
    measured = made.measurement
    communication = busy["transfer"] | busy["wait"]
    anything = communication | busy["compute"]
    window = np.flatnonzero(anything)[-1] + 1 - np.flatnonzero(anything)[0]
    whole, both = measured.summary.breakdown, measured.summary.overlaps["transfer+wait"]
    assert whole.window == pytest.approx(window)
    assert whole.compute == pytest.approx(busy["compute"].sum())
    assert whole.idle == pytest.approx(window - anything.sum())
    assert both.communication == pytest.approx(communication.sum())
    assert both.exposed == pytest.approx((communication & ~busy["compute"]).sum())
    moved = busy["transfer"].sum()
    ratio = measured.summary.overlaps["transfer"].ratio
    assert ratio == (pytest.approx((busy["transfer"] & busy["compute"]).sum() / moved) if moved else None)
    assert measured.unclassified_share == 0.0
    assert measured.bounds is None and made.doubt == ""
