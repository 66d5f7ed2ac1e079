"""The grouped product of transposed, scaled 8-bit rows on Hopper GPUs: the gradient of the matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from eplb_jax.kernels.fp8_gemm import slots
from eplb_jax.kernels.fp8_gemm.slots import PART, ScaledTile
from eplb_jax.kernels.grouped_gemm import ring
from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN, group_starts, round_up
from eplb_jax.kernels.grouped_gemm.ring import CONSUMERS
from eplb_jax.kernels.once import traced_once
from eplb_jax.kernels.scaled import BLOCK


@dataclasses.dataclass(frozen=True)
class _ScaledOuterBlock:
    """One block of the kernel: the operands, its ring of tiles, and its place.

    Attributes:
      tile: the division of the work.
      lhs, lhs_scales, dout, dout_scales, out: the arrays in memory.
      total: what the products are added to, the memory of ``out``; None: there is nothing.
      refs: what `slots.scratch` made.
      warpgroup: which of the block's warpgroups this is; the last one loads, the others multiply.
      for_each_tile: calls its argument for each of the block's output tiles with the steps before it, the number of
        tiles before it, and the fields of `_ScaledOuterOutput`, and wants the steps after it; returns the last.
    """

    tile: ScaledTile
    lhs: Any
    lhs_scales: Any
    dout: Any
    dout_scales: Any
    out: Any
    total: Any
    refs: dict[str, Any]
    warpgroup: jax.Array
    for_each_tile: Callable[[Callable[..., jax.Array]], jax.Array]


class _ScaledOuterOutput(NamedTuple):
    """An output tile: its group, the first block of 128 rows and the blocks of that, and its first row and column."""

    group: jax.Array
    start: jax.Array
    steps: jax.Array
    row: jax.Array
    column: jax.Array


@traced_once("dtype", "tile", "cores")
def scaled_outer_products(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    dout: jax.Array,
    dout_scales: jax.Array,
    group_sizes: jax.Array,
    dtype: DTypeLike,
    tile: ScaledTile,
    cores: int,
    *,
    total: jax.Array | None = None,
) -> jax.Array:
    """`eplb_jax.kernels.fp8_gemm.xla.outer` with a given division of the work: output tiles of 128 columns.

    The largest groups come first, so that the blocks end together. A slot holds one step: with a second one's scales of
    columns the registers would not do.

    With a ``total`` in float32 the products are added to it in its place. The producer has its tile fetched into the L2
    cache while the tile before is made.
    """
    height, columns = lhs.shape[0], dout.shape[0]
    groups = group_sizes.shape[0]
    row_tiles = height // tile.m
    column_tiles = columns // (BLOCK * tile.cluster)
    per_group = row_tiles * column_tiles
    workers = cores // tile.cluster

    def body(group_of, start_of, steps_of, lhs_ref, lhs_scales_ref, dout_ref, dout_scales_ref, *results):
        def scoped(**refs):
            *totals, out_ref = results
            total_ref = totals[0] if totals else None
            worker, pair = lax.axis_index("worker"), lax.axis_index("pair")

            def look_up(index):
                rank = lax.div(index, jnp.int32(per_group))
                row_tile, column_tile = ring.snake(
                    index - rank * per_group, jnp.int32(row_tiles), column_tiles, tile.width
                )
                column = (column_tile * tile.cluster + pair) * BLOCK
                return _ScaledOuterOutput(group_of[rank], start_of[rank], steps_of[rank], row_tile * tile.m, column)

            def for_each_tile(work):
                return ring.turns(jnp.int32(groups * per_group), worker, workers, look_up, work, jnp.int32(0))

            warpgroup = lax.axis_index("warpgroup")
            block = _ScaledOuterBlock(
                tile, lhs_ref, lhs_scales_ref, dout_ref, dout_scales_ref, out_ref, total_ref, refs, warpgroup,
                for_each_tile,
            )  # fmt: skip
            pl.when(warpgroup == CONSUMERS)(lambda: _load(block))
            pl.when(warpgroup < CONSUMERS)(lambda: _compute(block))

        pl.run_scoped(scoped, **slots.scratch(tile, [tile.m, BLOCK], dtype), collective_axes="warpgroup")

    order = jnp.argsort(-group_sizes).astype(jnp.int32)
    starts, steps = group_starts(group_sizes, FP8_ALIGN) // BLOCK, round_up(group_sizes, FP8_ALIGN) // BLOCK
    out: Any = jax.ShapeDtypeStruct((groups, height, columns), dtype)
    tables = order, starts[order], steps[order]
    return ring.launch(body, "scaled_outer", tile, cores, out, *tables, lhs, lhs_scales, dout, dout_scales, total=total)


def _load(block: _ScaledOuterBlock) -> None:
    """The producer: copies the operands of all of the block's tiles into the ring."""
    plgpu.set_max_registers(40, action="decrease")
    tile = block.tile

    def load_tile(before, _, *fields):
        output = _ScaledOuterOutput(*fields)
        high = pl.ds(pl.multiple_of(output.row, tile.m), tile.m)
        wide = pl.ds(pl.multiple_of(output.column, BLOCK), BLOCK)
        if block.total is not None:
            pl.when(output.steps > 0)(lambda: plgpu.async_prefetch(block.total.at[output.group, high, wide]))

        def load_step(k, _):
            rows = pl.ds(output.start + k, 1)
            deep = pl.ds(pl.multiple_of((output.start + k) * BLOCK, BLOCK), BLOCK)
            scales = [block.lhs_scales.at[rows, high], block.dout_scales.at[rows, wide]]
            a, b = block.lhs.at[high, deep], block.dout.at[wide, deep]
            slot = ring.slot_of(before + k, tile)
            slots.fill(slot, before + k >= tile.stages, tile, block.refs, a, b, scales)

        lax.fori_loop(jnp.int32(0), output.steps, load_step, None)
        return before + output.steps

    ring.drain(block.for_each_tile(load_tile), tile, block.refs)


def _compute(block: _ScaledOuterBlock) -> None:
    """A consumer: multiplies and stores this warpgroup's rows of the block's tiles."""
    plgpu.set_max_registers(232, action="increase")

    def compute_tile(before, _, *fields):
        output = _ScaledOuterOutput(*fields)
        _multiply_and_store(block, before, output)
        return before + output.steps

    block.for_each_tile(compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _multiply_and_store(block: _ScaledOuterBlock, before: jax.Array, output: _ScaledOuterOutput) -> None:
    """Makes this warpgroup's rows of a tile."""
    tile, refs = block.tile, block.refs
    mine = [slots.rows_of(part, block.warpgroup) for part in range(tile.parts)]

    def multiply_step(k, totals):
        slot = ring.slot_of(before + k, tile)
        plgpu.barrier_wait(refs["filled"].at[slot])
        columns, added = None, []
        for part, (rows, total) in enumerate(zip(mine, totals, strict=True)):

            def multiply(acc, rows=rows, columns=columns):
                slots.multiply(acc, slot, 0, rows, refs)
                if columns is None:
                    columns = slots.column_scales(slot, refs)
                return slots.row_scales(slot, rows, refs), columns, acc[...]

            factors, columns, sums = pl.run_scoped(multiply, ring.accumulator(PART, BLOCK))
            if part == tile.parts - 1:
                plgpu.barrier_arrive(refs["free"].at[slot])
            added.append(total + sums * slots.spread(factors, 0) * slots.spread(columns, 1))
        return tuple(added)

    totals = (slots.zeros(),) * tile.parts
    totals = lax.fori_loop(jnp.int32(0), output.steps, multiply_step, totals)
    wide = pl.ds(pl.multiple_of(output.column, BLOCK), BLOCK)
    first = output.row + block.warpgroup * PART
    rows = [pl.ds(pl.multiple_of(first + part * BLOCK, PART), PART) for part in range(tile.parts)]
    if block.total is None:
        slots.store(totals, refs, block.warpgroup, [block.out.at[output.group, high, wide] for high in rows])
        return

    @pl.when(output.steps > 0)  # the total of a group without rows is there already
    def _():
        for high, value in zip(rows, totals, strict=True):
            block.out.at[output.group, high, wide][...] = value + ring.load(block.total.at[output.group, high, wide])
