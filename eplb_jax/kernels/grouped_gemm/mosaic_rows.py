"""The grouped product of rows and matrices on Hopper GPUs: the forward pass, and the gradient of the rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from eplb_jax.kernels.grouped_gemm import ring
from eplb_jax.kernels.grouped_gemm.layout import ALIGN, round_up
from eplb_jax.kernels.grouped_gemm.ring import CHUNK, CONSUMERS, Tile
from eplb_jax.kernels.once import traced_once


def assign_tiles(
    size_of: Any, groups: int, column_tiles: int, worker: jax.Array, workers: int, tile: Tile, work: Callable[..., None]
) -> jax.Array:
    """Goes through a worker's share of the output tiles, group after group, which keeps the workers near each other.

    A group's rows are divided into tiles from its first row on. One with at most half the rows takes about half the
    time, so high and low tiles are assigned separately, the low ones from the last worker on: numbers of either differ
    between workers by one at most.

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

    def share(count, before, first):
        """The first of `count` tiles that is the worker's, if `before` tiles were assigned before, and how many are."""
        start = lax.rem(first + (workers - lax.rem(before, jnp.int32(workers))), jnp.int32(workers))
        return start, lax.div(count - start + (workers - 1), jnp.int32(workers))

    def go_through(group, carry):
        turn, first_row, high_before, low_before, size = carry
        next_size = size_of[jnp.minimum(group + 1, groups - 1)]  # early, as it takes long
        high = lax.div(size + (tile.m - half - 1), jnp.int32(tile.m))
        cut = jnp.minimum(high, jnp.where(group == groups - 1, tile.cut, 0)) if half else 0
        high -= cut
        rest = size - high * tile.m
        low = lax.div(jnp.maximum(rest, 0) + (half - 1), jnp.int32(half)) if half else jnp.int32(0)
        start_high, mine_high = share(high * column_tiles, high_before, worker)
        start_low, mine_low = share(low * column_tiles, low_before, workers - 1 - worker)

        def one(number, _):
            is_high = number < mine_high
            index = jnp.where(is_high, start_high + number * workers, start_low + (number - mine_high) * workers)
            row_tile, column_tile = ring.snake(index, jnp.where(is_high, high, low), column_tiles, tile.width)
            offset = jnp.where(is_high, row_tile * tile.m, high * tile.m + row_tile * half)
            valid = jnp.minimum(size - offset, jnp.where(is_high, tile.m, half))
            work(turn + number, group, first_row + offset, valid, column_tile)

        lax.fori_loop(jnp.int32(0), mine_high + mine_low, one, None)
        rounded = round_up(size)
        before = high_before + high * column_tiles, low_before + low * column_tiles
        return turn + mine_high + mine_low, first_row + rounded, *before, next_size

    zero = jnp.int32(0)
    return lax.fori_loop(zero, jnp.int32(groups), go_through, (zero, zero, zero, zero, size_of[0]))[0]


@dataclasses.dataclass(frozen=True)
class _RowsBlock:
    """One block of the kernel: the operands, its ring of tiles, and its place.

    Attributes:
      tile: the division of the work.
      transpose_rhs: whether the matrices are multiplied transposed.
      steps: parts of the contraction; each takes one slot of the ring.
      lhs, rhs, out: the arrays in memory.
      refs: what `ring.scratch` made.
      warpgroup: which of the block's warpgroups this is; the last one loads, the others multiply.
      pair: which block of its cluster this is.
      for_each_tile: calls its argument for each of the block's output tiles, as `assign_tiles` does.
    """

    tile: Tile
    transpose_rhs: bool
    steps: int
    lhs: Any
    rhs: Any
    out: Any
    refs: dict[str, Any]
    warpgroup: jax.Array
    pair: jax.Array
    for_each_tile: Callable[[Callable[..., None]], jax.Array]

    def first_column(self, column_tile: jax.Array) -> jax.Array:
        """The first column of this block's tile."""
        return (column_tile * self.tile.cluster + self.pair) * self.tile.n


class _RowsOutput(NamedTuple):
    """An output tile, as `assign_tiles` gives it."""

    turn: jax.Array
    group: jax.Array
    row: jax.Array
    valid: jax.Array
    column_tile: jax.Array


@traced_once("transpose_rhs", "tile", "cores")
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

    def body(size_of, lhs_ref, rhs_ref, out_ref):
        def scoped(**refs):
            warpgroup = lax.axis_index("warpgroup")
            worker, pair = lax.axis_index("worker"), lax.axis_index("pair")
            for_each_tile = functools.partial(assign_tiles, size_of, groups, column_tiles, worker, workers, tile)
            block = _RowsBlock(
                tile, transpose_rhs, steps, lhs_ref, rhs_ref, out_ref, refs, warpgroup, pair, for_each_tile
            )
            pl.when(warpgroup == CONSUMERS)(lambda: _load(block))
            pl.when(warpgroup < CONSUMERS)(lambda: _compute(block))

        b_shape = (tile.n, tile.k) if transpose_rhs else (tile.k, tile.n)
        pl.run_scoped(scoped, **ring.scratch(tile, (tile.m, tile.k), b_shape, lhs.dtype), collective_axes="warpgroup")

    out: Any = jax.ShapeDtypeStruct((num_rows, columns), lhs.dtype)
    return ring.launch(body, "grouped_rows", tile, cores, out, group_sizes, lhs, rhs)


def _load(block: _RowsBlock) -> None:
    """The producer: copies the operands of all of the block's tiles into the ring."""
    plgpu.set_max_registers(40, action="decrease")
    turns = block.for_each_tile(lambda *output: _load_tile(block, _RowsOutput(*output)))
    ring.drain(turns * block.steps, block.tile, block.refs)


def _load_tile(block: _RowsBlock, output: _RowsOutput) -> None:
    tile = block.tile
    matrix = block.rhs.at[output.group]
    wide = pl.ds(pl.multiple_of(block.first_column(output.column_tile), tile.n), tile.n)

    def load(height: int) -> None:
        high = pl.ds(pl.multiple_of(output.row, ALIGN), height)

        def load_step(k, _):
            deep = pl.ds(k * tile.k, tile.k)
            b = matrix.at[wide, deep] if block.transpose_rhs else matrix.at[deep, wide]
            ring.fill(output.turn * block.steps + k, output.turn, tile, block.refs, block.lhs.at[high, deep], b)

        lax.fori_loop(jnp.int32(0), jnp.int32(block.steps), load_step, None)

    by_height(output.valid, tile.m, load)


def _compute(block: _RowsBlock) -> None:
    """A consumer: multiplies and stores this warpgroup's parts of the block's tiles."""
    plgpu.set_max_registers(232, action="increase")
    corner_column = block.tile.corner(block.warpgroup)[1]
    block.for_each_tile(lambda *output: _compute_tile(block, corner_column, _RowsOutput(*output)))
    plgpu.wait_smem_to_gmem(0)


def _compute_tile(block: _RowsBlock, corner_column: jax.Array, output: _RowsOutput) -> None:
    """Makes the part of a tile that is this warpgroup's, or passes by where none is."""
    tile, valid = block.tile, output.valid
    part_rows = tile.part[0]
    begin = output.turn * block.steps
    # With "m" the warpgroups divide between them the rows of a low tile, too.
    share = jnp.where(valid <= tile.m // 2, max(part_rows // 2, CHUNK), part_rows)
    corner_row = pl.multiple_of(block.warpgroup * share, CHUNK) if tile.split == "m" else 0

    def multiply(rows: int) -> None:
        _multiply_and_store(block, output, begin, corner_row, corner_column, rows)

    if tile.sharers == 1:
        mine = ring.owner(output.turn, tile) == block.warpgroup
        pl.when(mine)(lambda: by_height(valid, part_rows, multiply))
    elif tile.split == "n":
        by_height(valid, part_rows, multiply)
    else:
        pl.when(valid > corner_row)(lambda: by_height(valid - corner_row, part_rows, multiply))
        pl.when(valid <= corner_row)(lambda: _pass_by(block, output, begin))


def _multiply_and_store(
    block: _RowsBlock,
    output: _RowsOutput,
    begin: jax.Array,
    corner_row: jax.Array | int,
    corner_column: jax.Array,
    rows: int,
) -> None:
    """Makes some rows of a tile, from this warpgroup's corner on; ``begin`` is the tile's first step."""
    tile, steps, refs, transpose_rhs = block.tile, block.steps, block.refs, block.transpose_rhs
    part_columns = tile.part[1]

    def operands(slot):
        a = ring.cut(refs["a_ring"].at[slot], 0, corner_row, rows)
        b = refs["b_ring"].at[slot]
        b = ring.cut(b, 0 if transpose_rhs else 1, corner_column, part_columns)
        return a, (b.transpose((1, 0)) if transpose_rhs else b)

    def accumulate(acc):
        ring.multiply(acc, begin, begin, begin + steps, output.turn, tile, refs, operands)
        values = acc[...]
        ring.release(begin + steps - 1, tile, refs)
        return values.astype(block.out.dtype)

    values = pl.run_scoped(accumulate, ring.accumulator(rows, part_columns))

    def target(m, n, rows):
        high = pl.ds(pl.multiple_of(output.row + corner_row + m, ALIGN), rows)
        wide = pl.multiple_of(block.first_column(output.column_tile) + corner_column + n, CHUNK)
        return block.out.at[high, pl.ds(wide, CHUNK)]

    ring.store(values, output.valid - corner_row, tile, refs, block.warpgroup, target)


def _pass_by(block: _RowsBlock, output: _RowsOutput, begin: jax.Array) -> None:
    """Lets the slots of a tile go that has no row of its group in this warpgroup's part."""

    def skip(step, _):
        plgpu.barrier_wait(ring.filled(step, output.turn, block.tile, block.refs))
        ring.release(step, block.tile, block.refs)

    lax.fori_loop(begin, begin + block.steps, skip, None)


def by_height(valid: jax.Array, most: int, work: Callable[[int], None]) -> None:
    """Calls ``work`` with the fewest rows that hold the valid ones: `most`, or its half or quarter from CHUNK on."""
    if most <= CHUNK:
        work(most)
        return
    pl.when(valid > most // 2)(lambda: work(most))
    pl.when(valid <= most // 2)(lambda: by_height(valid, most // 2, work))
