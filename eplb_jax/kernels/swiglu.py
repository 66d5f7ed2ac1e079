"""The backward pass of weighted SwiGLU rows on Hopper GPUs, in one pass over memory: our own kernel, in Pallas' Mosaic.

As in `eplb_jax.kernels.permute`, blocks stay on their multiprocessors and a ring of slots in shared memory keeps enough
bytes on their way. Results take the place of what they were made of in a slot, and leave from there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eplb_jax.kernels.permute import DTYPES, LINES, Plan, divide, launch, token_and_part, turns

GATED = Plan(24 * 1024, 4, 2, 1)
"""A slot of ``part`` bytes holds gate, value and cotangent of a part of a row, or of several rows where they fit. The
fastest on an H100 of those that `examples/benchmarks/gated_rows.py --plans` tries."""
MOST_ROWS = 4
"""Rows of a slot, each of which is summed by itself."""


def why_not(hidden: Any) -> str | None:
    """Why the kernel does not take hidden activations of this shape and dtype; None if it does.

    >>> why_not(jax.ShapeDtypeStruct((64, 192), "bfloat16"))
    'half of the width 192 is no multiple of 128'
    """
    if hidden.dtype not in DTYPES:
        return f"dtype {hidden.dtype} is none of {', '.join(DTYPES)}"
    if hidden.shape[1] % (2 * LINES[-1]):
        return f"half of the width {hidden.shape[1]} is no multiple of {LINES[-1]}"
    return None if hidden.size else f"its shape is {hidden.shape}"


def gated_backward(
    hidden: Float[Array, "R FF"], weight: Float[Array, " R"], ct: Float[Array, "R F"], cores: int, plan: Plan = GATED
) -> tuple[Float[Array, "R FF"], Float[Array, "R F"], Float[Array, " R"]]:
    """`eplb_jax.moe.experts.swiglu` of these rows again, and the gradients of both arguments.

    Args:
      hidden: gate and value side by side, for which `why_not` has no reason.
      weight: of each row.
      ct: the gradient of what `swiglu` gave, in the dtype of ``hidden``.
      cores: multiprocessors.
      plan: how to divide the work.

    Returns:
      The gradient of ``hidden``, what `swiglu` gave, and the gradient of ``weight``; computed in float32.
    """
    total, width = ct.shape
    line = next(line for line in LINES if width % line == 0)
    height = width // line
    line_bytes = 3 * line * hidden.dtype.itemsize
    lines, parts = divide(height, line_bytes, plan.part)
    rows = min(max(plan.part // (height * line_bytes), 1), MOST_ROWS, total)
    workers = cores * plan.blocks
    ahead = plan.stages - plan.behind

    def body(weight_of, hidden_ref, ct_ref, hidden_ct_ref, act_ref, sums_ref):
        def scoped(pairs, singles, filled):
            worker = lax.axis_index("worker")
            mine = turns(pl.cdiv(total, rows) * parts, worker, workers)

            def place(turn):
                """First row and part; the last rows come twice rather than too few."""
                group, part = token_and_part(worker + turn * workers, parts)
                return jnp.minimum(group * rows, total - rows), part

            def items(turn, pairs_ref, singles_ref):
                first, part = place(turn)
                here, there = pl.ds(first, rows), pl.ds(part * lines, lines)
                return pairs_ref.at[here, :, there], singles_ref.at[here, there]

            def look_up(turn):
                first, _ = place(jnp.minimum(turn, mine - 1))
                return [weight_of[first + i] for i in range(rows)]

            def load(turn, _=None):
                slot = lax.rem(turn, jnp.int32(plan.stages))
                pair, single = items(turn, hidden_ref, ct_ref)
                plgpu.copy_gmem_to_smem(pair, pairs.at[slot], filled.at[slot])
                plgpu.copy_gmem_to_smem(single, singles.at[slot], filled.at[slot])

            def step(turn, weights):
                slot = lax.rem(turn, jnp.int32(plan.stages))
                first, part = place(turn)
                following = look_up(turn + 1)  # early, as it takes long
                plgpu.barrier_wait(filled.at[slot])
                for i, weight in enumerate(weights):
                    gate, value = (pairs[slot, i, half].astype(jnp.float32) for half in range(2))
                    ct = singles[slot, i].astype(jnp.float32)
                    share = lax.logistic(gate)
                    active = gate * share
                    sums_ref[first + i, part] = (ct * active * value).sum()  # all threads have read before any writes
                    weighted = ct * weight
                    slope = share * (1 + gate * (1 - share))
                    pairs[slot, i, 0] = (weighted * value * slope).astype(pairs.dtype)
                    pairs[slot, i, 1] = (weighted * active).astype(pairs.dtype)
                    singles[slot, i] = (active * value * weight).astype(singles.dtype)
                plgpu.commit_smem()
                pair, single = items(turn, hidden_ct_ref, act_ref)
                plgpu.copy_smem_to_gmem(pairs.at[slot], pair, commit_group=False)
                plgpu.copy_smem_to_gmem(singles.at[slot], single, commit_group=False)
                plgpu.commit_smem_to_gmem_group()

                @pl.when(turn + ahead < mine)
                def _():
                    plgpu.wait_smem_to_gmem(plan.behind, wait_read_only=True)
                    load(turn + ahead)

                return following

            @pl.when(mine > 0)
            def _():
                lax.fori_loop(jnp.int32(0), jnp.minimum(mine, ahead), load, None)
                lax.fori_loop(jnp.int32(0), mine, step, look_up(jnp.int32(0)))
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            plgpu.SMEM((plan.stages, rows, 2, lines, line), hidden.dtype),
            plgpu.SMEM((plan.stages, rows, lines, line), hidden.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            collective_axes="warpgroup",
        )

    pairs, singles = (total, 2, height, line), (total, height, line)
    out = [jax.ShapeDtypeStruct(shape, hidden.dtype) for shape in (pairs, singles)]
    sums = jax.ShapeDtypeStruct((total, parts), jnp.float32)
    operands = weight.astype(jnp.float32), hidden.reshape(pairs), ct.reshape(singles)
    hidden_ct, act, sums = launch(body, "gated_backward", workers, 1, (*out, sums), *operands)
    return hidden_ct.reshape(hidden.shape), act.reshape(ct.shape), sums.sum(1).astype(weight.dtype)
