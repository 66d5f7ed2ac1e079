"""Predictions against measurements, and measurements against each other."""

import dataclasses

import pytest

from jaxpipe.schedule import Costs, build, simulate
from profiling.event import Event, Trace
from profiling.metrics import measure
from profiling.predict import changes, compare
from profiling.predict.replaying import Task, replay
from profiling.read.timeline import read_timeline


def event(start, end, phase, lane="7", device=0, **facts):
    return Event(device, lane, float(start), float(end), "k", group=facts.pop("group", "compute"), phase=phase, **facts)


def trace(*events, ranks=None, title="t"):
    return Trace(title, "xplane", tuple(sorted(events, key=lambda e: e.start)), ranks=ranks or {})


def test_a_trace_is_what_it_is(three_layers):
    found = compare(three_layers, three_layers)
    assert (found.makespan_error, found.inversions) == (0, 0)
    assert {(row.start_error, row.duration_error) for row in found.tasks} == {(0, 0)}
    assert len(found.tasks) == 15
    same = changes(three_layers, three_layers)
    assert all(row.change == 0 for row in (*same.totals, *same.kinds, *same.phases))


def test_errors_by_hand():
    """Each trace counts from its own start; the duration of a task in pieces is the time with any of them."""
    predicted = replay([Task("a", 4.0, phase="F", layer=0), Task("b", 6.0, phase="B", layer=0)])
    measured = trace(
        event(100, 103, "F", layer=0), event(104, 106, "F", layer=0),
        event(108, 112, "B", layer=0), event(110, 113, "B", lane="23", layer=0),
    )  # fmt: skip
    found = compare(predicted, measured)
    assert [(row.phase, row.start_error, row.duration_error) for row in found.tasks] == [("F", 0, -1), ("B", -4, 1)]
    assert found.makespan_error == pytest.approx(10 / 13 - 1)
    (row,) = found.devices
    assert (row.predicted_bubble, row.measured_bubble) == (0, pytest.approx(3 / 13))


def test_repetitions_are_matched_in_order():
    phases = "F", "B", "F", "B"
    predicted = trace(*(event(2 * n, 2 * n + 2, phase) for n, phase in enumerate(phases)))
    measured = trace(*(event(3 * n, 3 * n + 2, phase) for n, phase in enumerate(phases)))
    found = compare(predicted, measured)
    assert [(row.phase, row.occurrence, row.start_error) for row in found.tasks] == [
        ("F", 0, 0), ("B", 0, -1), ("F", 1, -2), ("B", 1, -3),
    ]  # fmt: skip


def test_tasks_that_do_not_match_are_named():
    """Three times F against twice; a W that nobody predicted."""
    predicted = trace(*(event(2 * n, 2 * n + 2, phase) for n, phase in enumerate("FBFBF")))
    measured = trace(*(event(2 * n, 2 * n + 2, phase) for n, phase in enumerate("FBFBW")))
    found = compare(predicted, measured)
    assert [row.phase for row in found.tasks] == ["B", "B"]
    assert found.only_predicted == ("3 x F on device 0",)
    assert found.only_measured == ("2 x F on device 0", "1 x W on device 0")


def test_inversions_are_counted_within_a_lane():
    names = "abcd"
    predicted = replay([Task(n, 1.0, phase=n) for n in names] + [Task("x", 9.0, lane="network", phase="x")])
    measured = trace(*(event(2 * n, 2 * n + 1, name) for n, name in enumerate("dacb")), event(9, 10, "x", lane="27"))
    found = compare(predicted, measured)
    # d before a, b, c; c before b.
    assert found.inversions == 4
    assert found.devices[0].pairs == 6


def test_devices_are_paired_by_rank():
    predicted = read_timeline(simulate(build("1f1b", 2, 4), Costs(backward_input=2.0)), unit_us=100.0)
    late = {0: 0.0, 1: 0.0, 2: 30.0, 3: 30.0}
    measured = trace(
        *(
            dataclasses.replace(e, device=device, start=e.start + late[device], end=e.end + late[device])
            for e in predicted.events
            for device in (e.device, e.device + 2)
        ),
        ranks={0: 0, 1: 1, 2: 0, 3: 1},
    )
    found = compare(predicted, measured)
    assert [(row.device, row.rank) for row in found.devices] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert len(found.tasks) == 4 * 8
    assert {row.start_error for row in found.tasks} == {0.0, -30.0}
    assert found.devices[0].predicted_bubble == pytest.approx(measure(predicted).summary.bubbles[0].compute_bubble)
    unknown = dataclasses.replace(measured, ranks={0: 7, 1: 7, 2: 7, 3: 7})
    with pytest.raises(ValueError, match=r"no device in common.*set the ranks of both traces"):
        compare(predicted, unknown)
    assert len(compare(predicted, dataclasses.replace(measured, ranks={})).devices) == 2


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="trace 'predicted' has no events"):
        compare(replay([]), trace(event(0, 1, "F")))
    found = compare(trace(event(0, 1, "F")), trace(event(0, 1, "B")))
    assert found.tasks == ()
    assert (found.only_predicted, found.only_measured) == (("1 x F on device 0",), ("1 x B on device 0",))
    assert compare(trace(event(0, 1, "F")), trace(event(0, 0, "F"))).makespan_error is None


def test_changes(three_layers):
    """A faster attention; a barrier that is gone."""
    faster = [
        dataclasses.replace(e, end=e.start + 50) if e.kind == "attention" else e
        for e in three_layers.events
        if e.kind != "barrier"
    ]
    found = changes(three_layers, dataclasses.replace(three_layers, title="after", events=tuple(faster)))
    totals = {row.name: (row.before / 3, row.after / 3) for row in found.totals}
    assert totals["makespan"] == (400, 400)
    assert totals["compute"] == (240, 210)
    assert totals["communication (transfer)"] == (170, 170)
    assert totals["communication (transfer+wait)"] == (200, 170)
    assert [(row.name, row.change / 3) for row in found.kinds[:2]] == [("attention", -30), ("barrier", -30)]
    assert found.kinds[1].relative == -1
    assert {row.name: row.change / 3 for row in found.phases if row.change} == {
        "attn(F)": -30, "dispatch(F)": -20, "combine(F)": -10,
    }  # fmt: skip
    new = changes(trace(event(0, 1, "F", kind="a")), trace(event(0, 1, "F", kind="b"))).kinds
    assert {(row.name, row.relative) for row in new} == {("a", -1.0), ("b", None)}


def test_changes_are_means_over_devices():
    one = trace(event(0, 4, "F"))
    two = trace(event(0, 4, "F"), event(0, 2, "F", device=1))
    assert changes(one, two).phases[0].after == 3


def test_texts(deepseek, three_layers):
    text = compare(replay([Task("a", 400.0, phase="attn(F)", layer=0)]), three_layers).table()
    assert "makespan 400 us against 1,200 us, -66.7%" in text
    assert "1 tasks matched, 0 order inversions" in text
    assert "only measured: 1 x attn(F), layer 1 on device 0" in text
    lines = changes(deepseek, deepseek).table(most=3).splitlines()
    assert lines[2].split() == ["total", "before", "after", "change"]
    assert any(line.split() == ["combine", "49,448", "49,448", "+0", "+0.0%"] for line in lines)
    assert len(lines) == 1 + 2 + 9 + 2 * (2 + 3)


class TestTimeline:
    @pytest.mark.parametrize("name", ["gpipe", "1f1b", "dualpipe", "dualpipev", "zb1p"])
    def test_measures_as_simulated(self, name):
        timeline = simulate(build(name, 4, 8), Costs(forward=1.0, backward_input=1.0, weight=0.5))
        found = read_timeline(timeline, unit_us=10.0)
        assert found.ranks == {0: 0, 1: 1, 2: 2, 3: 3}
        measured = measure(found)
        assert measured.makespan == pytest.approx(10 * timeline.makespan)
        for bubble, simulated in zip(measured.summary.bubbles, timeline.bubble, strict=True):
            assert bubble.compute_bubble * timeline.makespan == pytest.approx(simulated)
            assert bubble.compute_bubble == pytest.approx(bubble.device_idle)
        assert {event.lane for event in found.events} == {"compute"}

    def test_overlapped_pairs_are_one_event(self):
        found = read_timeline(simulate(build("dualpipe", 4, 8)), title="mine")
        assert found.title == "mine"
        pairs = [event for event in found.events if event.phase == "FB"]
        assert pairs and all("&" in event.name for event in pairs)
        assert {event.phase for event in found.events} <= {"F", "B", "I", "W", "FB"}

    @pytest.mark.parametrize("unit", [0.0, -1.0, float("nan"), float("inf")])
    def test_no_unit(self, unit):
        with pytest.raises(ValueError, match="one unit takes a positive number"):
            read_timeline(simulate(build("gpipe", 2, 2)), unit_us=unit)
