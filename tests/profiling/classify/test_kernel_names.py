"""A kernel's name is its function's; labels tell kernels apart and stay short."""

import random

import pytest

from profiling.classify.classifier import KERNELS, Classifier
from profiling.classify.names import KernelName, kernel_label, kernel_labels, parse_kernel

COPY = "at::native::direct_copy_kernel_cuda(at::TensorIterator&)::{lambda()#3}::operator()() const::{lambda(float)#1}"
FUNCTIONS = [
    ("void at::native::elementwise_kernel<128, 2, my::nccl_functor<float> >(int)", "at::native::elementwise_kernel"),
    (f"void at::native::unrolled_elementwise_kernel<{COPY}, at::detail::Array<char*, 2> >(int, {COPY})",
     "at::native::unrolled_elementwise_kernel"),
    ("void (anonymous namespace)::two_shot_all_reduce_kernel<c10::BFloat16, 16>(c10::BFloat16*)",
     "two_shot_all_reduce_kernel"),
    ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8>(float*)", "at::native::cunn_SoftMaxForward"),
    ("void <unnamed>::softmax_warp_forward<float, 9>(float*)", "softmax_warp_forward"),
    ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, float>(cublasGemvParams<int>)",
     "internal::gemvx::kernel"),
    ("void f<(E)2, (A > 3)>::g<int>(int)", "f::g"),
    ("void f<&(x->y)>(int)", "f"),
    ("outer(int)::{lambda(int)#1}::operator()(int) const", "outer::lambda::operator~"),
    ("void less<std::operator< <int>, 3>::run(int)", "less::run"),
    ("unsigned long* counter::next<int>()", "counter::next"),
    ("void cut::short_kernel<cutlass::gemm::GemmUniversal<cute::tuple<int, ", "cut::short_kernel"),
    ("void kernel_of<int>(int) [clone .constprop.0]", "kernel_of"),
    ("void bare", "bare"),
    ("Memcpy PtoP (Device -> Device)", "Memcpy PtoP (Device -> Device)"),
    ("triton_per_fused_all_reduce_mean_3", "triton_per_fused_all_reduce_mean_3"),
    ("Cijk_Ailk_Bljk_HHS_BH_MT64x64x32_SE.kd", "Cijk_Ailk_Bljk_HHS_BH_MT64x64x32_SE"),
    ("", ""),
    ("<<<", "<<<"),
    # By the Itanium C++ ABI: names with their lengths before them, nested ones between N and E.
    ("_ZN5aiter28fmha_fwd_hd128_bf16_rtz_kernE", "aiter::fmha_fwd_hd128_bf16_rtz_kern"),
    ("_ZN7deep_ep9intranode7combineI13__nv_bfloat16Li8ELi768EEEvP4int4Pf", "deep_ep::intranode::combine"),
    ("_ZN12_GLOBAL__N_126two_shot_all_reduce_kernelIN3c108BFloat16ELi16EEEvPT_", "two_shot_all_reduce_kernel"),
    ("_ZN2at6native18elementwise_kernelILi128ELi2EZNS0_15gpu_kernel_implIN4nccl3addEEEvvEEEvi",
     "at::native::elementwise_kernel"),
    ("_Z26cross_device_reduce_1stageIfLi8EEvP8RankData", "cross_device_reduce_1stage"),
    ("_ZL11plain_localPf", "plain_local"),
    ("_ZN4cut_5short9kern", "cut_::short::kern"),
    ("_Z", "_Z"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_function_of_a_name(name, function):
    assert parse_kernel(name).function == function


def test_arguments_are_those_of_the_function():
    assert parse_kernel("void ns<int>::kernel<4, f<float> >(g<double>)").arguments.strip() == "4, f<float>"
    assert parse_kernel("_ZN2ck6kernelINS_14GridwiseGemm_xILi64EfE4TypeEEEvPT_").arguments == "GridwiseGemm_x, Type"
    assert parse_kernel("nvjet_tst_128x256_64x4") == KernelName("nvjet_tst_128x256_64x4", "")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (f"void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<{COPY}>(int)",
         "elementwise_kernel<direct_copy_kernel_cuda>"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, "
         "at::native::sum_functor<float, float, float>::operator()(at::TensorIterator&)::{lambda(float, float)#1}>, "
         "unsigned int, float, 4> >(int)", "reduce_kernel<sum_functor>"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
         "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float> >(int)",
         "multi_tensor_apply_kernel<FusedAdamMathFunctor>"),
        ("cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x64_nn>(int)", "cutlass_80_tensorop_s1688gemm_128x64_nn"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>, "
         "cutlass::gemm::collective::CollectiveMma<cutlass::gemm::MainloopSm90TmaGmma<7, cute::tuple<cute::C<2>, "
         "cute::C<1>, cute::C<1> >, P>, cute::tuple<cute::C<128>, cute::C<256>, cute::C<64> >, float> > >(int)",
         "GemmUniversal<128x256x64, MainloopSm90TmaGmma>"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<int> > >(int)", "FlashAttnFwdSm90"),
        ("void cutlass::device_kernel<ns::m_grouped_fp8::GemmKernel>(int)", "m_grouped_fp8::GemmKernel"),
        ("Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT320x224x64_MI16x16x1_SN_LDSB0",
         "Cijk_Alik_Bljk_BBS MT320x224x64"),
    ],
)  # fmt: skip
def test_label_names_what_tells(name, label):
    assert kernel_label(name) == label


def test_labels_are_short_and_keep_the_end():
    name = "triton_poi_fused_" + "_".join(["add"] * 40) + "_17"
    assert len(kernel_label(name)) == 60 and kernel_label(name).endswith("_17")
    assert len(kernel_label(name, most=20)) == 20
    with pytest.raises(ValueError, match="fewer than 8 characters"):
        kernel_label("gemm", most=3)


def test_labels_of_several_kernels_differ():
    names = [f"void at::native::vectorized_elementwise_kernel<{n}, Add<{t}> >(int)" for n in (2, 4) for t in "ab"]
    names += ["x" * 70, "x" * 71, "y"]
    labels = kernel_labels([*names, *names])
    assert list(labels) == names
    assert len(set(labels.values())) == len(names)
    assert all(len(label) <= 60 for label in labels.values())
    assert labels["y"] == "y"
    assert labels[names[0]].endswith("<Add> 2 a")


def test_any_text_is_a_name():
    """Names in a damaged trace are whatever they are: parsed, labelled and classified, never an error."""
    pieces = ["<", ">", "(", ")", "{", "}", "[", "]", "::", "operator", "_ZN", "I", "E", "L", "S_", "T_", "12", "99999"]
    pieces += [
        "(anonymous namespace)",
        "nccl",
        "void ",
        " ",
        "~",
        "->",
        "decltype",
        "\u00e9",
        "\ud800",
        "\0",
        "gemm",
        "X",
    ]
    chosen = random.Random(0)
    names = ["".join(chosen.choices(pieces, k=chosen.randrange(30))) for _ in range(3000)]
    names += ["_ZN" + "1aINS_" * 5000, "f<" * 20_000, "gemm" * 20_000, "{" * 20_000, "operator" * 5000]
    classifier = Classifier(KERNELS)
    for name in names:
        assert len(kernel_label(name)) <= 60
        assert classifier(name)[1] in ("compute", "transfer", "wait")
    assert len(set(kernel_labels(names[:500]).values())) == len(set(names[:500]))
