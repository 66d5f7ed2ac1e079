"""The backward pass of weighted SwiGLU rows on Hopper GPUs, in one pass over memory: our own kernel, in Pallas' Mosaic.

As in `eplb_jax.kernels.permute`, blocks stay on their multiprocessors and a ring of slots in shared memory keeps enough
bytes on their way. Results take the place of what they were made of in a slot, and leave from there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eplb_jax.kernels.once import traced_once
from eplb_jax.kernels.permute import DTYPES, LINES, Ring, Share, divide, launch, turns

GATED = Ring(24 * 1024, 4, 2, 1)
"""A slot of ``part`` bytes holds gate, value and cotangent of a part of a row, or of several rows where they fit. The
fastest on an H100 of those that `examples/benchmarks/swiglu.py --plans` tries."""
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


@traced_once("cores", "plan")
def gated_backward(
    hidden: Float[Array, "R FF"],
    weight: Float[Array, " R"],
    ct: Float[Array, "R F"],
    cores: int,
    plan: Ring = GATED,
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

    def body(weight_of, hidden_ref, ct_ref, hidden_ct_ref, act_ref, sums_ref):
        def scoped(pairs, singles, filled):
            worker = lax.axis_index("worker")
            mine = turns(pl.cdiv(total, rows) * parts, worker, workers)
            share = _GateShare(plan, worker, workers, lines, parts, mine, total, rows)
            slots = _GateRing(pairs, singles, filled)
            memory = _Memory(weight_of, hidden_ref, ct_ref, hidden_ct_ref, act_ref, sums_ref)
            pl.when(mine > 0)(lambda: _go_through(share, memory, slots))

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


class _Memory(NamedTuple):
    """The arrays of `gated_backward` in memory: three that are read and three that are written."""

    weight: Any
    hidden: Any
    ct: Any
    hidden_ct: Any
    act: Any
    sums: Any


class _GateRing(NamedTuple):
    """The ring in shared memory: gate and value, the cotangent, and the barriers of filled slots."""

    pairs: Any
    singles: Any
    filled: Any


@dataclasses.dataclass(frozen=True)
class _GateShare(Share):
    """A `Share` of parts of several rows.

    Attributes:
      total: rows of the arrays.
      rows: rows of a slot.
    """

    total: int
    rows: int

    def first_and_part(self, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and part; the last rows come twice rather than too few."""
        group, part = self.row_and_part(turn)
        return jnp.minimum(group * self.rows, self.total - self.rows), part

    def items(self, turn: jax.Array, pairs: Any, singles: Any) -> tuple[Any, Any]:
        """What a turn works on, of an array of pairs and one of single rows."""
        first, part = self.first_and_part(turn)
        here, there = pl.ds(first, self.rows), pl.ds(part * self.lines, self.lines)
        return pairs.at[here, :, there], singles.at[here, there]


def _go_through(share: _GateShare, memory: _Memory, slots: _GateRing) -> None:
    """Loads the block's rows, makes their gradients in the slots, and stores them."""
    plan, mine = share.plan, share.mine
    ahead = plan.stages - plan.behind

    def look_up(turn):
        first, _ = share.first_and_part(jnp.minimum(turn, mine - 1))
        return [memory.weight[first + i] for i in range(share.rows)]

    def load(turn, _=None):
        slot = share.slot(turn)
        pair, single = share.items(turn, memory.hidden, memory.ct)
        plgpu.copy_gmem_to_smem(pair, slots.pairs.at[slot], slots.filled.at[slot])
        plgpu.copy_gmem_to_smem(single, slots.singles.at[slot], slots.filled.at[slot])

    def step(turn, weights):
        slot = share.slot(turn)
        first, part = share.first_and_part(turn)
        following = look_up(turn + 1)  # early, as it takes long
        plgpu.barrier_wait(slots.filled.at[slot])
        for i, weight in enumerate(weights):
            _differentiate(slots, slot, i, weight, memory.sums, (first, part))
        plgpu.commit_smem()
        pair, single = share.items(turn, memory.hidden_ct, memory.act)
        plgpu.copy_smem_to_gmem(slots.pairs.at[slot], pair, commit_group=False)
        plgpu.copy_smem_to_gmem(slots.singles.at[slot], single, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

        @pl.when(turn + ahead < mine)
        def _():
            plgpu.wait_smem_to_gmem(plan.behind, wait_read_only=True)
            load(turn + ahead)

        return following

    lax.fori_loop(jnp.int32(0), jnp.minimum(mine, ahead), load, None)
    lax.fori_loop(jnp.int32(0), mine, step, look_up(jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def _differentiate(
    slots: _GateRing, slot: jax.Array, row: int, weight: jax.Array, sums: Any, place: tuple[jax.Array, jax.Array]
) -> None:
    """Puts the gradients of one row of a slot in place of what they are made of, and the weight's into ``sums``.

    ``place`` is the slot's first row and the part.
    """
    pairs, singles = slots.pairs, slots.singles
    gate, value = (pairs[slot, row, half].astype(jnp.float32) for half in range(2))
    ct = singles[slot, row].astype(jnp.float32)
    share = lax.logistic(gate)
    active = gate * share
    first, part = place
    sums[first + row, part] = (ct * active * value).sum()  # all threads have read before any writes
    weighted = ct * weight
    slope = share * (1 + gate * (1 - share))
    pairs[slot, row, 0] = (weighted * value * slope).astype(pairs.dtype)
    pairs[slot, row, 1] = (weighted * active).astype(pairs.dtype)
    singles[slot, row] = (active * value * weight).astype(singles.dtype)
