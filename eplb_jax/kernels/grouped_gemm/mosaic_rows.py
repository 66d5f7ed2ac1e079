"""The grouped product of rows and matrices on Hopper GPUs: the forward pass, and the gradient of the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from eplb_jax.kernels.grouped_gemm import ring
from eplb_jax.kernels.grouped_gemm.layout import ALIGN
from eplb_jax.kernels.grouped_gemm.ring import CHUNK, CONSUMERS, Tile


def assign_tiles(
    size_of: Any, groups: int, column_tiles: int, worker: jax.Array, workers: int, tile: Tile, work: Callable[..., None]
) -> jax.Array:
    """Goes through a worker's share of the output tiles, group after group, which keeps the workers near each other.

    A group's rows are divided into tiles from its first row on. One with at most half the rows takes about half the
    time, so high and low tiles are dealt out apart, the low ones from the last worker on: all get as many of either.

    Args:
      size_of: rows of each group; int32, in memory.
      groups: how many groups there are.
      column_tiles: tiles side by side.
      worker: which share.
      workers: how many shares.
      tile: the division of the work.
      work: called with the number of tiles before this one, its group, its first row, how many of its rows the group
        has, and its column tile.

    Returns:
      How many tiles there were.
    """
    half = tile.m // 2 if tile.m > CHUNK else 0

    def share(count, dealt, first):
        """The first of `count` tiles that is the worker's, if `dealt` were dealt out before, and how many are."""
        start = lax.rem(first + (workers - lax.rem(dealt, jnp.int32(workers))), jnp.int32(workers))
        return start, lax.div(count - start + (workers - 1), jnp.int32(workers))

    def go_through(group, carry):
        turn, first_row, dealt_high, dealt_low, size = carry
        next_size = size_of[jnp.minimum(group + 1, groups - 1)]  # early, as it takes long
        high = lax.div(size + (tile.m - half - 1), jnp.int32(tile.m))
        cut = jnp.minimum(high, jnp.where(group == groups - 1, tile.cut, 0)) if half else 0
        high -= cut
        rest = size - high * tile.m
        low = lax.div(jnp.maximum(rest, 0) + (half - 1), jnp.int32(half)) if half else jnp.int32(0)
        start_high, mine_high = share(high * column_tiles, dealt_high, worker)
        start_low, mine_low = share(low * column_tiles, dealt_low, workers - 1 - worker)

        def one(number, _):
            is_high = number < mine_high
            index = jnp.where(is_high, start_high + number * workers, start_low + (number - mine_high) * workers)
            row_tile, column_tile = ring.snake(index, jnp.where(is_high, high, low), column_tiles, tile.width)
            offset = jnp.where(is_high, row_tile * tile.m, high * tile.m + row_tile * half)
            valid = jnp.minimum(size - offset, jnp.where(is_high, tile.m, half))
            work(turn + number, group, first_row + offset, valid, column_tile)

        lax.fori_loop(jnp.int32(0), mine_high + mine_low, one, None)
        rounded = (size + (ALIGN - 1)) & -ALIGN
        dealt = dealt_high + high * column_tiles, dealt_low + low * column_tiles
        return turn + mine_high + mine_low, first_row + rounded, *dealt, next_size

    zero = jnp.int32(0)
    return lax.fori_loop(zero, jnp.int32(groups), go_through, (zero, zero, zero, zero, size_of[0]))[0]


def rows_times_matrices(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transpose_rhs: bool, tile: Tile, cores: int
) -> jax.Array:
    """`eplb_jax.kernels.grouped_gemm.xla.matmul` with a given division of the work."""
    num_rows, depth = lhs.shape
    groups = group_sizes.shape[0]
    columns = rhs.shape[1 if transpose_rhs else 2]
    steps = pl.cdiv(depth, tile.k)
    column_tiles = pl.cdiv(columns, tile.n * tile.cluster)
    workers = cores // tile.cluster
    part_rows, part_columns = tile.part

    def body(size_of, lhs_ref, rhs_ref, out_ref):
        def scoped(**refs):
            warpgroup = lax.axis_index("warpgroup")
            worker, pair = lax.axis_index("worker"), lax.axis_index("pair")
            go_through = functools.partial(assign_tiles, size_of, groups, column_tiles, worker, workers, tile)

            def first_column(column_tile):
                return (column_tile * tile.cluster + pair) * tile.n

            @pl.when(warpgroup == CONSUMERS)
            def _():
                plgpu.set_max_registers(40, action="decrease")

                def load_tile(turn, group, row, valid, column_tile):
                    matrix = rhs_ref.at[group]
                    wide = pl.ds(pl.multiple_of(first_column(column_tile), tile.n), tile.n)

                    def load(height):
                        high = pl.ds(pl.multiple_of(row, ALIGN), height)

                        def load_step(k, _):
                            deep = pl.ds(k * tile.k, tile.k)
                            b = matrix.at[wide, deep] if transpose_rhs else matrix.at[deep, wide]
                            ring.fill(turn * steps + k, turn, tile, refs, lhs_ref.at[high, deep], b)

                        lax.fori_loop(jnp.int32(0), jnp.int32(steps), load_step, None)

                    by_height(valid, tile.m, load)

                ring.drain(go_through(load_tile) * steps, tile, refs)

            @pl.when(warpgroup < CONSUMERS)
            def _():
                plgpu.set_max_registers(232, action="increase")
                corner_column = tile.corner(warpgroup)[1]

                def compute_tile(turn, group, row, valid, column_tile):
                    begin = turn * steps
                    # With "m" the warpgroups divide between them the rows of a low tile, too.
                    share = jnp.where(valid <= tile.m // 2, max(part_rows // 2, CHUNK), part_rows)
                    corner_row = pl.multiple_of(warpgroup * share, CHUNK) if tile.split == "m" else 0

                    def multiply(rows):
                        def operands(slot):
                            a = ring.cut(refs["a_ring"].at[slot], 0, corner_row, rows)
                            b = refs["b_ring"].at[slot]
                            b = ring.cut(b, 0 if transpose_rhs else 1, corner_column, part_columns)
                            return a, (b.transpose((1, 0)) if transpose_rhs else b)

                        def accumulate(acc):
                            ring.multiply(acc, begin, begin, begin + steps, turn, tile, refs, operands)
                            values = acc[...]
                            ring.release(begin + steps - 1, tile, refs)
                            return values.astype(out_ref.dtype)

                        values = pl.run_scoped(accumulate, ring.accumulator(rows, part_columns))

                        def target(m, n, rows):
                            high = pl.ds(pl.multiple_of(row + corner_row + m, ALIGN), rows)
                            wide = pl.multiple_of(first_column(column_tile) + corner_column + n, CHUNK)
                            return out_ref.at[high, pl.ds(wide, CHUNK)]

                        ring.store(values, valid - corner_row, tile, refs, warpgroup, target)

                    def pass_by():
                        """None of this warpgroup's rows are the group's: it only lets the slots go."""

                        def skip(step, _):
                            plgpu.barrier_wait(ring.filled(step, turn, tile, refs))
                            ring.release(step, tile, refs)

                        lax.fori_loop(begin, begin + steps, skip, None)

                    if tile.sharers == 1:
                        mine = ring.owner(turn, tile) == warpgroup
                        pl.when(mine)(lambda: by_height(valid, part_rows, multiply))
                    elif tile.split == "n":
                        by_height(valid, part_rows, multiply)
                    else:
                        pl.when(valid > corner_row)(lambda: by_height(valid - corner_row, part_rows, multiply))
                        pl.when(valid <= corner_row)(pass_by)

                go_through(compute_tile)
                plgpu.wait_smem_to_gmem(0)

        b_shape = (tile.n, tile.k) if transpose_rhs else (tile.k, tile.n)
        pl.run_scoped(scoped, **ring.scratch(tile, (tile.m, tile.k), b_shape, lhs.dtype), collective_axes="warpgroup")

    out: Any = jax.ShapeDtypeStruct((num_rows, columns), lhs.dtype)
    return ring.launch(body, "grouped_rows", tile, cores, out, group_sizes, lhs, rhs)


def by_height(valid: jax.Array, most: int, work: Callable[[int], None]) -> None:
    """Calls ``work`` with the fewest rows that hold the valid ones: `most`, or its half or quarter from CHUNK on."""
    if most <= CHUNK:
        work(most)
        return
    pl.when(valid > most // 2)(lambda: work(most))
    pl.when(valid <= most // 2)(lambda: by_height(valid, most // 2, work))
