"""Runs a Program of one rank as unrolled code: what each step does, and on which slots, is known when it is traced.

No step chooses among branches, and no value is copied into its slot or out of it: a slot is a name. Steps that come
again with other microbatches are one loop, whose body has as many steps as it takes until every slot is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.runtime.buffers import Apart, Buffers, put
from jaxpipe.runtime.operations import Operation, run_branch
from jaxpipe.runtime.program import Branch, Field, Op, Program

MOST_OPERATIONS = 12
"""Forwards and backwards of each local chunk in the code; a longer program takes too long to compile."""

_FREED: dict[Op, tuple[tuple[str, Field], ...]] = {
    Op.F: (("in_flight", Field.SOURCE),),
    Op.B: (("in_flight", Field.SOURCE), ("stash", Field.STASH), ("weight_stash", Field.WEIGHT_STASH)),
    Op.I: (("in_flight", Field.SOURCE), ("stash", Field.STASH)),
    Op.W: (("weight_stash", Field.WEIGHT_STASH), ("cross", Field.CROSS)),
    Op.EMBED: (),
    Op.HEAD: (("in_flight", Field.SOURCE),),
    Op.EMBED_GRAD: (("in_flight", Field.SOURCE),),
}


class Repeat(NamedTuple):
    """Steps ``start`` to ``start + period * times`` are ``times`` times the same, but for the microbatches."""

    start: int
    period: int
    times: int

    def code(self, num_steps: int) -> list[int]:
        """The steps of which there is code."""
        stop = self.start + self.period * self.times
        return [*range(self.start + self.period), *range(stop, num_steps)]


def find_repeat(program: Program, longest: int | None = None) -> Repeat:
    """The repetition in a program of one rank that leaves the least code; its period is at most ``longest`` steps.

    >>> from jaxpipe.schedule import build
    >>> from jaxpipe.runtime.lower import lower
    >>> find_repeat(lower(build("1f1b", 1, 8)))
    Repeat(start=0, period=5, times=8)
    """
    steps = program.num_steps
    fixed = np.delete(program.operands[:, 0], Field.MICROBATCH, axis=-1).reshape(steps, -1)
    rows = np.column_stack([program.branch[:, 0], fixed])
    _, kinds, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    once = np.flatnonzero(counts[kinds] == 1)
    most = int(np.diff(once, prepend=-1, append=steps).max()) - 1  # steps in a row of which each comes again somewhere
    best = Repeat(0, steps, 1)
    for period in range(1, min(most // 2, longest or steps) + 1):
        if most - period <= (best.times - 1) * best.period:
            break  # what is left is shorter than what repeats already
        (others,) = np.nonzero(kinds[:-period] != kinds[period:])
        breaks = np.array([-1, *others, steps - period])
        widest = np.diff(breaks).argmax()
        length = int(breaks[widest + 1] - breaks[widest]) - 1
        found = Repeat(int(breaks[widest]) + 1, period, length // period + 1)
        if (found.times - 1) * period > (best.times - 1) * best.period:
            best = found
    return best


def is_short(program: Program) -> bool:
    """Whether there is one rank and little code."""
    if program.num_ranks != 1:
        return False
    most = MOST_OPERATIONS * program.schedule.num_stages
    steps = find_repeat(program, 3 * most).code(program.num_steps)  # beside a forward or backward run two ends at most
    kinds = [op for step in steps for op, _ in program.branches[program.branch[step, 0]]]
    return sum(op in (Op.F, Op.B, Op.I, Op.W) for op in kinds) <= most


def run_unrolled(program: Program, operation: Callable[[Op, int], Operation], buffers: Buffers) -> Buffers:
    """All steps of a program of one rank; the pools of buffers are `Apart`.

    The scope ``steps_FIRST_PERIOD_TIMES`` tells a profile's reader which steps an operation is of.
    """
    repeat = find_repeat(program)
    microbatches = program.operands[:, 0, :, Field.MICROBATCH]

    def run(buffers: Buffers, step: int, microbatches: Any, scope: str) -> Buffers:
        index = int(program.branch[step, 0])
        branch = program.branches[index]
        operands = [
            [microbatches[i], *map(int, program.operands[step, 0, i, Field.MICROBATCH + 1 :])]
            for i in range(len(branch))
        ]
        with jax.named_scope(f"branch_{index}"), jax.named_scope(scope):
            buffers = run_branch(branch, operation, apart=True)(buffers, operands)
        # Nothing moves from step to step, so that the compiler holds what the schedule holds.
        return lax.optimization_barrier(_free(buffers, branch, operands))

    def body(buffers: Buffers, microbatches: jax.Array) -> tuple[Buffers, None]:
        before = buffers
        for i in range(repeat.period):
            step = repeat.start + i
            buffers = run(buffers, step, microbatches[i], f"steps_{step}_{repeat.period}_{repeat.times}")
        return _like(before, buffers), None

    stop = repeat.start + repeat.period * repeat.times
    for step in range(repeat.start):
        buffers = run(buffers, step, microbatches[step], f"steps_{step}_1_1")
    rounds = jnp.asarray(microbatches[repeat.start : stop].reshape(repeat.times, repeat.period, -1))
    buffers = body(buffers, rounds[0])[0] if repeat.times == 1 else lax.scan(body, buffers, rounds)[0]
    for step in range(stop, program.num_steps):
        buffers = run(buffers, step, microbatches[step], f"steps_{step}_1_1")
    return buffers


def _free(buffers: Buffers, branch: Branch, operands: Sequence[Sequence[Any]]) -> Buffers:
    """The buffers without the values that a step was the last to read, and without those in dummy slots."""
    for (op, _), slots in zip(branch, operands, strict=True):
        for name, field in _FREED[op]:
            if name != "in_flight" or slots[Field.SOURCE] != slots[Field.TARGET]:
                buffers = buffers._replace(**{name: put(getattr(buffers, name), slots[field], None)})
    return jax.tree.map(
        lambda pool: put(pool, len(pool.slots) - 1, None) if isinstance(pool, Apart) else pool,
        buffers,
        is_leaf=lambda node: isinstance(node, Apart),
    )


def _like(before: Buffers, after: Buffers) -> Buffers:
    """``after`` without what nobody reads in the next round: values in slots that were empty before."""

    def pool(before: Any, after: Any) -> Any:
        if not isinstance(before, Apart):
            return after
        return Apart(tuple(b if b is None else a for b, a in zip(before.slots, after.slots, strict=True)))

    return jax.tree.map(pool, before, after, is_leaf=lambda node: isinstance(node, Apart))
