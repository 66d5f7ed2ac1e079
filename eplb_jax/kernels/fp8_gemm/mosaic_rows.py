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
from eplb_jax.kernels.fp8_gemm.slots import PART, ScaledTile
from eplb_jax.kernels.fp8_gemm.xla import group_of_blocks
from eplb_jax.kernels.grouped_gemm import ring
from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN, round_up, valid_rows
from eplb_jax.kernels.grouped_gemm.ring import CONSUMERS
from eplb_jax.kernels.once import traced_once
from eplb_jax.kernels.scaled import BLOCK


@dataclasses.dataclass(frozen=True)
class _ScaledRowsBlock:
    """One block of the kernel: the operands, its ring of tiles, and its place.

    Attributes:
      tile: the division of the work.
      all_slots: slots of the ring that a row of the first operand takes; the last may be filled in part.
      lhs, lhs_scales, rhs, rhs_scales, out: the arrays in memory.
      refs: what `slots.scratch` made.
      warpgroup: which of the block's warpgroups this is; the last one loads, the others multiply.
      for_each_tile: calls its argument for each of the block's output tiles with the slots filled before it, the number
        of tiles before it, and the fields of `_ScaledRowsOutput`, and wants the slots after it; returns the last.
    """

    tile: ScaledTile
    all_slots: int
    lhs: Any
    lhs_scales: Any
    rhs: Any
    rhs_scales: Any
    out: Any
    refs: dict[str, Any]
    warpgroup: jax.Array
    for_each_tile: Callable[[Callable[..., jax.Array]], jax.Array]


class _ScaledRowsOutput(NamedTuple):
    """An output tile: its group, how many of its rows the group has, and first row and column.

    And which part of the contraction it sums: its number, first slot and how many slots, and the first scales of the
    matrix.
    """

    group: jax.Array
    valid: jax.Array
    row: jax.Array
    column: jax.Array
    split: jax.Array
    first_slot: jax.Array
    filled_slots: jax.Array
    scales: tuple[jax.Array, ...]


def _matrix_scales(
    scales: Any, group: jax.Array, column: jax.Array, slot: jax.Array, tile: ScaledTile
) -> list[jax.Array]:
    """The scales of a column block of a group's matrix for the steps of some slots; behind the last step anything."""
    steps, last = slots.steps_of(tile), scales.shape[2] - 1
    return [scales[group, column, jnp.minimum(slot * steps + i, last)] for i in range(steps * tile.together)]


@traced_once("dtype", "tile", "cores")
def scaled_rows_times_matrices(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    rhs: jax.Array,
    rhs_scales: jax.Array,
    group_sizes: jax.Array,
    dtype: DTypeLike,
    tile: ScaledTile,
    cores: int,
) -> jax.Array:
    """`eplb_jax.kernels.fp8_gemm.xla.matmul` with a given division of the work.

    Args:
      lhs, lhs_scales, rhs, rhs_scales, group_sizes: as there.
      dtype: of the result.
      tile: an output tile has 128 rows and columns.
      cores: multiprocessors.
    """
    rows, depth = lhs.shape
    columns = rhs.shape[1]
    column_tiles = columns // (BLOCK * tile.cluster)
    workers = cores // tile.cluster
    all_slots = pl.cdiv(depth, tile.k)
    per_split = pl.cdiv(all_slots, tile.splits)
    tile = dataclasses.replace(tile, splits=pl.cdiv(all_slots, per_split))  # none of them is empty

    def body(group_of, valid_of, used, lhs_ref, lhs_scales_ref, rhs_ref, rhs_scales_ref, out_ref):
        def scoped(**refs):
            worker, pair = lax.axis_index("worker"), lax.axis_index("pair")
            row_tiles = used[0]

            def look_up(index):
                split = jnp.int32(0)
                if tile.splits > 1:
                    index, split = lax.div(index, jnp.int32(tile.splits)), lax.rem(index, jnp.int32(tile.splits))
                row_tile, column_tile = ring.snake(index, row_tiles, column_tiles, tile.width)
                column = column_tile * tile.cluster + pair
                group, first_slot = group_of[row_tile], split * per_split
                scales = _matrix_scales(rhs_scales_ref, group, column, first_slot, tile)
                where = valid_of[row_tile], row_tile * BLOCK, column * BLOCK
                slots_of = split, first_slot, jnp.minimum(per_split, all_slots - first_slot)
                return _ScaledRowsOutput(group, *where, *slots_of, tuple(scales))

            def for_each_tile(work):
                total = row_tiles * (column_tiles * tile.splits)
                return ring.turns(total, worker, workers, look_up, work, jnp.int32(0))

            warpgroup = lax.axis_index("warpgroup")
            arrays = lhs_ref, lhs_scales_ref, rhs_ref, rhs_scales_ref, out_ref
            block = _ScaledRowsBlock(tile, all_slots, *arrays, refs, warpgroup, for_each_tile)
            pl.when(warpgroup == CONSUMERS)(lambda: _load(block))
            pl.when(warpgroup < CONSUMERS)(lambda: _compute(block))

        kept = jnp.float32 if tile.splits > 1 else dtype
        pl.run_scoped(scoped, **slots.scratch(tile, [BLOCK], kept), collective_axes="warpgroup")

    blocks = round_up(rows, FP8_ALIGN) // BLOCK
    group_of = jnp.minimum(group_of_blocks(group_sizes, blocks), group_sizes.shape[0] - 1)
    valid = valid_rows(group_sizes, blocks * BLOCK)  # blocks without any come last
    tables = group_of, valid, (valid > 0).sum(dtype=jnp.int32)[None]
    stored = rows if tile.pieces else round_up(rows, PART)
    kept = jnp.float32 if tile.splits > 1 else dtype
    out: Any = jax.ShapeDtypeStruct((tile.splits, stored, columns), kept)
    found = ring.launch(body, "scaled_rows", tile, cores, out, *tables, lhs, lhs_scales, rhs, rhs_scales)
    return (found[0] if tile.splits == 1 else found.sum(0).astype(dtype))[:rows]


def _load(block: _ScaledRowsBlock) -> None:
    """The producer: copies the operands of all of the block's tiles into the ring."""
    plgpu.set_max_registers(40, action="decrease")

    def load_tile(before, _, *fields):
        output = _ScaledRowsOutput(*fields)
        _load_tile(block, before, output)
        return before + output.filled_slots

    ring.drain(block.for_each_tile(load_tile), block.tile, block.refs)


def _load_tile(block: _ScaledRowsBlock, before: jax.Array, output: _ScaledRowsOutput) -> None:
    """Loads a tile, and no more of its rows than needed."""
    tile, steps = block.tile, slots.steps_of(block.tile)
    row = pl.multiple_of(output.row, BLOCK)
    matrix = block.rhs.at[output.group]
    wide = pl.ds(pl.multiple_of(output.column, BLOCK), BLOCK)

    def load(height: int) -> None:
        def load_slot(k, slot):
            at = output.first_slot + k
            deep = pl.ds(at * tile.k, tile.k)
            a = block.lhs.at[pl.ds(row, height), deep]
            scales = block.lhs_scales.at[pl.ds(at * steps, steps), pl.ds(row, BLOCK)]
            slots.fill(slot, before + k >= tile.stages, tile, block.refs, a, matrix.at[wide, deep], [scales])
            return slots.following(slot, tile)

        lax.fori_loop(jnp.int32(0), output.filled_slots, load_slot, ring.slot_of(before, tile))

    pl.when(output.valid > PART)(lambda: load(BLOCK))
    pl.when(output.valid <= PART)(lambda: load(PART))


def _compute(block: _ScaledRowsBlock) -> None:
    """A consumer: multiplies and stores this warpgroup's rows of the block's tiles."""
    plgpu.set_max_registers(232, action="increase")
    begin = block.warpgroup * PART

    def compute_tile(before, _, *fields):
        output = _ScaledRowsOutput(*fields)
        pl.when(output.valid > begin)(lambda: _multiply_and_store(block, before, output))
        pl.when(output.valid <= begin)(lambda: _pass_by(block, before, output))
        return before + output.filled_slots

    block.for_each_tile(compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _multiply_and_store(block: _ScaledRowsBlock, before: jax.Array, output: _ScaledRowsOutput) -> None:
    """Makes this warpgroup's rows of a tile."""
    tile, refs, warpgroup = block.tile, block.refs, block.warpgroup
    column_block = lax.div(output.column, jnp.int32(BLOCK))
    steps, mine = slots.steps_of(tile), slots.rows_of(0, warpgroup)

    def multiply_slots(count: int, begin: jax.Array, carry: Any, number: jax.Array) -> Any:
        """Goes through slots from the first one on, so many times ``count`` together."""

        def multiply_them(k, carry):
            total, slot, scales = carry
            several = [slot]
            for _ in range(count):
                plgpu.barrier_wait(refs["filled"].at[several[-1]])
                several.append(slots.following(several[-1], tile))

            def multiply(*accs):
                for i, acc in enumerate(accs):
                    slots.multiply(acc, several[i // steps], i % steps, mine, refs)
                # While they multiply: the next scales of the matrix take long to arrive.
                at = output.first_slot + begin + (k + 1) * count
                soon = _matrix_scales(block.rhs_scales, output.group, column_block, at, tile)
                rows = [slots.row_scales(several[i // steps] * steps + i % steps, mine, refs) for i in range(len(accs))]
                factors = [row * scale for row, scale in zip(rows, scales, strict=False)]
                added = total
                for i, (acc, factor) in enumerate(zip(accs, factors, strict=True)):
                    sums = plgpu.wgmma_accumulator_load(acc, wait_n=len(accs) - 1 - i)
                    if i % steps == steps - 1:
                        plgpu.barrier_arrive(refs["free"].at[several[i // steps]])
                    added += sums * slots.spread(factor, 0)
                return added, tuple(soon)

            total, scales = pl.run_scoped(multiply, *[ring.accumulator(PART, BLOCK)] * (count * steps))
            return total, several[-1], scales

        return lax.fori_loop(jnp.int32(0), number, multiply_them, carry)

    carry = slots.zeros(), ring.slot_of(before, tile), output.scales
    whole = lax.div(output.filled_slots, jnp.int32(tile.together))
    carry = multiply_slots(tile.together, jnp.int32(0), carry, whole)
    if tile.together > 1:
        done = whole * tile.together
        carry = multiply_slots(1, done, carry, output.filled_slots - done)
    high = pl.ds(pl.multiple_of(output.row + warpgroup * PART, PART), PART)
    wide = pl.ds(pl.multiple_of(output.column, BLOCK), BLOCK)
    slots.store((carry[0],), refs, warpgroup, [block.out.at[output.split, high, wide]])


def _pass_by(block: _ScaledRowsBlock, before: jax.Array, output: _ScaledRowsOutput) -> None:
    """Lets the slots of a tile go that has no row of its group in this warpgroup's part."""

    def skip(_, slot):
        plgpu.barrier_wait(block.refs["filled"].at[slot])
        plgpu.barrier_arrive(block.refs["free"].at[slot])
        return slots.following(slot, block.tile)

    lax.fori_loop(jnp.int32(0), output.filled_slots, skip, ring.slot_of(before, block.tile))
