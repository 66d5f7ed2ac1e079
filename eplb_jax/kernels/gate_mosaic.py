"""Weighted SwiGLU rows in and out of 8 bits on Hopper GPUs: our own kernels, in Pallas' Mosaic dialect.

The forward kernel reads 16 bits and writes 8; the backward one reads what the forward pass kept and makes all that the
products of the input's and the weights' gradients read, rows and columns, in one pass over memory.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.gated import GateGradients, gated, gradients
from eplb_jax.kernels.once import traced_once
from eplb_jax.kernels.permute import launch
from eplb_jax.kernels.scaled import BLOCK, E4M3, ScaledRows
from eplb_jax.kernels.scaled_tiles import (
    HALF,
    HALVES,
    TilePlan,
    all_valid,
    go_through,
    of_columns,
    of_rows,
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

FORWARD = TilePlan(2, 1)
BACKWARD = TilePlan(2, 1)
"""The fastest on an H200 of those that `examples/benchmarks/fp8_quantise.py --plans` tries."""
_store = functools.partial(plgpu.copy_smem_to_gmem, commit_group=False)


@traced_once("cores", "power_of_two", "plan")
def gate(
    hidden: Float[Array, "R FF"],
    weight: Float[Array, " R"],
    *,
    cores: int,
    power_of_two: bool,
    plan: TilePlan = FORWARD,
) -> tuple[ScaledRows, ScaledRows]:
    """`eplb_jax.kernels.quantise.gate`: each warpgroup has 64 rows of a tile of gates and of values for itself.

    Args:
      hidden, weight: for which `eplb_jax.kernels.quantise_mosaic.why_not` has no reason.
      cores: multiprocessors.
      power_of_two: see `eplb_jax.kernels.scaled.scale_of`.
      plan: how to divide the work.
    """
    rows, width = hidden.shape
    high, wide = rows // HALF, width // (2 * BLOCK)
    plan = plan.of(hidden.dtype)
    warpgroups = HALVES * plan.pairs

    def body(hidden_ref, weight_ref, act_ref, act_scales_ref, kept_ref, kept_scales_ref):
        def scoped(ring, weights, numbers, scales, filled):
            me = lax.axis_index("warpgroup")
            ring, weights, numbers, scales = (ref.at[me] for ref in (ring, weights, numbers, scales))

            def corner(tile):
                row, column = place(tile, high, wide, plan)
                return pl.ds(row * HALF, HALF), column

            def load(tile, slot):
                here, column = corner(tile)
                to = filled.at[me * plan.stages + slot]
                for i in range(2):
                    plgpu.copy_gmem_to_smem(hidden_ref.at[here, whole(column + i * wide)], ring.at[slot, i], to)
                plgpu.copy_gmem_to_smem(weight_ref.at[here], weights.at[slot], to)

            def work(tile, slot):
                here, column = corner(tile)
                plgpu.barrier_wait(filled.at[me * plan.stages + slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                gates, values = (upright(ring[slot, i]) for i in range(2))
                act = gated(gates, values, of_rows(weights[slot], gates.shape))
                for i, x in enumerate((gates, values, act)):
                    put(x, numbers.at[i], scales.at[i], power_of_two)

                def store():
                    for i in range(2):
                        _store(numbers.at[i], kept_ref.at[here, whole(column + i * wide)])
                        _store(scales.at[i], kept_scales_ref.at[column + i * wide, here])
                    _store(numbers.at[2], act_ref.at[here, whole(column)])
                    _store(scales.at[2], act_scales_ref.at[column, here])

                return store

            go_through(plan, high * wide, me, warpgroups, load, work)

        pl.run_scoped(
            scoped,
            tiled(warpgroups, plan.stages, 2, HALF, BLOCK, dtype=hidden.dtype),
            plgpu.SMEM((warpgroups, plan.stages, HALF), jnp.float32),
            tiled(warpgroups, 3, HALF, BLOCK, dtype=E4M3),
            plgpu.SMEM((warpgroups, 3, HALF), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=warpgroups * plan.stages),
            collective_axes="warpgroup",
        )

    shapes = (
        ((rows, width // 2), E4M3),
        ((wide, rows), jnp.float32),
        (hidden.shape, E4M3),
        ((2 * wide, rows), jnp.float32),
    )
    out = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    found = launch(body, "scaled_gate", cores, warpgroups, out, hidden, weight)
    return ScaledRows(*found[:2]), ScaledRows(*found[2:])


@traced_once("cores", "power_of_two", "plan")
def gate_backward(
    numbers: Float[Array, "R FF"],
    scales: Float[Array, "FF_blocks R"],
    weight: Float[Array, " R"],
    ct: Float[Array, "R F"],
    valid: Int[Array, " blocks"] | None = None,
    *,
    cores: int,
    power_of_two: bool,
    plan: TilePlan = BACKWARD,
) -> GateGradients:
    """`eplb_jax.kernels.quantise.gate_backward`: made twice of a slot, for half the rows and for half the columns.

    Args:
      numbers, scales, weight, ct: for which `eplb_jax.kernels.quantise_mosaic.why_not` has no reason.
      valid: how many rows of each 128 belong to their group; None: all.
      cores, power_of_two, plan: see `gate`.
    """
    rows, width = numbers.shape
    high, wide = rows // BLOCK, width // (2 * BLOCK)
    plan = plan.of(ct.dtype)

    def body(valid_of, numbers_ref, scales_ref, weight_ref, ct_ref, *out_refs):
        rows_ref, row_scales_ref, columns_ref, column_scales_ref, act_ref, act_scales_ref, sums_ref = out_refs

        def scoped(pairs, factors, weights, cts, out, out_scales, sums, filled, left):
            pair, me = pair_and_half()
            half = pl.ds(me * HALF, HALF)
            pairs, factors, weights, cts, left = (ref.at[pair] for ref in (pairs, factors, weights, cts, left))
            out, out_scales, sums = (ref.at[pair, me] for ref in (out, out_scales, sums))

            def load(tile, slot):
                row, column = place(tile, high, wide, plan)
                here, to = part(row, me), filled.at[pair * plan.stages + slot]
                for i in range(2):
                    source = numbers_ref.at[here, whole(column + i * wide)]
                    plgpu.copy_gmem_to_smem(source, pairs.at[slot, i, half], to)
                    plgpu.copy_gmem_to_smem(scales_ref.at[column + i * wide, here], factors.at[slot, i, half], to)
                plgpu.copy_gmem_to_smem(weight_ref.at[here], weights.at[slot, half], to)
                plgpu.copy_gmem_to_smem(ct_ref.at[here, whole(column)], cts.at[slot, half], to)

            def by_rows(slot):
                gate, value = (upright(pairs[slot, i, half]) for i in range(2))
                gate, value = (x * of_rows(factors[slot, i, half], x.shape) for i, x in enumerate((gate, value)))
                return gradients(gate, value, of_rows(weights[slot, half], gate.shape), upright(cts[slot, half]))

            def by_columns(slot):
                gate, value = (turned(pairs.at[slot, i], half) for i in range(2))
                gate, value = (x * of_columns(factors[slot, i], x.shape) for i, x in enumerate((gate, value)))
                return gradients(gate, value, of_columns(weights[slot], gate.shape), turned(cts.at[slot], half))

            def work(tile, slot):
                row, column = place(tile, high, wide, plan)
                valid = valid_of[row]
                plgpu.barrier_wait(filled.at[pair * plan.stages + slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                found = by_rows(slot)
                sums[...] = found.weight.sum(1)
                for i, x in enumerate((found.gate, found.value)):
                    put(x, out.at[i], out_scales.at[i], power_of_two)
                found = by_columns(slot)
                for i, x in enumerate((found.gate, found.value, found.act), 2):
                    put(valid_columns(x, valid), out.at[i], out_scales.at[i], power_of_two)

                def store():
                    here = part(row, me)
                    for i in range(2):
                        at = column + i * wide
                        _store(out.at[i], rows_ref.at[here, whole(at)])
                        _store(out_scales.at[i], row_scales_ref.at[at, here])
                        _store(out.at[2 + i], columns_ref.at[part(at, me), whole(row)])
                        _store(out_scales.at[2 + i], column_scales_ref.at[row, part(at, me)])
                    _store(out.at[4], act_ref.at[part(column, me), whole(row)])
                    _store(out_scales.at[4], act_scales_ref.at[row, part(column, me)])
                    _store(sums, sums_ref.at[column, here])

                return store

            go_through(plan, high * wide, pair, plan.pairs, load, work, left)

        pl.run_scoped(
            scoped,
            tiled(plan.pairs, plan.stages, 2, BLOCK, BLOCK, dtype=E4M3, line=HALF),
            plgpu.SMEM((plan.pairs, plan.stages, 2, BLOCK), jnp.float32),
            plgpu.SMEM((plan.pairs, plan.stages, BLOCK), jnp.float32),
            tiled(plan.pairs, plan.stages, BLOCK, BLOCK, dtype=ct.dtype),
            tiled(plan.pairs, HALVES, 5, HALF, BLOCK, dtype=E4M3),
            plgpu.SMEM((plan.pairs, HALVES, 5, HALF), jnp.float32),
            plgpu.SMEM((plan.pairs, HALVES, HALF), jnp.float32),
            plgpu.Barrier(num_arrivals=6 * HALVES, num_barriers=plan.pairs * plan.stages),
            plgpu.Barrier(num_arrivals=HALVES, num_barriers=plan.pairs),
            collective_axes="warpgroup",
        )

    half, f32 = width // 2, jnp.float32
    shapes = [((rows, width), E4M3), ((2 * wide, rows), f32), ((width, rows), E4M3), ((high, width), f32)]
    shapes += [((half, rows), E4M3), ((high, half), f32), ((wide, rows), f32)]
    out = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    operands = all_valid(valid, high), numbers, scales, weight, ct
    *found, sums = launch(body, "scaled_gate_backward", cores, HALVES * plan.pairs, out, *operands)
    return GateGradients(ScaledRows(*found[:2]), ScaledRows(*found[2:4]), ScaledRows(*found[4:]), sums.sum(0))
