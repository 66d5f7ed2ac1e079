"""What single kernels of this library reach of a chip's best, as measured: `PROGRAMS` is what plans assume.

A share is of the data sheet of the chip that a kernel was measured on, an H100 or an H200, and stands for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jaxpipe.planning.chips import Achieved, KernelShare

KERNELS: Mapping[str, KernelShare] = MappingProxyType(
    {
        # A layer of DeepSeek-V3 with 4,096 tokens on an H100, docs/measured/gpus.md, "An overlapped pair".
        "attention_forward": KernelShare(matmul=0.524, fill=363),
        "attention_backward": KernelShare(matmul=0.399, fill=284),
        "beside_attention": KernelShare(memory=0.45),
        "pad": KernelShare(memory=0.31),
        "grouped_rows": KernelShare(fill=190),
        "grouped_outer": KernelShare(fill=190),
        # The profile of an MoE layer on an H200, docs/measured/fp8.md, "Layers".
        "scaled_rows": KernelShare(matmul=0.70, fill=560),
        "scaled_outer": KernelShare(matmul=0.46, fill=380),
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

PROGRAMS = Achieved(matmul=0.70, relief=0.27, most_clock=1.25, memory=0.88, narrow=0.7, kernel_us=2.0, product_us=6.5, step_us=5800, occupied=20 / 132, kernels=dict(KERNELS))
"""The shares of a chip's best that the kernels of whole steps reach, on H200s; see docs/measured/gpus.md.

Collectives beside kernels take 20 of 132 multiprocessors, as in DeepSeek's training (arXiv 2412.19437, 3.2.2).
"""
