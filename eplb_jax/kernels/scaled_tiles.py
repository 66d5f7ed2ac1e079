"""What the Mosaic kernels share that make numbers of 8 bits: tiles of 128 by 128, and how blocks go through them.

Two warpgroups have a tile together. A ring of slots in shared memory keeps bytes on their way in, and the
copy engine takes the results from there. Whoever makes the column-wise copy of a tile reads half of its columns
transposed, so that scales along the rows are found, and numbers stored, as those of rows are: two neighbouring numbers
of a row lie beside each other in memory, come into one register, and change places with those of the next row by a
shuffle. Nothing of 8 bits is ever transposed, and no maximum is needed across warps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from eplb_jax.kernels.permute import turns
from eplb_jax.kernels.scaled import BLOCK, E4M3, largest_of, scale_of

HALVES = 2
HALF = BLOCK // HALVES
"""Rows, or columns, of a tile that one warpgroup has."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a kernel divides its work.

    Attributes:
      stages: slots of the ring.
      pairs: pairs of warpgroups of a block, each with its own tiles; there is one block on a multiprocessor. Two pairs
        leave a thread 128 registers, one pair 255.
      down: whether pairs that run side by side have tiles below each other, and not beside each other.
    """

    stages: int
    pairs: int
    down: bool = False

    def of(self, dtype: Any) -> Plan:
        """The plan for what is read in this dtype: half the slots where they are twice as large as for bfloat16."""
        return dataclasses.replace(self, stages=max(self.stages * 2 // max(jnp.dtype(dtype).itemsize, 2), 1))


def pair_and_half() -> tuple[jax.Array, jax.Array]:
    """Which pair of its block a warpgroup belongs to, and which half of a tile it has."""
    warpgroup = lax.axis_index("warpgroup")
    pair = lax.div(warpgroup, jnp.int32(HALVES))
    return pair, warpgroup - pair * HALVES


def whole(index: jax.Array) -> Any:
    """The rows or columns of a tile in memory."""
    return pl.ds(index * BLOCK, BLOCK)


def part(index: jax.Array, half: jax.Array) -> Any:
    """The rows or columns of half a tile in memory."""
    return pl.ds(index * BLOCK + half * HALF, HALF)


def tiled(*shape: int, dtype: Any, line: int = 128) -> Any:
    """Shared memory that rows are read and written of without conflicts, in lines of so many bytes.

    Halves of the columns of a tile need lines of at most as many bytes.
    """
    numbers = line // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, numbers)), plgpu.SwizzleTransform(line)))


def upright(x: jax.Array) -> jax.Array:
    """Half of the rows of a tile from shared memory, in float32: each row lies in four threads of one warp."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA).astype(jnp.float32)


def turned(tile: Any, half: Any) -> jax.Array:
    """Half of the columns of a tile in shared memory, transposed, in float32, as `upright` has rows."""
    x = plgpu.layout_cast(tile.at[:, half].transpose((1, 0))[...], plgpu.Layout.WGMMA_TRANSPOSED)
    if x.dtype == E4M3:
        x = x.astype(jnp.float16)  # exact, and wide enough for the shuffle
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA).astype(jnp.float32)


def of_rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each row, in all its columns."""
    return lax.broadcast_in_dim(plgpu.layout_cast(vector, plgpu.Layout.WGMMA.reduce(1)), shape, (0,))


def of_columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each column, in all its rows."""
    return lax.broadcast_in_dim(plgpu.layout_cast(vector, plgpu.Layout.WGMMA.reduce(0)), shape, (1,))


def valid_columns(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Zeros behind the first columns: of a transposed tile, in place of rows that belong to no group."""
    column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(column < valid, x, jnp.float32(0))


def put(x: jax.Array, numbers: Any, scales: Any, power_of_two: bool) -> None:
    """Quantises rows of 128 into shared memory."""
    scale, back = scale_of(largest_of(x, 1), power_of_two=power_of_two)
    scales[...] = scale
    numbers[...] = (x * lax.broadcast_in_dim(back, x.shape, (0,))).astype(E4M3)


def go_through(
    plan: Plan,
    tiles: int,
    unit: jax.Array,
    units: int,
    load: Callable[[jax.Array, jax.Array], None],
    work: Callable[[jax.Array, jax.Array], Callable[[], None]],
    left: Any = None,
) -> None:
    """Goes through a share of the tiles.

    Args:
      plan: the division of the work.
      tiles: how many there are.
      unit, units: which pair, or single warpgroup, of its block this is of how many.
      load: starts the copies of a tile into a slot of the ring.
      work: waits for them, makes the results in shared memory, and returns what starts their copies to memory.
      left: the barrier at which warpgroups meet that read a slot together; None: each has its own.
    """
    worker, workers = lax.axis_index("worker") * units + unit, lax.axis_size("worker") * units
    mine = turns(tiles, worker, workers)

    def fill(turn: jax.Array, _: Any = None) -> None:
        load(worker + turn * workers, lax.rem(turn, jnp.int32(plan.stages)))

    def step(turn: jax.Array, _: Any) -> None:
        store = work(worker + turn * workers, lax.rem(turn, jnp.int32(plan.stages)))
        plgpu.commit_smem()  # all threads have read the slot, too
        if left is not None:
            plgpu.barrier_arrive(left)
        store()
        plgpu.commit_smem_to_gmem_group()
        if left is not None:
            plgpu.barrier_wait(left)
        pl.when(turn + plan.stages < mine)(lambda: fill(turn + plan.stages))

    lax.fori_loop(jnp.int32(0), jnp.minimum(mine, plan.stages), fill, None)
    lax.fori_loop(jnp.int32(0), mine, step, None)
    plgpu.wait_smem_to_gmem(0)


def place(tile: jax.Array, high: int, wide: int, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Row and column of a tile among ``high`` rows and ``wide`` columns of tiles."""
    if plan.down:
        column = lax.div(tile, jnp.int32(high))
        return tile - column * high, column
    row = lax.div(tile, jnp.int32(wide))
    return row, tile - row * wide


def all_valid(valid: jax.Array | None, blocks: int) -> jax.Array:
    """How many rows of each 128 count, where None says all."""
    return jnp.full(blocks, BLOCK, jnp.int32) if valid is None else valid
