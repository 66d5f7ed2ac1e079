"""What the kernels of scaled 8-bit products share: the slots of their ring, and how results leave.

A block is as in `eplb_jax.kernels.grouped_gemm.ring`: its third warpgroup loads, the first two multiply. A slot holds
one or two steps, each 128 of the contraction, which share scales: the product of a step is summed by itself, scaled and
added to the total. Meanwhile the next step of the slot is multiplied, and the other warpgroup's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from eplb_jax.kernels.grouped_gemm.ring import CONSUMERS, Tile
from eplb_jax.kernels.scaled import BLOCK, E4M3

LINE = 128
"""Bytes of a swizzled tile's row."""
PART = BLOCK // CONSUMERS
"""Rows of each 128 of the output tile that one warpgroup has."""


@dataclasses.dataclass(frozen=True)
class ScaledTile(Tile):
    """A `Tile` of 128 rows, or 256 of a weight gradient, and 128 columns: each warpgroup has 64 rows of each 128.

    Attributes:
      pieces: how many of its pieces of a result, 128 bytes wide, a warpgroup can have on their way out; 0: results go
        to memory from registers, which is fast for float32 alone.
      together: how many slots are multiplied before the first of their sums is scaled.
      splits: between how many tiles the contraction of an output tile is divided; their sums are added afterwards.
    """

    pieces: int = 1
    together: int = 1
    splits: int = 1

    @property
    def parts(self) -> int:
        """How many times 64 rows a warpgroup has."""
        return self.m // BLOCK


def scratch(tile: ScaledTile, vectors: list[int], dtype: DTypeLike) -> dict[str, Any]:
    """The ring of operands, and of scales in rows of these lengths a step, and the barriers.

    Also the pieces of results of this dtype on their way out, if there are to be any.
    """
    if tile.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=CONSUMERS, num_barriers=tile.stages)
    else:
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages)
    refs = dict(
        a_ring=_swizzled(tile.stages, tile.m, tile.k, dtype=E4M3),
        b_ring=_swizzled(tile.stages, BLOCK, tile.k, dtype=E4M3),
        scale_rings=[plgpu.SMEM((tile.stages * steps_of(tile), length), jnp.float32) for length in vectors],
        filled=plgpu.Barrier(num_arrivals=2 + len(vectors), num_barriers=tile.stages),
        free=free,
    )
    if tile.pieces:
        refs["out_pieces"] = _swizzled(CONSUMERS, tile.pieces, PART, LINE // jnp.dtype(dtype).itemsize, dtype=dtype)
    return refs


def steps_of(tile: Tile) -> int:
    """Steps of a slot."""
    return tile.k // BLOCK


def _swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory for tiles that tensor cores and the copy engine read."""
    tiling = plgpu.TilingTransform((8, LINE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(LINE)))


def following(slot: jax.Array, tile: Tile) -> jax.Array:
    """The slot after this one; dividing the number of slots used before takes longer."""
    return jnp.where(slot == tile.stages - 1, 0, slot + 1)


def fill(
    slot: jax.Array, again: jax.Array, tile: Tile, refs: dict[str, Any], a_source: Any, b_source: Any, scales: list[Any]
) -> None:
    """Copies operands into a slot, as soon as the warpgroups have left it where it is used again.

    The source of the first operand may have fewer rows than a slot; those of scales have a row a step.
    """
    barrier = refs["filled"].at[slot]

    @pl.when(again)
    def _():
        plgpu.barrier_wait(refs["free"].at[slot])

    a_slot = refs["a_ring"].at[slot]
    if a_source.shape != a_slot.shape:
        a_slot = a_slot.at[: a_source.shape[0]]
    plgpu.copy_gmem_to_smem(a_source, a_slot, barrier, collective_axes="pair" if tile.cluster > 1 else None)
    plgpu.copy_gmem_to_smem(b_source, refs["b_ring"].at[slot], barrier)
    steps = steps_of(tile)
    for source, target in zip(scales, refs["scale_rings"], strict=True):
        plgpu.copy_gmem_to_smem(source, target.at[pl.ds(slot * steps, steps)], barrier)


def rows_of(part: int, warpgroup: jax.Array) -> Any:
    """The rows of an output tile that are a warpgroup's, in some 128 of its rows."""
    return pl.ds(part * BLOCK + warpgroup * PART, PART)


def multiply(acc: Any, slot: jax.Array, step: int, mine: Any, refs: dict[str, Any]) -> None:
    """Starts the product of some rows of the first operand and the second one, for a step of the slot."""
    deep = pl.ds(step * BLOCK, BLOCK)
    a, b = refs["a_ring"].at[slot], refs["b_ring"].at[slot]
    if a.shape[1] != BLOCK:
        a, b = a.at[:, deep], b.at[:, deep]
    plgpu.wgmma(acc, a.at[mine], b.transpose((1, 0)))


def row_scales(index: jax.Array, mine: Any, refs: dict[str, Any]) -> jax.Array:
    """The scales of some rows for the index-th step of the ring, each where its row's sums are."""
    return plgpu.layout_cast(refs["scale_rings"][0].at[index].at[mine][...], plgpu.Layout.WGMMA.reduce(1))


def column_scales(index: jax.Array, refs: dict[str, Any]) -> jax.Array:
    """The scales of the second operand's rows for the index-th step of the ring, each where its column's sums are."""
    return plgpu.layout_cast(refs["scale_rings"][1][index], plgpu.Layout.WGMMA.reduce(0))


def spread(scales: jax.Array, axis: int) -> jax.Array:
    """Scales of rows (axis 0) or columns (1) for each sum of a part."""
    return lax.broadcast_in_dim(scales, (PART, BLOCK), (axis,))


def zeros() -> jax.Array:
    """A warpgroup's part of an output tile before anything was added."""
    return plgpu.layout_cast(jnp.zeros((PART, BLOCK), jnp.float32), plgpu.Layout.WGMMA)


def store(values: tuple[jax.Array, ...], refs: dict[str, Any], consumer: jax.Array, targets: list[Any]) -> None:
    """Stores a warpgroup's parts of an output tile: through shared memory, which leaves out rows behind the last.

    As many pieces as there is room for are written together, and none waits for those of the tile before.

    Args:
      values: the parts, float32.
      refs: the kernel's scratch; without pieces the parts are stored as they are, all their rows.
      consumer: the warpgroup.
      targets: the destination of each part.
    """
    if "out_pieces" not in refs:  # four threads have 32 neighbouring bytes of float32: memory takes them well
        for value, target in zip(values, targets, strict=True):
            target[...] = value.astype(target.dtype)
        return
    pieces = refs["out_pieces"].at[consumer]
    together, _, width = pieces.shape
    every = [(*each, column) for each in zip(values, targets, strict=True) for column in range(0, BLOCK, width)]
    for batch in _batches(every, together):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, (value, target, column) in enumerate(batch):
            pieces.at[i][...] = value[:, column : column + width].astype(target.dtype)
        plgpu.commit_smem()
        for i, (_, target, column) in enumerate(batch):
            plgpu.copy_smem_to_gmem(pieces.at[i], target.at[:, pl.ds(column, width)])


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
