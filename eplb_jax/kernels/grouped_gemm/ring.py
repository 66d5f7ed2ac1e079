"""What the Mosaic kernels share: a ring of tiles in shared memory, filled by one warpgroup and used by two.

Each block runs on one multiprocessor for the whole product and goes through its share of output tiles. Its third
warpgroup copies operand tiles into the ring as long as slots are free, also those of the next output tile while this
one is being stored; the first two multiply, each for a part of the output tile, and go on independently.
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

from eplb_jax._jax import call_over_last

CONSUMERS = 2
CHUNK = 64
"""Rows and columns of the pieces in which results are stored, and a swizzled tile's columns of 2 bytes."""
OUT_SLOTS = 2


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel divides its work.

    Attributes:
      m, n: rows and columns of an output tile.
      k: the part of the contraction in one slot of the ring.
      stages: slots of the ring.
      split: the side of the output tile, "m" or "n", that the two multiplying warpgroups divide between them; with
        "tiles" they take turns at whole tiles, one storing its result while the other multiplies.
      cluster: 2 lets two blocks take neighbouring column tiles and load their common rows once.
      width: this many row tiles are gone through together, to find operands in the L2 cache.
      cut: this many row tiles of the last group are cut in halves, so that the blocks end together.
    """

    m: int
    n: int
    k: int = 64
    stages: int = 4
    split: str = "m"
    cluster: int = 1
    width: int = 8
    cut: int = 0

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of the output tile that one warpgroup has."""
        if self.split == "tiles":
            return self.m, self.n
        return (self.m // CONSUMERS, self.n) if self.split == "m" else (self.m, self.n // CONSUMERS)

    @property
    def sharers(self) -> int:
        """How many warpgroups use one slot of the ring."""
        return 1 if self.split == "tiles" else CONSUMERS

    def corner(self, warpgroup: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and column of a warpgroup's part."""
        rows, columns = self.part
        zero = jnp.int32(0)
        return warpgroup * rows if self.split == "m" else zero, warpgroup * columns if self.split == "n" else zero


def swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory for tiles that tensor cores and the copy engine read."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128)))


def accumulator(rows: int, columns: int) -> Any:
    """Registers for one warpgroup's part of an output tile, zero at first."""
    return plgpu.ACC((rows, columns), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def scratch(
    tile: Tile, a_shape: tuple[int, int], b_shape: tuple[int, int], dtype: Any, *, pieces: bool = True
) -> dict[str, Any]:
    """The ring, the pieces on their way out, if there are to be any, and the barriers of both directions."""
    if tile.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=tile.sharers, num_barriers=tile.stages)
    else:
        free = plgpu.Barrier(num_arrivals=tile.sharers, num_barriers=tile.stages)
    refs = dict(
        a_ring=swizzled(tile.stages, *a_shape, dtype=dtype),
        b_ring=swizzled(tile.stages, *b_shape, dtype=dtype),
        filled=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages * (CONSUMERS // tile.sharers)),
        free=free,
    )
    if pieces:
        refs["out_pieces"] = swizzled(CONSUMERS, OUT_SLOTS, CHUNK, CHUNK, dtype=dtype)
    return refs


def launch(
    body: Callable[..., None],
    name: str,
    tile: Tile,
    cores: int,
    out: Any,
    *operands: jax.Array,
    total: jax.Array | None = None,
) -> jax.Array:
    """Runs a kernel with one block of three warpgroups per multiprocessor.

    With a total of the result's shape and dtype, that is the last operand, and the result is written over it.
    """
    mesh: dict[str, Any] = dict(
        grid=(cores // tile.cluster,),
        grid_names=("worker",),
        cluster=(tile.cluster,),
        cluster_names=("pair",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
    )
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    if total is None:
        return plgpu.kernel(body, out_type=out, compiler_params=params, **mesh)(*operands)
    return call_over_last(body, plgpu.Mesh(**mesh), name, params, *operands, total)


def slot_of(step: jax.Array, tile: Tile) -> jax.Array:
    """The slot of the ring that a step uses."""
    return lax.rem(step, jnp.int32(tile.stages))


def cut(slot: Any, axis: int, start: jax.Array | int, size: int) -> Any:
    """Some rows (axis 0) or columns (1) of a tile in shared memory."""
    if slot.shape[axis] == size:
        return slot
    return slot.at[pl.ds(start, size)] if axis == 0 else slot.at[:, pl.ds(start, size)]


def owner(turn: jax.Array, tile: Tile) -> jax.Array | int:
    """The first of the warpgroups that work on a tile."""
    return lax.rem(turn, jnp.int32(CONSUMERS)) if tile.split == "tiles" else 0


def filled(step: jax.Array, turn: jax.Array, tile: Tile, refs: Any) -> Any:
    """The barrier of a step's operands. Each owner has its own: one must wait for a barrier every time it falls."""
    return refs["filled"].at[slot_of(step, tile) + owner(turn, tile) * tile.stages]


def fill(step: jax.Array, turn: jax.Array, tile: Tile, refs: Any, a_source: Any, b_source: Any) -> None:
    """Copies the operands of one step into its slot, as soon as the warpgroups have left it; maybe not all its rows."""
    slot = slot_of(step, tile)
    barrier = filled(step, turn, tile, refs)

    @pl.when(step >= tile.stages)
    def _():
        plgpu.barrier_wait(refs["free"].at[slot])

    common = "pair" if tile.cluster > 1 else None
    a_slot = refs["a_ring"].at[slot]
    if a_source.shape != a_slot.shape:
        a_slot = a_slot.at[: a_source.shape[0]]
    plgpu.copy_gmem_to_smem(a_source, a_slot, barrier, collective_axes=common)
    plgpu.copy_gmem_to_smem(b_source, refs["b_ring"].at[slot], barrier)


def drain(steps: jax.Array, tile: Tile, refs: Any) -> None:
    """Waits until the last slots are left: a block must not end while its pair still reaches into it."""

    def wait(step, _):
        plgpu.barrier_wait(refs["free"].at[slot_of(step, tile)])

    lax.fori_loop(jnp.maximum(steps - tile.stages, 0), steps, wait, None)


def release(step: jax.Array, tile: Tile, refs: Any) -> None:
    """Says that this warpgroup has left a step's slot."""
    plgpu.barrier_arrive(refs["free"].at[slot_of(step, tile)])


def multiply(acc: Any, first: Any, begin: Any, end: Any, turn: Any, tile: Tile, refs: Any, operands: Any) -> None:
    """Adds the products of steps [begin, end) to the accumulator; one product is still running afterwards.

    A slot is left one step late, when the product that reads it is known to be done. The first step of an output tile
    is ``first``; nothing runs before it.
    """

    def step(index, _):
        plgpu.barrier_wait(filled(index, turn, tile, refs))
        plgpu.wgmma(acc, *operands(slot_of(index, tile)))
        plgpu.wgmma_wait(1)
        pl.when(index > first)(lambda: release(index - 1, tile, refs))

    lax.fori_loop(begin, end, step, None)


def store(values: jax.Array, valid: jax.Array | None, tile: Tile, refs: Any, consumer: jax.Array, target: Any) -> None:
    """Stores a warpgroup's part of an output tile piece by piece.

    Args:
      values: the part.
      valid: how many of its rows are to be stored, rounded up to 8; None for all.
      tile: its division.
      refs: the kernel's scratch.
      consumer: the warpgroup.
      target: gives the destination of `rows` rows and CHUNK columns, from its first row and column within the part.
    """
    rows, columns = values.shape
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    pieces = [(m, n) for m in range(0, rows, CHUNK) for n in range(0, columns, CHUNK)]
    for number, (m, n) in enumerate(pieces):
        piece = refs["out_pieces"].at[consumer, number % OUT_SLOTS]

        def write(m=m, n=n, number=number, piece=piece):
            if number >= OUT_SLOTS:
                plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
            piece[...] = values[m : m + CHUNK, n : n + CHUNK]
            plgpu.commit_smem()
            if valid is None:
                plgpu.copy_smem_to_gmem(piece, target(m, n, CHUNK))
                return
            eights = lax.div(valid - m + 7, jnp.int32(8))

            @pl.when(eights >= CHUNK // 8)
            def _():
                plgpu.copy_smem_to_gmem(piece, target(m, n, CHUNK))

            @pl.when(eights < CHUNK // 8)
            def _():
                for part in (32, 16, 8):
                    # The larger parts that are stored come before this one.
                    begin = pl.multiple_of(lax.div(eights, jnp.int32(part // 4)) * (part * 2), 2 * part)

                    @pl.when(lax.rem(lax.div(eights, jnp.int32(part // 8)), jnp.int32(2)) == 1)
                    def _(part=part, begin=begin):
                        plgpu.copy_smem_to_gmem(piece.at[pl.ds(begin, part)], target(m + begin, n, part))

        if valid is None or m == 0:
            write()
        else:
            pl.when(valid > m)(write)


def load(source: Any) -> jax.Array:
    """Numbers of the GPU's memory in registers, each where its sum is."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()  # which earlier JAX insists on
    return plgpu.load(source, *index, layout=plgpu.Layout.WGMMA, optimized=False)


def snake(index: jax.Array, num_rows: jax.Array | int, num_columns: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of the index-th tile: ``width`` rows of tiles together, back and forth over the columns."""
    span = width * num_columns
    band = lax.div(index, jnp.int32(span))
    within = index - band * span
    height = jnp.clip(num_rows - band * width, 1, width)
    column = lax.div(within, height)
    row = band * width + within - column * height
    return row, jnp.where(lax.rem(band, jnp.int32(2)) == 0, column, num_columns - 1 - column)


def turns(total: jax.Array, worker: jax.Array, workers: int, look_up: Callable, work: Callable, state: Any) -> Any:
    """Goes through the tiles worker, worker + workers, ... below the total.

    Args:
      total: how many tiles there are.
      worker: the first tile.
      workers: the step.
      look_up: reads what is to be known of a tile from memory; done one tile ahead, as it takes long.
      work: gives the next state, from the state, the number of tiles before this one, and what `look_up` returned.
      state: the first.

    Returns:
      The last state.
    """

    def known(turn):
        return look_up(jnp.clip(worker + turn * workers, 0, jnp.maximum(total - 1, 0)))

    def step(turn, carry):
        state, now = carry
        soon = known(turn + 1)
        return work(state, turn, *now), soon

    mine = lax.div(jnp.maximum(total - worker + (workers - 1), 0), jnp.int32(workers))
    return lax.fori_loop(jnp.int32(0), mine, step, (state, known(jnp.int32(0))))[0]
