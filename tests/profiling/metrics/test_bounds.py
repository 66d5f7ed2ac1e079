"""What no rule knows makes figures a range: shown where it matters, and never where all is known."""

import dataclasses

import pytest

from profiling.classify.classifier import OTHER
from profiling.event import Event, Trace
from profiling.metrics import bounds, measure
from profiling.reports.html import page
from profiling.reports.making import report


def gemm(start, end):
    return Event(0, "7", start, end, "sgemm", kind="GEMM", group="compute")


def transfer(start, end):
    return Event(0, "9", start, end, "ncclAllReduce", kind="all-reduce", group="transfer")


def unknown(start, end, name="mystery"):
    return Event(0, "11", start, end, name, kind=OTHER, group="compute")


def traced(*events):
    return Trace("a step", "kineto", events)


def bounds_of(trace):
    found = measure(trace).bounds
    assert found is not None
    return found


def notes(made):
    return {figure.name: figure.note for figure in made.figures}


@pytest.fixture
def doubtful():
    """By hand: 100 us, a product to 60, a transfer from 40 to 80, and from 70 to 100 nobody knows what."""
    return traced(
        gemm(0.0, 60.0),
        transfer(40.0, 80.0),
        unknown(70.0, 100.0, "void my::mystery<float>(int)"),
    )


def test_both_readings_by_hand(doubtful):
    """As compute: 60 + 30 of it, the transfer under it to 60 and from 70 to 80, 10 exposed.

    As a transfer: 60 of compute, 40 to 100 of transfers, 20 of them hidden and 40 not.
    """
    found = bounds_of(doubtful)
    assert found.share == pytest.approx(30 / 130)
    assert found.overlap == pytest.approx((20 / 60, 30 / 40))
    assert found.exposed == pytest.approx((10.0, 40.0))
    assert found.compute == pytest.approx((0.6, 0.9))
    assert found.matter
    figures = {figure.name: figure.value for figure in report(doubtful).figures}
    assert figures["overlap"] == found.overlap[1] and figures["compute"] == found.compute[1]
    assert figures["unclassified"] == found.share


def test_ranges_are_said_everywhere(doubtful):
    made = report(doubtful)
    shown = {figure.name: figure.written for figure in made.figures}
    assert shown["overlap"] == "33.33 to 75.00%" and shown["exposed"] == "10.0 to 40.0 us"
    assert shown["compute"] == "60.00 to 90.00%" and shown["makespan"] == "100.0 us"
    assert notes(made)["overlap"].startswith("75.00% if what no rule knows computes; of 40.0 us in transfers")
    assert "33.33 to 75.00%" in made.text() and "| 33.33 to 75.00% |" in made.markdown()
    assert '<span class="value range">10.0 to 40.0<small> us</small></span>' in page(made)
    assert made.doubt.startswith("23.1% of the time is in kernels that no rule knows.")
    assert made.doubt in made.text() and "**23.1% of the time" in made.markdown()
    assert '<p id="doubt" role="note">23.1% of the time' in page(made)
    assert made.notes[0].startswith("23% of the time is in kernels that no rule knows, counted as compute: my::mystery")
    assert "--rules FILE" in made.notes[0]
    assert [row[0] for row in made["unclassified"].rows] == ["void my::mystery<float>(int)"]


def test_nothing_is_said_where_all_is_known(doubtful):
    known = dataclasses.replace(doubtful, events=doubtful.events[:2])
    made = report(known)
    assert made.measurement.bounds is None and made.doubt == ""
    assert made.notes == ("nothing is known to be missing",)
    assert not any(figure.shown for figure in made.figures)
    assert 'id="doubt"' not in page(made)
    assert "unclassified" not in {table.name for table in made.tables}


def test_little_that_moves_nothing_is_only_noted(doubtful):
    """1 us in 101 of the events' time, at the end, moves compute by 1 point: a note, no warning."""
    little = unknown(80.0, 81.0)
    made = report(traced(*doubtful.events[:2], little))
    assert not bounds_of(made.trace).matter and made.doubt == ""
    assert made.notes[0].startswith("0.99% of the time is in kernels that no rule knows")
    assert notes(made)["overlap"].startswith("of 40.0 us")


def test_little_that_moves_much_is_warned_of():
    """1% of the time, but all that might communicate: without communication there is no ratio to be wrong."""
    events = [gemm(0.0, 99.0), unknown(98.0, 99.0)]
    found = bounds_of(traced(*events))
    assert found.share == pytest.approx(0.01) and found.matter
    assert found.overlap == (None, 1.0)
    made = report(traced(*events))
    assert {figure.name: figure.written for figure in made.figures}["overlap"] == "none to 100.00%"
    assert notes(made)["overlap"].startswith("none if what no rule knows computes; no communication in this trace")


def test_devices_are_added_up(doubtful):
    other = [dataclasses.replace(event, device=1) for event in doubtful.events]
    assert bounds_of(traced(*doubtful.events, *other)) == dataclasses.replace(
        bounds_of(doubtful), window=200.0, exposed=(20.0, 80.0)
    )


def test_what_nothing_has_classified_is_unknown_as_well():
    made = report(traced(gemm(0.0, 8.0), Event(0, "9", 0.0, 4.0, "mystery")))
    assert bounds_of(made.trace).share == pytest.approx(1 / 3)
    assert "counted as neither compute nor communication" in made.notes[0]


def test_loops_do_not_count():
    loop = Event(0, "7", 0.0, 99.0, "while.1", kind="control flow", group="control")
    assert bounds([[loop]], (0.0, 99.0)) is None


def test_a_device_that_is_idle_in_the_window_counts_in_both_readings():
    """Half of two devices' window is known to compute on neither: 4 of 20 us compute, 10 of 20 at most."""
    other = dataclasses.replace(gemm(30.0, 40.0), device=1)
    trace = traced(gemm(0.0, 4.0), unknown(4.0, 10.0), other)
    found = measure(trace, window=(0.0, 10.0))
    assert found.bounds is not None and found.bounds.compute == (0.2, 0.5)
    assert found.summary.breakdown.compute / found.summary.breakdown.window == 0.5
