"""Runs the stretches of a Program on one rank, inside shard_map; see `jaxpipe.runtime.stretches`.

What is the same on all ranks in all rounds, a slot perhaps, is a constant of the code; the rest is in a table.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxpipe.runtime.buffers import Buffers, Named, Zeros, put, take, with_arrays
from jaxpipe.runtime.by_rank import first_additions
from jaxpipe.runtime.operations import Operation, run_branch
from jaxpipe.runtime.program import Field, Op, Program
from jaxpipe.runtime.stretches import Guarded, Piece, Sending, Stretch


class _Column(NamedTuple):
    """A column of a stretch's table."""

    index: int


_Entry = _Column | int
"""Where a number is found: in the table, or here."""


@dataclasses.dataclass
class _Columns:
    """The columns of a stretch's table, each ``int[rounds, ranks]``, no two the same."""

    columns: list[np.ndarray] = dataclasses.field(default_factory=list)
    known: dict[bytes, _Column] = dataclasses.field(default_factory=dict)

    def entry(self, values: np.ndarray, where: np.ndarray) -> _Entry:
        """The entry for values that count ``where`` it says."""
        counting = values[where]
        if (counting == counting[0]).all():
            return int(counting[0])
        column = np.where(where, values, 0).astype(np.int32)
        if column.tobytes() not in self.known:
            self.known[column.tobytes()] = _Column(len(self.columns))
            self.columns.append(column)
        return self.known[column.tobytes()]


class _Code(NamedTuple):
    """A piece, with its entries ``[operations of its branch][fields]``, and a scope that says which it is.

    ``begins`` are the chunks to whose sums nobody has added before.
    """

    branch: int
    operands: tuple[tuple[_Entry, ...], ...]
    scope: str
    begins: frozenset[int] = frozenset()


class _Loop(NamedTuple):
    """A guarded code, with the entry of its trips, and its number among the program's loops."""

    nodes: tuple[_Code | _Loop, ...]
    trips: _Entry
    number: int


class _Exchange(NamedTuple):
    """(channel, slot that leaves, slot that is written) of all messages, and the loop that they stand in, if any."""

    messages: tuple[tuple[int, _Entry, _Entry], ...]
    trips: _Entry
    number: int | None


class _Body(NamedTuple):
    """The code of a stretch, and its table ``int32[rounds, ranks, columns]``."""

    ticks: tuple[tuple[tuple[_Code | _Loop, ...], tuple[_Exchange, ...]], ...]
    table: np.ndarray


def make_bodies(program: Program, stretches: Sequence[Stretch], *, by_rank: bool = False) -> list[_Body]:
    """The code of each stretch, and its table.

    The scope ``piece_NUMBER`` tells a profile's reader which piece an operation is of; ``by_rank``, where each is of
    one rank, ``steps_FIRST_PERIOD_TIMES`` tells the steps.
    """
    bodies, of_pieces, of_loops = [], itertools.count(), itertools.count()
    first = first_additions(program, stretches) if by_rank else {}
    for stretch in stretches:
        columns = _Columns()

        def node(each: Piece | Guarded, columns: _Columns = columns) -> _Code | _Loop:
            if isinstance(each, Piece):
                scope = _scope_of_steps(each) if by_rank else f"piece_{next(of_pieces)}"
                rank = int(each.steps[0].argmax())
                begins = first.get((rank, int(each.steps[0, rank])), frozenset())
                return _Code(each.branch, _operands(program, each, columns), scope, begins)
            number, trips = next(of_loops), columns.entry(each.chosen.astype(np.int32), np.ones_like(each.chosen))
            return _Loop(tuple(map(node, each.nodes)), trips, number)

        def exchange(each: Sending, columns: _Columns = columns) -> _Exchange:
            return _exchange(program, each, columns, None if each.always else next(of_loops))

        ticks = tuple((tuple(map(node, t.nodes)), tuple(map(exchange, t.exchanges))) for t in stretch.ticks)
        shape = (stretch.times, program.num_ranks)
        table = np.stack(columns.columns, -1) if columns.columns else np.zeros((*shape, 0), np.int32)
        bodies.append(_Body(ticks, table))
    return bodies


def _scope_of_steps(piece: Piece) -> str:
    steps = piece.steps.max(1)
    return f"steps_{steps[0]}_{steps[1] - steps[0] if len(steps) > 1 else 1}_{len(steps)}"


def _operands(program: Program, piece: Piece, columns: _Columns) -> tuple[tuple[_Entry, ...], ...]:
    where = piece.steps >= 0
    ranks = np.broadcast_to(np.arange(program.num_ranks), where.shape)
    rows = program.operands[piece.steps, ranks]
    operations = range(len(program.branches[piece.branch]))
    return tuple(tuple(columns.entry(rows[..., i, field], where) for field in Field) for i in operations)


def _exchange(program: Program, exchange: Sending, columns: _Columns, number: int | None) -> _Exchange:
    moves = np.broadcast_to((exchange.steps >= 0)[:, None], (len(exchange.steps), program.num_ranks))

    def message(channel: int) -> tuple[int, _Entry, _Entry]:
        # A channel that is silent in a round takes what is in the ranks' dummy slots to dummy slots.
        send, receive = (table[exchange.steps][..., channel] for table in (program.send, program.receive))
        return channel, columns.entry(send, moves), columns.entry(receive, moves)

    trips = columns.entry(moves.astype(np.int32), np.ones_like(moves))
    return _Exchange(tuple(map(message, exchange.channels)), trips, number)


def run_stretches(
    program: Program,
    stretches: Sequence[Stretch],
    operation: Callable[[Op, int], Operation],
    axis: str,
    buffers: Buffers,
    tables: Sequence[jax.Array],
    *,
    by_rank: bool = False,
) -> Buffers:
    """All steps; ``tables`` are this rank's, ``[rounds, columns]`` for each stretch.

    ``by_rank``: pools of residuals are `Named`, and each piece is one rank's.
    """

    def run_nodes(nodes: Sequence[_Code | _Loop], buffers: Buffers, row: Any, zero: Any) -> Buffers:
        for i, node in enumerate(nodes):
            if i and not (by_rank and isinstance(node, _Loop)):
                # so that all slots are read before another piece writes, and no pool is copied
                buffers = lax.optimization_barrier(buffers)
            buffers = run_piece(node, buffers, row, zero) if isinstance(node, _Code) else run_loop(node, buffers, row)
        return buffers

    def run_piece(node: _Code, buffers: Buffers, row: Any, zero: Any) -> Buffers:
        branch = program.branches[node.branch]
        operands = [
            [_value(entry, row, zero if field in (Field.MICROBATCH, Field.STAGE) else None) for field, entry in fields]
            for fields in (zip(Field, entries, strict=True) for entries in node.operands)
        ]
        scope = f"branch_{node.branch}{'/together' * program.together(branch)}"
        grads = tuple(
            jax.tree.map(Zeros, sums) if chunk in node.begins else sums for chunk, sums in enumerate(buffers.grads)
        )
        with jax.named_scope(scope), jax.named_scope(node.scope):
            run = run_branch(branch, operation, apart=by_rank, in_order=not by_rank)
            return with_arrays(run(buffers._replace(grads=grads), operands))

    def run_loop(node: _Loop, buffers: Buffers, row: Any) -> Buffers:
        def trip(index: jax.Array, buffers: Buffers) -> Buffers:
            # The number of the trip is zero, but behind a barrier nothing knows: XLA would take out of the loop what
            # does not change from trip to trip, such as the embedding of a microbatch that is a constant.
            with jax.named_scope(f"choice_{node.number}"):
                buffers, inside, zero = lax.optimization_barrier((buffers, row, index))
                return run_nodes(node.nodes, buffers, inside, zero)

        if not by_rank:
            return lax.fori_loop(0, _value(node.trips, row), trip, buffers)
        inside = lax.fori_loop(0, _value(node.trips, row), trip, _part(program, buffers, node))
        return _with_part(buffers, inside)

    def exchange(given: _Exchange, in_flight: Any, row: Any) -> Any:
        def move(_: Any, in_flight: Any) -> Any:
            with jax.named_scope(f"choice_{given.number}"):
                return _move(program, given, axis, in_flight, row)

        if given.number is None:
            return _move(program, given, axis, in_flight, row)
        return lax.fori_loop(0, _value(given.trips, row), move, in_flight)

    def run_round(body: _Body, buffers: Buffers, row: Any) -> Buffers:
        for i, (nodes, exchanges) in enumerate(body.ticks):
            if i and not by_rank:  # what slots by name hold stays; loops are in order, for all of them carry messages
                buffers = lax.optimization_barrier(buffers)
            buffers = run_nodes(nodes, buffers, row, None)
            for each in exchanges:
                buffers = buffers._replace(in_flight=exchange(each, buffers.in_flight, row))
        return buffers

    bodies = make_bodies(program, stretches, by_rank=by_rank)
    for i, (body, table) in enumerate(zip(bodies, tables, strict=True)):
        if i and not by_rank:
            buffers = lax.optimization_barrier(buffers)
        if len(table) == 1:
            buffers = run_round(body, buffers, table[0])
        else:
            buffers, _ = lax.scan(lambda carry, row, body=body: (run_round(body, carry, row), None), buffers, table)
    return buffers


_USED: dict[str, tuple[Field, ...]] = {
    "in_flight": (Field.SOURCE, Field.TARGET),
    "stash": (Field.STASH,),
    "weight_stash": (Field.WEIGHT_STASH,),
    "cross": (Field.CROSS,),
}
"""The columns of the slots of each pool."""


def _part(program: Program, buffers: Buffers, loop: _Loop) -> Buffers:
    """What a loop uses of buffers with slots by name."""
    pieces = list(_codes(loop.nodes))
    pools = {
        name: pool.only({entries[field] for piece in pieces for entries in piece.operands for field in fields})
        for name, fields in _USED.items()
        if isinstance(pool := getattr(buffers, name), Named)  # or () where there is none
    }
    operations = [operation for piece in pieces for operation in program.branches[piece.branch]]
    summed = {program.parts[part][0] for op, part in operations if op in (Op.B, Op.W)}
    grads = tuple(sums if chunk in summed else None for chunk, sums in enumerate(buffers.grads))
    return buffers._replace(**pools, grads=grads)


def _with_part(buffers: Buffers, part: Buffers) -> Buffers:
    """The buffers with what a loop has made of a part of them."""
    pools = {
        name: pool.updated(getattr(part, name)) for name in _USED if isinstance(pool := getattr(buffers, name), Named)
    }
    grads = tuple(old if new is None else new for old, new in zip(buffers.grads, part.grads, strict=True))
    return part._replace(**pools, grads=grads)


def _codes(nodes: Sequence[_Code | _Loop]) -> Iterator[_Code]:
    for node in nodes:
        if isinstance(node, _Code):
            yield node
        else:
            yield from _codes(node.nodes)


def _value(entry: _Entry, row: Any, zero: Any = None) -> Any:
    """What an entry stands for in a round; one that is a constant plus ``zero``."""
    if isinstance(entry, _Column):
        return row[entry.index]
    return entry if zero is None else entry + zero


def _move(program: Program, given: _Exchange, axis: str, in_flight: Any, row: Any) -> Any:
    """Moves one message on each channel of an exchange: all sends are read before any arrival is written."""
    with jax.named_scope("send"):
        arrived = [
            lax.ppermute(take(in_flight, _value(leaves, row)), axis, program.channels[channel])
            for channel, leaves, _ in given.messages
        ]
    in_flight, arrived = lax.optimization_barrier((in_flight, arrived))
    for (_, _, written), message in zip(given.messages, arrived, strict=True):
        in_flight = put(in_flight, _value(written, row), message)
    return in_flight
