"""The grouped product of transposed rows and rows on Hopper GPUs: the gradient of the matrices."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from eplb_jax.kernels.grouped_gemm import ring
from eplb_jax.kernels.grouped_gemm.layout import group_starts
from eplb_jax.kernels.grouped_gemm.ring import CONSUMERS, Tile
from eplb_jax.kernels.once import traced_once


@dataclasses.dataclass(frozen=True)
class _OuterBlock:
    """One block of the kernel: the operands, its ring of tiles, and its place.

    Attributes:
      tile: the division of the work; ``tile.k`` counts rows of a group.
      lhs, dout, out: the arrays in memory.
      total: what the products are added to, the memory of ``out``; None: there is nothing.
      exact: whether tiles end where the results end.
      refs: what `ring.scratch` made.
      masked: the barrier at which both consumers have set the rows of others to zero.
      warpgroup: which of the block's warpgroups this is; the last one loads, the others multiply.
      for_each_tile: calls its first argument for each of the block's output tiles with the last state, which is the
        second argument at first, the number of tiles before, and the fields of `_OuterOutput`; returns the last state.
    """

    tile: Tile
    lhs: Any
    dout: Any
    out: Any
    total: Any
    exact: bool
    refs: dict[str, Any]
    masked: Any
    warpgroup: jax.Array
    for_each_tile: Callable[[Callable[..., jax.Array], jax.Array], jax.Array]


class _OuterOutput(NamedTuple):
    """An output tile: its group, the first row and the size of that, and its first row and column."""

    group: jax.Array
    start: jax.Array
    size: jax.Array
    row: jax.Array
    column: jax.Array


@traced_once("tile", "cores", "dtype")
def outer_products(
    lhs: jax.Array,
    dout: jax.Array,
    group_sizes: jax.Array,
    tile: Tile,
    cores: int,
    *,
    dtype: DTypeLike | None = None,
    total: jax.Array | None = None,
) -> jax.Array:
    """`eplb_jax.kernels.grouped_gemm.xla.outer` with a given division of the work; ``tile.k`` counts rows of the group.

    The largest groups come first, so that the blocks end together. A group's last rows may share their slot with rows
    of no group or of the next one, which are set to zero in both operands: zero times NaN would be NaN.

    Results in float32, of ``dtype`` or where there is a ``total`` in float32 to which they are added in its place, go
    to memory from registers. The producer has a total's tile fetched into the L2 cache while the tile before is made.
    """
    height, columns = lhs.shape[1], dout.shape[1]
    groups = group_sizes.shape[0]
    row_tiles = pl.cdiv(height, tile.m)
    column_tiles = pl.cdiv(columns, tile.n * tile.cluster)
    per_group = row_tiles * column_tiles
    workers = cores // tile.cluster
    out: Any = jax.ShapeDtypeStruct((groups, height, columns), dtype or lhs.dtype) if total is None else total
    exact = height % tile.m == 0 and columns % (tile.n * tile.cluster) == 0

    def body(group_of, start_of, size_of, lhs_ref, dout_ref, *results):
        def scoped(*, masked, **refs):
            warpgroup = lax.axis_index("warpgroup")
            worker, pair = lax.axis_index("worker"), lax.axis_index("pair")

            def look_up(index):
                rank = lax.div(index, jnp.int32(per_group))
                row_tile, column_tile = ring.snake(
                    index - rank * per_group, jnp.int32(row_tiles), column_tiles, tile.width
                )
                column = (column_tile * tile.cluster + pair) * tile.n
                return _OuterOutput(group_of[rank], start_of[rank], size_of[rank], row_tile * tile.m, column)

            for_each_tile = functools.partial(ring.turns, jnp.int32(groups * per_group), worker, workers, look_up)
            *totals, out_ref = results
            total_ref = totals[0] if totals else None
            block = _OuterBlock(
                tile, lhs_ref, dout_ref, out_ref, total_ref, exact, refs, masked, warpgroup, for_each_tile
            )
            pl.when(warpgroup == CONSUMERS)(lambda: _load(block))
            pl.when(warpgroup < CONSUMERS)(lambda: _compute(block))

        pl.run_scoped(
            scoped,
            masked=plgpu.Barrier(num_arrivals=CONSUMERS),
            **ring.scratch(tile, (tile.k, tile.m), (tile.k, tile.n), lhs.dtype, pieces=out.dtype == lhs.dtype),
            collective_axes="warpgroup",
        )

    order = jnp.argsort(-group_sizes).astype(jnp.int32)
    tables = order, group_starts(group_sizes)[order], group_sizes[order]
    return ring.launch(body, "grouped_outer", tile, cores, out, *tables, lhs, dout, total=total)


def _steps(size: jax.Array, tile: Tile) -> jax.Array:
    """Slots of the ring that a group of so many rows takes."""
    return lax.div(size + (tile.k - 1), jnp.int32(tile.k))


def _load(block: _OuterBlock) -> None:
    """The producer: copies the operands of all of the block's tiles into the ring."""
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(first, turn, *output):
        return _load_tile(block, first, turn, _OuterOutput(*output))

    ring.drain(block.for_each_tile(load_tile, jnp.int32(0)), block.tile, block.refs)


def _load_tile(block: _OuterBlock, first: jax.Array, turn: jax.Array, output: _OuterOutput) -> jax.Array:
    """Loads a tile from the first step on; returns the next tile's first step."""
    tile = block.tile
    steps = _steps(output.size, tile)
    high = pl.ds(pl.multiple_of(output.row, tile.m), tile.m)
    wide = pl.ds(pl.multiple_of(output.column, tile.n), tile.n)
    if block.total is not None:
        pl.when(steps > 0)(lambda: plgpu.async_prefetch(block.total.at[output.group, high, wide]))

    def load(k, _):
        deep = pl.ds(pl.multiple_of(output.start + k * tile.k, 8), tile.k)
        ring.fill(first + k, turn, tile, block.refs, block.lhs.at[deep, high], block.dout.at[deep, wide])

    lax.fori_loop(jnp.int32(0), steps, load, None)
    return first + steps


def _compute(block: _OuterBlock) -> None:
    """A consumer: multiplies and stores this warpgroup's parts of the block's tiles."""
    plgpu.set_max_registers(232, action="increase")
    tile = block.tile
    corner = tile.corner(block.warpgroup)

    def compute_tile(first, turn, *fields):
        output = _OuterOutput(*fields)
        if tile.sharers == 1:
            mine = ring.owner(turn, tile) == block.warpgroup
            pl.when(mine)(lambda: _multiply_and_store(block, corner, first, turn, output))
        else:
            _multiply_and_store(block, corner, first, turn, output)
        return first + _steps(output.size, tile)

    block.for_each_tile(compute_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _multiply_and_store(
    block: _OuterBlock, corner: tuple[jax.Array, jax.Array], first: jax.Array, turn: jax.Array, output: _OuterOutput
) -> None:
    """Makes the part of a tile that is this warpgroup's, from the corner on; ``first`` is the tile's first step."""
    tile, refs = block.tile, block.refs
    first_row, first_column = corner
    part_rows, part_columns = tile.part
    full = lax.div(output.size, jnp.int32(tile.k))
    last = first + _steps(output.size, tile)

    def operands(slot):
        a = ring.cut(refs["a_ring"].at[slot], 1, first_row, part_rows)
        return a.transpose((1, 0)), ring.cut(refs["b_ring"].at[slot], 1, first_column, part_columns)

    def masked_operands(slot):
        _mask(block, slot, output.size - full * tile.k)
        return operands(slot)

    def accumulate(acc):
        ring.multiply(acc, first, first, first + full, turn, tile, refs, operands)
        ring.multiply(acc, first, first + full, last, turn, tile, refs, masked_operands)
        values = acc[...]
        pl.when(last > first)(lambda: ring.release(last - 1, tile, refs))
        return values.astype(block.out.dtype)

    def place(ref, m, n, rows, columns=ring.CHUNK):
        high = pl.ds(pl.multiple_of(output.row + first_row + m, ring.CHUNK), rows)
        wide = pl.ds(pl.multiple_of(output.column + first_column + n, ring.CHUNK), columns)
        return ref.at[output.group, high, wide]

    def make():
        values = pl.run_scoped(accumulate, ring.accumulator(*tile.part))
        if "out_pieces" in refs:
            ring.store(values, None, tile, refs, block.warpgroup, functools.partial(place, block.out))
            return
        height, width = block.out.shape[1:]
        across = tile.part[1] if block.exact else ring.CHUNK
        for m, n in itertools.product(range(0, tile.part[0], ring.CHUNK), range(0, tile.part[1], across)):
            value = values[m : m + ring.CHUNK, n : n + across]

            def write(m=m, n=n, value=value):
                if block.total is not None:
                    value += ring.load(place(block.total, m, n, ring.CHUNK, across))
                place(block.out, m, n, ring.CHUNK, across)[...] = value

            if block.exact:
                write()
            else:  # sides are whole pieces, so each is inside or outside
                row, column = output.row + first_row + m, output.column + first_column + n
                pl.when((row < height) & (column < width))(write)

    if block.total is None:
        make()
    else:
        pl.when(last > first)(make)  # the total of a group without rows is there already


def _mask(block: _OuterBlock, slot: jax.Array, valid: jax.Array) -> None:
    """Zeroes the rows of a slot from ``valid`` on; warpgroups that share it do half of each operand."""
    tile = block.tile
    for name, columns in (("a_ring", tile.m), ("b_ring", tile.n)):
        width = columns // tile.sharers
        part = ring.cut(block.refs[name].at[slot], 1, block.warpgroup * width, width)
        row = plgpu.broadcasted_iota(jnp.int32, (tile.k, width), 0, layout=plgpu.Layout.WGMMA)
        values = part[...]
        part[...] = jnp.where(row < valid, values, jnp.zeros_like(values))
    plgpu.commit_smem()
    if tile.sharers > 1:
        plgpu.barrier_arrive(block.masked)
        plgpu.barrier_wait(block.masked)
