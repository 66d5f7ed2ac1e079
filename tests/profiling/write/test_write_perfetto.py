"""Perfetto files are parsed back with Perfetto's own schema."""

import collections

import pytest

from profiling.event import Event, Step, Trace
from profiling.write.perfetto import write_perfetto
from profiling.write.tracks import MOE_LINKS
from tests.profiling.traces import HOSTILE, layer_trace, tangled_trace

schema = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="needs the package perfetto")


def parsed(tmp_path, traces, **options):
    path = tmp_path / "trace.pftrace"
    write_perfetto(path, traces, **options)
    found = schema.Trace()
    found.ParseFromString(path.read_bytes())
    return list(found.packet)


def tracks(packets):
    """Path of names by uuid, from the outermost; parents come first."""
    paths = {}
    for packet in packets:
        if packet.HasField("track_descriptor"):
            descriptor = packet.track_descriptor
            parent = paths[descriptor.parent_uuid] if descriptor.HasField("parent_uuid") else ()
            paths[descriptor.uuid] = (*parent, descriptor.name)
    return paths


def slices(packets):
    """Replays the packets: ``(uuid, start, end, name, category, annotations, flows, ending flows)`` of each slice."""
    texts, opened, found, latest = {}, collections.defaultdict(list), [], 0
    for packet in packets:
        if packet.sequence_flags & schema.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED:
            texts.clear()
        else:
            assert packet.sequence_flags == schema.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        for field, entries in packet.interned_data.ListFields():
            for entry in entries:
                texts[field.name, entry.iid] = entry.str.decode() if hasattr(entry, "str") else entry.name
        if not packet.HasField("track_event"):
            continue
        assert packet.timestamp >= latest
        latest, event = packet.timestamp, packet.track_event
        if event.type == schema.TrackEvent.TYPE_SLICE_BEGIN:
            annotations = {
                texts["debug_annotation_names", a.name_iid]: a.int_value
                if a.HasField("int_value")
                else texts["debug_annotation_string_values", a.string_value_iid]
                for a in event.debug_annotations
            }
            category = texts["event_categories", event.category_iids[0]]
            name = texts["event_names", event.name_iid]
            flows = (tuple(event.flow_ids), tuple(event.terminating_flow_ids))
            opened[event.track_uuid].append((packet.timestamp, name, category, annotations, *flows))
        elif event.type == schema.TrackEvent.TYPE_SLICE_END:
            start, *rest = opened[event.track_uuid].pop()
            found.append((event.track_uuid, start, packet.timestamp, *rest))
    assert not any(opened.values())
    return found


def test_tracks_and_slices(tmp_path):
    trace = layer_trace()
    packets = parsed(tmp_path, trace)
    paths = tracks(packets)
    counters = [("exposed communication",), ("thread blocks in transfers",)]
    children = [*counters, ("stream 7",), ("stream 23",)]
    assert list(paths.values()) == [
        ("host",), ("host", "steps"),
        ("rank 0, device 1",), *[("rank 0, device 1", *child) for child in children],
        ("rank 1, device 0",), *[("rank 1, device 0", *child) for child in children],
    ]  # fmt: skip
    descriptors = [packet.track_descriptor for packet in packets if packet.HasField("track_descriptor")]
    assert {descriptor.child_ordering for descriptor in descriptors} == {schema.TrackDescriptor.EXPLICIT}
    ranks = [descriptor.sibling_order_rank for descriptor in descriptors]
    assert ranks == sorted(ranks)
    assert {d.name for d in descriptors if d.HasField("counter")} == {name for (name,) in counters}
    found = slices(packets)
    labels = {0: "rank 1, device 0", 1: "rank 0, device 1"}
    assert sorted(
        (paths[uuid], start, end, name, category) for uuid, start, end, name, category, *_ in found
    ) == sorted(
        [((labels[e.device], e.lane), e.start * 1000, e.end * 1000, e.name, e.group) for e in trace.events]
        + [(("host", "steps"), 990_000, 1_200_000, "train 7", "unclassified")]
    )
    assert next(annotations for _, _, _, name, _, annotations, *_ in found if name == "dispatch") == {
        "kind": "dispatch kernel", "phase": "dispatch(F)", "layer": 0, "microbatch": 0, "hlo_op": "all-to-all.1",
        "blocks": 20,
    }  # fmt: skip


def test_nothing_is_written_that_the_schema_does_not_know(tmp_path):
    """What the schema parses, it writes back with as many bytes."""
    path = tmp_path / "trace.pftrace"
    write_perfetto(path, [layer_trace(), tangled_trace()], links=MOE_LINKS)
    found = schema.Trace()
    found.ParseFromString(path.read_bytes())
    known = found.ByteSize()
    found.DiscardUnknownFields()
    assert found.ByteSize() == known == path.stat().st_size


def test_overlap_takes_further_tracks_of_the_same_name(tmp_path):
    packets = parsed(tmp_path, tangled_trace())
    paths = tracks(packets)
    assert list(paths.values()) == [
        ("device 5",), ("device 5", "exposed communication"), ("device 5", "lane"), ("device 5", "lane")
    ]  # fmt: skip
    spans = {name: (uuid, start, end) for uuid, start, end, name, *_ in slices(packets)}
    first, second = (uuid for uuid, path in paths.items() if path[-1] == "lane")
    assert spans == {
        "outer": (first, 0, 10_000), "inner": (first, 1000, 4000), "instant": (first, 2000, 2000),
        "across": (second, 3000, 12_000), "touching": (first, 10_000, 11_000), HOSTILE: (first, 10_000, 10_000),
    }  # fmt: skip


def test_counters(tmp_path):
    packets = parsed(tmp_path, layer_trace(layers=1))
    paths = tracks(packets)
    found = collections.defaultdict(list)
    for packet in packets:
        event = packet.track_event
        if event.type == schema.TrackEvent.TYPE_COUNTER:
            found[paths[event.track_uuid]].append((packet.timestamp, event.double_counter_value))
    assert found["rank 0, device 1", "exposed communication"] == [
        (1_040_000, 1.0), (1_055_000, 0.0), (1_060_000, 1.0), (1_065_000, 0.0)
    ]  # fmt: skip
    assert found["rank 1, device 0", "thread blocks in transfers"] == [(1_045_000, 20.0), (1_065_000, 0.0)]
    assert not [
        path for path in tracks(parsed(tmp_path, layer_trace(), counted=False)).values() if "exposed" in path[-1]
    ]


def test_arrows(tmp_path):
    found = slices(parsed(tmp_path, layer_trace(), links=MOE_LINKS))
    sources = {flow: (name, facts["layer"]) for _, _, _, name, _, facts, flows, _ in found for flow in flows}
    targets = {flow: (name, facts["layer"]) for _, _, _, name, _, facts, _, flows in found for flow in flows}
    assert len(sources) == 8 and sources.keys() == targets.keys()
    assert {(sources[flow], targets[flow]) for flow in sources} == {
        pair
        for layer in (0, 1)
        for pair in (
            (("attention_kernel", layer), ("notify_dispatch", layer)),
            (("dispatch", layer), ("grouped_gemm", layer)),
        )
    }
    assert not [s for s in slices(parsed(tmp_path, layer_trace())) if s[-1] or s[-2]]


def test_side_by_side(tmp_path):
    packets = parsed(tmp_path, [layer_trace(start=5.0), layer_trace("predicted", slower=0.9, start=0.0)])
    paths = tracks(packets)
    first = {}
    for uuid, start, *_ in slices(packets):
        first[paths[uuid][0]] = min(start, first.get(paths[uuid][0], start))
    assert first == {
        f"{title}: {name}": 0 if name == "host" else 10_000
        for title in ("measured", "predicted")
        for name in ("host", "rank 0, device 1", "rank 1, device 0")
    }


def test_long_names_and_large_numbers(tmp_path):
    """Lengths and times of more than one byte, and a layer that is negative, as a mistaken reader might give it."""
    event = Event(0, "gpu", 2.0**40, 2.0**40 + 1, "k" * 1000, layer=-1, blocks=1 << 31)
    found = slices(parsed(tmp_path, Trace("", "xplane", (event,))))
    assert found[0][1:4] == (2**40 * 1000, (2**40 + 1) * 1000, "k" * 1000)
    assert found[0][5] == {"kind": "unclassified", "layer": -1, "blocks": 1 << 31}


def test_a_trace_without_events(tmp_path):
    assert parsed(tmp_path, Trace("", "xplane", ())) == []
    found = slices(parsed(tmp_path, Trace("", "xplane", (), (Step("train", None, 0.0, 1.0),))))
    assert [(start, end, name) for _, start, end, name, *_ in found] == [(0, 1000, "train")]


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        write_perfetto(tmp_path / "a.json", layer_trace())
    with pytest.raises(ValueError, match="give at least one"):
        write_perfetto(tmp_path / "a.pftrace", ())
    with pytest.raises(ValueError, match=r"goes from 2\.0 to 1\.0 us"):
        write_perfetto(tmp_path / "a.pftrace", Trace("", "xplane", (Event(0, "gpu", 2.0, 1.0, "a"),)))
