"""Rules: the first that matches counts, what none matches stays visible."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from profiling.classify.classifier import (
    DEEPSEEK,
    KERNELS,
    OTHER,
    XLA,
    Rule,
    classify,
    rules_for,
    unclassified_names,
    unclassified_share,
)
from profiling.event import Collective, Event, Trace

KNOWN = [
    line.split("\t")
    for line in (pathlib.Path(__file__).parents[1] / "data" / "kernels.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def kind(rules, name, hlo_op=""):
    event = classify(Trace("", "xplane", (Event(0, "s", 0.0, 1.0, name, hlo_op=hlo_op),)), rules).events[0]
    return event.kind, event.group


@pytest.mark.parametrize(("name", "group", "expected"), KNOWN)
def test_kernels_of_everyone(name, group, expected):
    assert kind(KERNELS, name) == (expected, group)
    assert kind(XLA, name)[1] == kind(DEEPSEEK, name)[1] == group


@pytest.mark.parametrize("wrapper", ["cutlass::Kernel2", "cutlass::device_kernel", "at::native::reduce_kernel", "f::g"])
@pytest.mark.parametrize("inside", [name for name, group, _ in KNOWN if group != "compute" and " " not in name])
def test_a_template_argument_is_no_communication(wrapper, inside):
    assert kind(KERNELS, f"void {wrapper}<{inside.partition('(')[0]}, 4>(int)")[1] == "compute"


def test_words_of_deepseek_only_where_its_kernels_ran():
    gemm, norm = "nvjet_sm90_tst_256x128_64x4", "void layer_norm::ln_fwd_kernel<int>(int)"
    assert rules_for([gemm, norm, "void f::kernel<deep_ep::internode::Meta>(deep_ep::internode::Meta)"]) is KERNELS
    assert rules_for([gemm, norm, "void deep_gemm::fp8_gemm_kernel<7168u>(float*)"]) is DEEPSEEK
    assert kind(KERNELS, gemm)[0] == "GEMM" and kind(DEEPSEEK, gemm)[0] == "cuBLAS GEMM"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void deep_ep::internode::dispatch<false>(int4*)", ("dispatch", "transfer")),
        ("void deep_ep::intranode::combine<__nv_bfloat16, 8>(int4*)", ("combine", "transfer")),
        ("void deep_ep::internode_ll::dispatch<true>(void*)", ("dispatch", "transfer")),
        ("void deep_ep::intranode::notify_dispatch<8>(int const*)", ("barrier", "wait")),
        ("void deep_ep::intranode::cached_notify_combine<8>(void**)", ("barrier", "wait")),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", ("all-reduce", "transfer")),
        ("void swiglu_and_per_channel_cast_and_transpose<256>(void const*)", ("fp8 cast", "compute")),
        ("void swiglu_backward<__nv_bfloat16>(void const*)", ("SwiGLU", "compute")),
        ("Memcpy DtoD (Device -> Device)", ("memory", "compute")),
        ("Memcpy PtoP (Device -> Device)", ("peer copy", "transfer")),
        ("void at::native::elementwise_kernel<128, 4, gpu_kernel_impl_nocast<silu>>", ("elementwise", "compute")),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)", ("attention", "compute")),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", ("cuBLAS GEMM", "compute")),
        ("something_new", (OTHER, "compute")),
    ],
)
def test_kernels_of_deepseek(name, expected):
    assert kind(DEEPSEEK, name) == expected


@pytest.mark.parametrize(
    ("hlo_op", "name", "expected"),
    [
        ("all-to-all-start.1", "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", ("all-to-all", "transfer")),
        ("all-to-all-done.1", "", ("collective done", "wait")),
        ("ragged-all-to-all.2", "", ("ragged all-to-all", "transfer")),
        ("ppermute.6", "", ("collective-permute", "transfer")),
        ("psum.10", "", ("all-reduce", "transfer")),
        ("async-collective-start.2", "", ("collective", "transfer")),
        ("te_fused_attn_forward_ffi.10", "unheard_of", ("attention", "compute")),
        ("custom-call.8", "ncclDevKernel_Generic(ncclDevKernelArgsStorage<4096ul>)", ("collective", "transfer")),
        ("psum_scatter.3", "", ("reduce-scatter", "transfer")),
        ("reduce_scatter.7", "", ("reduce-scatter", "transfer")),
        ("all_gather.7", "", ("all-gather", "transfer")),
        ("recv.2", "", ("send and receive", "transfer")),
        ("", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", ("all-gather", "transfer")),
        ("", "Rendezvous", ("rendezvous", "wait")),
        ("", "Wait: pending_threads=1/4", ("rendezvous", "wait")),
        ("while.14", "while.14", ("control flow", "control")),
        ("conditional.clone.3", "conditional.clone.3", ("control flow", "control")),
        ("while.14", "MemcpyD2H", ("memory", "compute")),
        ("custom-call.4", "nvjet_hsh_128x256_64x4", ("GEMM", "compute")),
        ("gemm_fusion_dot_general.2", "gemm_fusion_dot_general_2", ("GEMM", "compute")),
        ("mpmd_map.1", "grouped_rows_mosaic_gpu_kernel", ("grouped GEMM", "compute")),
        ("mpmd_map.2", "copy_rows_mosaic_gpu_kernel", ("permute", "compute")),
        ("mpmd_map.3", "scaled_rows_mosaic_gpu_kernel", ("FP8 GEMM", "compute")),
        ("mpmd_map.4", "scaled_outer_mosaic_gpu_kernel", ("FP8 GEMM", "compute")),
        ("mpmd_map.5", "quantise_weights_mosaic_gpu_kernel", ("quantization", "compute")),
        ("mpmd_map.6", "columns_of_mosaic_gpu_kernel", ("quantization", "compute")),
        ("mpmd_map.7", "scaled_gate_backward_mosaic_gpu_kernel", ("SwiGLU", "compute")),
        ("mpmd_map.3", "add_rows_mosaic_gpu_kernel", ("permute", "compute")),
        ("mpmd_map.4", "gated_backward_mosaic_gpu_kernel", ("SwiGLU", "compute")),
        ("mpmd_map.5", "latent_attention_mosaic_gpu_kernel", ("attention", "compute")),
        ("dot_product_attention_fwd.4", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop", ("attention", "compute")),
        ("custom-call.1", "void stream_executor::cuda::Run<8ul, float, unsigned int>(float*)", ("sort", "compute")),
        ("custom-call.3", "void cub::detail::radix_sort::DeviceRadixSortHistogramKernel", ("sort", "compute")),
        ("fusion.3", "sort_14_1", ("sort", "compute")),
        ("cond.3.clone", "MemcpyD2H", ("memory", "compute")),
        ("sort.24", "sort.24", ("sort", "compute")),
        ("wrapped_scatter", "wrapped_scatter", ("gather and scatter", "compute")),
        ("bitcast_dynamic-update-slice_fusion", "", ("copy", "compute")),
        ("copy-start.1", "", ("copy", "compute")),
        ("broadcast_add_fusion", "", ("fusion", "compute")),
        ("input_reduce_fusion.2", "", ("reduction", "compute")),
        ("custom-call", "custom-call", ("custom call", "compute")),
        ("add.3", "add.3", ("elementwise", "compute")),
        ("mystery.3", "mystery.3", (OTHER, "compute")),
    ],
)
def test_operations_of_xla(hlo_op, name, expected):
    assert kind(XLA, name, hlo_op) == expected


def instructions(text):
    """Names of the instructions that run by themselves: those of the entry, of loops and of branches."""
    called = re.findall(r"(?:body|condition)=%?([\w.-]+)", text)
    called += [
        name for names in re.findall(r"branch_computations=\{([^}]*)\}", text) for name in re.findall(r"[\w.-]+", names)
    ]
    found, inside = [], False
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            inside = bool(header[1]) or header[2] in called
        elif inside and (instruction := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*?([\w-]+)\(", line)):
            found.append(instruction.groups())
    without_work = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
    return [name for name, opcode in found if opcode not in without_work]


FLOATS = """abs acos acosh asin asinh atan atanh cbrt ceil cos cosh digamma erf erfc erf_inv exp exp2 expm1 floor
    is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square tan tanh add atan2 div eq ge gt le lt
    max min mul ne nextafter pow rem sub igamma clamp complex"""
INTEGERS = """bitwise_and bitwise_or bitwise_xor bitwise_not shift_left shift_right_logical shift_right_arithmetic
    population_count clz"""
COMPLEX = "real imag conj"


@pytest.mark.parametrize(
    "names", [(FLOATS, "float32"), (INTEGERS, "int32"), (COMPLEX, "complex64")], ids=lambda n: n[1]
)
def test_functions_of_single_numbers_are_elementwise(names):
    """XLA leaves an instruction by itself under the name of JAX's primitive."""
    x = jnp.ones(3, names[1])
    for name in names[0].split():
        traced = None
        for count in (1, 2, 3):
            try:
                traced = jax.make_jaxpr(getattr(jax.lax, name))(*[x] * count)
            except TypeError:  # it takes more
                continue
            break
        assert traced is not None, name
        instruction = f"{traced.eqns[-1].primitive.name}.7"
        assert kind(XLA, instruction, instruction) == ("elementwise", "compute"), name


def test_every_instruction_of_a_compiled_step_is_known():
    """Names are the compiler's, so they are taken from it: what runs on this CPU has no unclassified instruction."""
    mesh = jax.make_mesh((2, 4), ("pp", "ep"), axis_types=(AxisType.Auto,) * 2)

    def body(x, w):
        def layer(carry, step):
            rows = jax.lax.all_to_all(carry.reshape(4, -1, 8), "ep", 0, 0, tiled=True).reshape(carry.shape)
            rows = jax.lax.switch(step % 2, [lambda r: jnp.sort(r, -1), lambda r: jnp.sin(r) @ w], jnp.tanh(rows @ w))
            return jax.lax.ppermute(rows, "pp", [(0, 1), (1, 0)]), jax.lax.psum(rows.sum(), "ep")

        rows, sums = jax.lax.scan(layer, x, jnp.arange(4))
        gathered = jax.lax.all_gather(rows, "ep").sum(0)
        return jax.lax.top_k(gathered, 4)[0] + jax.lax.psum_scatter(gathered, "ep", tiled=True).sum() + sums.sum()

    specs = PartitionSpec(("pp", "ep"))
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs, PartitionSpec()), out_specs=specs, check_vma=False))
    text = step.lower(jnp.ones((64, 8)), jnp.ones((8, 8))).compile().as_text()
    assert text
    events = tuple(Event(0, "s", 0.0, 1.0, name, hlo_op=name) for name in instructions(text))
    trace = classify(Trace("", "xplane", events), XLA)
    kinds = {event.kind for event in trace.events}
    assert {"all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "control flow"} <= kinds
    assert unclassified_names(trace) == ()


def test_the_profiler_knows_a_collective_whose_kernel_nobody_does():
    told = Collective("all-reduce", ranks=(0, 1))
    names = ("a_vendors_kernel", "ampere_sgemm_128x64_tn")
    trace = Trace("", "kineto", tuple(Event(0, "s", 0.0, 1.0, name, collective=told) for name in names))
    assert [(event.kind, event.group) for event in classify(trace, KERNELS).events] == [
        ("all-reduce", "transfer"),
        ("GEMM", "compute"),
    ]


def test_own_rules_go_in_front():
    rules = (Rule(r"gemm", "mine", "transfer"), Rule(r"^decode/", "decode", "compute", "scope"), *XLA)
    assert kind(rules, "gemm_kernel") == ("mine", "transfer")
    event = Event(0, "s", 0.0, 1.0, "mystery", scope="decode/x")
    assert classify(Trace("", "xplane", (event,)), rules).events[0].kind == "decode"


def test_classification_starts_afresh():
    event = Event(0, "s", 0.0, 1.0, "mystery", kind="GEMM", group="compute")
    assert classify(Trace("", "xplane", (event,)), XLA).events[0].kind == OTHER


def test_what_is_unknown_is_shown():
    events = [Event(0, "s", 0.0, 6.0, "nvjet_1"), Event(0, "s", 6.0, 7.0, "one"), Event(0, "s", 7.0, 8.0, "one")]
    events += [
        Event(0, "s", 8.0, 10.0, "kernel", hlo_op="two.1"),
        Event(0, "s", 0.0, 90.0, "while.1", hlo_op="while.1"),
    ]
    trace = classify(Trace("", "xplane", tuple(events)), XLA)
    assert unclassified_share(trace) == 0.4
    assert unclassified_names(trace) == (("one", 2.0), ("two.1", 2.0))
    assert unclassified_names(trace, top=1) == (("one", 2.0),)
    assert unclassified_share(Trace("", "xplane", ())) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "b", "communication"), "group='communication'.: choose one of compute, transfer"),
        (("a", "b", "wait", "stream"), "field='stream'.: choose one of name, function, kernel, hlo_op"),
        (("(", "b", "wait"), "no regular expression"),
    ],
)
def test_rules_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(*arguments)
