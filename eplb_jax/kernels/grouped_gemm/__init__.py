"""Grouped GEMM, the matrix products of a mixture-of-experts layer: each group of rows times the matrix of its expert.

`interface` has `grouped_matmul`, with checks and gradients. `xla` and `mosaic` each have ``matmul`` and ``outer``, the
products that the forward and the backward pass are made of; internal.
"""
