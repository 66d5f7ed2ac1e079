"""Measures all metrics of a trace, as reports print them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from profiling.classify.classifier import unclassified_share
from profiling.event import Trace
from profiling.metrics.bandwidth import CollectiveRow, rows
from profiling.metrics.calls import Call, calls, match_calls
from profiling.metrics.columns import Columns, by_device
from profiling.metrics.doubt import Bounds, bounds
from profiling.metrics.overlaps import DEFINITIONS, Breakdown, Overlap, breakdown, overlap, overlap_of, sides
from profiling.metrics.stragglers import Skew, skew_and_notes
from profiling.metrics.times import (
    LaneRow,
    LayerRow,
    LayerSpan,
    TimeRow,
    concurrency,
    lanes,
    layer_spans,
    layers,
    steady_window,
    time_by_action,
    time_by_kind,
    time_by_phase,
    unattributed_share,
)
from profiling.metrics.windows import StepRow, steps


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The metrics of one device.

    Attributes:
      device: index of the device; rank: its pipeline rank, None without a pipeline.
      breakdown: how the time divides, in the window that all devices have in common.
      overlaps: ``{definition: Overlap}`` for each of `profiling.metrics.DEFINITIONS`.
      sensitivity: ``{definition: overlaps}``, one for each of the gaps asked for.
      steady_window: the time from the start of the second layer to that of the last, without cold queues and with
        compute to hide behind; None without evidence of layers.
      steady: ``{definition: Overlap}`` within the steady window; empty if that is None.
      kinds, phases, actions: time by each, the longest first.
      layers: phases of each layer; layer_spans: when each layer begins.
      lanes: time of each lane; concurrency: ``[lanes + 1]`` microseconds with so many busy lanes.
    """

    device: int
    rank: int | None
    breakdown: Breakdown
    overlaps: Mapping[str, Overlap]
    sensitivity: Mapping[str, tuple[Overlap, ...]]
    steady_window: tuple[float, float] | None
    steady: Mapping[str, Overlap]
    kinds: tuple[TimeRow, ...]
    phases: tuple[TimeRow, ...]
    actions: tuple[TimeRow, ...]
    layers: tuple[LayerRow, ...]
    layer_spans: tuple[LayerSpan, ...]
    lanes: tuple[LaneRow, ...]
    concurrency: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Bubble:
    """The bubble of one pipeline rank: means over its devices, as shares of the window that all devices have in common.

    Attributes:
      rank: pipeline rank.
      compute_bubble: share of the window without compute.
      device_idle: share of the window in which the devices do nothing at all.
    """

    rank: int
    compute_bubble: float
    device_idle: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The metrics of all devices together.

    Attributes:
      overlaps: ``{definition: Overlap}`` with the times of all devices added up, so that ratios weigh them by time.
      steady: the same for the devices' steady windows; empty if no device has one.
      breakdown: how the times divide, added up, with the longest gap of any device.
      bubbles: one bubble for each pipeline rank; empty without a pipeline.
    """

    overlaps: Mapping[str, Overlap]
    steady: Mapping[str, Overlap]
    breakdown: Breakdown
    bubbles: tuple[Bubble, ...]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """All metrics of a trace; `measure` makes it.

    Attributes:
      title: title of the trace.
      window: start and end over all devices, in microseconds.
      devices: metrics of each device.
      summary: metrics of all devices together.
      skew: how devices drift apart; None if no collective is common to several devices.
      collectives: rows by kind, process group and size; empty if the profiler says nothing about collectives.
      steps: one row for each numbered step that lies in the window.
      unclassified_share: share of the time in events that no rule knows; they count as compute.
      unattributed_share: share of the time in events without a phase.
      bounds: ranges of the figures, as unknown kernels might communicate; None if all kernels are known.
      notes: what could not be measured, and why.
    """

    title: str
    window: tuple[float, float]
    devices: tuple[Metrics, ...]
    summary: Summary
    skew: Skew | None
    collectives: tuple[CollectiveRow, ...]
    steps: tuple[StepRow, ...]
    unclassified_share: float
    unattributed_share: float
    bounds: Bounds | None = None
    notes: tuple[str, ...] = ()

    @property
    def makespan(self) -> float:
        """The length of the window, in microseconds."""
        return self.window[1] - self.window[0]


def measure(
    trace: Trace, gaps_us: Sequence[float] = (0.0, 2.0, 5.0, 20.0, 50.0), window: tuple[float, float] | None = None
) -> Measurement:
    """Measures all metrics of a trace.

    Args:
      trace: trace of any reader, whose events are classified.
      gaps_us: gaps in compute, in microseconds, that count as compute in the table of sensitivity to launch gaps.
      window: start and end to look at, in microseconds; by default everything. Events across an edge are cut there.
        Collectives and steps count only if they lie in the window as a whole.

    Raises:
      ValueError: the trace has no events in the window, or the window ends before it starts.

    >>> from profiling.event import Event
    >>> gemm = Event(0, "7", 0.0, 8.0, "gemm", group="compute")
    >>> found = measure(Trace("", "kineto", (gemm, Event(0, "27", 5.0, 9.0, "dispatch", group="transfer"))))
    >>> found.devices[0].overlaps["transfer"].ratio, found.devices[0].breakdown.idle
    (0.75, 0.0)
    """
    whole, looked_at = trace, window
    if window is not None:
        trace = trace.clip(*window)
    if not trace.events:
        raise ValueError(f"trace {trace.title!r} has no events in the window {window}: there is nothing to measure")
    window = window or trace.window
    parts = by_device(trace)
    # The edge of a window must not change which collectives belong together, how long they take, or what a step is.
    all_parts = parts if looked_at is None else by_device(whole)
    nothing = Columns(())  # a device that does nothing in the window is idle for all of it
    devices = tuple(
        _device(device, trace.ranks.get(device), parts.get(device, nothing), window, gaps_us) for device in all_parts
    )
    called = calls(whole.events)
    met = match_calls(called)
    found_skew, notes = skew_and_notes(whole, looked_at, met)
    cut = sum(_is_cut(call, window) for call in called)
    if cut:
        notes += (f"{cut:,} collectives lie across an edge of the window: the table of collectives leaves them out",)
    return Measurement(
        title=trace.title,
        window=window,
        devices=devices,
        summary=_summary(devices),
        skew=found_skew,
        collectives=rows(called, met[0], all_parts, looked_at),
        steps=steps(whole, looked_at, all_parts),
        unclassified_share=unclassified_share(trace),
        unattributed_share=unattributed_share(trace),
        bounds=bounds([parts.get(device, nothing) for device in all_parts], window),
        notes=notes,
    )


def _is_cut(call: Call, window: tuple[float, float]) -> bool:
    return call.start < window[1] and call.end > window[0] and not (window[0] <= call.start and call.end <= window[1])


def _device(
    device: int, rank: int | None, events: Columns, window: tuple[float, float], gaps_us: Sequence[float]
) -> Metrics:
    weighed = {definition: sides(events, definition, window) for definition in DEFINITIONS}
    steady = steady_window(events)
    return Metrics(
        device=device,
        rank=rank,
        breakdown=breakdown(events, window),
        overlaps={name: overlap_of(of, name) for name, of in weighed.items()},
        sensitivity={name: tuple(overlap_of(of, name, gap) for gap in gaps_us) for name, of in weighed.items()},
        steady_window=steady,
        steady={name: overlap(events, name, window=steady) for name in DEFINITIONS} if steady else {},
        kinds=time_by_kind(events),
        phases=time_by_phase(events),
        actions=time_by_action(events),
        layers=layers(events),
        layer_spans=layer_spans(events),
        lanes=lanes(events),
        concurrency=concurrency(events),
    )


def _summary(devices: Sequence[Metrics]) -> Summary:
    ranks: dict[int, list[Breakdown]] = {}
    for metrics in devices:
        if metrics.rank is not None:
            ranks.setdefault(metrics.rank, []).append(metrics.breakdown)
    parts = [metrics.breakdown for metrics in devices]
    return Summary(
        overlaps=_pooled([metrics.overlaps for metrics in devices]),
        steady=_pooled([metrics.steady for metrics in devices if metrics.steady]),
        breakdown=Breakdown.added(parts),
        bubbles=tuple(
            Bubble(
                rank,
                1 - sum(part.compute for part in parts) / sum(part.window for part in parts),
                sum(part.idle for part in parts) / sum(part.window for part in parts),
            )
            for rank, parts in sorted(ranks.items())
            if sum(part.window for part in parts) > 0
        ),
    )


def _pooled(overlaps: Sequence[Mapping[str, Overlap]]) -> dict[str, Overlap]:
    return {name: Overlap.added([each[name] for each in overlaps]) for name in DEFINITIONS} if overlaps else {}
