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

from profiling.metrics import measure
from profiling.read.xplane import read_xplane
from profiling.read.xplane_files import SIDECAR
from profiling.recording import _facts, annotate_step, capture
from tests.profiling.xspaces import gpu_profile, written


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
