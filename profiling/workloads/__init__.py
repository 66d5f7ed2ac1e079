"""DeepSeek's three published workloads as JAX programs: training, prefill, decode. Internal."""

from profiling.workloads.sizes import SIZES, Sizes

__all__ = ["SIZES", "Sizes"]
