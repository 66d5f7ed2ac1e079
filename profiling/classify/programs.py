"""The tables of rules for programs with DeepSeek's kernels and for programs that XLA compiled."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from profiling.classify.communication import COMMUNICATION
from profiling.classify.compute import COMPUTE, INDUCTOR
from profiling.classify.names import parse_kernel
from profiling.classify.rules import Rule

KERNELS: tuple[Rule, ...] = (*INDUCTOR, *COMMUNICATION, *COMPUTE)
"""Rules for kernels of any framework, on GPUs of NVIDIA and AMD."""

DEEPSEEK: tuple[Rule, ...] = (
    *INDUCTOR,
    *COMMUNICATION,
    *(
        Rule(pattern, kind, "compute", "kernel")
        for pattern, kind in (
            (r"m_grouped", "grouped GEMM"),
            (r"fp8_dptp128c_acc", "weight-gradient GEMM"),
            (r"fp8_ptp128c|deep_gemm|fp8_gemm", "dense GEMM"),
            (r"flash(?!infer)|fmha|mla_|cudnn::fusion", "attention"),
            # Before SwiGLU: where one kernel does both, the cast decides what it reads and writes.
            (r"[_:]cast_|(^|[:_])transpose$|_transpose\b", "fp8 cast"),
            (r"reduce_fused|expand_to_fused|get_fused_mapping|count_expert", "permute"),
            (r"swiglu", "SwiGLU"),
            (r"layer_norm|rms_?norm", "RMSNorm"),
            (r"rotary|^_copy_tensor_kernel", "rope"),
            (r"topk|topK|aux_fi|unique_group|_scatter_gather", "router"),
            (r"gemm_bf16|xmma_gemm|cublas|nvjet", "cuBLAS GEMM"),
            (r"^Mem(cpy|set)", "memory"),
            (r"at::native|elementwise_kernel|fill_tensormaps", "elementwise"),
        )
    ),
    *COMPUTE,
)
"""Rules for programs with DeepSeek's kernels (DeepEP, DeepGEMM, flash attention), in the words of its traces."""

_MOVES = r"(copy|transpose|bitcast|slice|dynamic-slice|dynamic-update-slice|concatenate|pad|reshape|iota|broadcast)"
_PART = r"(-start|\.|-|_|$)"

_ELEMENTWISE = (
    # What both call so, then JAX's primitives, then XLA's opcodes.
    r"and|or|not|xor|abs|sqrt|rsqrt|cbrt|sign|floor|ceil|map|tan|tanh|sinh|cosh|atan2|logistic|clamp|real|imag|complex"
    r"|erf|constant"
    r"|add|add_any|sub|mul|div|rem|neg|exp|exp2|expm1|log|log1p|sin|cos|asin|acos|atan|asinh|acosh|atanh|pow|integer_pow"
    r"|square|max|min|lt|le|gt|ge|eq|ne|lt_to|le_to|eq_to|select_n|convert_element_type|round|is_finite|nextafter|erfc"
    r"|erf_inv|lgamma|digamma|igamma|igammac|polygamma|regularized_incomplete_beta|bessel_i[01]e|population_count|clz|conj"
    r"|shift_left|shift_right_logical|shift_right_arithmetic"
    r"|subtract|multiply|divide|remainder|negate|exponential(-minus-one)?|log-plus-one|sine|cosine|power|maximum|minimum"
    r"|compare|select|convert|round-nearest-(even|afz)|is-finite|popcnt|count-leading-zeros"
    r"|shift-(left|right-(logical|arithmetic))"
)
"""Instructions that compute each number of others at its place."""

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
    Rule(r"Rendezvous|^Wait\b", "rendezvous", "wait"),
    Rule(r"^async[-_]collective[-_]start", "collective", "transfer", "hlo_op"),
    *INDUCTOR,
    *COMMUNICATION,
    # Before loops and branches: a GPU copies their conditions to the host under their names.
    Rule(r"^Mem(cpy|set)", "memory", "compute"),
    Rule(r"^(while|conditional|cond|call)([.\d]|$|\.clone)", "control flow", "control", "hlo_op"),
    Rule(r"grouped_(rows|outer|gemm)|ragged_dot|m_grouped", "grouped GEMM", "compute", "kernel"),
    Rule(r"grouped_(rows|outer|gemm)|ragged[-_]dot", "grouped GEMM", "compute", "hlo_op"),
    # Products of numbers of 8 bits, grouped and dense, before them what makes these numbers.
    Rule(r"^scaled_(rows|outer)", "FP8 GEMM", "compute", "kernel"),
    Rule(r"^(quantise|columns_of)", "quantization", "compute", "kernel"),
    Rule(r"(copy|add)_rows", "permute", "compute", "kernel"),
    Rule(r"gated_backward|^scaled_gate", "SwiGLU", "compute", "kernel"),
    Rule(r"^latent_attention|flash|fmha|sdpa|cudnn::fusion", "attention", "compute", "kernel"),
    Rule(r"gemm|nvjet|cublas|cutlass|wgmma|splitKreduce", "GEMM", "compute", "kernel"),
    Rule(r"gemm|^dot|_dot\b|dot_general|_dot_|matmul|cublas", "GEMM", "compute", "hlo_op"),
    Rule(r"radix_?sort|RadixSort|^sort_|stream_executor::cuda::Run<", "sort", "compute"),
    Rule(r"conv(olution|_general)|cudnn", "convolution", "compute", "hlo_op"),
    Rule(r"sort|top[-_]?k", "sort", "compute", "hlo_op"),
    Rule(r"scatter|gather", "gather and scatter", "compute", "hlo_op"),
    Rule(rf"^(wrapped_|loop_|input_)?({_MOVES}[_.\d]*)+(fusion|$)", "copy", "compute", "hlo_op"),
    Rule(r"^copy-(start|done)", "copy", "compute", "hlo_op"),
    # XLA's CPU backend hands matrix products, and what it fuses with them, to a library.
    Rule(r"^(ynn|xnn|onednn)_fusion", "library fusion", "compute", "hlo_op"),
    Rule(rf"^reduce[-_]precision{_PART}", "elementwise", "compute", "hlo_op"),
    Rule(r"reduce|reduction|cumsum|cumlogsumexp|argm(ax|in)", "reduction", "compute", "hlo_op"),
    Rule(r"fusion|^wrapped_", "fusion", "compute", "hlo_op"),
    Rule(r"^rng|^partition-id|^replica-id|random|threefry", "random numbers and ids", "compute", "hlo_op"),
    Rule(rf"^({_ELEMENTWISE}){_PART}", "elementwise", "compute", "hlo_op"),
    *COMPUTE,
    # Calls that a library registered are instructions with names of their own.
    *(dataclasses.replace(rule, field="hlo_op") for rule in COMPUTE),
    Rule(r"^custom[-_]call|callback|pallas|triton|mosaic", "custom call", "compute", "hlo_op"),
)
"""Rules for programs that XLA compiled, on GPUs and CPUs. The instruction decides before the kernel's name, which often
says less. Loops, branches and calls have events only on CPUs, around the events of what they run."""

_DEEPSEEK = re.compile(r"(^|::)(deep_ep|deep_gemm|dpsk)::|(^|::)ep::(internode|intranode)|(^|::)fp8_gemm_kernel$")


def rules_for(names: Iterable[str]) -> tuple[Rule, ...]:
    """The rules for a trace of PyTorch with kernels of these names: DeepSeek's only if its kernels ran.

    >>> rules_for(["ampere_sgemm_128x64_tn", "void my::kernel<deep_ep::Buffer>(int)"]) is KERNELS
    True
    >>> rules_for(["void deep_ep::intranode::combine<int, 8>(int4*)"]) is DEEPSEEK
    True
    """
    return DEEPSEEK if any(_DEEPSEEK.search(parse_kernel(name).kernel) for name in set(names)) else KERNELS
