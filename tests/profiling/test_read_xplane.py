"""Profiles of jax: real ones of this machine's devices, and one in the form that a GPU's has."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from profiling.capture import _facts, annotate_step, capture
from profiling.metrics import measure
from profiling.read_xplane import read_xplane
from profiling.xplane_files import SIDECAR

STATS = (
    "correlation_id",
    "hlo_op",
    "hlo_module",
    "program_id",
    "name",
    "kernel_details",
    "core_count",
    "cuda_graph_id",
)


def event_text(names, name, start, duration, stats):
    index = names.setdefault(name, len(names) + 1)
    found = "".join(
        f" stats {{ metadata_id: {STATS.index(key) + 1} "
        + (f"int64_value: {value} }}" if isinstance(value, int) else f'str_value: "{value}" }}')
        for key, value in stats.items()
    )
    return (
        f"events {{ metadata_id: {index} offset_ps: {int(start * 1e6)} duration_ps: {int(duration * 1e6)}{found} }}\n"
    )


def plane_text(name, lines, stats=()):
    names: dict[str, int] = {}
    body = "".join(
        f'lines {{ id: {i} name: "{line}" timestamp_ns: 0\n'
        + "".join(event_text(names, *event) for event in events)
        + "}\n"
        for i, (line, events) in enumerate(lines)
    )
    body += "".join(f" stats {{ metadata_id: {STATS.index(key) + 1} int64_value: {value} }}" for key, value in stats)
    body += "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}\n' for name, i in names.items())
    body += "".join(
        f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}\n' for i, name in enumerate(STATS, 1)
    )
    return f'planes {{ name: "{name}"\n{body}}}\n'


def kernel(op, scope, grid="112,1,1"):
    details = f"regs:168 static_shared:0 dynamic_shared:0 grid:{grid} block:384,1,1 occ_pct:18.75"
    return {"correlation_id": 1, "hlo_op": op, "hlo_module": "jit_step", "name": scope, "kernel_details": details}


def gpu_profile(device_shift=0.0, nameless=0.0):
    compute = [
        ("nvjet_sm90_tst", 0.0, 100.0, kernel("custom-call.1", "jit(step)/F/layer_0/attention/dot_general")),
        ("fusion_3", 110.0, 90.0, kernel("fusion.3", "jit(step)/W/transpose(jvp(layer_1))/mlp/add", "2,3,4")),
    ]
    if nameless:
        compute.append(("graph_kernel", 200.0, nameless, {"cuda_graph_id": 5}))
    exchange = kernel("all-to-all-start.1", "jit(step)/F/layer_0/dispatch/all_to_all", "20,1,1")
    send = [("ncclDevKernel_SendRecv", 50.0, 100.0, exchange)]
    text = "".join(
        plane_text(
            f"/device:GPU:{device}",
            [
                ("Stream #13(Compute)", [(n, s + device * device_shift, d, st) for n, s, d, st in compute]),
                ("Stream #20(Compute,MemcpyP2P)", send),
                ("XLA Ops", compute),
            ],
            [("core_count", 132)],
        )
        for device in range(2)
    )
    return ProfileData.text_proto_to_serialized_xspace(text)


def written(folder, raw, sidecar=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "host.xplane.pb").write_bytes(raw)
    if sidecar is not None:
        (folder / SIDECAR).write_text(json.dumps(sidecar))
    return folder


def test_a_gpus_streams(tmp_path):
    trace = read_xplane(written(tmp_path, gpu_profile()))
    assert trace.devices == (0, 1) and len(trace.events) == 6  # a line that other tools derive is not read twice
    gemm, send, update = [event for event in trace.events if event.device == 0]
    assert (gemm.lane, gemm.phase, gemm.layer, gemm.blocks, gemm.group) == ("stream 13", "attn(F)", 0, 112, "compute")
    assert (send.phase, send.kind, send.group, send.blocks) == ("dispatch(F)", "all-to-all", "transfer", 20)
    assert (update.phase, update.layer, update.blocks) == ("mlp(W)", 1, 24)
    assert trace.metadata["sms"] == 132 and trace.metadata["platform"] == "gpu" and trace.notes == ()
    overlap = measure(trace).devices[0].overlaps["transfer"]
    assert overlap.ratio == pytest.approx(0.9) and overlap.exposed == pytest.approx(10)


def test_the_sidecar_names_devices_and_ranks(tmp_path):
    sidecar = {"devices": {"0": 4, "1": 5}, "ranks": {"4": 0, "5": 1}, "metadata": {"chip": "toy"}}
    trace = read_xplane(written(tmp_path, gpu_profile(), sidecar))
    assert trace.devices == (4, 5) and trace.ranks == {4: 0, 5: 1} and trace.metadata["chip"] == "toy"


def test_kernels_that_command_buffers_hide_are_told(tmp_path):
    (note,) = read_xplane(written(tmp_path, gpu_profile(nameless=50.0))).notes
    assert "15% of the device time" in note and "--xla_gpu_enable_command_buffer=" in note


def test_processes_are_joined_on_their_hosts_clock(tmp_path):
    for process, start in enumerate((1_000_000, 1_500_000)):
        task = (
            f'planes {{ name: "Task Environment" stats {{ metadata_id: 1 uint64_value: {start} }} '
            'stat_metadata { key: 1 value { id: 1 name: "profile_start_time" } } }'
        )
        raw = gpu_profile() + ProfileData.text_proto_to_serialized_xspace(task)
        sidecar = {"devices": {"0": 2 * process, "1": 2 * process + 1}}
        folder = tmp_path / f"proc{process}"
        written(folder / "plugins" / "profile" / "session", raw)
        (folder / SIDECAR).write_text(json.dumps(sidecar))
    trace = read_xplane(tmp_path)
    assert trace.devices == (0, 1, 2, 3) and trace.metadata["processes"] == 2
    starts = {device: min(event.start for event in trace.events if event.device == device) for device in trace.devices}
    assert starts == {0: 0.0, 1: 0.0, 2: 500.0, 3: 500.0}
    assert "2 processes" in trace.notes[-1]


@pytest.mark.parametrize(
    "content", [None, b"", b"\x0f\x01", gpu_profile()[:-7]], ids=["no file", "empty", "two bytes", "cut short"]
)
def test_what_is_no_profile_is_refused(tmp_path, content):
    if content is not None:
        written(tmp_path, content)
    with pytest.raises(ValueError, match=r"no \*\.xplane\.pb|no profile|no operation"):
        read_xplane(tmp_path)


def test_capture_refuses_what_would_record_nothing(tmp_path):
    with pytest.raises(ValueError, match="host_level=0"), capture(tmp_path, host_level=0):
        pass


def test_a_real_step_with_collectives(tmp_path):
    devices = jax.devices()[:4]
    if len(devices) < 4:
        pytest.skip("needs 4 devices")
    mesh = Mesh(np.array(devices), ("ep",), axis_types=(AxisType.Auto,))

    def step(x):
        with jax.named_scope("F"), jax.named_scope("layer_0"):
            with jax.named_scope("attention"):
                y = jnp.tanh(x @ x.T) @ x
            with jax.named_scope("dispatch"):
                return jax.lax.all_to_all(y, "ep", 0, 0, tiled=True)

    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    x = jnp.ones((4 * 64, 32))
    run(x).block_until_ready()
    with capture(tmp_path):
        for i in range(3):
            with annotate_step(i, "train"):
                run(x).block_until_ready()
    trace = read_xplane(tmp_path)
    assert [(step.name, step.number) for step in trace.steps] == [("train", 0), ("train", 1), ("train", 2)]
    assert trace.devices == tuple(device.id for device in devices)
    exchanges = [event for event in trace.events if event.phase == "dispatch(F)" and event.group == "transfer"]
    assert len(exchanges) == 3 * 4
    assert {event.layer for event in trace.events if event.phase == "attn(F)"} == {0}
    found = measure(trace)
    assert found.unclassified_share == 0 and found.unattributed_share < 0.02


def test_devices_are_noted_by_the_numbers_that_the_profiler_gives_them(monkeypatch):
    """A process of many on a machine uses one of its GPUs; the profiler counts them all."""
    device = types.SimpleNamespace(id=9, local_hardware_id=3, device_kind="NVIDIA H200", platform="gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert _facts("", {9: 1})["devices"] == {"3": 9}
