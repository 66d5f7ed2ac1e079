"""What the kernels of scaled 8-bit products share: the slots of their ring, and how results leave.

A block is as in `eplb_jax.kernels.grouped_gemm.ring`: its third warpgroup loads, the first two multiply. A slot holds
128 of the contraction, which share scales, so its product is summed by itself, scaled and added to the total. While one
of the warpgroups does that, the other one's product runs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from eplb_jax.kernels.grouped_gemm import ring
from eplb_jax.kernels.grouped_gemm.ring import CONSUMERS, Tile
from eplb_jax.kernels.scaled import BLOCK, E4M3

LINE = 128
"""Bytes of a swizzled tile's row."""
PART = BLOCK // CONSUMERS
"""Rows of the output tile that one warpgroup has."""


def scratch(tile: Tile, vectors: int, dtype: DTypeLike) -> dict[str, Any]:
    """The ring of operands and of ``vectors`` rows of scales, the pieces on their way out, and the barriers."""
    itemsize = jnp.dtype(dtype).itemsize
    if tile.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=CONSUMERS, num_barriers=tile.stages)
    else:
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages)
    return dict(
        a_ring=_swizzled(tile.stages, BLOCK, BLOCK, dtype=E4M3),
        b_ring=_swizzled(tile.stages, BLOCK, BLOCK, dtype=E4M3),
        scale_rings=[plgpu.SMEM((tile.stages, BLOCK), jnp.float32)] * vectors,
        out_pieces=_swizzled(CONSUMERS, 2 if tile.stages < 6 else 1, PART, LINE // itemsize, dtype=dtype),
        filled=plgpu.Barrier(num_arrivals=2 + vectors, num_barriers=tile.stages),
        free=free,
    )


def _swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory for tiles that tensor cores and the copy engine read."""
    tiling = plgpu.TilingTransform((8, LINE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(LINE)))


def fill(step: jax.Array, tile: Tile, refs: dict[str, Any], a_source: Any, b_source: Any, scales: list[Any]) -> None:
    """Copies the operands of one step into its slot, as soon as the warpgroups have left it; maybe not all rows of a."""
    slot = ring.slot_of(step, tile)
    barrier = refs["filled"].at[slot]

    @pl.when(step >= tile.stages)
    def _():
        plgpu.barrier_wait(refs["free"].at[slot])

    a_slot = refs["a_ring"].at[slot]
    if a_source.shape != a_slot.shape:
        a_slot = a_slot.at[: a_source.shape[0]]
    plgpu.copy_gmem_to_smem(a_source, a_slot, barrier, collective_axes="pair" if tile.cluster > 1 else None)
    plgpu.copy_gmem_to_smem(b_source, refs["b_ring"].at[slot], barrier)
    for source, target in zip(scales, refs["scale_rings"], strict=True):
        plgpu.copy_gmem_to_smem(source, target.at[slot], barrier)


def operands(slot: jax.Array, warpgroup: jax.Array, refs: dict[str, Any]) -> tuple[Any, Any]:
    """This warpgroup's rows of the first operand, and the second one transposed."""
    mine = pl.ds(warpgroup * PART, PART)
    return refs["a_ring"].at[slot].at[mine], refs["b_ring"].at[slot].transpose((1, 0))


def row_scales(slot: jax.Array, warpgroup: jax.Array, refs: dict[str, Any]) -> jax.Array:
    """The scales of this warpgroup's rows, each where its row's sums are."""
    mine = refs["scale_rings"][0].at[slot].at[pl.ds(warpgroup * PART, PART)]
    return plgpu.layout_cast(mine[...], plgpu.Layout.WGMMA.reduce(1))


def column_scales(slot: jax.Array, refs: dict[str, Any]) -> jax.Array:
    """The scales of the second operand's rows, each where its column's sums are."""
    return plgpu.layout_cast(refs["scale_rings"][1][slot], plgpu.Layout.WGMMA.reduce(0))


def zeros() -> jax.Array:
    """A warpgroup's part of an output tile before anything was added."""
    return plgpu.layout_cast(jnp.zeros((PART, BLOCK), jnp.float32), plgpu.Layout.WGMMA)


def store(values: jax.Array, refs: dict[str, Any], consumer: jax.Array, target: Any) -> None:
    """Stores a warpgroup's part of an output tile piece by piece.

    Args:
      values: the part, float32.
      refs: the kernel's scratch.
      consumer: the warpgroup.
      target: the destination of the part.
    """
    pieces = refs["out_pieces"]
    _, slots, _, width = pieces.shape
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for number, column in enumerate(range(0, BLOCK, width)):
        if number >= slots:
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        piece = pieces.at[consumer, number % slots]
        piece[...] = values[:, column : column + width].astype(pieces.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(piece, target.at[:, pl.ds(column, width)])
