"""Small profiles as `jax.profiler` writes them, from their text."""

import json

from jax.profiler import ProfileData

from profiling.read.xplane_files import SIDECAR

STATS = (
    "correlation_id",
    "hlo_op",
    "hlo_module",
    "program_id",
    "name",
    "kernel_details",
    "core_count",
    "cuda_graph_id",
    "device_ordinal",
    "tf_op",
    "hlo_category",
    "flow",
    "_p",
    "_c",
    "step_num",
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
    """A plane; a line is (name, events), an event (name, start, duration in microseconds, stats)."""
    names: dict[str, int] = {}
    body = "".join(
        f'lines {{ id: {i} name: "{line}" timestamp_ns: 0\n'
        + "".join(event_text(names, *event) for event in events)
        + "}\n"
        for i, (line, events) in enumerate(lines)
    )
    body += "".join(f" stats {{ metadata_id: {STATS.index(key) + 1} int64_value: {value} }}" for key, value in stats)
    body += "".join(
        f"event_metadata {{ key: {i} value {{ id: {i} name: {json.dumps(name)} }} }}\n" for name, i in names.items()
    )
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


def began(start_ns, stop_ns=None):
    """When a profile was taken, as newer versions of JAX say it."""
    stop = f"stats {{ metadata_id: 2 uint64_value: {stop_ns} }}" if stop_ns else ""
    return serialized(
        f'planes {{ name: "Task Environment" stats {{ metadata_id: 1 uint64_value: {start_ns} }} {stop} '
        'stat_metadata { key: 1 value { id: 1 name: "profile_start_time" } } '
        'stat_metadata { key: 2 value { id: 2 name: "profile_stop_time" } } }'
    )


def serialized(text):
    return ProfileData.text_proto_to_serialized_xspace(text)


def written(folder, raw, sidecar=None, host="host"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{host}.xplane.pb").write_bytes(raw)
    if sidecar is not None:
        (folder / SIDECAR).write_text(json.dumps(sidecar))
    return folder
