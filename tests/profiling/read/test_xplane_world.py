"""Profiles of other people's machines: several hosts, AMD's GPUs, TPUs, damaged files, and files that are none."""

import collections
import gzip
import json
import math
import random

import pytest

from profiling.metrics import measure
from profiling.read.xplane import read_xplane
from profiling.reports.making import report
from tests.profiling.xspaces import began, gpu_profile, kernel, plane_text, serialized, written

SECOND = 10**9


def one_gpu(gpu=0, start=0.0):
    return serialized(
        plane_text(f"/device:GPU:{gpu}", [("Stream #2(Compute)", [("nvjet", start, 5.0, kernel("a", ""))])])
    )


def session(folder, name):
    return folder / "plugins" / "profile" / name


def write_two_hosts(folder, first="2026_01_01_00_00_00", second="2026_01_01_00_00_03", hosts=("hostA", "hostB")):
    for name, host, at in zip((first, second), hosts, (0, 3), strict=True):
        written(session(folder, name), gpu_profile() + began(at * SECOND + 1), host=host)


def test_two_hosts_of_two_gpus_have_four_devices(tmp_path):
    written(session(tmp_path, "run"), gpu_profile(), host="node10")
    written(session(tmp_path, "run"), gpu_profile(), host="node9")
    trace = read_xplane(tmp_path)
    assert trace.devices == (0, 1, 2, 3) and len(trace.events) == 12
    (numbered,) = [note for note in trace.notes if "numbered" in note]
    assert "0, 1: GPU 0, 1 of node9; 2, 3: GPU 0, 1 of node10" in numbered
    assert "cannot be compared" in trace.notes[-1]  # neither file says when it began


def test_numbers_do_not_depend_on_who_began_first(tmp_path):
    write_two_hosts(tmp_path / "a", hosts=("hostB", "hostA"))
    write_two_hosts(tmp_path / "b")
    for folder, late in (("a", {0, 1}), ("b", {2, 3})):
        trace = read_xplane(tmp_path / folder)
        starts = {device: min(e.start for e in trace.events if e.device == device) for device in trace.devices}
        assert {device for device, start in starts.items() if start == 3e6} == late


def test_processes_of_one_host_may_see_the_same_gpu(tmp_path):
    for process in range(2):
        written(session(tmp_path / f"proc{process}", "run"), one_gpu() + began(SECOND), host="host")
    assert read_xplane(tmp_path).devices == (0, 1)


def test_one_file_keeps_the_profilers_numbers(tmp_path):
    trace = read_xplane(written(tmp_path, one_gpu(gpu=3)))
    assert trace.devices == (3,) and trace.notes == ()


def test_captured_and_plain_files_together(tmp_path):
    sidecar = {"devices": {"0": 4, "1": 5}, "ranks": {"4": 1}, "metadata": {"chip": "toy"}}
    written(session(tmp_path / "proc0", "run"), gpu_profile() + began(SECOND), host="a")
    (tmp_path / "proc0" / "capture.json").write_text(json.dumps(sidecar))
    written(session(tmp_path / "plain", "run"), gpu_profile() + began(SECOND), host="b")
    trace = read_xplane(tmp_path)
    assert trace.devices == (4, 5, 6, 7) and trace.ranks == {4: 1} and trace.metadata["chip"] == "toy"
    assert any("6, 7: GPU 0, 1 of b" in note for note in trace.notes)


def test_captures_that_name_the_same_devices_are_told_apart(tmp_path):
    for process in range(2):
        written(session(tmp_path / f"job{process}", "run"), one_gpu() + began(SECOND), host=f"host{process}")
        (tmp_path / f"job{process}" / "capture.json").write_text(json.dumps({"devices": {"0": 0}}))
    trace = read_xplane(tmp_path)
    assert trace.devices == (0, 1) and any("captures name the same devices" in note for note in trace.notes)


def test_sessions_seconds_apart_are_one_job(tmp_path):
    write_two_hosts(tmp_path)
    trace = read_xplane(tmp_path)
    assert trace.devices == (0, 1, 2, 3) and trace.window == (0.0, 3e6 + 200)
    assert any("began within 60 s" in note for note in trace.notes)


def test_sessions_minutes_apart_are_different_runs(tmp_path):
    write_two_hosts(tmp_path)
    write_two_hosts(tmp_path, "2026_01_01_00_10_00", "2026_01_01_00_10_01")
    trace = read_xplane(tmp_path)
    assert trace.devices == (0, 1, 2, 3)
    (note,) = [note for note in trace.notes if "newest" in note]
    assert "2026_01_01_00_10_01" in note and "not 2026_01_01_00_00_03, 2026_01_01_00_00_00" in note


@pytest.mark.parametrize(("second", "devices"), [(2, (0, 1)), (20, (0,))], ids=["at once", "one after another"])
def test_two_sessions_of_one_host_are_one_job_if_written_at_once(tmp_path, second, devices):
    for name, start in (("2026_01_01_00_00_00", 1), ("2026_01_01_00_00_20", second)):
        raw = one_gpu() + began(start * SECOND, (start + 10) * SECOND)
        written(session(tmp_path, name), raw, host="host")
    assert read_xplane(tmp_path).devices == devices


def test_steps_of_all_hosts_are_the_same_steps(tmp_path):
    for host, start in enumerate((1, 2)):
        steps = [("train", 100.0 * i, 50.0, {"step_num": i}) for i in range(2)]
        raw = one_gpu() + serialized(plane_text("/host:CPU", [("python3", steps)])) + began(start * 1000)
        written(session(tmp_path, "run"), raw, host=f"host{host}")
    trace = read_xplane(tmp_path)
    assert [(s.name, s.number, s.start, s.end) for s in trace.steps] == [
        ("train", 0, 0.0, 51.0), ("train", 1, 100.0, 151.0)
    ]  # fmt: skip


def test_launches_on_the_host_are_no_kernels(tmp_path):
    """ROCm's host events name the operation that they launch."""
    stats = {"hlo_op": "fusion.1", "hlo_module": "jit_f"}
    host = plane_text("/host:CPU", [("Host Threads/7", [("hipModuleLaunchKernel", 0.0, 5.0, stats)] * 3)])
    devices = [
        plane_text(f"/device:GPU:{i}", [("Stream #2(Kernel)", [("fusion.kd", 8.0, 5.0, stats)])], [("core_count", 304)])
        for i in range(2)
    ]
    trace = read_xplane(written(tmp_path, serialized("".join(devices) + host)))
    assert [(event.device, event.name, event.duration) for event in trace.events] == [
        (0, "fusion.kd", 5.0), (1, "fusion.kd", 5.0)
    ]  # fmt: skip
    assert trace.notes == () and trace.metadata["sms"] == 304
    with pytest.raises(ValueError, match=r"launches of kernels on the host .* no device reports"):
        read_xplane(written(tmp_path / "no kernels", serialized(host)))


def test_what_the_host_computes_beside_its_gpus_is_told(tmp_path):
    own = ("add", 0.0, 5.0, {"hlo_op": "add.1", "device_ordinal": 0})
    raw = one_gpu() + serialized(plane_text("/host:CPU", [("tf_XLAEigen/1", [own])]))
    trace = read_xplane(written(tmp_path, raw))
    assert len(trace.events) == 1 and "CPU backend" in trace.notes[0]


@pytest.mark.parametrize(
    "line", ["Stream #13", "Stream #13(Kernel)", "Stream #13(MemcpyOther)", "Stream #13(Compute,MemcpyD2D)"]
)
def test_names_of_streams(tmp_path, line):
    text = plane_text("/device:GPU:0", [(line, [("k", 0.0, 5.0, {})]), ("Launch Stats", [("k", 0.0, 9.0, {})])])
    (event,) = read_xplane(written(tmp_path, serialized(text))).events
    assert (event.lane, event.end) == ("stream 13", 5.0)


def tpu_plane():
    """A loop of 90 us with 80 us of products, 30 us of waiting for a gather of which 40 us are hidden, and a copy."""
    loop = "%while.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while((s32[]{:T(128)}) %tuple.1), condition=%c, body=%b"
    dot = "%fusion.2 = f32[8,8]{1,0:T(8,128)} fusion(f32[8]{0:T(128)} %p), kind=kOutput, calls=%f"
    start = "%all-gather-start.1 = (f32[8]{0}, f32[16]{0}) all-gather-start(f32[8]{0} %p), dimensions={0}"
    done = "%all-gather-done.1 = f32[16]{0} all-gather-done((f32[8]{0}, f32[16]{0}) %all-gather-start.1)"
    copy = "%copy-start.3 = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(f32[8]{0} %p)"
    scope = {"tf_op": "jit(step)/F/layer_3/attention/dot_general:"}
    operations = [(loop, 0.0, 120.0, {}), (dot, 10.0, 40.0, scope), (done, 50.0, 30.0, {}), (dot, 80.0, 40.0, scope)]
    beside = [(start, 10.0, 1.0, {"flow": 7}), (copy, 0.0, 100.0, {"flow": 8}), (done, 50.0, 30.0, {"flow": 7})]
    return plane_text(
        "/device:TPU:0",
        [
            ("Steps", [("0", 0.0, 120.0, {})]),
            ("XLA Modules", [("jit_step(7)", 0.0, 120.0, {})]),
            ("XLA Ops", operations),
            ("Async XLA Ops", beside),
        ],
    )


def test_a_tpus_operations_and_what_runs_beside_them(tmp_path):
    sparse = plane_text("/device:TPU:0 SparseCore 0", [("Sparse Core Ops", [("gather", 0.0, 5.0, {})])])
    trace = read_xplane(written(tmp_path, serialized(tpu_plane() + sparse)))
    assert trace.metadata["platform"] == "tpu" and trace.devices == (0,)
    found = [(event.lane, event.hlo_op, event.start, event.end, event.group) for event in trace.events]
    assert found == [
        ("XLA Ops", "fusion.2", 10.0, 50.0, "compute"),
        ("Async XLA Ops", "all-gather-start.1", 10.0, 80.0, "transfer"),
        ("XLA Ops", "all-gather-done.1", 50.0, 80.0, "wait"),
        ("XLA Ops", "fusion.2", 80.0, 120.0, "compute"),
    ]
    assert (trace.events[0].phase, trace.events[0].layer, trace.events[0].name) == ("attn(F)", 3, "fusion.2")
    overlap = measure(trace).devices[0].overlaps["transfer"]
    assert overlap.ratio == pytest.approx(40 / 70) and overlap.exposed == pytest.approx(30)
    notes = " ".join(trace.notes)
    assert "SparseCore 0 (1)" in notes and "copies that a TPU makes" in notes and "without a TPU" in notes


def test_one_event_from_start_to_end_is_a_whole_collective_of_a_tpu(tmp_path):
    beside = [("all-reduce-start.2", 5.0, 20.0, {})]
    text = plane_text("/device:TPU:1", [("XLA Ops", [("fusion.1", 0.0, 10.0, {})]), ("Async XLA Ops", beside)])
    trace = read_xplane(written(tmp_path, serialized(text)))
    assert [(e.kind, e.start, e.end) for e in trace.events if e.group == "transfer"] == [("all-reduce", 5.0, 25.0)]


@pytest.mark.parametrize(
    ("plane", "line"),
    [("/device:METAL:0", "Queue 1"), ("/device:CUSTOM:npu", "XLA Ops"), ("/device:GPU:0", "Queue 1")],
)
def test_other_devices_are_refused_in_their_own_words(tmp_path, plane, line):
    text = plane_text(plane, [(line, [("k", 0.0, 5.0, {})])])
    with pytest.raises(ValueError, match=rf"that is read here.*'{line}' of {plane} \(1\)"):
        read_xplane(written(tmp_path, serialized(text)))


def test_a_device_whose_plane_stands_there_twice(tmp_path):
    assert len(read_xplane(written(tmp_path, one_gpu() + one_gpu(start=9.0))).events) == 2


def test_cpu_devices_of_two_plain_processes(tmp_path):
    for process in range(2):
        written(session(tmp_path / f"proc{process}", "run"), cpu_profile() + began(SECOND))
    trace = read_xplane(tmp_path)
    assert trace.devices == (0, 1) and any("0: CPU 1 of host; 1: CPU 1 of host" in note for note in trace.notes)


def test_what_the_profiler_reports_is_told(tmp_path):
    raw = one_gpu() + serialized('warnings: "12 events were dropped" errors: "late"')
    notes = read_xplane(written(tmp_path, raw)).notes
    assert "the profiler reports: 12 events were dropped" in notes and "the profiler reports: late" in notes


def test_packed_files_and_names_in_capitals(tmp_path):
    (tmp_path / "HOST.XPLANE.PB").write_bytes(one_gpu())
    (tmp_path / "other.xplane.pb.gz").write_bytes(gzip.compress(one_gpu()))
    assert read_xplane(tmp_path).devices == (0, 1)
    assert read_xplane(tmp_path / "other.xplane.pb.gz").devices == (0,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.trace.json.gz", gzip.compress(b'{"traceEvents":[]}', mtime=0), r"Chrome trace .*read_kineto"),
        ("a.json", b'{"traceEvents": [', "Chrome trace in JSON.*beside"),
        ("a.json", b'{"schemaVersion": 1}', "but JSON: give a"),
        ("a.html", b"<!DOCTYPE html><html>", "but a page of HTML"),
        ("a.xplane.pb", b"", "the file is empty"),
        ("a.xplane.pb", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("a.zip", b"PK\x03\x04 something", "a zip archive: unpack it"),
        ("a.hlo", b"HloModule jit_f\n", "text of an HLO module"),
        ("a.xplane.pb.gz", gzip.compress(one_gpu(), mtime=0)[:60], "damaged or cut short"),
        ("a.xplane.pb", one_gpu()[:-9], "damaged or cut short"),
        ("a.xplane.pb", one_gpu()[3:], "is no profile"),
        ("a.db", b"SQLite format 3\x00" + bytes(100), "SQLite database"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",
)  # fmt: skip
def test_files_that_are_no_profile_are_named_and_told_what_they_are(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_xplane(file)
    assert str(file) in str(caught.value)


def test_folders_without_a_profile(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_xplane(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no \*\.xplane\.pb file here or below; give the folder"):
        read_xplane(tmp_path)
    (tmp_path / "rank0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"but rank0\.json: Chrome traces are read by profiling\.read_kineto"):
        read_xplane(tmp_path)


def test_a_damaged_note_of_a_capture_is_named(tmp_path):
    written(tmp_path, one_gpu(), sidecar={"devices": {"0": "four"}})
    with pytest.raises(ValueError, match=r"capture\.json: damaged"):
        read_xplane(tmp_path)


@pytest.mark.parametrize(
    ("events", "note"),
    [
        ([("bad", 300.0, -5.0, {})], "negative duration were left out: 1"),
        ([("bad", 0.0, 3e12, {})], "times outside of the profile were left out: 1"),
        ([("bad", -1e12, 5.0, {})], "times outside of the profile were left out: 1"),
    ],
)
def test_an_event_that_cannot_be_does_not_cost_the_file(tmp_path, events, note):
    good = [("nvjet", 0.0, 5.0, kernel("a", ""))]
    text = plane_text("/device:GPU:0", [("Stream #2(Compute)", good + events)])
    trace = read_xplane(written(tmp_path, serialized(text)))
    assert trace.window == (0.0, 5.0) and len(trace.events) == 1 and any(note in each for each in trace.notes)


def test_an_event_longer_than_its_profile_is_left_out(tmp_path):
    text = plane_text("/device:GPU:0", [("Stream #2", [("a", 0.0, 5.0, {}), ("bad", 5.0, 60e6, {})])])
    trace = read_xplane(written(tmp_path, serialized(text) + began(SECOND, SECOND + 10**6)))
    assert [event.name for event in trace.events] == ["a"]


def test_a_kernel_that_lasts_past_all_that_follows_on_its_stream_is_left_out(tmp_path):
    """A stream runs one after another, so an end beyond later kernels is a lost time; beside them it may be true."""
    events = [("a", 0.0, 5.0, {}), ("odd", 5.0, 2e6, {}), ("b", 10.0, 5.0, {})]
    trace = read_xplane(written(tmp_path, serialized(plane_text("/device:GPU:0", [("Stream #2", events)]))))
    assert [event.name for event in trace.events] == ["a", "b"] and any("long after all else" in n for n in trace.notes)
    lines = [("Stream #2", [events[0], events[2]]), ("Stream #3", [events[1]])]
    trace = read_xplane(written(tmp_path, serialized(plane_text("/device:GPU:0", lines))))
    assert [event.name for event in trace.events] == ["a", "odd", "b"]


def test_bytes_that_are_no_text_and_names_that_are_missing(tmp_path):
    raw = one_gpu().replace(b"nvjet", b"nv\xff\xfet")
    trace = read_xplane(written(tmp_path, raw))
    assert trace.events[0].name == "nv��t" and any("not UTF-8" in note for note in trace.notes)
    raw = serialized(
        'planes { name: "/device:GPU:0" lines { name: "Stream #1" events { metadata_id: 9 duration_ps: 5 } } }'
    )
    trace = read_xplane(written(tmp_path, raw))
    assert trace.events[0].name == "?" and any("no name" in note for note in trace.notes)


def test_times_of_the_epoch_count_from_the_profiles_start(tmp_path):
    """Profiles that no session has normalised."""
    text = plane_text("/device:GPU:0", [("Stream #2", [("a", 2.0, 5.0, {})])])
    raw = serialized(text.replace("timestamp_ns: 0", f"timestamp_ns: {1_700_000_000 * SECOND}"))
    assert read_xplane(written(tmp_path, raw)).window == (2.0, 7.0)


def mutated(raw, rng):
    """A profile with a few of the damages that disks, copies and crashes do."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 4))):
        at = rng.randrange(len(data))
        kind = rng.choice(("flip", "flip", "byte", "insert", "delete", "cut", "repeat", "huge"))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            data[at] = rng.randrange(256)
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == "delete":
            del data[at : at + rng.randrange(1, 20)]
        elif kind == "cut":
            del data[max(at, 1) :]
        elif kind == "repeat":
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        else:
            data[at : at + 10] = b"\xff" * 9 + b"\x01"
    return bytes(data)


def test_damaged_profiles_end_in_figures_or_in_a_sentence_that_names_the_file(tmp_path):
    rng = random.Random(18)
    whole = [gpu_profile() + began(SECOND, 2 * SECOND), serialized(tpu_plane()), cpu_profile()]
    file = tmp_path / "host.xplane.pb"
    ends = collections.Counter()
    for i in range(500):
        file.write_bytes(mutated(whole[i % 3], rng))
        try:
            trace = read_xplane(file)
            text = report(trace).text() if i % 10 == 0 else ""
        except ValueError as error:
            assert str(file) in str(error)
            ends["refused"] += 1
        else:
            assert all(event.duration >= 0 and math.isfinite(event.end) for event in trace.events)
            assert "nan" not in text
            ends["read"] += 1
    assert min(ends.values()) > 50, ends


def cpu_profile():
    operation = {"hlo_op": "dot.1", "hlo_module": "jit_f", "device_ordinal": 1, "_p": 5}
    events = [("dot.1", 0.0, 2.0, operation), ("end: dot.1", 9.0, 1.0, {"_c": 5})]
    return serialized(
        plane_text("/host:CPU", [("tf_XLAEigen/1", events), ("python", [("t", 0.0, 9.0, {"step_num": 1})])])
    )


def test_a_cpus_operation_ends_with_its_second_event(tmp_path):
    trace = read_xplane(written(tmp_path, cpu_profile()))
    assert [(event.device, event.start, event.end) for event in trace.events] == [(1, 0.0, 10.0)]
    assert [(step.name, step.number) for step in trace.steps] == [("t", 1)]
