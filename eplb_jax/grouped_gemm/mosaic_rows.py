"""The grouped product of rows and matrices on Hopper GPUs: the forward pass, and the gradient of the rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from eplb_jax.grouped_gemm import ring
from eplb_jax.grouped_gemm.layout import round_up
from eplb_jax.grouped_gemm.ring import CONSUMERS, Tile


def row_tiles(group_sizes: jax.Array, num_rows: int, height: int) -> tuple[jax.Array, ...]:
    """The row tiles of all groups, one group after the other, each from the group's first row on.

    Args:
      group_sizes: rows of each group; int32.
      num_rows: rows altogether, which bound the number of tiles.
      height: rows of a tile.

    Returns:
      Of each tile its group, its first row, and how many of its rows the group has; of each group its first tile.

    >>> [x.tolist() for x in row_tiles(jnp.array([65, 0, 3]), 80, 64)]
    [[0, 0, 2, 0], [0, 64, 72, 0], [64, 1, 3, 0], [0, 2, 2]]
    """
    # XLA makes two small kernels of this, one for each axis that is summed over; its cumsum and gathers would be more.
    order = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    tiles = (group_sizes + (height - 1)) // height
    before = order < order[:, None]
    first = jnp.where(before, tiles, 0).sum(1, dtype=jnp.int32)
    start = jnp.where(before, round_up(group_sizes), 0).sum(1, dtype=jnp.int32)
    index = jnp.arange(-(-num_rows // height) + group_sizes.shape[0] - 1, dtype=jnp.int32)[:, None]
    inside = (index >= first) & (index < first + tiles)
    offset = (index - first) * height
    columns = order, start + offset, jnp.minimum(group_sizes - offset, height)
    group, row, valid = (jnp.where(inside, column, 0).sum(1, dtype=jnp.int32) for column in columns)
    return group, row, valid, first


def rows_times_matrices(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transpose_rhs: bool, tile: Tile, cores: int
) -> jax.Array:
    """`eplb_jax.grouped_gemm.xla.matmul` with a given division of the work."""
    num_rows, depth = lhs.shape
    groups = group_sizes.shape[0]
    columns = rhs.shape[1 if transpose_rhs else 2]
    steps = pl.cdiv(depth, tile.k)
    column_tiles = pl.cdiv(columns, tile.n * tile.cluster)
    workers = cores // tile.cluster
    part_rows, part_columns = tile.part

    def body(group_of, row_of, valid_of, first_of, size_of, lhs_ref, rhs_ref, out_ref):
        def scoped(**refs):
            warpgroup = lax.axis_index("warpgroup")
            worker, pair = lax.axis_index("worker"), lax.axis_index("pair")
            row_tiles = first_of[groups - 1] + lax.div(size_of[groups - 1] + (tile.m - 1), jnp.int32(tile.m))

            def look_up(index):
                row_tile, column_tile = ring.snake(index, row_tiles, column_tiles, tile.width)
                column = (column_tile * tile.cluster + pair) * tile.n
                return group_of[row_tile], row_of[row_tile], valid_of[row_tile], column

            turns = functools.partial(ring.turns, row_tiles * column_tiles, worker, workers, look_up)

            @pl.when(warpgroup == CONSUMERS)
            def _():
                plgpu.set_max_registers(40, action="decrease")

                def load_tile(begin, turn, group, row, valid, column):
                    matrix = rhs_ref.at[group]
                    high = pl.ds(pl.multiple_of(row, 8), tile.m)
                    wide = pl.ds(pl.multiple_of(column, tile.n), tile.n)

                    def load(k, _):
                        deep = pl.ds(k * tile.k, tile.k)
                        b = matrix.at[wide, deep] if transpose_rhs else matrix.at[deep, wide]
                        ring.fill(begin + k, turn, tile, refs, lhs_ref.at[high, deep], b)

                    lax.fori_loop(jnp.int32(0), jnp.int32(steps), load, None)
                    return begin + steps

                ring.drain(turns(load_tile, jnp.int32(0)), tile, refs)

            @pl.when(warpgroup < CONSUMERS)
            def _():
                plgpu.set_max_registers(232, action="increase")
                first_row, first_column = tile.corner(warpgroup)

                def operands(slot):
                    a = ring.cut(refs["a_ring"].at[slot], 0, first_row, part_rows)
                    b = ring.cut(refs["b_ring"].at[slot], 0 if transpose_rhs else 1, first_column, part_columns)
                    return a, (b.transpose((1, 0)) if transpose_rhs else b)

                def multiply(begin, turn, row, valid, column):
                    def accumulate(acc):
                        ring.multiply(acc, begin, begin, begin + steps, turn, tile, refs, operands)
                        values = acc[...]
                        ring.release(begin + steps - 1, tile, refs)
                        return values.astype(out_ref.dtype)

                    values = pl.run_scoped(accumulate, ring.accumulator(tile))

                    def target(m, n, rows):
                        high = pl.ds(pl.multiple_of(row + first_row + m, 8), rows)
                        wide = pl.multiple_of(column + first_column + n, ring.CHUNK)
                        return out_ref.at[high, pl.ds(wide, ring.CHUNK)]

                    ring.store(values, valid, tile, refs, warpgroup, target)

                def pass_by(begin, turn):
                    """None of this warpgroup's rows are the group's: it only lets the slots go."""

                    def skip(step, _):
                        plgpu.barrier_wait(ring.filled(step, turn, tile, refs))
                        ring.release(step, tile, refs)

                    lax.fori_loop(begin, begin + steps, skip, None)

                def compute_tile(begin, turn, group, row, valid, column):
                    if tile.sharers == 1:
                        mine = ring.owner(turn, tile) == warpgroup
                        pl.when(mine)(lambda: multiply(begin, turn, row, valid, column))
                    elif tile.split == "n":
                        multiply(begin, turn, row, valid, column)
                    else:
                        pl.when(valid > first_row)(lambda: multiply(begin, turn, row, valid - first_row, column))
                        pl.when(valid <= first_row)(lambda: pass_by(begin, turn))
                    return begin + steps

                turns(compute_tile, jnp.int32(0))
                plgpu.wait_smem_to_gmem(0)

        b_shape = (tile.n, tile.k) if transpose_rhs else (tile.k, tile.n)
        pl.run_scoped(scoped, **ring.scratch(tile, (tile.m, tile.k), b_shape, lhs.dtype), collective_axes="warpgroup")

    out: Any = jax.ShapeDtypeStruct((num_rows, columns), lhs.dtype)
    tables = *row_tiles(group_sizes, num_rows, tile.m), group_sizes
    return ring.launch(body, "grouped_rows", tile, cores, out, *tables, lhs, rhs)
