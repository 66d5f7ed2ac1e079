"""Attention of one token of each request over its cache of latents: `interface`, XLA's form, Mosaic's. Internal."""
