"""The grouped product of transposed rows and rows on Hopper GPUs: the gradient of the matrices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from eplb_jax.kernels.grouped_gemm import ring
from eplb_jax.kernels.grouped_gemm.layout import group_starts
from eplb_jax.kernels.grouped_gemm.ring import CONSUMERS, Tile


def outer_products(lhs: jax.Array, dout: jax.Array, group_sizes: jax.Array, tile: Tile, cores: int) -> jax.Array:
    """`eplb_jax.kernels.grouped_gemm.xla.outer` with a given division of the work; ``tile.k`` counts rows of the group.

    The largest groups come first, so that the blocks end together. A group's last rows may share their slot with rows
    of no group or of the next one, which are set to zero in both operands: zero times NaN would be NaN.
    """
    height, columns = lhs.shape[1], dout.shape[1]
    groups = group_sizes.shape[0]
    row_tiles = pl.cdiv(height, tile.m)
    column_tiles = pl.cdiv(columns, tile.n * tile.cluster)
    workers = cores // tile.cluster
    part_rows, part_columns = tile.part

    def body(group_of, start_of, size_of, lhs_ref, dout_ref, out_ref):
        def scoped(*, masked, **refs):
            warpgroup = lax.axis_index("warpgroup")
            worker, pair = lax.axis_index("worker"), lax.axis_index("pair")
            per_group = row_tiles * column_tiles

            def look_up(index):
                rank = lax.div(index, jnp.int32(per_group))
                row_tile, column_tile = ring.snake(
                    index - rank * per_group, jnp.int32(row_tiles), column_tiles, tile.width
                )
                column = (column_tile * tile.cluster + pair) * tile.n
                return group_of[rank], start_of[rank], size_of[rank], row_tile * tile.m, column

            turns = functools.partial(ring.turns, jnp.int32(groups * per_group), worker, workers, look_up)

            @pl.when(warpgroup == CONSUMERS)
            def _():
                plgpu.set_max_registers(40, action="decrease")

                def load_tile(first, turn, group, start, size, row, column):
                    steps = lax.div(size + (tile.k - 1), jnp.int32(tile.k))
                    high = pl.ds(pl.multiple_of(row, tile.m), tile.m)
                    wide = pl.ds(pl.multiple_of(column, tile.n), tile.n)

                    def load(k, _):
                        deep = pl.ds(pl.multiple_of(start + k * tile.k, 8), tile.k)
                        ring.fill(first + k, turn, tile, refs, lhs_ref.at[deep, high], dout_ref.at[deep, wide])

                    lax.fori_loop(jnp.int32(0), steps, load, None)
                    return first + steps

                ring.drain(turns(load_tile, jnp.int32(0)), tile, refs)

            @pl.when(warpgroup < CONSUMERS)
            def _():
                plgpu.set_max_registers(232, action="increase")
                first_row, first_column = tile.corner(warpgroup)

                def operands(slot):
                    a = ring.cut(refs["a_ring"].at[slot], 1, first_row, part_rows)
                    return a.transpose((1, 0)), ring.cut(refs["b_ring"].at[slot], 1, first_column, part_columns)

                def mask(slot, valid):
                    """Zeroes the rows from ``valid`` on; warpgroups that share a slot do half of each operand."""
                    for name, columns in (("a_ring", tile.m), ("b_ring", tile.n)):
                        width = columns // tile.sharers
                        part = ring.cut(refs[name].at[slot], 1, warpgroup * width, width)
                        row = plgpu.broadcasted_iota(jnp.int32, (tile.k, width), 0, layout=plgpu.Layout.WGMMA)
                        values = part[...]
                        part[...] = jnp.where(row < valid, values, jnp.zeros_like(values))
                    plgpu.commit_smem()
                    if tile.sharers > 1:
                        plgpu.barrier_arrive(masked)
                        plgpu.barrier_wait(masked)

                def multiply(first, turn, group, size, row, column):
                    full = lax.div(size, jnp.int32(tile.k))
                    last = first + lax.div(size + (tile.k - 1), jnp.int32(tile.k))

                    def masked_operands(slot):
                        mask(slot, size - full * tile.k)
                        return operands(slot)

                    def accumulate(acc):
                        ring.multiply(acc, first, first, first + full, turn, tile, refs, operands)
                        ring.multiply(acc, first, first + full, last, turn, tile, refs, masked_operands)
                        values = acc[...]
                        pl.when(last > first)(lambda: ring.release(last - 1, tile, refs))
                        return values.astype(out_ref.dtype)

                    values = pl.run_scoped(accumulate, ring.accumulator(*tile.part))

                    def target(m, n, rows):
                        high = pl.ds(pl.multiple_of(row + first_row + m, ring.CHUNK), rows)
                        wide = pl.ds(pl.multiple_of(column + first_column + n, ring.CHUNK), ring.CHUNK)
                        return out_ref.at[group, high, wide]

                    ring.store(values, None, tile, refs, warpgroup, target)

                def compute_tile(first, turn, group, start, size, row, column):
                    if tile.sharers == 1:
                        mine = ring.owner(turn, tile) == warpgroup
                        pl.when(mine)(lambda: multiply(first, turn, group, size, row, column))
                    else:
                        multiply(first, turn, group, size, row, column)
                    return first + lax.div(size + (tile.k - 1), jnp.int32(tile.k))

                turns(compute_tile, jnp.int32(0))
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            masked=plgpu.Barrier(num_arrivals=CONSUMERS),
            **ring.scratch(tile, (tile.k, tile.m), (tile.k, tile.n), lhs.dtype),
            collective_axes="warpgroup",
        )

    order = jnp.argsort(-group_sizes).astype(jnp.int32)
    out: Any = jax.ShapeDtypeStruct((groups, height, columns), lhs.dtype)
    tables = order, group_starts(group_sizes)[order], group_sizes[order]
    return ring.launch(body, "grouped_outer", tile, cores, out, *tables, lhs, dout)
