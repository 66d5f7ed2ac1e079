"""ZB-H1 (ZB1P): 1F1B whose weight gradients fill the gaps."""

from __future__ import annotations

from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule


def zero_bubble(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1, which DeepSeek calls ZB1P: at most ``num_ranks`` microbatches stashed on any rank.

    Rank r runs its input gradients as 1F1B does and each weight gradient r microbatches later, so that every
    rank uses the memory that 1F1B needs on rank 0 only. Source: arXiv 2401.10241.

    >>> " ".join(str(action) for (action,) in zero_bubble(2, 3).ranks[1])
    '1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2'
    """
    num_ranks = at_least("zb1p", "num_ranks", num_ranks, 1)
    num_microbatches = at_least("zb1p", "num_microbatches", num_microbatches, 1)

    def order(rank: int) -> tuple[Group, ...]:
        ahead = min(num_ranks - 1 - rank, num_microbatches)
        actions = [Action(rank, Kind.F, m) for m in range(ahead)]
        for m in range(num_microbatches):
            if m + ahead < num_microbatches:
                actions.append(Action(rank, Kind.F, m + ahead))
            actions.append(Action(rank, Kind.I, m))
            if m >= rank:
                actions.append(Action(rank, Kind.W, m - rank))
        actions += [Action(rank, Kind.W, m) for m in range(max(0, num_microbatches - rank), num_microbatches)]
        return tuple((action,) for action in actions)

    ranks = tuple(order(rank) for rank in range(num_ranks))
    return Schedule("zb1p", num_ranks, num_microbatches, ranks, (tuple(range(num_ranks)),))
