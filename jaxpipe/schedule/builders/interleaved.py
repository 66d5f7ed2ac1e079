"""1F1B with one or several stages a rank."""

from __future__ import annotations

from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule


def interleaved(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Schedule:
    """Interleaved 1F1B: stage s on rank ``s % num_ranks``. Source: Megatron-LM, arXiv 2104.04473.

    Microbatches go round the ranks in rounds of ``num_microbatches // max(1, num_microbatches // num_ranks)``.

    Raises:
      ValueError: the microbatches do not divide into such rounds; multiples of the ranks always do.

    >>> " ".join(str(action) for (action,) in interleaved(2, 2).ranks[1])
    '1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1'
    """
    num_ranks = at_least("interleaved", "num_ranks", num_ranks, 1)
    num_microbatches = at_least("interleaved", "num_microbatches", num_microbatches, 1)
    num_chunks = at_least("interleaved", "num_chunks", num_chunks, 1)
    rounds = max(1, num_microbatches // num_ranks)
    if num_microbatches % rounds:
        raise ValueError(
            f"interleaved with {num_microbatches} microbatches on {num_ranks} ranks: they do not divide into {rounds} "
            f"equal rounds; use a multiple of {num_ranks}, such as {num_ranks * rounds}"
        )
    per_round = num_microbatches // rounds
    return alternating("interleaved", num_ranks, num_microbatches, num_chunks, per_round)


def alternating(name: str, num_ranks: int, num_microbatches: int, num_chunks: int, per_round: int) -> Schedule:
    """1F1B with ``num_chunks`` stages a rank, microbatches going round the ranks ``per_round`` at a time."""

    def action(rank: int, kind: Kind, turn: int) -> Group:
        chunk = turn // per_round % num_chunks
        if kind is Kind.B:
            chunk = num_chunks - 1 - chunk
        microbatch = turn // (per_round * num_chunks) * per_round + turn % per_round
        return (Action(chunk * num_ranks + rank, kind, microbatch),)

    def order(rank: int) -> tuple[Group, ...]:
        turns = num_microbatches * num_chunks
        # A rank runs ahead by the way to the last rank (and back, with chunks), and a round for each further chunk.
        ahead = min(turns, (num_chunks - 1) * per_round + (num_ranks - 1 - rank) * (1 if num_chunks == 1 else 2))
        groups = [action(rank, Kind.F, turn) for turn in range(ahead)]
        for turn in range(turns):
            if turn + ahead < turns:
                groups.append(action(rank, Kind.F, turn + ahead))
            groups.append(action(rank, Kind.B, turn))
        return tuple(groups)

    ranks = tuple(order(rank) for rank in range(num_ranks))
    route = tuple(stage % num_ranks for stage in range(num_chunks * num_ranks))
    return Schedule(name, num_chunks * num_ranks, num_microbatches, ranks, (route,))
