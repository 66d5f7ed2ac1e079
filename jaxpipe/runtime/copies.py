"""Working copies of stage parameters on each rank, and the way back for their gradients.

Masters are rows of stacked leaves, divided evenly over ranks: one owner each. A rank that runs a stage holds a working
copy of it. Where the owner is another rank, the row travels once a step, in compute dtype, and its gradient returns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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

    Where ranks run equally many stages, in storage order each owns what it holds, but for one of DualPipe's two stages:

    >>> from jaxpipe.schedule import build
    >>> plan_moves(build("dualpipev", 2, 4), "storage")
    ((Move(row=0, pairs=((0, 0), (1, 1))),), (Move(row=1, pairs=((0, 0), (1, 1))),))
    >>> for chunk in plan_moves(build("dualpipe", 2, 4), "storage"):
    ...     print(*chunk)
    Move(row=0, pairs=((0, 0),)) Move(row=0, pairs=((0, 1),))
    Move(row=0, pairs=((1, 0),)) Move(row=0, pairs=((1, 1),))

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


class JointMove(NamedTuple):
    """Moves that one ppermute makes: a link carries both of its directions at once.

    Attributes:
      row: the row of the masters that they all move.
      moves: (chunk, move) of each.
    """

    row: int
    moves: tuple[tuple[int, Move], ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (owner, holder) pairs of all."""
        return tuple(pair for _, move in self.moves for pair in move.pairs)

    def fits(self, move: Move) -> bool:
        """Whether the move can be made at the same time."""
        sides = zip(zip(*self.pairs, strict=True), zip(*move.pairs, strict=True), strict=True)
        return self.row == move.row and all(set(side).isdisjoint(other) for side, other in sides)


def plan_transfers(chunks: Sequence[Sequence[Move]]) -> tuple[JointMove, ...]:
    """The moves that do not stay, together where they can be.

    >>> from jaxpipe.schedule import build
    >>> [transfer] = plan_transfers(plan_moves(build("dualpipe", 2, 4), "storage"))
    >>> transfer.pairs
    ((0, 1), (1, 0))
    """
    transfers: list[JointMove] = []
    for chunk, move in ((chunk, move) for chunk, moves in enumerate(chunks) for move in moves if not move.stays):
        i = next((i for i, transfer in enumerate(transfers) if transfer.fits(move)), len(transfers))
        known = transfers[i].moves if i < len(transfers) else ()
        transfers[i : i + 1] = [JointMove(move.row, (*known, (chunk, move)))]
    return tuple(transfers)


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

    Each row is cast by itself, since casting whole leaves would hold them in both dtypes at once. Each transfer is one
    ppermute. A rank with fewer chunks than others gets a value that it never uses for a missing one.
    """
    owned = [
        cast(jax.tree.map(lambda leaf, row=row: leaf[row], stages), dtype) for row in range(rows_per_rank(schedule))
    ]
    chunks = plan_moves(schedule, order)
    arrived: dict[tuple[int, Move], Any] = {}
    for transfer in plan_transfers(chunks):
        arrived |= dict.fromkeys(transfer.moves, send(owned[transfer.row], axis, transfer.pairs))

    def choose(chunk: int, moves: Sequence[Move]) -> Any:
        copies = [owned[move.row] if move.stays else arrived[chunk, move] for move in moves]
        copy = copies[0]
        for move, other in zip(moves[1:], copies[1:], strict=True):
            here = _holds(move, schedule.num_ranks, axis)
            copy = jax.tree.map(functools.partial(jnp.where, here), other, copy)
        return copy

    return tuple(choose(chunk, moves) for chunk, moves in enumerate(chunks))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("grads",), meta_fields=("row",))
@dataclasses.dataclass(frozen=True)
class Returned:
    """Gradients that came from the copies of a row.

    Attributes:
      row: of the masters that this rank owns.
      grads: the row's.
    """

    row: int
    grads: Any


def return_grads(grads: Mapping[int, Any], schedule: Schedule, order: str, axis: str) -> list[Returned]:
    """Brings the gradients of some local chunks' copies to the owners of their rows; each transfer is one ppermute."""
    moves = [each if chunk in grads else () for chunk, each in enumerate(plan_moves(schedule, order))]
    found = []
    for transfer in plan_transfers(moves):
        (chunk, _), *others = transfer.moves
        given = grads[chunk]
        for chunk, move in others:
            given = jax.tree.map(
                functools.partial(jnp.where, _holds(move, schedule.num_ranks, axis)), grads[chunk], given
            )
        back = tuple((holder, owner) for owner, holder in transfer.pairs)
        found.append(Returned(transfer.row, send(given, axis, back)))
    return found


def gather_grads(
    grads: tuple[Any, ...], schedule: Schedule, order: str, axis: str, returned: Sequence[Returned]
) -> Any:
    """Leaves ``[rows, ...]``: the gradients of the rows this rank owns, with those of their copies, `return_grads`'.

    The inverse of `working_copies`. Leaves that are not of inexact dtype have none.
    """
    chunks, count = plan_moves(schedule, order), len(grads)

    def gather(*leaves: jax.Array) -> jax.Array:
        parts: list[list[jax.Array]] = [[] for _ in range(rows_per_rank(schedule))]
        for grad, moves in zip(leaves[:count], chunks, strict=True):
            for move in moves:
                if move.stays:
                    parts[move.row].append(mine(grad, move))
        for each, grad in zip(returned, leaves[count:], strict=True):
            parts[each.row].append(grad)
        return jnp.stack([functools.reduce(jnp.add, row) for row in parts])

    def mine(grad: jax.Array, move: Move) -> jax.Array:
        if len(move.pairs) == schedule.num_ranks:
            return grad
        return jnp.where(_holds(move, schedule.num_ranks, axis), grad, jnp.zeros_like(grad))

    # Behind barriers, or an optimizer's every output would be computed from the parts by a kernel of its own.
    leaves = (*grads, *(each.grads for each in returned))
    return jax.tree.map(lambda *leaves: lax.optimization_barrier(gather(*leaves)), *leaves)


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
