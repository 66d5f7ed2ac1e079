"""The grouped product of scaled 8-bit rows and matrices on Hopper GPUs: the forward pass, and the rows' gradient."""

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
from eplb_jax.kernels.fp8_gemm.slots import PART
from eplb_jax.kernels.grouped_gemm import ring
from eplb_jax.kernels.grouped_gemm.ring import CONSUMERS, Tile
from eplb_jax.kernels.once import traced_once
from eplb_jax.kernels.scaled import BLOCK


@dataclasses.dataclass(frozen=True)
class _ScaledRowsBlock:
    """One block of the kernel: the operands, its ring of tiles, and its place.

    Attributes:
      tile: the division of the work.
      filled_slots: slots of the ring that an output tile takes; the last may be filled in part.
      lhs, lhs_scales, rhs, rhs_scales, out: the arrays in memory.
      refs: what `slots.scratch` made.
      warpgroup: which of the block's warpgroups this is; the last one loads, the others multiply.
      for_each_tile: calls its argument for each of the block's output tiles with the slots filled before it, the number
        of tiles before it, and the fields of `_ScaledRowsOutput`, and wants the slots after it; returns the last.
    """

    tile: Tile
    filled_slots: int
    lhs: Any
    lhs_scales: Any
    rhs: Any
    rhs_scales: Any
    out: Any
    refs: dict[str, Any]
    warpgroup: jax.Array
    for_each_tile: Callable[[Callable[..., jax.Array]], jax.Array]


class _ScaledRowsOutput(NamedTuple):
    """An output tile: its group, how many of its rows the group has, and first row and column; the first scales."""

    group: jax.Array
    valid: jax.Array
    row: jax.Array
    column: jax.Array
    scales: tuple[jax.Array, ...]


def _matrix_scales(scales: Any, group: jax.Array, column: jax.Array, slot: jax.Array, tile: Tile) -> list[jax.Array]:
    """The scales of a column block of a group's matrix for the steps of a slot; behind the last step anything."""
    steps, last = slots.steps_of(tile), scales.shape[2] - 1
    return [scales[group, column, jnp.minimum(slot * steps + i, last)] for i in range(steps)]


@traced_once("dtype", "tile", "cores")
def scaled_rows_times_matrices(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    rhs: jax.Array,
    rhs_scales: jax.Array,
    group_of: jax.Array,
    valid: jax.Array,
    dtype: DTypeLike,
    tile: Tile,
    cores: int,
) -> jax.Array:
    """`eplb_jax.kernels.fp8_gemm.xla.matmul` with a given division of the work.

    Args:
      lhs, lhs_scales, rhs, rhs_scales: as there.
      group_of: the group of each block of 128 rows; int32.
      valid: how many rows of each block belong to it; blocks without any come last.
      dtype: of the result.
      tile: its stages, cluster and width; an output tile has 128 rows and columns.
      cores: multiprocessors.
    """
    rows, depth = lhs.shape
    columns = rhs.shape[1]
    column_tiles = columns // (BLOCK * tile.cluster)
    workers = cores // tile.cluster

    def body(group_of, valid_of, used, lhs_ref, lhs_scales_ref, rhs_ref, rhs_scales_ref, out_ref):
        def scoped(**refs):
            worker, pair = lax.axis_index("worker"), lax.axis_index("pair")
            row_tiles = used[0]

            def look_up(index):
                row_tile, column_tile = ring.snake(index, row_tiles, column_tiles, tile.width)
                column = column_tile * tile.cluster + pair
                group = group_of[row_tile]
                scales = _matrix_scales(rhs_scales_ref, group, column, jnp.int32(0), tile)
                return _ScaledRowsOutput(group, valid_of[row_tile], row_tile * BLOCK, column * BLOCK, tuple(scales))

            def for_each_tile(work):
                return ring.turns(row_tiles * column_tiles, worker, workers, look_up, work, jnp.int32(0))

            warpgroup = lax.axis_index("warpgroup")
            arrays = lhs_ref, lhs_scales_ref, rhs_ref, rhs_scales_ref, out_ref
            block = _ScaledRowsBlock(tile, pl.cdiv(depth, tile.k), *arrays, refs, warpgroup, for_each_tile)
            pl.when(warpgroup == CONSUMERS)(lambda: _load(block))
            pl.when(warpgroup < CONSUMERS)(lambda: _compute(block))

        pl.run_scoped(scoped, **slots.scratch(tile, 1, dtype), collective_axes="warpgroup")

    out: Any = jax.ShapeDtypeStruct((rows, columns), dtype)
    used = (valid > 0).sum(dtype=jnp.int32)[None]
    return ring.launch(body, "scaled_rows", tile, cores, out, group_of, valid, used, lhs, lhs_scales, rhs, rhs_scales)


def _load(block: _ScaledRowsBlock) -> None:
    """The producer: copies the operands of all of the block's tiles into the ring."""
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(before, _, *output):
        _load_tile(block, before, _ScaledRowsOutput(*output))
        return before + block.filled_slots

    ring.drain(block.for_each_tile(load_tile), block.tile, block.refs)


def _load_tile(block: _ScaledRowsBlock, before: jax.Array, output: _ScaledRowsOutput) -> None:
    """Loads a tile, and no more of its rows than needed."""
    tile, steps = block.tile, slots.steps_of(block.tile)
    row = pl.multiple_of(output.row, BLOCK)
    matrix = block.rhs.at[output.group]
    wide = pl.ds(pl.multiple_of(output.column, BLOCK), BLOCK)

    def load(height: int) -> None:
        def load_slot(k, slot):
            deep = pl.ds(k * tile.k, tile.k)
            a = block.lhs.at[pl.ds(row, height), deep]
            scales = block.lhs_scales.at[pl.ds(k * steps, steps), pl.ds(row, BLOCK)]
            slots.fill(slot, before + k >= tile.stages, tile, block.refs, a, matrix.at[wide, deep], [scales])
            return slots.following(slot, tile)

        lax.fori_loop(jnp.int32(0), jnp.int32(block.filled_slots), load_slot, ring.slot_of(before, tile))

    pl.when(output.valid > PART)(lambda: load(BLOCK))
    pl.when(output.valid <= PART)(lambda: load(PART))


def _compute(block: _ScaledRowsBlock) -> None:
    """A consumer: multiplies and stores this warpgroup's rows of the block's tiles."""
    plgpu.set_max_registers(232, action="increase")
    begin = block.warpgroup * PART

    def compute_tile(before, _, *fields):
        output = _ScaledRowsOutput(*fields)
        pl.when(output.valid > begin)(lambda: _multiply_and_store(block, before, output))
        pl.when(output.valid <= begin)(lambda: _pass_by(block, before))
        return before + block.filled_slots

    block.for_each_tile(compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _multiply_and_store(block: _ScaledRowsBlock, before: jax.Array, output: _ScaledRowsOutput) -> None:
    """Makes this warpgroup's rows of a tile."""
    tile, refs, warpgroup = block.tile, block.refs, block.warpgroup
    column_block = lax.div(output.column, jnp.int32(BLOCK))
    steps = slots.steps_of(tile)

    def multiply_slot(k, carry):
        total, slot, scales = carry
        plgpu.barrier_wait(refs["filled"].at[slot])

        def multiply(*accs):
            for step, acc in enumerate(accs):
                slots.multiply(acc, slot, step, warpgroup, refs)
            # While they multiply: the next scales of the matrix take long to arrive.
            next_scales = _matrix_scales(block.rhs_scales, output.group, column_block, k + 1, tile)
            first = slot * steps
            factors = [slots.row_scales(first + step, warpgroup, refs) * scale for step, scale in enumerate(scales)]
            added = total
            for step, (acc, factor) in enumerate(zip(accs, factors, strict=True)):
                sums = plgpu.wgmma_accumulator_load(acc, wait_n=steps - 1 - step)
                if step == steps - 1:
                    plgpu.barrier_arrive(refs["free"].at[slot])
                added += sums * slots.spread(factor, 0)
            return added, tuple(next_scales)

        accs = [ring.accumulator(PART, BLOCK)] * steps
        total, scales = pl.run_scoped(multiply, *accs)
        return total, slots.following(slot, tile), scales

    carry = slots.zeros(), ring.slot_of(before, tile), output.scales
    total, *_ = lax.fori_loop(jnp.int32(0), jnp.int32(block.filled_slots), multiply_slot, carry)
    high = pl.ds(pl.multiple_of(output.row + warpgroup * PART, PART), PART)
    target = block.out.at[high, pl.ds(pl.multiple_of(output.column, BLOCK), BLOCK)]
    slots.store(total, refs, warpgroup, target)


def _pass_by(block: _ScaledRowsBlock, before: jax.Array) -> None:
    """Lets the slots of a tile go that has no row of its group in this warpgroup's part."""

    def skip(_, slot):
        plgpu.barrier_wait(block.refs["filled"].at[slot])
        plgpu.barrier_arrive(block.refs["free"].at[slot])
        return slots.following(slot, block.tile)

    lax.fori_loop(jnp.int32(0), jnp.int32(block.filled_slots), skip, ring.slot_of(before, block.tile))
