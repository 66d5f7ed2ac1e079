"""What single kernels of this library reach of a chip's best, as measured: `PROGRAMS` is what plans assume.

A share is of the data sheet of the chip that a kernel was measured on, an H100 or an H200, and stands for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jaxpipe.planning.chips import Achieved, KernelShare

# Tiles of attention's kernels meet all keys in one loop. Two lengths give share and fill: 2,048 tokens in the step of
# moe-1b on an H200 and 4,096 in a layer of DeepSeek-V3 on an H100 (docs/measured/gpus.md, "Where the step's time goes"
# and "An overlapped pair"), both at clocks above those of products without a pause, by 1.17 and 1.2.
_ATTENTION = {"fwd": KernelShare(matmul=0.524, fill=363), "bwd": KernelShare(matmul=0.399, fill=284)}

KERNELS: Mapping[str, KernelShare] = MappingProxyType(
    {
        "attention_forward": _ATTENTION["fwd"],
        "attention_backward": _ATTENTION["bwd"],
        "dot_product_attention_fwd_wrapper": _ATTENTION["fwd"],
        "dot_product_attention_bwd_wrapper": _ATTENTION["bwd"],
        # The profile of a step of moe-1b on an H200, docs/measured/gpus.md, "Where the step's time goes".
        "beside_attention_backward": KernelShare(memory=0.45),
        "pad": KernelShare(memory=0.31),
        # Rows of 1,024 and 2,048 numbers there: a tile of the former takes as long as 190 more numbers would.
        "grouped_rows": KernelShare(fill=190),
        "grouped_outer": KernelShare(fill=190),
        # Beside products in bfloat16 on an H200, as those of whole steps are, and of uneven groups, as routers make
        # them: docs/measured/fp8.md, "Products". Rows of 2,048, 4,096 and 7,168 numbers; groups of 1,024 and 4,096
        # rows, summed in float32.
        "scaled_rows": KernelShare(matmul=0.628, fill=370),
        "scaled_outer": KernelShare(matmul=0.40, fill=463),
        # Casts on an H200, docs/measured/fp8.md, "Casts".
        "quantise_rows": KernelShare(memory=0.76),
        "quantise": KernelShare(memory=0.70),
        "columns_of": KernelShare(memory=0.59),
        "scaled_gate": KernelShare(memory=0.64),
        "scaled_gate_backward": KernelShare(memory=0.35),
        "quantise_weights": KernelShare(memory=0.72),
        # Rows and gates on an H100, docs/measured/experts.md, "The whole layer".
        "copy_rows": KernelShare(memory=0.78),
        "add_rows": KernelShare(memory=0.90),
        "gated_backward": KernelShare(memory=0.81),
    }
)
"""By the name of the kernel."""

PROGRAMS = Achieved(
    # Plain products of 8,192 x 8,192 x 8,192 without a pause: 702, 709 and 677 TFLOP/s, docs/measured/fp8.md.
    matmul=0.70,
    # The same library's products in a step of moe-1b: 827 TFLOP/s where all products take 70% of the time, in FP8's
    # step 870 where they take 59%; the fastest of them, while the chip was cool, 875.
    relief=0.27,
    most_clock=1.25,
    # XLA's elementwise kernels there: sums of float32 and the optimizer 4.05 to 4.4 TB/s, bfloat16 3.0 to 3.7.
    memory=0.88,
    narrow=0.70,
    # Kernels of a few numbers take 1.2 us there, and the gap behind each 0.7.
    kernel_us=2.0,
    # Products of 17 to 1,100 GFLOP there lie on a line of time over FLOPs that begins at 6.5 us.
    product_us=6.5,
    # From the call to the first kernel 4.9 ms, from the last one to the result 0.9, there.
    step_us=5800,
    # Four profiles of a rank of DeepSeek-V3 alone, some 8,000 conditions a step: nothing runs for 23 to 28 us at each,
    # beside the gaps behind kernels (docs/measured/gpus.md, "One rank of sixteen of DeepSeek-V3").
    read_us=25,
    occupied=20 / 132,
    kernels=dict(KERNELS),
)
"""The shares of a chip's best that the kernels of whole steps reach, on H200s; see docs/measured/gpus.md.

Collectives beside kernels take 20 of 132 multiprocessors, as in DeepSeek's training (arXiv 2412.19437, 3.2.2).
"""
