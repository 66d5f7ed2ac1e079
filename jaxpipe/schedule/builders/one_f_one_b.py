"""1F1B: forwards and backwards alternate as soon as they can."""

from __future__ import annotations

from jaxpipe.schedule.builders.interleaved import alternating
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B: rank r stashes ``num_ranks - r`` microbatches. Source: PipeDream-Flush, arXiv 2006.09503.

    >>> " ".join(str(action) for (action,) in one_f_one_b(2, 3).ranks[0])
    '0F0 0F1 0B0 0F2 0B1 0B2'
    """
    num_ranks = at_least("1f1b", "num_ranks", num_ranks, 1)
    num_microbatches = at_least("1f1b", "num_microbatches", num_microbatches, 1)
    return alternating("1f1b", num_ranks, num_microbatches, num_chunks=1, per_round=num_microbatches)
