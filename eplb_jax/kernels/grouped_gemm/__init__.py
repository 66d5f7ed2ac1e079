"""Grouped GEMM, each group of rows times its expert's matrix: `interface`, XLA's form, Mosaic's kernels. Internal."""
