"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """GPipe; every rank stashes every microbatch. Source: arXiv 1811.06965.

    >>> " ".join(str(action) for (action,) in gpipe(2, 2).ranks[1])
    '1F0 1F1 1B0 1B1'
    """
    num_ranks = at_least("gpipe", "num_ranks", num_ranks, 1)
    num_microbatches = at_least("gpipe", "num_microbatches", num_microbatches, 1)
    ranks = tuple(
        tuple((Action(rank, kind, m),) for kind in (Kind.F, Kind.B) for m in range(num_microbatches))
        for rank in range(num_ranks)
    )
    return Schedule("gpipe", num_ranks, num_microbatches, ranks, (tuple(range(num_ranks)),))
