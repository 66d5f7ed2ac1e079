"""Products of numbers of 8 bits with scales, grouped and dense: `interface`, XLA's form, Mosaic's kernels. Internal."""
