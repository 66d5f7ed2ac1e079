"""Grouped GEMM, the matrix products of a mixture-of-experts layer: each group of rows times the matrix of its expert.

`grouped_matmul` chooses between two backends, ``xla`` for every platform and ``mosaic`` for Hopper GPUs; each has
``matmul`` and ``outer``, the products that the forward and the backward pass are made of.
"""

from eplb_jax.kernels.grouped_gemm import mosaic as mosaic
from eplb_jax.kernels.grouped_gemm import xla as xla
from eplb_jax.kernels.grouped_gemm.interface import Backend as Backend
from eplb_jax.kernels.grouped_gemm.interface import grouped_matmul as grouped_matmul
from eplb_jax.kernels.grouped_gemm.layout import ALIGN as ALIGN
from eplb_jax.kernels.grouped_gemm.layout import group_starts as group_starts
