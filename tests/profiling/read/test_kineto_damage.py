"""Kineto files with bad bytes, bad events and bad values: what can be read is read, and the rest is said."""

import gzip
import json

import pytest

from profiling import report
from profiling.read.kineto import read_kineto
from profiling.read.trace import read_trace
from tests.profiling.kineto_files import (
    ALL_REDUCE,
    GEMM,
    damaged,
    document,
    gpu,
    half_covered,
    host,
    launch,
    step_of_training,
)

FUNCTION = host("config.py(3): NAME", 1, 1, "python_function")


@pytest.fixture
def read(write_trace):
    return lambda *events, **header: read_kineto(write_trace(document([*half_covered(), *events], **header)))


@pytest.fixture
def read_bytes(tmp_path):
    def read_bytes(content, name="bytes.json"):
        (tmp_path / name).write_bytes(content)
        return read_kineto(tmp_path / name)

    return read_bytes


def times(trace):
    return [(event.start, event.end, event.lane) for event in trace.events]


UNHARMED = [(0.0, 100.0, "7"), (50.0, 150.0, "20")]
"""`half_covered` from its start on."""


class TestText:
    @pytest.mark.parametrize(
        ("name", "note"),
        [
            (b"a\x01b", "control characters in the text: 1"),
            (b"a\xff\xfeb", "bytes that are no UTF-8, replaced: 2"),
            (rb"torch\cuda\__init__.py(219)", "events whose text is no JSON, repaired: 1"),
            (b"C:\\dir\\", "events whose text is no JSON, repaired: 1"),
            (b'say "no"', "events whose text is no JSON, left out: 1"),
        ],
    )
    def test_names_on_the_host(self, read_bytes, name, note):
        text = json.dumps(document([FUNCTION, *half_covered()])).encode()
        trace = read_bytes(text.replace(b"NAME", name))
        assert times(trace) == UNHARMED
        assert f"bytes.json: {note}" in trace.notes

    def test_names_on_the_gpu_can_be_printed(self, read_bytes):
        text = json.dumps(document([*half_covered(), gpu("NAME", 1000, 1, 9)])).encode()
        name = read_bytes(text.replace(b"NAME", b"\x1b[31m\\udc00")).events[0].name
        assert name == "\ufffd[31m\ufffd"

    @pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-Infinity", "NaN", "nan(ind)"])
    def test_numbers_as_c_prints_them(self, read_bytes, value):
        """Old profilers wrote the bandwidth of a copy that took no time."""
        copy = gpu("Memcpy", 1000, 1, 9, cat="gpu_memcpy", bandwidth="VALUE")
        text = json.dumps(document([copy, *half_covered()])).replace('"VALUE"', value)
        assert len(read_bytes(text.encode()).events) == 3

    def test_commas(self, read_bytes):
        one, two = map(json.dumps, half_covered())
        trace = read_bytes(f'{{"traceEvents": [{one},, {two},]}}'.encode())
        assert times(trace) == UNHARMED
        assert "bytes.json: commas after the last event: 1" in trace.notes

    def test_entries_that_are_no_events(self, read):
        assert times(read(None, 3, "x", [1], {"a": 1}, {})) == UNHARMED
        notes = read(None, 3, "x", [1], {"a": 1}, {}).notes
        assert "trace.json: entries of the list that are no events, left out: 4" in notes

    @pytest.mark.parametrize("where", ["first", "last"])
    def test_an_event_that_is_no_json(self, read_bytes, where):
        events = list(map(json.dumps, half_covered()))
        events.insert(0 if where == "first" else 2, '{"ph": "X", "cat": kernel}')
        trace = read_bytes(f'{{"traceEvents": [{",".join(events)}], "traceName": "t"}}'.encode())
        assert times(trace) == UNHARMED
        assert trace.metadata["trace name"] == "t"
        assert "bytes.json: events whose text is no JSON, left out: 1" in trace.notes

    @pytest.mark.parametrize("value", [r'"C:\users"', "[1, 2", "[" * 100_000])
    def test_an_entry_beside_the_events(self, read_bytes, value):
        events = json.dumps(half_covered())
        for text in (
            f'{{"INFO": {value}, "traceEvents": {events}}}',
            f'{{"traceEvents": {events}, "INFO": {value}, "a": 1}}',
        ):
            trace = read_bytes(text.encode())
            assert times(trace) == UNHARMED
            assert any("entries beside the events whose text is no JSON" in note for note in trace.notes)

    @pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-le"])
    def test_other_encodings(self, read_bytes, codec):
        assert times(read_bytes(json.dumps(document(half_covered())).encode(codec))) == UNHARMED

    def test_text_behind_the_end(self, read_bytes):
        text = json.dumps(document(half_covered())).encode()
        assert not any("behind" in note for note in read_bytes(text + b"\n\0\0\0").notes)
        assert "bytes.json: text behind the end, left out: 1" in read_bytes(text + b"{}").notes

    def test_events_longer_than_what_is_read_at_once(self, read_bytes, monkeypatch):
        monkeypatch.setattr("profiling.read.kineto_json.CHUNK", 7)
        trace = read_bytes(json.dumps(step_of_training()).encode())
        assert len(trace.events) == 16
        assert trace.metadata["trace name"] == "runs/a.json"

    @pytest.mark.parametrize("cut", range(1, 60, 7))
    def test_cut_short(self, read_bytes, cut):
        text = json.dumps(document(half_covered(), traceName="t")).encode()
        with pytest.raises(ValueError, match=r"bytes\.json: .*cut short"):
            read_bytes(text[:-cut])


@pytest.mark.parametrize("fault", [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\xff", b""])
def test_one_bad_byte_costs_two_events_at_most(read_bytes, fault):
    """Put at every 131st place from the first event to the last."""
    text = json.dumps(document([gpu(GEMM, 20 * i, 10, correlation=i) for i in range(40)])).encode()
    for at in range(text.index(b'"ph"'), text.rindex(b'{"ph"'), 131):
        for broken in (text[:at] + fault + text[at + 1 :], text[:at] + fault + text[at:]):
            assert len(read_bytes(broken).events) >= 38, at


class TestEvents:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"dur": -1}, "with a negative duration"),
            ({"dur": None}, "without a duration"),
            ({"dur": float("nan")}, "with a duration that is no time"),
            ({"dur": "long"}, "with a duration that is no time"),
            ({"dur": 1e12}, "that last more than a day"),
            ({"ts": None}, "without a start"),
            ({"ts": float("inf")}, "with a start that is no time"),
            ({"ts": 10**400}, "with a start that is no time"),
            ({"ts": [1]}, "with a start that is no time"),
        ],
    )
    def test_times(self, read, change, reason):
        trace = read(gpu("odd", 1200, 5) | change)
        assert times(trace) == UNHARMED
        assert f"trace.json: left out: 1 GPU event {reason} (odd)" in trace.notes

    def test_times_as_text(self, read):
        assert times(read(gpu("k", 1200, 5) | {"ts": "1200", "dur": "5.5"}))[2] == (200.0, 205.5, "7")

    def test_a_start_that_could_not_be_taken(self, write_trace):
        """CUPTI notes 0 for it; the others are of the epoch."""
        epoch = 1_669_329_643_132_000
        events = [event | {"ts": event["ts"] + epoch} for event in half_covered()]
        for unknown in (gpu("k", 0, 0), gpu("k", 0, 3), gpu("k", -epoch, 3)):
            trace = read_kineto(write_trace(document([*events, unknown])))
            assert times(trace) == UNHARMED
            assert "1 GPU event more than an hour from all others" in trace.notes[0]

    def test_a_trace_that_begins_at_0(self, write_trace):
        events = [gpu("k", 0, 0), gpu("k", 3, 5)]
        assert len(read_kineto(write_trace(document(events))).events) == 2

    def test_an_end_beyond_what_follows_on_the_stream(self, read):
        """A stream runs one event after another; two seconds within 150 us are none."""
        trace = read(gpu("late", 1110, 2e6, correlation=5), gpu(GEMM, 1120, 10, correlation=6))
        assert times(trace) == [*UNHARMED, (120.0, 130.0, "7")]
        assert "1 GPU event with an end beyond later events of the same stream" in trace.notes[0]

    def test_such_an_end_in_the_middle_of_a_long_trace(self, write_trace):
        events = [gpu(GEMM, 20 * i, 10, correlation=i) for i in range(1000)]
        events[100]["dur"] = 5000
        assert len(read_kineto(write_trace(document(events))).events) == 999

    @pytest.mark.parametrize(
        "events",
        [
            # The second was let in before the first ended.
            [gpu("a", 0, 100, correlation=1), gpu("b", 90, 100, correlation=2), gpu("c", 185, 20, correlation=3)],
            # One graph: a long branch beside a short one, on one stream, of one launch.
            [gpu("long", 0, 500, correlation=1), *(gpu("b", 10 * i, 5, correlation=1) for i in range(1, 40))],
            # The second depends on nothing, was let in near the first's end and ended before it.
            [gpu("a", 0, 100, correlation=1), gpu("b", 95, 3, correlation=2)],
            # Whole microseconds.
            [gpu("a", 0, 10, correlation=1), gpu("b", 9, 0, correlation=2), gpu("c", 10, 0, correlation=3)],
        ],
    )
    def test_true_overlap_on_a_stream_stays(self, write_trace, events):
        trace = read_kineto(write_trace(document(events)))
        assert len(trace.events) == len(events)
        assert not any("left out" in note for note in trace.notes)

    def test_an_end_that_nothing_contradicts_is_doubtful(self, read):
        trace = read(gpu("hang", 1200, 2e6, 33))
        assert len(trace.events) == 3
        assert any("one event, hang, lasts 2,000,000.0 us" in note for note in trace.notes)

    def test_pairs_of_beginning_and_end(self, write_trace):
        one, two = half_covered()
        end = {"ph": "E", "pid": 0, "tid": 7, "ts": one["ts"] + one.pop("dur")}
        events = [one | {"ph": "B"}, end, two, gpu("endless", 1300, 1, 8) | {"ph": "B"}, end | {"tid": 9}]
        trace = read_kineto(write_trace(document(events)))
        assert times(trace) == UNHARMED
        assert trace.events[0].blocks == 16
        assert "1 GPU event that begin and never end (endless)" in trace.notes[0]
        assert "trace.json: ends without a beginning, left out: 1" in trace.notes

    @pytest.mark.parametrize(
        ("grid", "blocks"),
        [("[8,2,1]", 16), ("8, 2, 1", 16), ([8.0, 2, 1], 16), ([None, 1, 1], None), ([], None), ("x", None), (0, None),
         ([-1, 1, 1], None), ([10**30, 1, 1], None)],
    )  # fmt: skip
    def test_grids(self, read, grid, blocks):
        trace = read(gpu("k", 1200, 5, grid=grid))
        assert trace.events[2].blocks == blocks
        assert any("grid is none" in note for note in trace.notes) == (blocks is None)

    @pytest.mark.parametrize("correlation", ["0x1f", "31", 31.0])
    def test_correlations(self, read, correlation):
        trace = read(host("phase", 0, 20), launch(5, 31), gpu("k", 1200, 5, correlation=correlation))
        assert trace.events[2].phase == "phase"

    @pytest.mark.parametrize(
        "args", [None, [], "x", {"device": None}, {"device": [1], "stream": {}, "correlation": []}]
    )
    def test_arguments(self, read, args):
        assert len(read(gpu("k", 1200, 5) | {"args": args}).events) == 3

    @pytest.mark.parametrize("name", [None, 3, ["a"], {"a": 1}])
    def test_names(self, read, name):
        assert isinstance(read(gpu(name, 1200, 5)).events[2].name, str)


class TestHeaders:
    @pytest.mark.parametrize(
        "value", [[], None, "x", 3, {"rank": "one"}, {"rank": -1}, {"pg_config": 3}, {"pg_config": [3]}]
    )
    def test_distributed(self, read, value):
        assert read(distributedInfo=value).devices == (0,)

    @pytest.mark.parametrize(
        ("value", "chip"),
        [({}, None), (["H100"], "H100"), ([{"id": 0, "name": "H100"}], "H100"), ("H100", "H100"), (3, None),
         ([3, None], None),
         ([{"id": 1, "name": "B"}, {"id": 0, "name": "A"}], "A"), ([{"name": ""}], None)],
    )  # fmt: skip
    def test_properties(self, read, value, chip):
        assert read(deviceProperties=value).metadata.get("chip") == chip

    @pytest.mark.parametrize("value", [1.764e18, "1764000000000000000", None, "x", [], float("nan"), 10**40])
    def test_bases(self, read, value):
        assert times(read(baseTimeNanoseconds=value)) == UNHARMED


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (b"SQLite format 3\0", "an SQLite database"),
            (b"<!DOCTYPE html><html>", "a page of HTML"),
            (b"\n\x1f\x12\x00\x00\x10", "a protocol buffer, such as Perfetto's trace"),
            (b"\x80\x04\x95", "a pickle"),
            (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
            (b'{"rocprofiler-sdk-tool": []}', "the JSON of rocprofv3"),
            (b'{"schema": "1.0.1", "nodes": []}', "an execution trace of PyTorch"),
            (b'[{"file": "a.json.gz", "mode": "FULL"}]', "its entries are no events"),
            (b'{"traceEvents": {}}', "its traceEvents are no list"),
            (b'{"traceEvents": [{"ph": "X", "cat": "mtia_ccp_events", "ts": 1, "dur": 1}]}', "MTIA devices"),
            (
                b'{"traceEvents": [{"ph": "X", "cat": "cuda_profiler_range", "ts": 1, "dur": 1}]}',
                "CUPTI counted ranges",
            ),
            (
                b'{"traceEvents": [{"ph": "M", "name": "process_name", "args": {"name": "/device:GPU:0"}}, {}]}',
                r"a Chrome trace of jax.profiler .* name that, or its folder",
            ),
            (b"step,loss\n1,2\n", "no JSON, or cut short"),
        ],
    )
    def test_what_they_are(self, tmp_path, content, what):
        (tmp_path / "other.bin").write_bytes(content)
        with pytest.raises(ValueError, match=rf"other\.bin: .*{what}"):
            read_trace(tmp_path / "other.bin")


@pytest.mark.parametrize("files", [120, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_files_end_in_a_report_or_a_sentence(tmp_path, files):
    """Bytes flipped, cut and inserted; values and keys exchanged; deep nesting; huge numbers; packed and not."""
    path = tmp_path / "broken.json"
    read, refused = 0, 0
    for seed in range(files):
        path.write_bytes(damaged(seed))
        try:
            found = report(read_trace(path))
        except ValueError as error:
            assert "broken.json" in str(error), seed
            refused += 1
        else:
            found.text().encode()
            read += 1
    assert read > 0.6 * files and refused > 0.1 * files


def test_undamaged_it_has_all_events(tmp_path):
    (tmp_path / "whole.json").write_bytes(gzip.compress(json.dumps(step_of_training()).encode()))
    trace = read_trace(tmp_path / "whole.json")
    assert len(trace.events) == 16
    assert {event.step for event in trace.events} == {5, 6, None}
    assert sum(event.collective is not None for event in trace.events) == 2
    assert {event.name for event in trace.events if event.collective} == {ALL_REDUCE}
