"""Chrome JSON is read back: threads nest, names and order are there, times are exact, files are equal and whole."""

import collections
import gzip
import json

import pytest

from profiling.event import Event, Step, Trace
from profiling.write.chrome import write_chrome
from profiling.write.tracks import MOE_LINKS
from tests.profiling.traces import HOSTILE, layer_trace, tangled_trace


def written(tmp_path, traces, **options):
    path = tmp_path / "trace.json"
    write_chrome(path, traces, **options)
    return json.loads(path.read_text(encoding="utf-8"))


def slices(document):
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


def names(document, what="process"):
    found = [event for event in document["traceEvents"] if event["name"] == f"{what}_name"]
    return {event["tid"] if what == "thread" else event["pid"]: event["args"]["name"] for event in found}


def assert_threads_nest(document):
    threads = collections.defaultdict(list)
    for event in slices(document):
        start = round(event["ts"] * 1000)
        threads[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000)))
    for spans in threads.values():
        opened = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while opened and opened[-1] <= start:
                opened.pop()
            assert not opened or end <= opened[-1]
            opened.append(end)


def test_processes_threads_and_slices(tmp_path):
    trace = layer_trace()
    document = written(tmp_path, trace)
    assert list(names(document).values()) == ["host", "rank 0, device 1", "rank 1, device 0"]
    assert list(names(document, "thread").values()) == ["steps", *("stream 7", "stream 23") * 2]
    order = {e["pid"]: e["args"]["sort_index"] for e in document["traceEvents"] if e["name"] == "process_sort_index"}
    assert order == {1: 1, 2: 2, 3: 3}
    assert_threads_nest(document)
    found = {(e["name"], e["pid"], e["ts"], e["dur"]) for e in slices(document) if e["pid"] > 1}
    pids = {1: 2, 0: 3}
    assert found == {(e.name, pids[e.device], e.start, e.duration) for e in trace.events}
    assert [(e["name"], e["ts"], e["dur"]) for e in slices(document) if e["pid"] == 1] == [("train 7", 990, 210)]
    dispatch = next(event for event in slices(document) if event["name"] == "dispatch")
    assert (dispatch["cat"], dispatch["cname"]) == ("transfer", "rail_animation")
    assert dispatch["args"] == {
        "kind": "dispatch kernel", "phase": "dispatch(F)", "layer": 0, "microbatch": 0, "hlo_op": "all-to-all.1",
        "blocks": 20,
    }  # fmt: skip


def test_every_event_is_whole(tmp_path):
    """Perfetto refuses {}, text for numbers, and the process 0, which is the idle one."""
    document = written(tmp_path, [layer_trace(), tangled_trace()], links=MOE_LINKS)
    assert document["displayTimeUnit"] == "ns"
    for event in document["traceEvents"]:
        assert event["ph"] in "XMCsf" and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["pid"] > 0 and event["name"] is not None
        assert event["ph"] == "M" or event["ts"] >= 0
    threads = [event for event in document["traceEvents"] if event["name"] == "thread_name"]
    assert len({event["tid"] for event in threads}) == len(threads)


def test_overlap_takes_further_threads(tmp_path):
    document = written(tmp_path, tangled_trace())
    assert_threads_nest(document)
    threads = collections.defaultdict(list)
    for event in slices(document):
        threads[names(document, "thread")[event["tid"]]].append(event["name"])
    assert threads == {"lane": ["outer", "inner", "instant", "touching", HOSTILE], "lane (2)": ["across"]}
    assert document["otherData"]["traces"][0]["notes"] == [HOSTILE]


def test_nanoseconds_are_kept(tmp_path):
    times = [(k * 0.1 + 1e7, k * 0.1 + 1e7 + 0.1) for k in range(50)]
    events = tuple(Event(0, "gpu", start, end, "a") for start, end in times)
    document = written(tmp_path, Trace("", "xplane", events))
    assert [round(e["ts"] * 1000) for e in slices(document)] == [round(start * 1000) for start, _ in times]
    assert_threads_nest(document)


def test_counters(tmp_path):
    document = written(tmp_path, layer_trace(layers=1))
    found = collections.defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "C" and event["pid"] == 2:
            found[event["name"]].append((event["ts"], event["args"]["value"]))
    assert found == {
        "exposed communication": [(1040, 1.0), (1055, 0.0), (1060, 1.0), (1065, 0.0)],
        "thread blocks in transfers": [(1045, 20.0), (1065, 0.0)],
    }
    assert not [e for e in written(tmp_path, layer_trace(), counted=False)["traceEvents"] if e["ph"] == "C"]


def test_arrows(tmp_path):
    document = written(tmp_path, layer_trace(), links=MOE_LINKS)
    ends = collections.defaultdict(dict)
    for event in document["traceEvents"]:
        if event["ph"] in "sf":
            assert event["ph"] == "s" or event["bp"] == "e"
            at = next(s for s in slices(document) if s["tid"] == event["tid"] and s["ts"] == event["ts"])
            ends[event["id"]][event["ph"]] = (at["args"]["phase"], at["args"]["layer"], at["name"])
    assert len(ends) == 2 * 2 * 2
    assert {(arrow["s"], arrow["f"]) for arrow in ends.values()} == {
        (("attn(F)", layer, "attention_kernel"), ("dispatch(F)", layer, "notify_dispatch")) for layer in (0, 1)
    } | {(("dispatch(F)", layer, "dispatch"), ("mlp(F)", layer, "grouped_gemm")) for layer in (0, 1)}
    assert not [e for e in written(tmp_path, layer_trace())["traceEvents"] if e["ph"] in "sf"]


def test_side_by_side(tmp_path):
    """First device events coincide, even where a step of the host would begin before 0."""
    predicted = layer_trace("predicted", slower=0.9, start=0.0)
    document = written(tmp_path, [layer_trace(start=5.0), predicted])
    assert list(names(document).values()) == [
        f"{title}: {name}"
        for title in ("measured", "predicted")
        for name in ("host", "rank 0, device 1", "rank 1, device 0")
    ]
    first = {e["pid"]: e["ts"] for e in reversed(slices(document)) if e["pid"] not in (1, 4)}
    assert set(first.values()) == {10.0}
    assert min(e["ts"] for e in slices(document)) == 0.0


def test_compressed_files_are_the_same_and_equal(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json.gz", "c.json.gz")]
    for path in paths:
        write_chrome(path, layer_trace())
    assert gzip.decompress(paths[1].read_bytes()) == paths[0].read_bytes()
    assert paths[1].read_bytes() == paths[2].read_bytes()


def test_a_trace_without_events(tmp_path):
    document = written(tmp_path, Trace("empty", "xplane", (), (Step("train", None, 0.0, 1.0),)))
    assert [event["name"] for event in slices(document)] == ["train"]
    assert written(tmp_path, Trace("empty", "xplane", ()))["traceEvents"] == []


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_times_out_of_order(tmp_path, start, end):
    with pytest.raises(ValueError, match=rf"'a' on device 3, lane 'gpu' goes from {start} to {end} us"):
        write_chrome(tmp_path / "a.json", Trace("", "xplane", (Event(3, "gpu", start, end, "a"),)))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        write_chrome(tmp_path / "a.pftrace", layer_trace())
    with pytest.raises(ValueError, match="give at least one"):
        write_chrome(tmp_path / "a.json", [])
