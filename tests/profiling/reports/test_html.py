"""The page as a text: events as they were, predictions in their places, no name that leaves its own."""

import dataclasses
import json
import re

from profiling.event import Event, Trace
from profiling.reports.html import embedded, page
from profiling.reports.making import report
from tests.profiling.traces import layer_trace, tangled_trace


def decoded(trace, *others):
    """The embedded events of every row as ``[(row's label, trace, start, end, what)]``, in microseconds."""
    data = json.loads(embedded([trace, *others]))
    found = []
    for row in data["rows"]:
        time = 0
        for start, duration, what in zip(row["start"], row["duration"], row["what"], strict=True):
            time += start
            fields = data["whats"][what]
            texts = [data["strings"][i] for i in (*fields[:4], *fields[6:8])]
            found.append(
                (row["label"], row["trace"], time / 1000, (time + duration) / 1000, *texts, *fields[4:6], fields[8])
            )
    return found


def test_events_survive_embedding():
    trace = layer_trace()
    found = [row for row in decoded(trace) if row[0] != "steps"]
    expected = [
        (
            e.lane,
            0,
            e.start,
            e.end,
            e.name,
            e.kind,
            e.group,
            e.phase,
            e.scope,
            e.hlo_op,
            e.layer,
            e.microbatch,
            e.blocks,
        )
        for e in trace.events
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert [row[2:5] for row in decoded(trace) if row[0] == "steps"] == [(990.0, 1200.0, "train 7")]


def test_rows_never_overlap_and_names_are_stored_once():
    data = json.loads(embedded([tangled_trace()]))
    for row in data["rows"]:
        times = [sum(row["start"][: i + 1]) for i in range(len(row["start"]))]
        ends = [time + duration for time, duration in zip(times, row["duration"], strict=True)]
        assert all(end <= start for end, start in zip(ends, times[1:], strict=False))
    many = Trace("", "xplane", tuple(Event(0, "gpu", i * 1.0, i + 0.5, "the same long name") for i in range(10_000)))
    assert embedded([many]).count("the same long name") == 1
    assert len(embedded([many])) < 12 * len(many.events)


def test_predictions_stand_beside_the_device_of_their_rank():
    measured, predicted = layer_trace(), layer_trace("predicted", start=0.0)
    predicted = dataclasses.replace(predicted, ranks={0: 0, 1: 7})
    data = json.loads(embedded([measured, predicted]))
    assert data["bands"] == ["host", "rank 0, device 1", "rank 1, device 0", "rank 7, device 1"]
    assert [(row["band"], row["label"]) for row in data["rows"] if row["trace"] == 1] == [
        (1, "predicted stream 7"), (1, "predicted stream 23"), (3, "predicted stream 7"), (3, "predicted stream 23")
    ]  # fmt: skip
    assert {row[2] for row in decoded(measured, predicted) if row[4] == "attention_kernel"} == {1000.0, 1100.0}


def test_exposed_stretches_are_those_of_the_metrics():
    made = report(layer_trace())
    data = json.loads(embedded([made.trace]))
    lengths = sum(sum(band[1::2]) for band in data["exposed"]) / 1000
    assert lengths == made.measurement.summary.overlaps["transfer+wait"].exposed == 2 * 2 * 20


def test_the_longest_events_are_kept_of_more_than_a_page_holds():
    """And it is said: in the notes, and below the timeline, where the script compares what it has with all."""
    events = tuple(Event(0, "7", 10.0 * i, 10.0 * i + 1 + i % 5, f"kernel {i}", group="compute") for i in range(50))
    data = json.loads(embedded([Trace("", "xplane", events)], most=10))
    assert data["rows"][0]["duration"] == [5000] * 10 and data["events"] == 50
    assert len(json.loads(embedded([Trace("", "xplane", events)]))["rows"][0]["start"]) == 50
    made = report(Trace("", "xplane", events))
    assert "<li>the timeline shows the 10 longest of 50 events; figures and tables are of all</li>" in page(made, 10)
    assert "longest of 50 events" not in page(made)


def test_names_are_short_on_the_timeline_and_whole_in_its_data():
    name = "void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16_128x64_nn>(cutlass_80_tensorop::Params)"
    trace = Trace("", "kineto", (Event(0, "7", 0.0, 1.0, name), Event(0, "7", 1.0, 2.0, "gemm")))
    data = json.loads(embedded([trace]))
    assert [data["strings"][what[0]] for what in data["whats"]] == [name, "gemm"]
    assert data["labels"] == {str(data["whats"][0][0]): "cutlass_80_tensorop_s16816gemm_bf16_128x64_nn"}
    simulated = Trace("", "simulated", (Event(0, "compute", 0.0, 1.0, "attn(F), layer 0"),))
    assert json.loads(embedded([simulated]))["labels"] == {}


def test_cells_that_are_cut_tell_the_whole():
    made = page(report(Trace("", "kineto", (Event(0, "7", 0.0, 20_000.0, "void a::gemm<int>(int)", group="compute"),))))
    cell = re.search(r'<td class="text name"[^>]*>([^<]*)</td>', made)
    assert cell[1] == "a::gemm&lt;int&gt;" and 'title="void a::gemm&lt;int&gt;(int)"' in cell[0]
    assert '<th scope="col">total ms</th>' in made and 'data-value="20000.0">20.000</td>' in made
    assert made.count("<th scope") == made.count("<td ") == 8 + 7 + 6


def test_names_cannot_leave_their_place():
    """Only the page's own two scripts run: it says so to the browser, and no name ends one of them."""
    made = page(report(tangled_trace()))
    assert made.count("</script>") == made.count("<script") == 2
    assert "onerror" not in made.replace("\\u003cimg src=x onerror", "").replace("&lt;img src=x onerror", "")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_the_page_asks_for_nothing():
    made = page(report(layer_trace()))
    assert not re.search(r"(src|href|url|import|fetch)\s*[=(:]?\s*[\"'(]?https?:", made)
    assert "@import" not in made and "<link" not in made
