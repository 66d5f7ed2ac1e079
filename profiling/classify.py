"""What an event does, from its names: an ordered table of rules, of which the first that matches counts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from profiling.event import GROUPS, Event, Trace

FIELDS = ("name", "hlo_op", "scope", "phase", "lane")
"""The fields of an event that a rule may look at."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Events whose field contains the pattern are of this kind.

    Attributes:
      pattern: a regular expression, searched for anywhere in the field; ``^`` and ``$`` bind it to the ends.
      kind: what such an event does, "grouped GEMM" for instance.
      group: what its time counts as, one of `profiling.event.GROUPS`.
      field: which field of the event is searched, one of `FIELDS`.

    Raises:
      ValueError: a group or field that does not exist, or no regular expression.

    >>> Rule(r"^my_all_to_all", "all-to-all", "transfer").group
    'transfer'
    """

    pattern: str
    kind: str
    group: str
    field: str = "name"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"Rule(group={self.group!r}): choose one of {', '.join(GROUPS)}")
        if self.field not in FIELDS:
            raise ValueError(f"Rule(field={self.field!r}): choose one of {', '.join(FIELDS)}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"Rule(pattern={self.pattern!r}) is no regular expression: {error}") from error


DEEPSEEK: tuple[Rule, ...] = (
    Rule(r"notify_dispatch|cached_notify", "barrier", "wait"),
    Rule(r"::ep::(\w+::)*combine\b|deep_ep::\w+::combine", "combine", "transfer"),
    Rule(r"::ep::(\w+::)*dispatch\b|deep_ep::\w+::dispatch", "dispatch", "transfer"),
    Rule(r"^nccl", "NCCL", "transfer"),
    Rule(r"^Memcpy PtoP", "peer copy", "transfer"),
    Rule(r"get_dispatch_layout", "dispatch layout", "compute"),
    Rule(r"m_grouped", "grouped GEMM", "compute"),
    Rule(r"fp8_dptp128c_acc", "weight-gradient GEMM", "compute"),
    Rule(r"fp8_ptp128c|deep_gemm|fp8_gemm", "dense GEMM", "compute"),
    Rule(r"flash|fmha|mla_|cudnn::fusion", "attention", "compute"),
    # Before SwiGLU: where one kernel does both, the cast decides what it reads and writes.
    Rule(r"[_:]cast_|transpose<|_transpose\b", "fp8 cast", "compute"),
    Rule(r"reduce_fused|expand_to_fused|get_fused_mapping|count_expert", "permute", "compute"),
    Rule(r"swiglu", "SwiGLU", "compute"),
    Rule(r"layer_norm|rms_?norm", "RMSNorm", "compute"),
    Rule(r"rotary|^_copy_tensor_kernel", "rope", "compute"),
    Rule(r"topk|topK|aux_fi|unique_group|_scatter_gather", "router", "compute"),
    Rule(r"gemm_bf16|xmma_gemm|cublas|nvjet", "cuBLAS GEMM", "compute"),
    Rule(r"^Mem(cpy|set)", "memory", "compute"),
    Rule(r"at::native|at6native|fill_tensormaps", "elementwise", "compute"),
)
"""Kernels of DeepSeek's published traces: DeepEP, DeepGEMM, flash attention, PyTorch's own."""

_MOVES = r"(copy|transpose|bitcast|slice|dynamic-slice|dynamic-update-slice|concatenate|pad|reshape|iota|broadcast)"
_PART = r"(-start|\.|-|_|$)"

XLA: tuple[Rule, ...] = (
    Rule(r"^(all|reduce|ragged|collective|async|send|recv)[a-z-]*-done(\.|$)", "collective done", "wait", "hlo_op"),
    # JAX names an instruction after its own primitive where it can, and XLA after its opcode where it cannot.
    Rule(r"^ragged[-_]all[-_]to[-_]all", "ragged all-to-all", "transfer", "hlo_op"),
    Rule(r"^all[-_]to[-_]all", "all-to-all", "transfer", "hlo_op"),
    Rule(r"^all[-_]gather", "all-gather", "transfer", "hlo_op"),
    Rule(r"^(reduce[-_]scatter|psum_scatter)", "reduce-scatter", "transfer", "hlo_op"),
    Rule(rf"^(all[-_]reduce|psum|psum_invariant|pmax|pmin){_PART}", "all-reduce", "transfer", "hlo_op"),
    Rule(r"^(collective[-_]permute|ppermute)", "collective-permute", "transfer", "hlo_op"),
    Rule(r"^(collective[-_]broadcast|pbroadcast)", "collective-broadcast", "transfer", "hlo_op"),
    Rule(r"^(send|recv)(-start)?(\.|$)", "send and receive", "transfer", "hlo_op"),
    Rule(r"nccl\w*AllGather", "all-gather", "transfer"),
    Rule(r"nccl\w*ReduceScatter", "reduce-scatter", "transfer"),
    Rule(r"nccl\w*AllReduce", "all-reduce", "transfer"),
    Rule(r"nccl\w*SendRecv", "send and receive", "transfer"),
    Rule(r"nccl|nvshmem", "NCCL", "transfer"),
    Rule(r"Memcpy ?(P2P|PtoP)", "peer copy", "transfer"),
    Rule(r"Rendezvous|^Wait\b", "rendezvous", "wait"),
    # Before loops and branches: a GPU copies their conditions to the host under their names.
    Rule(r"^Mem(cpy|set)", "memory", "compute"),
    Rule(r"^(while|conditional|cond|call)([.\d]|$|\.clone)", "control flow", "control", "hlo_op"),
    Rule(r"grouped_(rows|outer|gemm)|ragged_dot|m_grouped", "grouped GEMM", "compute"),
    Rule(r"grouped_(rows|outer|gemm)|ragged[-_]dot", "grouped GEMM", "compute", "hlo_op"),
    Rule(r"(copy|add)_rows", "permute", "compute"),
    Rule(r"gated_backward", "SwiGLU", "compute"),
    Rule(r"flash|fmha|sdpa|cudnn::fusion", "attention", "compute"),
    Rule(r"gemm|nvjet|cublas|cutlass|wgmma|splitKreduce", "GEMM", "compute"),
    Rule(r"gemm|^dot|_dot\b|dot_general|_dot_|matmul|cublas", "GEMM", "compute", "hlo_op"),
    Rule(r"radix_?sort|RadixSort|^sort_|stream_executor::cuda::Run<", "sort", "compute"),
    Rule(r"conv(olution|_general)|cudnn", "convolution", "compute", "hlo_op"),
    Rule(r"sort|top[-_]?k", "sort", "compute", "hlo_op"),
    Rule(r"scatter|gather", "gather and scatter", "compute", "hlo_op"),
    Rule(rf"^(wrapped_|loop_|input_)?({_MOVES}[_.\d]*)+(fusion|$)", "copy", "compute", "hlo_op"),
    Rule(r"^copy-(start|done)", "copy", "compute", "hlo_op"),
    # XLA's CPU backend hands matrix products, and what it fuses with them, to a library.
    Rule(r"^(ynn|xnn|onednn)_fusion", "library fusion", "compute", "hlo_op"),
    Rule(r"reduce|reduction|cumsum|cumlogsumexp|argm(ax|in)", "reduction", "compute", "hlo_op"),
    Rule(r"fusion|^wrapped_", "fusion", "compute", "hlo_op"),
    Rule(r"^custom[-_]call|callback|pallas|triton|mosaic", "custom call", "compute", "hlo_op"),
    Rule(r"^rng|^partition-id|^replica-id|random|threefry", "random numbers and ids", "compute", "hlo_op"),
    Rule(
        rf"^(add|subtract|sub|multiply|mul|divide|div|negate|neg|exponential|exp|log|tanh|logistic|sine|cosine|power"
        rf"|maximum|minimum|max|min|compare|select|select_n|convert|convert_element_type|clamp|and|or|not|xor|abs|sqrt"
        rf"|rsqrt|sign|floor|ceil|constant|map){_PART}",
        "elementwise",
        "compute",
        "hlo_op",
    ),
)
"""Programs that XLA compiled, on GPUs and CPUs: the instruction decides before the kernel's name, which for NCCL says
little. Loops, branches and calls have events on CPUs alone, round the events of what they run."""


def classify(trace: Trace, rules: Sequence[Rule]) -> Trace:
    """The trace with the kind and group of every event, from the first rule that matches it.

    Your own rules go in front: ``classify(trace, (Rule(r"^my_kernel", "dispatch", "transfer"), *XLA))``. What no
    rule matches is "unclassified" in kind and group and counts as neither compute nor communication, so look at
    `unclassified_share` before you believe a ratio.

    >>> trace = Trace("", "xplane", (Event(0, "s", 0.0, 2.0, "nvjet_hsh"), Event(0, "s", 3.0, 4.0, "mystery")))
    >>> [(event.kind, event.group) for event in classify(trace, XLA).events]
    [('GEMM', 'compute'), ('unclassified', 'unclassified')]
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    used = tuple(dict.fromkeys(rule.field for rule in rules))
    found: dict[tuple[str, ...], tuple[str, str]] = {}

    def classified(event: Event) -> Event:
        key = tuple(getattr(event, field) for field in used)
        if key not in found:
            texts = dict(zip(used, key, strict=True))
            match = next((rule for pattern, rule in compiled if pattern.search(texts[rule.field])), None)
            found[key] = (match.kind, match.group) if match else ("unclassified", "unclassified")
        kind, group = found[key]
        return dataclasses.replace(event, kind=kind, group=group)

    return dataclasses.replace(trace, events=tuple(map(classified, trace.events)))


def unclassified_share(trace: Trace) -> float:
    """Time of the events that no rule matched, as a share of all events' time; 0 where there is no time at all.

    >>> events = (Event(0, "s", 0.0, 3.0, "a", group="compute"), Event(0, "s", 3.0, 4.0, "mystery"))
    >>> unclassified_share(Trace("", "xplane", events))
    0.25
    """
    total = sum(event.duration for event in trace.events if event.group != "control")
    return sum(event.duration for event in trace.events if event.group == "unclassified") / total if total else 0.0


def unclassified_names(trace: Trace, top: int = 10) -> tuple[tuple[str, float], ...]:
    """What to write rules for: the names that no rule matched and their microseconds, the longest first.

    >>> unclassified_names(Trace("", "xplane", (Event(0, "s", 3.0, 4.0, "mystery"),)))
    (('mystery', 1.0),)
    """
    times: dict[str, float] = {}
    for event in trace.events:
        if event.group == "unclassified":
            name = event.hlo_op or event.name
            times[name] = times.get(name, 0.0) + event.duration
    return tuple(sorted(times.items(), key=lambda item: -item[1])[:top])
