"""Windows of a trace, by steps and by times, and that everything in a report obeys them."""

import random

import pytest

from profiling.__main__ import main
from profiling.event import Collective, Event, Step, Trace
from profiling.metrics import measure, parse_window, step_windows, steps, window_in, window_of_step
from profiling.metrics.exposure import exposed_segments
from profiling.reports.making import report
from profiling.write.chrome import write_chrome


def event(start, end, group="compute", device=0, lane="7", **facts):
    return Event(device, lane, float(start), float(end), facts.pop("name", "k"), group=group, **facts)


def three_steps():
    """Steps 4 to 6 on two devices, each 100 us apart.

    In each, device 0 computes from 0 to 60, 90 in the first one, and transfers from 50 to 70, 80 to 95 in the first
    one; device 1 computes from 10 to 60.
    """
    events = []
    for n in range(3):
        t, cold = 100 * n, n == 0
        events += [
            event(t, t + (90 if cold else 60), step=4 + n, kind="GEMM"),
            event(t + (80 if cold else 50), t + (95 if cold else 70), "transfer", lane="20", step=4 + n, kind="NCCL"),
            event(t + 10, t + 60, device=1, step=4 + n, kind="GEMM"),
        ]
    return Trace("three", "kineto", tuple(sorted(events, key=lambda e: e.start)))


def test_what_a_step_launched_is_its_window():
    assert step_windows(three_steps()) == {4: (0, 95), 5: (100, 170), 6: (200, 270)}


def test_rows():
    first, second, third = steps(three_steps())
    assert [(row.number, row.start, row.end) for row in (first, second, third)] == [
        (4, 0, 95), (5, 100, 170), (6, 200, 270)
    ]  # fmt: skip
    # Over both devices: 90 + 50 of compute in 2 x 95, a transfer of 15 of which 10 under compute.
    assert (first.breakdown.compute, first.breakdown.idle, first.breakdown.window) == (140, 190 - 95 - 50, 190)
    assert (first.overlap.communication, first.overlap.exposed) == (15, 5)
    assert (second.breakdown.compute, second.overlap.ratio, second.overlap.exposed) == (110, 0.5, 10)
    # Compared with the other steps but the first: 95 by 70, and each of the others by the other.
    assert first.share_of_median == pytest.approx(95 / 70)
    assert second.share_of_median == third.share_of_median == 1.0


def test_the_row_of_a_step_is_the_report_of_that_step():
    trace = three_steps()
    for row in steps(trace):
        made = report(trace, step=row.number).measurement
        assert made.summary.breakdown == row.breakdown
        assert made.summary.overlaps["transfer+wait"] == row.overlap
        assert made.window == (row.start, row.end)


def test_table():
    made = report(three_steps())["steps"]
    assert [row[0] for row in made.rows] == ["4, the first", "5", "6"]
    assert made.spans == ((0, 95), (100, 170), (200, 270))
    assert "steps" not in {table.name for table in report(three_steps(), step=5).tables}


def test_where_events_know_no_step_the_hosts_annotations_tell():
    """Devices run a little behind: what starts after a step was begun and before the next one was is of that step."""
    events = (event(-5, 0), event(3, 40), event(40, 55), event(58, 61), event(70, 80))
    spans = (
        Step("train", 7, 0.0, 50.0),
        Step("train", 8, 60.0, 75.0),
        Step("eval", 1, 0.0, 80.0),
        Step("x", None, 0, 9),
    )
    trace = Trace("jax", "xplane", events, spans)
    assert step_windows(trace) == {7: (3, 61), 8: (70, 80)}
    assert step_windows(Trace("", "xplane", events)) == {}
    assert steps(Trace("", "xplane", events)) == ()


def test_every_table_obeys_the_window():
    """What runs only outside of the window, be it a lane, kind, phase, layer or group, is nowhere in the report."""
    of = Collective("all-reduce", "dp", (0, 1), 2, 8, 8)
    inside = [
        event(100, 150, kind="in", phase="in", layer=0, device=d) for d in (0, 1)
    ] + [event(160 - d, 190, "transfer", lane="20", kind="in", collective=of, device=d) for d in (0, 1)]  # fmt: skip
    outside = [
        event(t, t + 9, group, d, "outer", kind="outer", phase="outer", layer=9, name="outer", collective=collective)
        for t in (0, 500)
        for d in (0, 1)
        for group, collective in (
            ("compute", None), ("transfer", Collective("broadcast", "outer", (0, 1), 2, 9, 9)), ("unclassified", None)
        )
    ]  # fmt: skip
    trace = Trace("run", "kineto", tuple(sorted([*inside, *outside], key=lambda e: e.start)), metadata={"chip": "H100"})
    made = report(trace, window=(90.0, 200.0))
    assert "outer" not in made.text() and "outer" not in made.markdown()
    assert made["collectives"].rows[0][4] == 2 and made.measurement.skew is not None
    assert "outer" in report(trace).text()
    assert made.measurement.makespan == 110
    assert made.trace.title == "run, 90.0 to 200.0 us" in made.text()
    assert len(made.trace.events) == 4


def test_title_and_facts_say_which_window():
    made = report(three_steps(), step=5)
    assert made.window == "step 5" in made.facts
    assert made.trace.title == "three, step 5"
    assert report(three_steps()).window == ""


def test_a_device_that_does_nothing_in_the_window_is_idle_in_it():
    made = report(three_steps(), window=(60.0, 80.0))
    assert "2 devices" in made.facts
    assert made.measurement.summary.breakdown.idle == 20
    assert [metrics.breakdown.compute for metrics in made.measurement.devices] == [20, 0]


def test_a_window_wider_than_the_trace_is_the_trace():
    trace = three_steps()
    assert window_in(trace, -50.0, 1e9) == window_in(trace, None, None) == (0, 270)
    assert window_in(trace, 100.0, None) == (100, 270)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:10", (0, 10)), ("12ms:30ms", (12e3, 30e3)), ("1.5s:2s", (1.5e6, 2e6)), ("5:", (5, None)), (":7us", (None, 7)),
     ("1e3:2e3", (1000, 2000)), (" 5 us : 9 us ", (5, 9)), ("500ns:1us", (0.5, 1)), ("-5:5", (-5, 5))],
)  # fmt: skip
def test_times_with_units(text, expected):
    assert parse_window(text) == expected


@pytest.mark.parametrize("text", ["", ":", "5", "a:b", "1:2:3", "5:9min", "nan:3", "1..2:3", "5ms"])
def test_what_is_no_window(text):
    with pytest.raises(ValueError, match="write A:B, two times in microseconds or with a unit"):
        parse_window(text)


def test_impossible_windows_say_what_there_is():
    trace = three_steps()
    with pytest.raises(ValueError, match="step 9 of 'three': there are steps 4 to 6"):
        report(trace, step=9)
    with pytest.raises(ValueError, match="no step of this trace has a number"):
        window_of_step(Trace("bare", "kineto", (event(0, 1),)), 0)
    with pytest.raises(ValueError, match=r"must lie before the end; the trace 'three' goes from 0.0 to 270.0 us"):
        report(trace, window=(5.0, 5.0))
    with pytest.raises(ValueError, match=r"nothing runs on a device then; the trace 'three' goes from 0.0 to 270.0 us"):
        report(trace, window=(1e6, 2e6))
    with pytest.raises(ValueError, match="ask for one of them"):
        report(trace, window=(0.0, 5.0), step=4)
    gappy = Trace("gappy", "kineto", (event(0, 1, step=3), event(2, 3, step=8), event(4, 5, step=11)))
    with pytest.raises(ValueError, match="there are steps 3, 8, 11"):
        window_of_step(gappy, 4)


def test_command_line(tmp_path, capsys):
    path = tmp_path / "trace.json"
    path.write_text(
        '{"traceEvents": [' + ",".join(
            f'{{"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": {t}, "dur": 60, "args": '
            f'{{"device": 0, "stream": 7}}}}' for t in (0, 100, 200)
        ) + "]}"
    )  # fmt: skip
    assert main(["report", str(path), "--window", "0.1ms:0.15ms"]) == 0
    assert "100.0 to 150.0 us" in capsys.readouterr().out
    assert main(["report", str(path), "--window", "9s:10s"]) == 2
    assert "goes from 0.0 to 260.0 us" in capsys.readouterr().err
    assert main(["report", str(path), "--step", "3"]) == 2
    assert "no step of this trace has a number" in capsys.readouterr().err
    assert main(["compare", str(path), str(path), "--window", ":100"]) == 0
    assert "60" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["report", str(path), "--step", "3", "--window", "0:1"])


def test_files_that_are_written_hold_the_window_only(tmp_path):
    made = report(three_steps(), step=5)
    write_chrome(tmp_path / "t.json", made.trace)
    assert (tmp_path / "t.json").read_text().count('"ph":"X"') >= 3
    assert made.trace.window == (100, 170)


def test_clipping_cuts_steps_of_the_host():
    trace = Trace("", "xplane", (event(0, 50),), (Step("a", 1, 0.0, 20.0), Step("a", 2, 20.0, 50.0)))
    assert trace.clip(30.0, 40.0).steps == (Step("a", 2, 30.0, 40.0),)
    kept = trace.clip(0.0, 60.0)
    assert kept.events[0] is trace.events[0] and kept.steps[0] is trace.steps[0]


@pytest.mark.parametrize("seed", range(6))
def test_any_window_against_a_grid(seed):
    """Random events in whole microseconds: each microsecond of a window is looked at by itself."""
    rng = random.Random(seed)
    groups = ("compute", "transfer", "wait", "unclassified", "control")
    events = []
    for _ in range(120):
        start = rng.randrange(200)
        events.append(
            event(start, start + rng.randrange(25), rng.choice(groups), rng.randrange(2), rng.choice("abc"),
                  kind=rng.choice("xyz"), phase=rng.choice(["", "F", "B"]))
        )  # fmt: skip
    trace = Trace("random", "simulated", tuple(sorted(events, key=lambda e: e.start)))
    window = (float(rng.randrange(20, 80)), float(rng.randrange(120, 180)))
    found = measure(trace, window=window)
    segments = exposed_segments(trace.clip(*window), top=1000)
    for metrics in found.devices:

        def at(time, device=metrics.device):
            return [
                e for e in events if e.device == device and e.start <= time < e.end and e.group != "control"
            ]  # fmt: skip

        grid = [at(time) for time in range(int(window[0]), int(window[1]))]
        comm = [any(e.group in ("transfer", "wait") for e in now) for now in grid]
        compute = [any(e.group == "compute" for e in now) for now in grid]
        of = metrics.overlaps["transfer+wait"]
        assert (of.communication, of.compute) == (sum(comm), sum(compute))
        assert of.overlapped == sum(a and b for a, b in zip(comm, compute, strict=True))
        assert metrics.breakdown.idle == sum(not now for now in grid)
        assert metrics.breakdown.noncompute == sum(bool(now) for now in grid) - sum(compute)
        exposed = sum(s.duration for s in segments if s.device == metrics.device)
        assert exposed == of.exposed
        for row in metrics.kinds:
            assert row.busy == sum(any(e.kind == row.name for e in now) for now in grid)
            assert row.total == sum(sum(e.kind == row.name for e in now) for now in grid)
        for row in metrics.phases:
            assert row.busy == sum(any(e.phase == row.name for e in now) for now in grid)
        for row in metrics.lanes:
            busy = [{e.lane for e in now} for now in grid]
            assert row.busy == sum(row.lane in lanes for lanes in busy)
            assert row.alone == sum(lanes == {row.lane} for lanes in busy)
        used = [len({e.lane for e in now}) for now in grid]
        assert list(metrics.concurrency[1:]) == [used.count(n) for n in range(1, len(metrics.concurrency))]
