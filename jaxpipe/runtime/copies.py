"""Working copies of stage parameters on each rank, and the way back for their gradients.

Masters are rows of stacked leaves, divided evenly over ranks: one owner each. A rank that runs a stage holds a working
copy of it. Where the owner is another rank, the row travels once a step, in compute dtype, and its gradient returns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.params import stage_of_rows
from jaxpipe.schedule.schedule import Schedule


class Move(NamedTuple):
    """One row of the masters becomes a local chunk on some ranks.

    Attributes:
      row: the row on the ranks that own it.
      pairs: (owner, holder) of each rank that needs it: no owner twice, no holder twice, and either all of them the
        same rank or none.
    """

    row: int
    pairs: tuple[tuple[int, int], ...]

    @property
    def stays(self) -> bool:
        """Whether owners hold their own rows, so that nothing is sent."""
        return all(owner == holder for owner, holder in self.pairs)


def plan_moves(schedule: Schedule, order: str) -> tuple[tuple[Move, ...], ...]:
    """For each local chunk, the moves that bring its stage's parameters to the ranks that have such a chunk.

    Where ranks run equally many stages, in storage order each owns what it holds, but for DualPipe's second direction:

    >>> from jaxpipe.schedule import build
    >>> plan_moves(build("dualpipev", 2, 4), "storage")
    ((Move(row=0, pairs=((0, 0), (1, 1))),), (Move(row=1, pairs=((0, 0), (1, 1))),))
    >>> plan_moves(build("dualpipe", 2, 4), "storage")
    ((Move(row=0, pairs=((0, 0), (1, 1))),), (Move(row=0, pairs=((1, 0), (0, 1))),))

    Rank 1 of DualPipeV runs stages 1 and 2 of 4, whose rows in model order are rank 0's second and its own first:

    >>> for chunk in plan_moves(build("dualpipev", 2, 4), "model"):
    ...     print(*chunk)
    Move(row=0, pairs=((0, 0),)) Move(row=1, pairs=((0, 1),))
    Move(row=1, pairs=((1, 0),)) Move(row=0, pairs=((1, 1),))
    """
    rows = rows_per_rank(schedule)
    place = {stage: divmod(index, rows) for index, stage in enumerate(stage_of_rows(schedule, order))}
    chunks = []
    for chunk in range(max(map(len, schedule.rank_stages))):
        moves: list[Move] = []
        for holder, stages in enumerate(schedule.rank_stages):
            if chunk < len(stages):
                owner, row = place[stages[chunk]]
                moves = _with_pair(moves, row, (owner, holder))
        chunks.append(tuple(moves))
    return tuple(chunks)


def _with_pair(moves: list[Move], row: int, pair: tuple[int, int]) -> list[Move]:
    """The moves with a pair added to the first one that can take it, or to a new one."""
    for i, move in enumerate(moves):
        fits = move.row == row and move.stays == (pair[0] == pair[1])
        if fits and pair[0] not in {owner for owner, _ in move.pairs}:
            return [*moves[:i], move._replace(pairs=(*move.pairs, pair)), *moves[i + 1 :]]
    return [*moves, Move(row, (pair,))]


def rows_per_rank(schedule: Schedule) -> int:
    """Stages whose master parameters a rank owns."""
    return schedule.num_stages // schedule.num_ranks


def cast(tree: Any, dtype: Any) -> Any:
    """Floating leaves in another dtype; the tree itself if dtype is None."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def working_copies(stages: Any, schedule: Schedule, order: str, axis: str, dtype: Any) -> tuple[Any, ...]:
    """The parameters of every local chunk in a dtype, from leaves ``[rows, ...]`` that this rank owns.

    Each row is cast by itself, since casting whole leaves would hold them in both dtypes at once. Each move that does
    not stay is one ppermute. A rank with fewer chunks than others gets a value that it never uses for a missing one.
    """
    owned = [
        cast(jax.tree.map(lambda leaf, row=row: leaf[row], stages), dtype) for row in range(rows_per_rank(schedule))
    ]

    def arrive(move: Move) -> Any:
        return owned[move.row] if move.stays else send(owned[move.row], axis, move.pairs)

    def choose(moves: Sequence[Move]) -> Any:
        copy = arrive(moves[0])
        for move in moves[1:]:
            here = _holds(move, schedule.num_ranks, axis)
            copy = jax.tree.map(functools.partial(jnp.where, here), arrive(move), copy)
        return copy

    return tuple(choose(moves) for moves in plan_moves(schedule, order))


def gather_grads(grads: tuple[Any, ...], schedule: Schedule, order: str, axis: str) -> Any:
    """Leaves ``[rows, ...]``: the gradients of the rows this rank owns, summed over the copies of each.

    The inverse of `working_copies`. Leaves that are not of inexact dtype have none.
    """

    def gather(*chunks: jax.Array) -> jax.Array:
        parts: list[list[jax.Array]] = [[] for _ in range(rows_per_rank(schedule))]
        for chunk, moves in zip(chunks, plan_moves(schedule, order), strict=True):
            for move in moves:
                parts[move.row].append(give_back(chunk, move))
        return jnp.stack([functools.reduce(jnp.add, row) for row in parts])

    def give_back(grad: jax.Array, move: Move) -> jax.Array:
        if not move.stays:
            return send(grad, axis, tuple((holder, owner) for owner, holder in move.pairs))
        if len(move.pairs) == schedule.num_ranks:
            return grad
        return jnp.where(_holds(move, schedule.num_ranks, axis), grad, jnp.zeros_like(grad))

    # Behind a barrier, or an optimizer's every output would be computed from the parts by a kernel of its own.
    return lax.optimization_barrier(jax.tree.map(gather, *grads))


def send(tree: Any, axis: str, pairs: tuple[tuple[int, int], ...]) -> Any:
    """One ppermute of a tree; random keys travel as their data."""

    def of_leaf(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = lax.ppermute(jax.random.key_data(leaf), axis, pairs)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return lax.ppermute(leaf, axis, pairs)

    return jax.tree.map(of_leaf, tree)


def _holds(move: Move, num_ranks: int, axis: str) -> jax.Array:
    """Whether this rank is one of a move's holders."""
    holders = {holder for _, holder in move.pairs}
    return jnp.asarray(np.isin(np.arange(num_ranks), list(holders)))[lax.axis_index(axis)]
