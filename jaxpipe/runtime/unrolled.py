"""Runs a Program whose ranks keep step as unrolled code: what a step does, and on which slots, is known when traced.

One rank keeps step with itself, and so do the two of DualPipe, which mirror each other: both run the same branch on the
same slots in every step, on microbatches and stages of their own. No step chooses among branches, and no value is
copied into its slot or out of it: a slot is a name. Steps that come again with other microbatches are one loop, whose
body has as many steps as it takes until every slot is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxpipe.runtime.buffers import Apart, Buffers, put, take, with_arrays
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
    """The repetition in a program whose ranks keep step that leaves the least code.

    Its period is at most ``longest`` steps.

    >>> from jaxpipe.schedule import build
    >>> from jaxpipe.runtime.lower import lower
    >>> find_repeat(lower(build("1f1b", 1, 8)))
    Repeat(start=0, period=5, times=8)
    """
    steps = program.num_steps
    fixed = np.delete(program.operands[:, 0], Field.MICROBATCH, axis=-1).reshape(steps, -1)
    rows = np.column_stack([program.branch[:, 0], fixed, *_exchanges(program)])
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


def _exchanges(program: Program) -> list[np.ndarray]:
    """``[steps, channels]``: which messages move, from which slots and to which; none on one rank."""
    if program.num_ranks == 1:
        return []
    return [program.communicate, program.send[:, 0], program.receive[:, 0]]


def keeps_step(program: Program) -> bool:
    """Whether all ranks run the same branch on the same slots in every step.

    >>> from jaxpipe.schedule import build
    >>> from jaxpipe.runtime.lower import lower
    >>> [keeps_step(lower(build("dualpipe", ranks, 8))) for ranks in (2, 4)]
    [True, False]
    """
    slots = program.operands[..., Field.SOURCE :]
    return all((table == table[:, :1]).all() for table in (program.branch, slots, program.send, program.receive))


def is_short(program: Program) -> bool:
    """Whether ranks keep step and there is little code."""
    if not keeps_step(program):
        return False
    most = MOST_OPERATIONS * program.schedule.num_stages
    steps = find_repeat(program, 3 * most).code(program.num_steps)  # beside a forward or backward run two ends at most
    kinds = [op for step in steps for op, _ in program.branches[program.branch[step, 0]]]
    return sum(op in (Op.F, Op.B, Op.I, Op.W) for op in kinds) <= most


def unrolled_table(program: Program) -> np.ndarray:
    """The table of `run_unrolled`, ``int32[steps, ranks, operations, 2]``."""
    return program.operands[..., : Field.STAGE + 1]


def run_unrolled(
    program: Program,
    operation: Callable[[Op, int], Operation],
    axis: str,
    buffers: Buffers,
    table: jax.Array,
    finish: Callable[[Sequence[int], Buffers], list[Any]] = lambda chunks, buffers: [],
) -> tuple[Buffers, list[Any]]:
    """(buffers after all steps of a program whose ranks keep step, what ``finish`` has made).

    The pools of buffers are `Apart`.

    The scope ``steps_FIRST_PERIOD_TIMES`` tells a profile's reader which steps an operation is of.

    Args:
      program, operation, buffers: as of the executor.
      axis: the pipeline's.
      table: `unrolled_table` of this rank, the microbatch and stage of each step's operations.
      finish: called once with the chunks whose gradients in the buffers are complete first, if there is more to do.
        What it makes is ready before the last step, whose own gradients can then be sent meanwhile.
    """
    repeat = find_repeat(program)
    stop = repeat.start + repeat.period * repeat.times
    looped = range(repeat.start, stop) if repeat.times > 1 else range(0)
    first_step, first_chunks = _first_complete(program)
    finished: list[Any] = []  # holds one list, or none
    # What is the same on all ranks is a constant where the code is of one step alone.
    common = unrolled_table(program)
    constant = (common == common[:, :1]).all((1, 2, 3))

    def run(buffers: Buffers, step: int, row: Any, scope: str) -> Buffers:
        index = int(program.branch[step, 0])
        branch = program.branches[index]
        slots = [list(map(int, program.operands[step, 0, i, Field.SOURCE :])) for i in range(len(branch))]
        operands = [[row[i, Field.MICROBATCH], row[i, Field.STAGE], *mine] for i, mine in enumerate(slots)]
        with jax.named_scope(f"branch_{index}"), jax.named_scope(scope):
            buffers = run_branch(branch, operation, apart=True)(buffers, operands)
        if step == first_step and step not in looped:
            finished.append(finish(first_chunks, with_arrays(buffers)))
        buffers = _free(buffers, branch, slots)
        if step == program.num_steps - 1:
            return buffers
        # Nothing moves from step to step, so that the compiler holds what the schedule holds.
        waited_for = finished if step == program.num_steps - 2 and step not in looped else []
        buffers, arrived = lax.optimization_barrier((buffers, waited_for))
        finished[: len(arrived)] = arrived
        return _exchange(program, step, axis, buffers)

    def body(buffers: Buffers, rows: jax.Array) -> tuple[Buffers, None]:
        before = buffers
        for i in range(repeat.period):
            step = repeat.start + i
            buffers = run(buffers, step, rows[i], f"steps_{step}_{repeat.period}_{repeat.times}")
        return _like(before, buffers), None

    def once(buffers: Buffers, step: int) -> Buffers:
        return run(buffers, step, common[step, 0] if constant[step] else table[step], f"steps_{step}_1_1")

    for step in range(repeat.start):
        buffers = once(buffers, step)
    rounds = table[repeat.start : stop].reshape(repeat.times, repeat.period, *table.shape[1:])
    buffers = body(buffers, rounds[0])[0] if repeat.times == 1 else lax.scan(body, with_arrays(buffers), rounds)[0]
    if first_step in looped:
        finished.append(finish(first_chunks, buffers))
    for step in range(stop, program.num_steps):
        buffers = once(buffers, step)
    return with_arrays(buffers), finished[0] if finished else []


def _first_complete(program: Program) -> tuple[int | None, list[int]]:
    """The step after which the first chunks have all of their gradients, and these chunks; None if it is the last."""
    last: dict[int, int] = {}
    for step in range(program.num_steps):
        for op, part in program.branches[program.branch[step, 0]]:
            if op in (Op.B, Op.W):
                last[program.parts[part][0]] = step
    first = min(last.values(), default=program.num_steps)
    if first >= program.num_steps - 1:
        return None, []
    return first, [chunk for chunk, step in last.items() if step == first]


def _exchange(program: Program, step: int, axis: str, buffers: Buffers) -> Buffers:
    """Moves the messages of a step, out of their slots and into those of their receivers."""
    channels = np.flatnonzero(program.communicate[step]).tolist()
    send, receive = program.send[step, 0], program.receive[step, 0]
    with jax.named_scope("send"):
        arrived = [lax.ppermute(take(buffers.in_flight, send[i]), axis, program.channels[i]) for i in channels]
    in_flight = buffers.in_flight
    for i in channels:
        in_flight = put(in_flight, send[i], None)
    for i, message in zip(channels, arrived, strict=True):
        in_flight = put(in_flight, receive[i], message)
    return buffers._replace(in_flight=in_flight)


def _free(buffers: Buffers, branch: Branch, slots: Sequence[Sequence[int]]) -> Buffers:
    """The buffers without the values that a step was the last to read, and without those in dummy slots.

    ``slots`` are the columns of `Field` from SOURCE on, of each operation.
    """
    for (op, _), mine in zip(branch, slots, strict=True):
        for name, field in _FREED[op]:
            if name != "in_flight" or mine[0] != mine[Field.TARGET - Field.SOURCE]:
                buffers = buffers._replace(**{name: put(getattr(buffers, name), mine[field - Field.SOURCE], None)})
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

    before = before._replace(grads=after.grads)  # which may have been `Zeros`
    return jax.tree.map(pool, before, after, is_leaf=lambda node: isinstance(node, Apart))
