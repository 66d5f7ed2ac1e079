"""Quantisation on Hopper GPUs in one pass over memory: our own kernels, in Pallas' Mosaic dialect.

`eplb_jax.kernels.scaled_tiles` says how they go through tiles. Each operation equals its form by XLA bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.once import traced_once
from eplb_jax.kernels.permute import launch
from eplb_jax.kernels.scaled import BLOCK, E4M3, ScaledMatrices, ScaledRows, largest_of, scale_of
from eplb_jax.kernels.scaled_tiles import (
    HALF,
    HALVES,
    TilePlan,
    all_valid,
    go_through,
    of_columns,
    pair_and_half,
    part,
    place,
    put,
    tiled,
    turned,
    upright,
    valid_columns,
    whole,
)

ROWS = TilePlan(2, 2)
BOTH = TilePlan(4, 1)
COLUMNS = TilePlan(3, 2, down=True)
MATRICES = TilePlan(4, 1)
"""The fastest on an H200 of those that `examples/benchmarks/fp8_quantise.py --plans` tries."""


def why_not(x: Any) -> str | None:
    """Why the kernels do not quantise an array of this shape, beside what no backend takes; None if they do.

    >>> why_not(jax.ShapeDtypeStruct((72, 128), "bfloat16"))
    '72 rows are no multiple of 64'
    """
    if x.shape[-2] % HALF:
        return f"{x.shape[-2]} rows are no multiple of {HALF}"
    return None if x.size else f"its shape is {x.shape}"


@traced_once("cores", "power_of_two", "plan")
def quantise_rows(x: Float[Array, "R K"], *, cores: int, power_of_two: bool, plan: TilePlan = ROWS) -> ScaledRows:
    """`eplb_jax.kernels.quantise.quantise_rows`: each warpgroup has 64 rows of a column of tiles for itself.

    Args:
      x: for which `why_not` has no reason.
      cores: multiprocessors.
      power_of_two: see `eplb_jax.kernels.scaled.scale_of`.
      plan: how to divide the work.
    """
    rows, width = x.shape
    high, wide = rows // HALF, width // BLOCK
    plan = plan.of(x.dtype)
    warpgroups = HALVES * plan.pairs

    def body(x_ref, numbers_ref, scales_ref):
        def scoped(ring, numbers, scales, filled):
            me = lax.axis_index("warpgroup")
            ring, numbers, scales = ring.at[me], numbers.at[me], scales.at[me]

            def corner(tile):
                row, column = place(tile, high, wide, plan)
                return pl.ds(row * HALF, HALF), column

            def load(tile, slot):
                here, column = corner(tile)
                plgpu.copy_gmem_to_smem(
                    x_ref.at[here, whole(column)], ring.at[slot], filled.at[me * plan.stages + slot]
                )

            def work(tile, slot):
                here, column = corner(tile)
                plgpu.barrier_wait(filled.at[me * plan.stages + slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                put(upright(ring[slot]), numbers, scales, power_of_two)

                def store():
                    plgpu.copy_smem_to_gmem(numbers, numbers_ref.at[here, whole(column)], commit_group=False)
                    plgpu.copy_smem_to_gmem(scales, scales_ref.at[column, here], commit_group=False)

                return store

            go_through(plan, high * wide, me, warpgroups, load, work)

        pl.run_scoped(
            scoped,
            tiled(warpgroups, plan.stages, HALF, BLOCK, dtype=x.dtype),
            tiled(warpgroups, HALF, BLOCK, dtype=E4M3),
            plgpu.SMEM((warpgroups, HALF), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=warpgroups * plan.stages),
            collective_axes="warpgroup",
        )

    out = jax.ShapeDtypeStruct(x.shape, E4M3), jax.ShapeDtypeStruct((wide, rows), jnp.float32)
    return ScaledRows(*launch(body, "quantise_rows", cores, warpgroups, out, x))


@traced_once("cores", "power_of_two", "plan")
def quantise(
    x: Float[Array, "R K"],
    valid: Int[Array, " blocks"] | None = None,
    *,
    cores: int,
    power_of_two: bool,
    plan: TilePlan = BOTH,
) -> tuple[ScaledRows, ScaledRows]:
    """`eplb_jax.kernels.quantise.quantise`: each warpgroup makes half the rows and half the columns of a tile.

    Args:
      x: for which `why_not` has no reason.
      valid: how many rows of each 128 belong to their group; None: all.
      cores, power_of_two, plan: see `quantise_rows`.
    """
    rows, width = x.shape
    high, wide = rows // BLOCK, width // BLOCK
    plan = plan.of(x.dtype)

    def body(valid_of, x_ref, rows_ref, row_scales_ref, columns_ref, column_scales_ref):
        def scoped(ring, numbers, scales, filled, left):
            pair, me = pair_and_half()
            half = pl.ds(me * HALF, HALF)
            ring, left = ring.at[pair], left.at[pair]
            numbers, scales = numbers.at[pair, me], scales.at[pair, me]

            def load(tile, slot):
                row, column = place(tile, high, wide, plan)
                plgpu.copy_gmem_to_smem(
                    x_ref.at[part(row, me), whole(column)], ring.at[slot, half], filled.at[pair * plan.stages + slot]
                )

            def work(tile, slot):
                row, column = place(tile, high, wide, plan)
                valid = valid_of[row]
                plgpu.barrier_wait(filled.at[pair * plan.stages + slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                put(upright(ring[slot, half]), numbers.at[0], scales.at[0], power_of_two)
                put(valid_columns(turned(ring.at[slot], half), valid), numbers.at[1], scales.at[1], power_of_two)

                def store():
                    to = part(row, me), part(column, me)
                    plgpu.copy_smem_to_gmem(numbers.at[0], rows_ref.at[to[0], whole(column)], commit_group=False)
                    plgpu.copy_smem_to_gmem(numbers.at[1], columns_ref.at[to[1], whole(row)], commit_group=False)
                    plgpu.copy_smem_to_gmem(scales.at[0], row_scales_ref.at[column, to[0]], commit_group=False)
                    plgpu.copy_smem_to_gmem(scales.at[1], column_scales_ref.at[row, to[1]], commit_group=False)

                return store

            go_through(plan, high * wide, pair, plan.pairs, load, work, left)

        pl.run_scoped(
            scoped,
            tiled(plan.pairs, plan.stages, BLOCK, BLOCK, dtype=x.dtype),
            tiled(plan.pairs, HALVES, 2, HALF, BLOCK, dtype=E4M3),
            plgpu.SMEM((plan.pairs, HALVES, 2, HALF), jnp.float32),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=plan.pairs * plan.stages),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=plan.pairs),
            collective_axes="warpgroup",
        )

    shapes = ((rows, width), E4M3), ((wide, rows), jnp.float32), ((width, rows), E4M3), ((high, width), jnp.float32)
    out = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    found = launch(body, "quantise", cores, HALVES * plan.pairs, out, all_valid(valid, high), x)
    return ScaledRows(*found[:2]), ScaledRows(*found[2:])


@traced_once("cores", "power_of_two", "plan")
def columns_of(
    numbers: Float[Array, "R K"],
    scales: Float[Array, "K_blocks R"],
    valid: Int[Array, " blocks"] | None = None,
    *,
    cores: int,
    power_of_two: bool,
    plan: TilePlan = COLUMNS,
) -> ScaledRows:
    """`eplb_jax.kernels.quantise.columns_of`.

    Args:
      numbers, scales: of rows, for which `why_not` has no reason.
      valid, cores, power_of_two, plan: see `quantise`.
    """
    rows, width = numbers.shape
    high, wide = rows // BLOCK, width // BLOCK

    def body(valid_of, numbers_ref, scales_ref, out_ref, out_scales_ref):
        def scoped(ring, factors, out, out_scales, filled, left):
            pair, me = pair_and_half()
            half = pl.ds(me * HALF, HALF)
            ring, factors, left = ring.at[pair], factors.at[pair], left.at[pair]
            out, out_scales = out.at[pair, me], out_scales.at[pair, me]

            def load(tile, slot):
                row, column = place(tile, high, wide, plan)
                here, to = part(row, me), filled.at[pair * plan.stages + slot]
                plgpu.copy_gmem_to_smem(numbers_ref.at[here, whole(column)], ring.at[slot, half], to)
                plgpu.copy_gmem_to_smem(scales_ref.at[column, here], factors.at[slot, half], to)

            def work(tile, slot):
                row, column = place(tile, high, wide, plan)
                valid = valid_of[row]
                plgpu.barrier_wait(filled.at[pair * plan.stages + slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                x = turned(ring.at[slot], half)
                x = valid_columns(x * of_columns(factors[slot], x.shape), valid)
                put(x, out, out_scales, power_of_two)

                def store():
                    to = part(column, me)
                    plgpu.copy_smem_to_gmem(out, out_ref.at[to, whole(row)], commit_group=False)
                    plgpu.copy_smem_to_gmem(out_scales, out_scales_ref.at[row, to], commit_group=False)

                return store

            go_through(plan, high * wide, pair, plan.pairs, load, work, left)

        pl.run_scoped(
            scoped,
            tiled(plan.pairs, plan.stages, BLOCK, BLOCK, dtype=E4M3, line=HALF),
            plgpu.SMEM((plan.pairs, plan.stages, BLOCK), jnp.float32),
            tiled(plan.pairs, HALVES, HALF, BLOCK, dtype=E4M3),
            plgpu.SMEM((plan.pairs, HALVES, HALF), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * HALVES, num_barriers=plan.pairs * plan.stages),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=plan.pairs),
            collective_axes="warpgroup",
        )

    out = jax.ShapeDtypeStruct((width, rows), E4M3), jax.ShapeDtypeStruct((high, width), jnp.float32)
    operands = all_valid(valid, high), numbers, scales
    return ScaledRows(*launch(body, "columns_of", cores, HALVES * plan.pairs, out, *operands))


@traced_once("cores", "power_of_two", "plan")
def quantise_weights(
    w: Float[Array, "G K N"], *, cores: int, power_of_two: bool, plan: TilePlan = MATRICES
) -> tuple[ScaledMatrices, ScaledMatrices]:
    """`eplb_jax.kernels.quantise.quantise_weights`: the warpgroups of a pair tell each other what is largest.

    Numbers of neighbouring rows change places in 32 bits, so that one set of registers gives both layouts.

    Args:
      w: for which `why_not` has no reason.
      cores, power_of_two, plan: see `quantise_rows`.
    """
    groups, rows, width = w.shape
    columns = plgpu.Layout.WGMMA.reduce(0)
    high, wide = rows // BLOCK, width // BLOCK
    plan = plan.of(w.dtype)

    def body(w_ref, forward_ref, backward_ref, scales_ref):
        def scoped(ring, straight, across, tops, filled, met, left):
            pair, me = pair_and_half()
            half = pl.ds(me * HALF, HALF)
            ring, tops, met, left = ring.at[pair], tops.at[pair], met.at[pair], left.at[pair]
            straight, across = straight.at[pair, me], across.at[pair, me]

            def corner(tile):
                group = lax.div(tile, jnp.int32(high * wide))
                return group, *place(tile - group * (high * wide), high, wide, plan)

            def load(tile, slot):
                group, row, column = corner(tile)
                source = w_ref.at[group, part(row, me), whole(column)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot, half], filled.at[pair * plan.stages + slot])

            def work(tile, slot):
                group, row, column = corner(tile)
                plgpu.barrier_wait(filled.at[pair * plan.stages + slot])
                x = upright(ring[slot, half])
                tops[half] = largest_of(x, 1)
                plgpu.barrier_arrive(met)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_wait(met)
                # Each warp goes through all: for maxima across warps JAX has one scratch, no good for two warpgroups.
                # Scales are made by operations on vectors; this one's numbers are all alike.
                top = lax.bitcast_convert_type(plgpu.layout_cast(tops[...], columns), jnp.int32).max()
                top = plgpu.layout_cast(lax.broadcast(top, (BLOCK,)), columns)
                scale, back = scale_of(lax.bitcast_convert_type(top, jnp.float32), power_of_two=power_of_two)
                scale = lax.bitcast_convert_type(scale, jnp.int32).max()

                @pl.when(me == 0)
                def _():
                    scales_ref[group, row, column] = scale

                x *= lax.broadcast_in_dim(back, x.shape, (1,))
                straight[...] = x.astype(E4M3)
                x = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)
                across.transpose((1, 0))[...] = x.astype(E4M3)

                def store():
                    to = forward_ref.at[group, whole(column), part(row, me)]
                    plgpu.copy_smem_to_gmem(across, to, commit_group=False)
                    to = backward_ref.at[group, part(row, me), whole(column)]
                    plgpu.copy_smem_to_gmem(straight, to, commit_group=False)

                return store

            go_through(plan, groups * high * wide, pair, plan.pairs, load, work, left)

        pl.run_scoped(
            scoped,
            tiled(plan.pairs, plan.stages, BLOCK, BLOCK, dtype=w.dtype),
            tiled(plan.pairs, HALVES, HALF, BLOCK, dtype=E4M3),
            tiled(plan.pairs, HALVES, BLOCK, HALF, dtype=E4M3, line=HALF),
            plgpu.SMEM((plan.pairs, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=plan.pairs * plan.stages),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=plan.pairs),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=plan.pairs),
            collective_axes="warpgroup",
        )

    shapes = ((groups, width, rows), E4M3), (w.shape, E4M3), ((groups, high, wide), jnp.int32)
    out = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    forward, backward, scales = launch(body, "quantise_weights", cores, HALVES * plan.pairs, out, w)
    scales = lax.bitcast_convert_type(scales, jnp.float32)
    return ScaledMatrices(forward, scales.swapaxes(1, 2)), ScaledMatrices(backward, scales)
