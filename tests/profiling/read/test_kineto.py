"""PyTorch's traces: DeepSeek's published one, one written by hand in the same format, and damaged ones."""

import collections
import gzip
import json

import pytest

from profiling.classify.classifier import DEEPSEEK, Rule
from profiling.read.kineto import read_kineto
from tests.profiling.conftest import THREE_LAYERS

PHASES = {f"{part}({action})" for part in ("attn", "mlp") for action in "FBW"} | {
    f"{part}({action})" for part in ("dispatch", "combine") for action in "FB"
}


@pytest.fixture
def document():
    return json.loads(THREE_LAYERS.read_text())


@pytest.fixture
def write(tmp_path):
    """Writes a document as a file and gives its path."""

    def write(document, name="trace.json"):
        text = json.dumps(document).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return tmp_path / name

    return write


def kernels(document):
    return [event for event in document["traceEvents"] if event.get("cat") == "kernel"]


class TestDeepSeek:
    def test_window_and_facts(self, deepseek):
        assert deepseek.window == (0.0, 129_012.0)
        assert len(deepseek.events) == 963 + 12 + 8
        facts = deepseek.metadata
        assert facts["trace name"] == "traces/prof_ep64_tp1_varsm_hidden7168_seqlen4096.json"
        assert (facts["world size"], facts["ranks"], facts["backend"]) == (64, [0], "nccl")
        assert (facts["chip"], facts["SMs"]) == ("NVIDIA H800", 132)
        counts = {"kernel": 963, "gpu_memset": 12, "gpu_memcpy": 8, "cpu_op": 4387, "cuda_runtime": 3853}
        assert counts.items() <= facts["events by category"].items()
        assert [(step.name, step.number) for step in deepseek.steps] == [("ProfilerStep", 1), ("1F1B", None)]

    def test_every_event_has_phase_and_layer(self, deepseek):
        assert deepseek.notes == ()
        assert {event.phase for event in deepseek.events} == PHASES
        assert {event.layer for event in deepseek.events} == {0, 1, 2, 3}
        assert {event.scope for event in deepseek.events} == {f"1F1B/{phase}" for phase in PHASES}

    def test_every_event_is_classified(self, deepseek):
        counts = collections.Counter(event.kind for event in deepseek.events)
        times = collections.Counter()
        for event in deepseek.events:
            times[event.kind] += event.duration
        assert {kind: (count, times[kind]) for kind, count in counts.items()} == {
            "combine": (8, 49_448),
            "weight-gradient GEMM": (60, 32_756),
            "barrier": (16, 32_578),
            "dispatch": (8, 31_004),
            "grouped GEMM": (16, 22_926),
            "attention": (16, 21_965),
            "dense GEMM": (64, 18_838),
            "fp8 cast": (276, 16_663),
            "permute": (24, 5_067),
            "RMSNorm": (64, 3_448),
            "rope": (40, 3_087),
            "elementwise": (307, 2_733),
            "SwiGLU": (12, 1_863),
            "router": (36, 718),
            "cuBLAS GEMM": (12, 537),
            "dispatch layout": (4, 410),
            "memory": (20, 28),
        }

    def test_backward_of_combine_runs_the_dispatch_kernel(self, deepseek):
        found = {(event.phase, event.kind) for event in deepseek.events if event.group == "transfer"}
        assert found == {
            ("dispatch(F)", "dispatch"),
            ("combine(F)", "combine"),
            ("combine(B)", "dispatch"),
            ("dispatch(B)", "combine"),
        }

    def test_communication_takes_20_multiprocessors_and_products_the_rest(self, deepseek):
        assert {event.blocks for event in deepseek.events if event.group == "transfer"} == {20}
        products = ("weight-gradient GEMM", "grouped GEMM", "dense GEMM")
        assert {event.blocks for event in deepseek.events if event.kind in products} == {112}
        assert deepseek.metadata["SMs"] == 20 + 112


def test_hand_written(three_layers):
    assert three_layers.title == "three_layers.json"
    assert three_layers.window == (0.0, 1200.0)
    assert three_layers.metadata["SMs"] == 132
    first = [event for event in three_layers.events if event.layer == 0]
    assert [(e.start, e.end, e.lane, e.phase, e.kind, e.group, e.blocks) for e in first] == [
        (0, 80, "7", "attn(F)", "attention", "compute", 256),
        (90, 100, "27", "dispatch(F)", "dispatch layout", "compute", 16),
        (100, 120, "27", "dispatch(F)", "barrier", "wait", 9),
        (120, 200, "27", "dispatch(F)", "dispatch", "transfer", 20),
        (150, 250, "23", "mlp(W)", "weight-gradient GEMM", "compute", 112),
        (202, 300, "7", "mlp(F)", "grouped GEMM", "compute", 112),
        (300, 310, "27", "combine(F)", "barrier", "wait", 20),
        (310, 400, "27", "combine(F)", "combine", "transfer", 20),
    ]
    assert [(s.name, s.number, s.start, s.end) for s in three_layers.steps] == [
        ("ProfilerStep", 4, -500.0, -100.0),
        ("forward", None, -499.0, -101.0),
    ]
    assert {event.scope for event in first} == {f"forward/{event.phase}" for event in first}


def test_gzip_whatever_its_name(document, write, three_layers):
    packed = write(document, "trace.json.gz")
    assert read_kineto(packed).events == three_layers.events
    renamed = packed.rename(packed.with_name("unpacked.json"))
    assert read_kineto(str(renamed)).events == three_layers.events


def test_a_bare_list_of_events(document, write):
    trace = read_kineto(write(document["traceEvents"]))
    assert len(trace.events) == 24
    assert trace.title == "trace.json"
    assert "trace name" not in trace.metadata


def test_names_instead_of_numbers(document, write, three_layers):
    """Processes and threads may be strings, and an event may say on which GPU it ran by its process alone."""
    for event in kernels(document):
        event |= {"pid": "GPU 0", "tid": f"stream {event['tid']}"}
        del event["args"]["device"], event["args"]["stream"]
    trace = read_kineto(write(document))
    assert [e.lane for e in trace.events] == [f"stream {e.lane}" for e in three_layers.events]
    assert {event.device for event in trace.events} == {0}


def test_rules_of_the_user(write, document):
    trace = read_kineto(write(document), rules=(Rule("flash", "my attention", "compute"), *DEEPSEEK))
    assert trace.events[0].kind == "my attention"


def test_a_launch_outside_every_annotation_is_noted(document, write):
    launches = [event for event in document["traceEvents"] if event.get("cat") == "cuda_runtime"]
    launches[0]["ts"] -= 10_000
    trace = read_kineto(write(document))
    assert trace.events[0].phase == "" and trace.events[0].layer is None
    assert trace.notes == ("trace.json: 1 of 24 GPU events were launched outside every annotation: they have no phase",)


def test_layers_are_counted_within_each_step(document, write):
    """Two steps of three layers are no six layers."""
    later = []
    for event in document["traceEvents"]:
        if event.get("ph") == "X":
            args = dict(event.get("args", {}))
            if "correlation" in args:
                args["correlation"] += 1000
            name = "ProfilerStep#5" if event["name"] == "ProfilerStep#4" else event["name"]
            later.append(event | {"ts": event["ts"] + 5000, "args": args, "name": name})
    document["traceEvents"] += later
    trace = read_kineto(write(document))
    assert collections.Counter(event.layer for event in trace.events) == {0: 16, 1: 16, 2: 16}
    assert [step.number for step in trace.steps] == [4, None, 5, None]


def test_layers_that_cannot_be_counted(document, write):
    annotations = [event for event in document["traceEvents"] if event.get("name") == "attn(F)"]
    annotations[0]["name"] = "embed"
    trace = read_kineto(write(document))
    assert {event.layer for event in trace.events} == {None}
    assert "phases occur unequally often" in trace.notes[0]


def test_what_a_step_does_once_is_in_no_layer(document, write):
    annotations = [event for event in document["traceEvents"] if event.get("name") == "attn(F)"]
    for event, name in zip(annotations, ("embed", "head", "loss"), strict=True):
        event["name"] = name
    trace = read_kineto(write(document))
    assert trace.notes == ()
    assert {(event.phase, event.layer) for event in trace.events if event.lane == "7"} == {
        ("embed", None), ("head", None), ("loss", None), ("mlp(F)", 0), ("mlp(F)", 1), ("mlp(F)", 2),
    }  # fmt: skip


def test_numbers_in_brackets_are_microbatches(document, write):
    for event in document["traceEvents"]:
        if event.get("name") in ("attn(F)", "mlp(F)"):
            event["name"] = event["name"].replace("F", "1")
    found = {(event.phase, event.microbatch) for event in read_kineto(write(document)).events}
    assert {("attn(1)", 1), ("mlp(1)", 1), ("mlp(W)", None)} <= found


def test_ranks_are_devices_on_one_clock(document, write, three_layers, tmp_path):
    """Newer profilers write times since a base of their own; the second rank is 7 us late."""
    one, two = (json.loads(json.dumps(document)) for _ in range(2))
    for of_rank, rank, base in ((one, 3, 5_000_000_000), (two, 1, 6_000_007_000)):
        of_rank["baseTimeNanoseconds"] = base
        of_rank["distributedInfo"]["rank"] = rank
    for event in two["traceEvents"]:
        if "ts" in event:
            event["ts"] -= 1_000_000
    files = [write(one, "a.json"), write(two, "b.json.gz")]
    (tmp_path / "readme.txt").write_text("no trace")
    for trace in (read_kineto(files), read_kineto(tmp_path)):
        assert trace.devices == (1, 3)
        assert trace.metadata["ranks"] == [3, 1]
        first = {device: next(e for e in trace.events if e.device == device) for device in trace.devices}
        assert first[3].start == 0.0
        assert first[1].start == pytest.approx(7.0)
        assert [e.duration for e in trace.events if e.device == 3] == [e.duration for e in three_layers.events]
    two["distributedInfo"]["rank"] = 3
    with pytest.raises(ValueError, match=r"a.json.*b.json.* are of ranks \[3, 3\]: read one file of each rank"):
        read_kineto([write(one, "a.json"), write(two, "b.json.gz")])
    del two["distributedInfo"]
    assert read_kineto([files[0], write(two, "b.json.gz")]).devices == (0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x1f\x8b\x08\x00garbage", "cannot be read|damaged or cut short"),
        (b"\x0a\xff\x00\x80", "a protocol buffer, such as Perfetto's trace"),
        (b"\x00\xff\x00\x80", "not text but binary"),
        (b"hello", "no JSON, or cut short"),
        (b'{"a": 1}', "no Chrome trace: there is no list of traceEvents"),
        (b"3", "no JSON, or cut short"),
        (b'{"traceEvents": []}', "no GPU events .categories: none"),
        (b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "ts": 1, "dur": 1}]}', "no GPU events .categories: cpu_op"),
        (
            b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": "x"}]}',
            "no GPU event can be used: 1 GPU event with a start that is no time .k.",
        ),
        (b'{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": 1, "dur": -2}]}', "with a negative duration"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.json.*({message})"):
        read_kineto(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_cut_short(tmp_path, share, packed):
    whole = THREE_LAYERS.read_bytes()
    content = gzip.compress(whole) if packed else whole
    path = tmp_path / "short.json"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"short\.json: .*cut short"):
        read_kineto(path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match=r"there is no \.json or \.json\.gz file to read"):
        read_kineto(tmp_path)
    with pytest.raises(ValueError, match=r"missing\.json: cannot be read"):
        read_kineto(tmp_path / "missing.json")
