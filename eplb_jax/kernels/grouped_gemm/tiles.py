"""Which division of the work is fastest, as measured by ``examples/benchmarks/grouped_gemm.py --sweep``."""

from __future__ import annotations

import dataclasses

from eplb_jax.kernels.grouped_gemm.ring import Tile

SMALLEST = 128
"""Fewest columns of any operand that the kernels take."""

TABLE = {
    "matmul": {
        192: Tile(64, 128, 64, 8, "n", 1, 8),
        2**31: Tile(128, 256, 64, 4, "n", 1, 8, 2),
    },
    "outer": {2**31: Tile(256, 128, 64, 4, "m", 2, 4)},
    "added_outer": {2**31: Tile(128, 128, 64, 6, "tiles", 2, 8)},
}
"""For each product: up to how many rows a group on average, the tile.

Reading the matrices takes most of the time for groups of few rows, arithmetic for large ones. Low tiles waste least of
uneven groups; wide ones read least from the L2 cache. Measured on H100s: up to 136 rows, 1024 and 4096; "added_outer"
on an H200, by examples/benchmarks/added_gradients.py.
"""


def tile_for(kind: str, num_rows: int, groups: int, height: int, columns: int) -> Tile:
    """The measured tile, made small enough for a result with few rows or columns.

    Args:
      kind: a key of `TABLE`.
      num_rows: rows of lhs, between all groups.
      groups: how many groups there are.
      height: rows of the result, or of each result.
      columns: columns of the result.

    >>> tile_for("outer", 4096, 8, 1024, 128)
    Tile(m=256, n=128, k=64, stages=4, split='m', cluster=1, width=4, cut=0)
    """
    mean = num_rows / groups
    tile = next(tile for most, tile in TABLE[kind].items() if mean <= most)
    if height < tile.m:
        tile = next(iter(TABLE[kind].values())) if kind == "matmul" else dataclasses.replace(tile, m=SMALLEST)
    if columns < tile.n:
        tile = dataclasses.replace(tile, n=SMALLEST)
    return dataclasses.replace(tile, cluster=1) if columns < tile.n * tile.cluster else tile
