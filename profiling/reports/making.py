"""Makes the report of a trace, with a prediction beside it: figures, tables and notes, as text and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from profiling.classify.classifier import OTHER, unclassified_names
from profiling.classify.names import kernel_label
from profiling.event import Trace
from profiling.hlo.hiding import CompiledOverlap
from profiling.metrics import DEFINITIONS, Bounds, Measurement, measure, window_in, window_of_step
from profiling.predict import Comparison, compare
from profiling.reports.section import Findings
from profiling.reports.tables import report_tables
from profiling.table import (
    TIMES,
    Figure,
    Table,
    as_markdown,
    as_text,
    counted,
    duration,
    escape_markdown,
    time_unit,
    written,
)

EXPLAINED = (
    (
        "A transfers",
        "What moves data between devices is communication. A kernel that waits for its peers, as NCCL's do, counts "
        "with its wait.",
    ),
    ("B transfers and waits", "Barriers and notifications, which move no data, also count as communication."),
    (
        "C communication lanes",
        "Everything on lanes that mostly communicate, casts and layouts included, against everything on the others.",
    ),
    (
        "overlap ratio",
        "Time with both communication and compute, divided by the time with communication. Times with several "
        "events at once count once. None without communication.",
    ),
    ("exposed", "Time with communication and without compute; launch gaps between compute kernels count."),
    ("compute share, idle share", "Time with compute, and time with nothing at all, divided by the window."),
    (
        "window",
        "The time from the first start to the last end over all devices, or the step or the times that were asked "
        "for. It is the same for each device.",
    ),
    ("bubble", "Share of the window in which a rank does not compute; the mean over its devices."),
    (
        "total, busy",
        "The sum of durations, and the time with any of the events, which is less if they run beside each other.",
    ),
    (
        "speed-up, efficiency",
        "Speed-up: the time of communication and compute one after the other, divided by the window. Efficiency: the "
        "share that was reached of the gain from hiding the shorter side entirely. None if the window is longer than "
        "both together, as idle time then decides.",
    ),
    (
        "a range",
        "Kernels that no rule knows count as compute and might communicate. The range goes from the figure with all of "
        "them computing to that with all communicating.",
    ),
    ("over several devices", "Times are added up, and ratios are ratios of the sums."),
    (
        "steady state",
        "The time from the start of the second layer to that of the last, if at least three layers follow one another "
        "that compute and have a phase in common.",
    ),
    (
        "algorithm and bus bandwidth",
        "Algorithm bandwidth: the bytes of a collective divided by its time. Bus bandwidth, which each link carries: "
        "that times 2(n-1)/n for an all-reduce of n ranks, (n-1)/n for an all-gather, reduce-scatter or all-to-all, "
        "and 1 for the rest. Both are those of NCCL's tests.",
    ),
)
"""The definitions of all numbers."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The figures, tables and notes of a trace; `report` makes it.

    Attributes:
      trace: the measured trace, cut to the window if one was asked for; predicted: the prediction, None without one.
      measurement: the metrics of the trace.
      figures: the numbers at the top.
      tables: the tables, in their order; ``report["kinds"]`` is the one named "kinds".
      notes: what is missing or doubtful.
      window: the part of the trace that was asked for, such as "step 3"; "" for all of it.
    """

    trace: Trace
    predicted: Trace | None
    measurement: Measurement
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    window: str = ""

    def __getitem__(self, name: str) -> Table:
        """The table of a name.

        Raises:
          KeyError: the report has no such table, perhaps because there is nothing to show.
        """
        found = {table.name: table for table in self.tables}
        if name not in found:
            raise KeyError(f"no table {name!r}; there are {', '.join(found)}")
        return found[name]

    def text(self, most: int | None = 30, width: int | None = 120) -> str:
        """The report for a terminal.

        Args:
          most: most rows of a table; a last line counts the others. None for all.
          width: characters of a line, which tables keep to; None for no limit.
        """
        shown = self.shown
        wide = max(len(figure.label) for figure in shown)
        high = max(len(figure.written) for figure in shown)
        figures = [
            f"{figure.label.ljust(wide)}  {figure.written.rjust(high)}  {figure.note}".rstrip() for figure in shown
        ]
        return "\n\n".join(
            [
                "\n".join([self.trace.title, " · ".join(self.facts), *filter(None, [self.doubt]), "", *figures]),
                *(as_text(table, most, width) for table in self.tables),
                "\n".join(["Definitions", *(f"- {name}: {meaning}" for name, meaning in EXPLAINED)]),
                "\n".join(["Notes", *(f"- {note}" for note in self.notes)]),
            ]
        )

    def markdown(self, most: int | None = 100) -> str:
        """The report for a document; `most` is that of `text`."""
        figures = [f"| {figure.label} | {figure.written} | {escape_markdown(figure.note)} |" for figure in self.shown]
        return "\n\n".join(
            [
                f"## {escape_markdown(self.trace.title)}",
                escape_markdown(" · ".join(self.facts)),
                *([f"**{escape_markdown(self.doubt)}**"] if self.doubt else []),
                "\n".join(["| | | |", "|---|--:|---|", *figures]),
                *(as_markdown(table, most) for table in self.tables),
                "\n".join(["### Notes", "", *(f"* {escape_markdown(note)}" for note in self.notes)]),
                "\n".join(["### Definitions", "", *(f"* **{name}**: {meaning}" for name, meaning in EXPLAINED)]),
            ]
        )

    @property
    def shown(self) -> tuple[Figure, ...]:
        """The figures that have a value, or a reason for having none."""
        return tuple(figure for figure in self.figures if figure.value is not None or figure.note)

    @property
    def doubt(self) -> str:
        """A sentence or two on how far the figures could be wrong; "" if that does not matter."""
        bounds = self.measurement.bounds
        if bounds is None or not bounds.matter:
            return ""
        return (
            f"{100 * bounds.share:.1f}% of the time is in kernels that no rule knows. Whether they compute or "
            f"communicate, the overlap ratio is {_between(bounds.overlap, '%')}, exposed communication "
            f"{_between(bounds.exposed, 'us')} and compute {_between(bounds.compute, '%')}: say what they are in a "
            "file of rules, --rules FILE."
        )

    @property
    def facts(self) -> tuple[str, ...]:
        """Facts about the trace, in a few words each."""
        devices, events = len(self.measurement.devices), len(self.trace.events)
        return (
            f"read from {self.trace.source}" if self.trace.source != "simulated" else "simulated",
            counted(devices, "device"),
            counted(events, "event"),
            *([self.window] if self.window else []),
            *(f"{name} {value}" for name, value in self.trace.metadata.items() if _is_short(name, value)),
        )


def report(
    trace: Trace,
    predicted: Trace | None = None,
    schedule: CompiledOverlap | None = None,
    *,
    window: tuple[float | None, float | None] | None = None,
    step: int | None = None,
) -> Report:
    """Makes the report of a trace.

    Args:
      trace: trace of any reader.
      predicted: the same step, simulated or predicted; its devices or ranks are compared with those of the trace.
      schedule: what `profiling.overlap` found in the compiled program.
      window: start and end to look at, in microseconds; None for a side stands for the trace's. By default everything.
      step: number of a step to look at instead of a window.

    Raises:
      ValueError: the trace has no events, the prediction is of other devices, nothing runs in the window, the step does
        not exist, or both a window and a step are given.

    >>> from profiling.event import Event
    >>> gemm = Event(0, "7", 0.0, 8.0, "gemm", kind="GEMM", group="compute")
    >>> dispatch = Event(0, "27", 5.0, 9.0, "dispatch", kind="all-to-all", group="transfer")
    >>> found = report(Trace("a step", "kineto", (gemm, dispatch)))
    >>> print(found.text().splitlines()[6])
    overlap ratio          75.00%  of 4.0 us in transfers; with waits 75.00%, by lanes 75.00%
    """
    chosen, asked = _chosen(trace, window, step)
    measured = measure(trace, window=chosen)
    if chosen is not None:
        cut = trace.clip(*chosen)
        trace = dataclasses.replace(cut, title=f"{trace.title}, {asked}" if trace.title else asked)
    expected = measure(predicted) if predicted else None
    comparison = compare(predicted, trace) if predicted else None
    return Report(
        trace=trace,
        predicted=predicted,
        measurement=measured,
        figures=tuple(_bounded(_figures(measured, expected, comparison, asked), measured.bounds)),
        tables=report_tables(Findings(trace, measured, expected, comparison, schedule)),
        notes=tuple(_notes(trace, measured, predicted, comparison, schedule)),
        window=asked,
    )


def _chosen(
    trace: Trace, window: tuple[float | None, float | None] | None, step: int | None
) -> tuple[tuple[float, float] | None, str]:
    """The window to look at, None for all, and its description."""
    if step is not None:
        if window is not None:
            raise ValueError(f"step {step} and window {window}: ask for one of them")
        return window_in(trace, *window_of_step(trace, step)), f"step {step}"
    if window is None:
        return None, ""
    start, end = window_in(trace, *window)
    unit = time_unit((start, end))
    return (start, end), f"{written(start, unit)} to {written(end, unit)} {unit}"


def _figures(
    measured: Measurement, expected: Measurement | None, comparison: Comparison | None, asked: str
) -> list[Figure]:
    """The numbers at the top of a report, in their order."""
    whole, devices = measured.summary.breakdown, len(measured.devices)
    window = "the window" if devices == 1 else f"the windows of {devices} devices"
    gaps = f"in {counted(whole.gaps, 'gap')}, the longest {duration(whole.longest_gap)}"
    return [
        Figure("makespan", "makespan", measured.makespan, "us", asked or "from the first start to the last end"),
        Figure("compute", "compute", whole.compute / whole.window if whole.window else None, "%", f"of {window}"),
        Figure("idle", "idle", whole.device_idle, "%", gaps if whole.gaps else "without a gap"),
        *_communication_figures(measured, window),
        *_bubble_figures(measured, expected),
        *_prediction_figures(comparison),
        _unclassified_figure(measured),
    ]


def _communication_figures(measured: Measurement, window: str) -> Iterator[Figure]:
    transfers, waits, lanes = (measured.summary.overlaps[name] for name in DEFINITIONS)
    steady = measured.summary.steady.get("transfer+wait")
    if transfers.communication or waits.communication:
        ratios = f"with waits {_percent(waits.ratio)}, by lanes {_percent(lanes.ratio)}"
        hidden = f"of {duration(transfers.communication)} in transfers; {ratios}"
        alone = f"with waits; transfers alone {duration(transfers.exposed)}"
        yield Figure("overlap", "overlap ratio", transfers.ratio, "%", hidden)
        note = f"{_percent(waits.exposed_share)} of {window}, {alone}"
        yield Figure("exposed", "exposed communication", waits.exposed, "us", note)
    else:
        yield Figure("overlap", "overlap ratio", transfers.ratio, "%", "no communication in this trace")
        yield Figure("exposed", "exposed communication", None, "us")
    if steady and steady.ratio is not None:
        note = f"with waits; {duration(steady.exposed)} exposed"
        yield Figure("steady", "steady-state overlap", steady.ratio, "%", note)


def _bubble_figures(measured: Measurement, expected: Measurement | None) -> Iterator[Figure]:
    bubbles = measured.summary.bubbles
    if not bubbles:
        return
    mean = sum(bubble.compute_bubble for bubble in bubbles) / len(bubbles)
    simulated = expected.summary.bubbles if expected else ()
    beside = sum(bubble.compute_bubble for bubble in simulated) / len(simulated) if simulated else None
    note = "mean over ranks" + ("" if beside is None else f"; simulated {_percent(beside)}")
    yield Figure("bubble", "bubble", mean, "%", note)


def _prediction_figures(comparison: Comparison | None) -> Iterator[Figure]:
    if comparison:
        error = comparison.makespan_error
        note = "" if error is None else f"{100 * error:+,.2f}% off the measured"
        yield Figure("predicted", "predicted makespan", comparison.predicted_makespan, "us", note)


def _unclassified_figure(measured: Measurement) -> Figure:
    unattributed = measured.unattributed_share
    more = f"; {_percent(unattributed)} of it belongs to no phase" if unattributed else ""
    return Figure("unclassified", "unclassified", measured.unclassified_share, "%", f"of the events' time{more}")


def _percent(share: float | None) -> str:
    return "none" if share is None else written(share, "%")


def _bounded(figures: list[Figure], bounds: Bounds | None) -> list[Figure]:
    """The figures, as ranges if kernels that no rule knows could move them."""
    if bounds is None or not bounds.matter:
        return figures
    ranges = {"overlap": bounds.overlap, "exposed": bounds.exposed, "compute": bounds.compute}

    def bounded(figure: Figure) -> Figure:
        ends = ranges[figure.name]
        unit = time_unit(ends) if figure.unit == "us" else figure.unit
        low, high = ("none" if end is None else written(end, unit) for end in ends)
        if low == high:
            return figure
        reading = f"{figure.written} if what no rule knows computes" if figure.value in ends else ""
        range_of = f"{low.removesuffix('%')} to {high}" + (f" {unit}" if unit in TIMES else "")
        return dataclasses.replace(figure, shown=range_of, note="; ".join(filter(None, [reading, figure.note])))

    return [bounded(figure) if figure.name in ranges else figure for figure in figures]


def _between(ends: tuple[float | None, float | None], unit: str) -> str:
    """A range in words, or one number if both ends are written the same."""
    low, high = (Figure("", "", end, unit).written for end in ends)
    return low if low == high else f"between {low} and {high}"


def _unknown(trace: Trace, measured: Measurement) -> list[str]:
    """A note about the kernels that no rule knows, their share of the time, and the remedy."""
    if measured.bounds is None:
        return []
    names = unclassified_names(trace, len(trace.events))
    longest = "; ".join(f"{kernel_label(name)} {duration(time)}" for name, time in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    group = "compute" if any(event.kind == OTHER for event in trace.events) else "neither compute nor communication"
    return [
        f"{100 * measured.bounds.share:.2g}% of the time is in kernels that no rule knows, counted as {group}: "
        f"{longest}{more}; if they communicate, say so in a file of rules, --rules FILE"
    ]


def _notes(
    trace: Trace,
    measured: Measurement,
    predicted: Trace | None,
    comparison: Comparison | None,
    schedule: CompiledOverlap | None,
) -> list[str]:
    """The notes of all sources, each once."""
    found = dict.fromkeys([*_unknown(trace, measured), *trace.notes, *measured.notes])
    found |= dict.fromkeys(f"predicted: {note}" for note in (predicted.notes if predicted else ()))
    found |= dict.fromkeys(f"compiled schedule: {note}" for note in (schedule.notes if schedule else ()))
    if comparison:
        for which, names in (("predicted", comparison.only_predicted), ("measured", comparison.only_measured)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                found[f"only {which}: {'; '.join(names[:5])}{more}"] = None
    return list(found) or ["nothing is known to be missing"]


def _is_short(name: str, value: object) -> bool:
    """Whether a fact stands at the top. Names with underscores are for programs; long facts and paths are not short."""
    return "_" not in name and isinstance(value, str | int) and 0 < len(str(value)) <= 40 and "/" not in str(value)
