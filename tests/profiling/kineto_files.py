"""Small traces as PyTorch writes them, made in the tests, and ways of damaging them."""

import gzip
import json
import random
from collections.abc import Iterable
from typing import Any

GEMM = "nvjet_hsh_128x256_64x4_2x1_v_bz_TNT"
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def gpu(name, ts, dur, stream=7, device=0, cat="kernel", **args: Any) -> dict[str, Any]:
    """An event of a GPU."""
    args = {"device": device, "stream": stream, "grid": [8, 2, 1], **args}
    return {"ph": "X", "cat": cat, "name": name, "pid": device, "tid": stream, "ts": ts, "dur": dur, "args": args}


def host(name, ts, dur, cat="user_annotation", tid=1, **args: Any) -> dict[str, Any]:
    """An event of a thread of the host."""
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def launch(ts, correlation, tid=1):
    """The host's call for the GPU event with the same correlation."""
    return host("cudaLaunchKernel", ts, 2, "cuda_runtime", tid, correlation=correlation)


def launched(annotations, each=10):
    """Annotations one after another, `each` us long; every one launches a kernel of 8 us."""
    events = []
    for i, name in enumerate(annotations):
        events += [
            host(name, i * each, each - 1),
            launch(i * each + 2, i),
            gpu(GEMM, 1000 + i * each, 8, correlation=i),
        ]
    return events


def half_covered():
    """A product from 1000 to 1100 us and an all-reduce from 1050 to 1150, so that half of it is covered."""
    return [gpu(GEMM, 1000, 100), gpu(ALL_REDUCE, 1050, 100, 20)]


def described(ranks: Iterable[int] = (0, 1), **args: Any) -> dict[str, Any]:
    """What PyTorch says of an all-reduce of 1,024 elements."""
    ranks = list(ranks)
    return {
        "Collective name": "allreduce", "In msg nelems": 1024, "Out msg nelems": 1024, "Group size": len(ranks),
        "dtype": "BFloat16", "Process Group Name": "0", "Process Group Ranks": str(ranks), "Seq": 3, **args,
    }  # fmt: skip


def document(events, rank=0, world_size=2, **header):
    """A whole file."""
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H100", "numSms": 132}],
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": world_size},
        "traceEvents": events,
        **header,
    }


def step_of_training():
    """Two steps with forward and backward, products, collectives, copies, operators and flows."""
    events = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}}]
    for step in range(2):
        t = step * 200
        events += [
            host(f"ProfilerStep#{step + 5}", t, 190),
            host("## forward ##", t + 1, 80),
            host("## backward ##", t + 90, 90),
        ]
        for i in range(6):
            number = step * 10 + i
            at = t + 5 + i * 15 + 60 * (i > 4)
            events += [
                host("aten::mm", at, 9, "cpu_op", 1, **{"External id": number, "Input Dims": [[8, 16], [16, 4]]}),
                launch(at + 2, number),
                {"ph": "s", "id": number, "pid": 1, "tid": 1, "ts": at + 2, "cat": "ac2g", "name": "ac2g"},
                gpu(GEMM, 1000 + t + i * 20, 15.5, 7, 0, "kernel", correlation=number, **{"External id": number}),
            ]
        facts: dict[str, Any] = {"External id": 40 + step}
        events += [
            host("record_param_comms", t + 95, 10, "cpu_op", 2, **(facts | described())),
            launch(t + 97, 30 + step, 2),
            gpu(ALL_REDUCE, 1080 + t, 60, 20, correlation=30 + step, **(facts | (described() if step else {}))),
            gpu("Memcpy DtoH (Device -> Pinned)", 1150 + t, 3, 21, cat="gpu_memcpy", correlation=99),
        ]
    return document(events, traceName="runs/a.json", baseTimeNanoseconds=1_700_000_000_000_000_000)


VALUES = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    -(10**19),
    1.5,
    "",
    "x",
    "0x1f",
    "\ud800",
    "a\x00b",
    [],
    [None],
    {},
    {"a": []},
)


def damaged(seed):
    """The bytes of `step_of_training` with one to four faults, packed for every third seed."""
    draw = random.Random(seed)
    whole = step_of_training()
    if draw.random() < 0.5:
        for _ in range(draw.randint(1, 4)):
            _damage_objects(draw, whole)
    text = json.dumps(whole)
    if draw.random() < 0.3:
        text = _damage_text(draw, text)
    content = text.encode(errors="surrogatepass")
    packed = seed % 3 == 0
    if packed and draw.random() < 0.5:
        content = _damage_bytes(draw, gzip.compress(content, 1, mtime=0))
    else:
        if draw.random() < 0.6:
            content = _damage_bytes(draw, content)
        content = gzip.compress(content, 1, mtime=0) if packed else content
    return content


def _damage_objects(draw, whole):
    events = whole["traceEvents"]
    event = draw.choice(events) if events else {}
    inner = event.get("args") if isinstance(event, dict) else None
    target = draw.choice([event, event, inner, whole, whole.get("distributedInfo")])
    match draw.randint(0, 6):
        case 0 if events:
            events[draw.randrange(len(events))] = draw.choice(VALUES)
        case 1 if isinstance(events, list) and events:
            events.append(draw.choice(events))
        case 2 if isinstance(target, dict) and target:
            key = draw.choice(sorted(set(target) - {"traceEvents"}) or ["ts"])
            target.pop(key, None)
        case 3 if isinstance(target, dict) and len(target) > 1:
            one, two = draw.sample([*sorted(set(target) - {"traceEvents"}), "ts", "dur"], 2)
            target[one], target[two] = target.get(two), target.get(one)
        case 4 if isinstance(event, dict):
            event["ts"] = draw.choice([0, -5, 1e18, 10**400 if draw.random() < 0.5 else 7, float("nan"), float("inf")])
        case 5 if isinstance(event, dict):
            event["dur"] = draw.choice([-1, 0, 1e9, 1e300, float("nan"), float("-inf"), "12"])
        case _ if isinstance(target, dict):
            key = draw.choice(sorted(set(target) - {"traceEvents"}) or ["ts"])
            target[key] = draw.choice(VALUES)
    whole["traceEvents"] = [event for event in events if event is not whole]


def _damage_text(draw, text):
    at = draw.randrange(len(text))
    nested, duplicate = ["[" * 100_000, '{"a":' * 5_000], '"ts": 1, "ts": 2,'
    faults = (*nested, "9" * 5_000, duplicate, "nan", "\\", '"', "}", "]", ",,", "{", "\ud800", "\x1b[31m")
    return text[:at] + draw.choice(faults) + text[at:]


def _damage_bytes(draw, content):
    broken = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(broken))
        match draw.randint(0, 3):
            case 0:
                broken[at] ^= 1 << draw.randrange(8)
            case 1:
                broken[at:at] = draw.randbytes(draw.randint(1, 8))
            case 2:
                del broken[max(at, 1) : at + draw.randint(1, 40)]
            case _ if draw.random() < 0.2:
                del broken[max(at, 1) :]
    return bytes(broken)
