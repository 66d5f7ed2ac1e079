"""Rows copied and added by index on Hopper GPUs, by the copy engine: our own kernels, in Pallas' Mosaic dialect.

Blocks stay on their multiprocessors and go through their shares of the tokens, a part of a row at a time. A ring of
slots in shared memory keeps enough bytes on their way; the copy engine gives zeros for rows that are out of bounds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.once import traced_once

DTYPES = ("bfloat16", "float16", "float32")
LINES = 256, 128
"""Elements that the copy engine takes from one row of an array: 256 at most."""
SCANNED = 8
"""Rows whose tokens are read from memory together."""
STORES = 2
"""Sums on their way out of a block."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a kernel divides its rows over a ring of slots in shared memory.

    Attributes:
      part: bytes in one slot of the ring, at most, of one row or, where rows are added, of all that a token has.
      stages: slots of the ring.
      blocks: of each multiprocessor.
      behind: slots whose stores may still run when the next is loaded; only where rows are copied.
    """

    part: int
    stages: int
    blocks: int
    behind: int = 0


COPIES = Ring(4 * 1024, 12, 4, 4)
SUMS = Ring(16 * 1024, 6, 2)
"""The fastest on an H100 of those that `examples/benchmarks/permute_rows.py --plans` tries."""
MOST_ADDED = 32 * 128
"""Elements of a part that is added: 32 registers of each thread."""


def why_not(array: Any, source: Any, rows: Any) -> str | None:
    """Why the kernels do not move such arrays by these `eplb_jax.moe.permute.RowMap`; None if they do.

    >>> indices = [jax.ShapeDtypeStruct(shape, "int32") for shape in ((64,), (32, 2))]
    >>> why_not(jax.ShapeDtypeStruct((64, 96), "float16"), *indices)
    'the width 96 is no multiple of 128'
    """
    if array.dtype not in DTYPES:
        return f"dtype {array.dtype} is none of {', '.join(DTYPES)}"
    if array.shape[1] % LINES[-1] or not array.shape[1]:
        return f"the width {array.shape[1]} is no multiple of {LINES[-1]}"
    tokens, choices = rows.shape
    if min(source.shape[0], tokens) < 2 or not choices:  # the copy engine would not see that one row is out of bounds
        return f"there are {source.shape[0]} rows for {tokens} tokens of {choices} choices"
    if choices * LINES[0] * jnp.dtype(array.dtype).itemsize > SUMS.part:
        return f"{choices} choices of a token are too many"
    return None


@dataclasses.dataclass(frozen=True)
class Share:
    """One block's share of the parts of rows, and how it goes through them.

    Attributes:
      plan: the division of the work.
      worker, workers: which block this is of how many.
      lines, parts: lines of a part and parts of a row.
      mine: parts that are the block's.
    """

    plan: Ring
    worker: jax.Array
    workers: int
    lines: int
    parts: int
    mine: jax.Array

    def slot(self, turn: jax.Array) -> jax.Array:
        """The slot of the ring that a turn uses."""
        return lax.rem(turn, jnp.int32(self.plan.stages))

    def row_and_part(self, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the block works on at a turn."""
        return token_and_part(self.worker + turn * self.workers, self.parts)

    def part_of(self, array: Any, row: jax.Array, part: jax.Array | int) -> Any:
        """A part of a row of an array in memory."""
        return array.at[row, pl.ds(part * self.lines, self.lines)]


@traced_once("cores", "plan")
def copy_rows(
    x: Float[Array, "N D"], source: Int[Array, " R"], rows: Int[Array, "N k"], cores: int, plan: Ring = COPIES
) -> Float[Array, "R D"]:
    """`eplb_jax.moe.permute.permute`: reads each token once and stores it to each of its rows, zeros to the others.

    Args:
      x: the tokens, for which `why_not` has no reason.
      source, rows: see `eplb_jax.moe.permute.RowMap`.
      cores: multiprocessors.
      plan: how to divide the work.
    """
    tokens, choices = rows.shape
    total = source.shape[0]
    x = _in_lines(x)
    _, height, line = x.shape
    lines, parts = divide(height, line * x.dtype.itemsize, plan.part)
    workers = cores * plan.blocks

    def body(source_of, rows_of, x_ref, out_ref):
        def scoped(ring, zeros, filled, cleared):
            worker = lax.axis_index("worker")

            @pl.when(lax.axis_index("warpgroup") == 0)
            def _():
                share = Share(plan, worker, workers, lines, parts, turns(tokens * parts, worker, workers))
                _copy_tokens(share, rows_of, choices, total, x_ref, out_ref, ring, filled)

            @pl.when(lax.axis_index("warpgroup") == 1)
            def _():
                share = Share(plan, worker, workers, lines, parts, jnp.int32(0))
                plgpu.copy_gmem_to_smem(share.part_of(x_ref, jnp.int32(tokens), 0), zeros, cleared)  # out of bounds
                plgpu.barrier_wait(cleared)
                _clear_rows(share, source_of, tokens, total, out_ref, zeros)

        pl.run_scoped(
            scoped,
            plgpu.SMEM((plan.stages, lines, line), x.dtype),
            plgpu.SMEM((lines, line), x.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=plan.stages),
            plgpu.Barrier(),
            collective_axes="warpgroup",
        )

    out = jax.ShapeDtypeStruct((total, height, line), x.dtype)
    return launch(body, "copy_rows", workers, 2, out, source, rows.reshape(-1), x).reshape(total, -1)


def _copy_tokens(
    share: Share, rows_of: Any, choices: int, total: int, x_ref: Any, out_ref: Any, ring: Any, filled: Any
) -> None:
    """Loads the block's parts of tokens and stores each to all rows below the total that have the token."""
    plan, mine = share.plan, share.mine
    ahead = plan.stages - plan.behind

    def load(turn, _=None):
        slot = share.slot(turn)
        item = share.part_of(x_ref, *share.row_and_part(turn))
        plgpu.copy_gmem_to_smem(item, ring.at[slot], filled.at[slot])

    def step(turn, _):
        slot = share.slot(turn)
        token, part = share.row_and_part(turn)
        places = [rows_of[token * choices + j] for j in range(choices)]  # early, as it takes long
        plgpu.barrier_wait(filled.at[slot])
        for place in places:

            @pl.when(place < total)
            def _(place=place):
                plgpu.copy_smem_to_gmem(ring.at[slot], share.part_of(out_ref, place, part), commit_group=False)

        plgpu.commit_smem_to_gmem_group()

        @pl.when(turn + ahead < mine)
        def _():
            plgpu.wait_smem_to_gmem(plan.behind, wait_read_only=True)
            load(turn + ahead)

    lax.fori_loop(jnp.int32(0), jnp.minimum(mine, ahead), load, None)
    lax.fori_loop(jnp.int32(0), mine, step, None)
    plgpu.wait_smem_to_gmem(0)


def _clear_rows(share: Share, source_of: Any, tokens: int, total: int, out_ref: Any, zeros: Any) -> None:
    """Stores zeros to those of the block's rows that hold no token."""
    size = pl.cdiv(total, share.workers)
    begin = share.worker * size
    end = jnp.minimum(begin + size, total)

    def scan(step, _):
        first = begin + step * SCANNED
        found = [source_of[jnp.minimum(first + i, total - 1)] for i in range(SCANNED)]
        for i, token in enumerate(found):

            @pl.when((token >= tokens) & (first + i < end))
            def _(row=first + i):
                for part in range(share.parts):
                    plgpu.copy_smem_to_gmem(zeros, share.part_of(out_ref, row, part))

    lax.fori_loop(jnp.int32(0), jnp.int32(pl.cdiv(size, SCANNED)), scan, None)
    plgpu.wait_smem_to_gmem(0)


@traced_once("cores", "plan")
def add_rows(rows: Float[Array, "R D"], index: Int[Array, "N k"], cores: int, plan: Ring = SUMS) -> Float[Array, "N D"]:
    """`eplb_jax.moe.permute.unpermute`: loads a part of all rows of a token, adds them in float32, stores the sum.

    Args:
      rows, index: for which `why_not` has no reason.
      cores: multiprocessors.
      plan: how to divide the work.
    """
    tokens, choices = index.shape
    rows = _in_lines(rows)
    _, height, line = rows.shape
    size = rows.dtype.itemsize
    lines, parts = divide(height, line * size, min(plan.part // choices, MOST_ADDED * size))
    workers = cores * plan.blocks

    def body(index_of, rows_ref, out_ref):
        def scoped(ring, sums, filled):
            worker = lax.axis_index("worker")
            share = Share(plan, worker, workers, lines, parts, turns(tokens * parts, worker, workers))
            pl.when(share.mine > 0)(
                lambda: _add_tokens(share, index_of, choices, rows_ref, out_ref, ring, sums, filled)
            )

        pl.run_scoped(
            scoped,
            plgpu.SMEM((plan.stages, choices, lines, line), rows.dtype),
            plgpu.SMEM((STORES, lines, line), rows.dtype),
            plgpu.Barrier(num_arrivals=choices, num_barriers=plan.stages),
            collective_axes="warpgroup",
        )

    out = jax.ShapeDtypeStruct((tokens, height, line), rows.dtype)
    return launch(body, "add_rows", workers, 1, out, index.reshape(-1), rows).reshape(tokens, -1)


def _add_tokens(
    share: Share, index_of: Any, choices: int, rows_ref: Any, out_ref: Any, ring: Any, sums: Any, filled: Any
) -> None:
    """Loads the block's parts of all rows of a token, adds them and stores the sum."""
    stages, mine = share.plan.stages, share.mine

    def look_up(turn):
        token, _ = share.row_and_part(jnp.minimum(turn, mine - 1))
        return [index_of[token * choices + j] for j in range(choices)]

    def load(turn, places):
        slot = share.slot(turn)
        _, part = share.row_and_part(turn)
        for j, place in enumerate(places):
            plgpu.copy_gmem_to_smem(share.part_of(rows_ref, place, part), ring.at[slot, j], filled.at[slot])

    def step(turn, places):
        slot = share.slot(turn)
        token, part = share.row_and_part(turn)
        plgpu.barrier_wait(filled.at[slot])
        total = ring[slot, 0].astype(jnp.float32)
        for j in range(1, choices):
            total += ring[slot, j].astype(jnp.float32)
        plgpu.wait_smem_to_gmem(STORES - 1, wait_read_only=True)
        place = sums.at[lax.rem(turn, jnp.int32(STORES))]
        place[...] = total.astype(sums.dtype)
        plgpu.commit_smem()  # all threads have read the slot, too
        plgpu.copy_smem_to_gmem(place, share.part_of(out_ref, token, part))
        pl.when(turn + stages < mine)(lambda: load(turn + stages, places))
        return look_up(turn + 1 + stages)  # early, as it takes long

    lax.fori_loop(jnp.int32(0), jnp.minimum(mine, stages), lambda turn, _: load(turn, look_up(turn)), None)
    lax.fori_loop(jnp.int32(0), mine, step, look_up(jnp.int32(stages)))
    plgpu.wait_smem_to_gmem(0)


def _in_lines(rows: jax.Array) -> jax.Array:
    """The rows in lines that the copy engine takes."""
    width = rows.shape[1]
    line = next(line for line in LINES if width % line == 0)
    return rows.reshape(rows.shape[0], width // line, line)


def divide(height: int, line_bytes: int, most: int) -> tuple[int, int]:
    """Lines of a part and parts of a row, all alike.

    >>> divide(28, 512, 4096)
    (7, 4)
    """
    limit = min(max(most // line_bytes, 1), LINES[0])
    lines = next(lines for lines in range(min(limit, height), 0, -1) if height % lines == 0)
    return lines, height // lines


def token_and_part(item: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """The row and the part of it that an item is."""
    token = lax.div(item, jnp.int32(parts))
    return token, item - token * parts


def turns(items: int, worker: jax.Array, workers: int) -> jax.Array:
    """How many of the items worker, worker + workers, ... there are."""
    return lax.div(jnp.maximum(items - worker + (workers - 1), 0), jnp.int32(workers))


def launch(body: Any, name: str, workers: int, warpgroups: int, out: Any, *operands: jax.Array) -> Any:
    """The results of a kernel of so many blocks."""
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(workers,),
        grid_names=("worker",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*operands)
