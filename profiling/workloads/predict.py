"""From one device's measured times to the timeline of a cluster: the workload's pattern with a modelled network."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from profiling.event import Event, Trace
from profiling.metrics import phase_durations
from profiling.predict.network import ClusterNetwork, exchange_us
from profiling.predict.replaying import DECODE, OVERLAPPED_PAIR, PREFILL, Pattern, pattern_tasks, replay
from profiling.read.scopes import PARTS, place
from profiling.workloads.sizes import Sizes

NETWORKS: Mapping[str, ClusterNetwork] = {
    "train": ClusterNetwork(sms=20),
    "prefill": ClusterNetwork(internode=57e9, sms=24),
    "decode": ClusterNetwork(internode=39e9, latency_us=5.0, sms=0),
}
"""DeepEP's rates at 64, 32 and 128 devices; in decode those of its low-latency kernels."""

_PATTERNS: Mapping[str, Pattern] = {"train": OVERLAPPED_PAIR, "prefill": PREFILL, "decode": DECODE}
_INFERENCE_PARTS = {**PARTS, "shared_expert": "shared"}
_DECODE_PARTS = {**_INFERENCE_PARTS, "attention": "attn_0", "project": "attn_0", "core": "attn_1"}
BYTES = {"dispatch": 1 + 4 / 128, "combine": 2.0}
"""Of one value that travels: e4m3 with a float32 scale for 128 of them, and bfloat16."""


def predict(trace: Trace, workload: str, sizes: Sizes, network: ClusterNetwork | None = None) -> Trace:
    """The workload as `Sizes.expert_parallel` spreads it, one of its devices.

    Args:
      trace: of the workload on one device, from `profiling.workloads.run`; its times stand for the cluster's devices.
      workload: "train", "prefill" or "decode".
      sizes: that it ran with.
      network: the cluster's; None: `NETWORKS`.

    Returns:
      The predicted timeline. Products and everything else of the device are slower by the share of its SMs that
      exchanges occupy.

    Raises:
      ValueError: an unknown workload, a trace of several devices, or of something else.
    """
    if workload not in _PATTERNS:
        raise ValueError(f"workload={workload!r}: choose one of {', '.join(_PATTERNS)}")
    if len(trace.devices) != 1:
        raise ValueError(f"the trace is of devices {trace.devices}: predict from a run on one")
    network = NETWORKS[workload] if network is None else network
    sms = trace.metadata.get("sms") or 132
    if network.sms >= sms:
        raise ValueError(f"exchanges on {network.sms} SMs leave none of the device's {sms}")
    slower = sms / (sms - network.sms)
    pattern = _PATTERNS[workload]
    durations = [
        {
            phase: exchanges[phase] if phase in exchanges else slower * measured.get(phase, 0.0)
            for phase in pattern.phases
        }
        for exchanges in [_exchanges(workload, sizes, network)]
        for measured in _measured(trace, workload)
    ]
    missing = {phase for phase in pattern.phases if all(not layer[phase] for layer in durations)}
    if missing or not durations:
        raise ValueError(
            f"trace {trace.title!r} has no time in {sorted(missing)}: it is not of the workload {workload!r}"
        )
    devices = sizes.expert_parallel[workload]
    notes = (
        f"predicted from one device's times for {devices}: {network}",
        "launch gaps, ranks that drift apart and uneven routing are not in it",
    )
    return replay(pattern_tasks(pattern, durations), f"{workload} on {devices} devices, predicted", notes=notes)


def _exchanges(workload: str, sizes: Sizes, network: ClusterNetwork) -> dict[str, float]:
    tokens = {
        "train": sizes.sequence,
        "prefill": sizes.prompts * sizes.prompt // 2,
        "decode": sizes.requests // 2,
    }[workload]
    router = sizes.moe.router

    def us(what: str) -> float:
        return exchange_us(
            network,
            sizes.expert_parallel[workload],
            tokens,
            router.top_k,
            router.top_groups,
            sizes.width * BYTES[what],
            direct=workload == "decode",
        )

    if workload == "train":
        # The transpose of a combine dispatches, and the other way round.
        ways = {"dispatch(F)": "dispatch", "combine(F)": "combine", "combine(B)": "dispatch", "dispatch(B)": "combine"}
    else:
        ways = {f"{what}({m})": what for what in BYTES for m in range(2)}
    return {phase: us(what) for phase, what in ways.items()}


def _measured(trace: Trace, workload: str) -> Sequence[Mapping[str, float]]:
    """Of every layer the busy time of each phase in one pair, or one call, in the pattern's names."""
    if workload == "train":
        events = [dataclasses.replace(event, phase=event.phase.replace("(I)", "(B)")) for event in trace.events]
    else:
        parts = _DECODE_PARTS if workload == "decode" else _INFERENCE_PARTS
        events = [_by_microbatch(event, parts) for event in trace.events]
    calls = runs(trace)
    return [{phase: busy / calls for phase, busy in layer.items()} for layer in phase_durations(events)]


def _by_microbatch(event: Event, parts: Mapping[str, str]) -> Event:
    part = re.sub(r"\(.*", "", place(event.scope, parts).phase)
    return dataclasses.replace(event, phase=f"{part}({event.microbatch})")


def runs(trace: Trace) -> int:
    """How often the trace ran the layers: the most common number of times that an operation of a layer ran.

    >>> twice = [Event(0, "7", at, at + 1.0, "gemm", hlo_op="dot.1", layer=0) for at in (0.0, 5.0)]
    >>> runs(Trace("", "xplane", tuple(twice)))
    2
    """
    counts = collections.Counter(event.hlo_op for event in trace.events if event.layer is not None and event.hlo_op)
    return collections.Counter(counts.values()).most_common(1)[0][0] if counts else 1
