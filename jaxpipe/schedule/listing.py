"""List scheduling: an order made action by action, each rank taking what it prefers of what can run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from jaxpipe.schedule.problem import B, Code, F, I, Orders, Problem, W


@dataclasses.dataclass(frozen=True)
class Preference:
    """What a rank prefers.

    Attributes:
      divide: which backwards are divided, with I as soon as it can run and W when nothing else can: "all", "none", or
        "last", those that find no forward left on the rank.
      pair: whether a forward and a whole backward run together where both can.
      backward: whether backwards are before forwards; of two stages' forwards that of the later stage is first.
      patience: how long a rank waits for what it prefers, as a share of the shortest action.
    """

    divide: str
    pair: bool
    backward: bool
    patience: float


def preferences(*, pairs: bool) -> Iterator[Preference]:
    """All that are tried; those with pairs only where ``pairs`` says that a pair is shorter than its halves apart."""
    for divide, backward, patience in itertools.product(("all", "last", "none"), (True, False), (0.0, 0.5)):
        yield Preference(divide, pairs and divide != "all", backward, patience)


@dataclasses.dataclass
class _Chunk:
    """A stage of a rank for the microbatches of a direction, and how far it is: each kind takes them in turn.

    Attributes:
      cells: ``[microbatches of the direction]``, stage and microbatch as one number.
      later: stages of the rank that come after this one in the model.
      forwards, gradients: how many have run.
      pending: microbatches of which I has run and W has not.
    """

    cells: range
    later: int
    forwards: int = 0
    gradients: int = 0
    pending: list[int] = dataclasses.field(default_factory=list)


def list_schedule(problem: Problem, stash: int, preference: Preference) -> Orders | None:
    """An order with at most ``stash`` stashes on a rank at once; None where the ranks come to wait for each other.

    The rank that can start something first is served first. A forward leaves a stash free for each later stage of its
    rank, or forwards of the first could keep those of the last from ever running.
    """
    schedule = problem.schedule
    ranks = [_chunks(problem, rank) for rank in range(schedule.num_ranks)]
    orders: Orders = [[] for _ in ranks]
    clocks, live = [0.0] * len(ranks), [0] * len(ranks)
    ends = [-1.0] * (3 * len(problem.rank_of))
    shortest = min(problem.duration((action,)) for action in range(0, 4 * len(problem.rank_of), problem.count))
    patience = preference.patience * shortest

    def arrival(action: int, rank: int) -> float:
        """When an action can start at the earliest; negative while an input has not been made."""
        latest = clocks[rank]
        for value, latency in problem.reads[action]:
            if ends[value] < 0:
                return -1.0
            latest = max(latest, ends[value] + latency)
        return latest

    def choose(rank: int) -> tuple[float, Code] | None:
        """When a rank starts what next."""
        found: list[tuple[float, tuple[int, int], int]] = []
        more = any(chunk.forwards < len(chunk.cells) for chunk in ranks[rank])
        divides = preference.divide == "all" or (preference.divide == "last" and not more)
        for chunk in ranks[rank]:
            if chunk.forwards < len(chunk.cells) and live[rank] + chunk.later < stash:
                action = 4 * chunk.cells[chunk.forwards] + F
                found.append((arrival(action, rank), (int(preference.backward), chunk.later), action))
            if chunk.gradients < chunk.forwards:
                action = 4 * chunk.cells[chunk.gradients] + (I if divides else B)
                found.append((arrival(action, rank), (int(not preference.backward), chunk.later), action))
            if chunk.pending:
                action = 4 * chunk.cells[chunk.pending[0]] + W
                found.append((arrival(action, rank), (2, chunk.later), action))
        found = [option for option in found if option[0] >= 0]
        if not found:
            return None
        first = min(found)[0]
        near = [option for option in found if option[0] <= first + patience]
        begin, _, action = min(near, key=lambda option: option[1:])
        if preference.pair and action % 4 in (F, B):
            other = [option for option in near if option[2] % 4 == (B if action % 4 == F else F)]
            if other:
                also, _, second = min(other, key=lambda option: option[1:])
                pair = (action, second) if action % 4 == F else (second, action)
                return max(begin, also), pair
        return begin, (action,)

    chosen = [choose(rank) for rank in range(len(ranks))]
    while True:
        starts = [(option[0], rank) for rank, option in enumerate(chosen) if option is not None]
        if not starts:
            break
        start, rank = min(starts)
        option = chosen[rank]
        assert option is not None
        _, code = option
        clocks[rank] = start + problem.duration(code)
        orders[rank].append(code)
        for action in code:
            _count(ranks[rank], action)
            live[rank] += {F: 1, B: -1, I: 0, W: -1}[action % 4]
            for value in problem.writes[action]:
                ends[value] = clocks[rank]
        chosen = [
            choose(other) if other == rank or _reaches(problem, code, other) else kept
            for other, kept in enumerate(chosen)
        ]
    done = all(chunk.gradients == len(chunk.cells) and not chunk.pending for chunks in ranks for chunk in chunks)
    return orders if done else None


def _chunks(problem: Problem, rank: int) -> list[_Chunk]:
    schedule = problem.schedule
    each = problem.count // len(schedule.routes)
    mine = [(d, s) for d, route in enumerate(schedule.routes) for s, at in enumerate(route) if at == rank]
    return [
        _Chunk(range(s * problem.count + d * each, s * problem.count + (d + 1) * each), sum(o > s for _, o in mine))
        for d, s in mine
    ]


def _count(chunks: Sequence[_Chunk], action: int) -> None:
    """Notes that an action has run."""
    cell, kind = divmod(action, 4)
    chunk = next(chunk for chunk in chunks if cell in chunk.cells)
    if kind == I:
        chunk.pending.append(chunk.gradients)
    elif kind == W:
        chunk.pending.pop(0)
    chunk.forwards += kind == F
    chunk.gradients += kind in (B, I)


def _reaches(problem: Problem, code: Code, rank: int) -> bool:
    """Whether a group makes an input of an action of a rank."""
    for action in code:
        cell, kind = divmod(action, 4)
        other = cell + problem.count * (1 if kind == F else -1)
        if kind != W and 0 <= other < len(problem.rank_of) and problem.rank_of[other] == rank:
            return True
    return False
