"""DualPipe: microbatches enter from both ends of the pipeline."""

from __future__ import annotations

from jaxpipe.schedule.action import Action, Group
from jaxpipe.schedule.builders.dualpipev import eight_steps
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe: rank r runs stage r for the first half of the microbatches, ``num_ranks - 1 - r`` for the second.

    Every rank holds two stages' parameters and at most ``num_ranks + 1`` stashes. ``num_microbatches`` counts both
    directions. Source: DeepSeek-V3, arXiv 2412.19437; https://github.com/deepseek-ai/DualPipe.

    Raises:
      ValueError: odd ranks or microbatches, or fewer than ``2 * num_ranks`` microbatches.

    >>> " ".join("&".join(map(str, group)) for group in dualpipe(2, 4).ranks[0])
    '0F0 1F2 0F1 1B2 1F3&0B0 1B3 0I1 0W1'
    """
    num_ranks = at_least("dualpipe", "num_ranks", num_ranks, 2)
    num_microbatches = at_least("dualpipe", "num_microbatches", num_microbatches, 2 * num_ranks)
    if num_ranks % 2 or num_microbatches % 2:
        raise ValueError(
            f"dualpipe with {num_ranks} ranks and {num_microbatches} microbatches: both must be even, as two "
            "directions share them; dualpipev takes any number"
        )
    half = num_microbatches // 2

    def order(rank: int) -> tuple[Group, ...]:
        mirror = num_ranks - 1 - rank
        # In the second half of the ranks the directions swap roles: the other one enters there.
        own = int(rank >= num_ranks // 2)
        return tuple(
            tuple(
                Action((rank, mirror)[chunk ^ own], kind, count + (chunk ^ own) * half) for chunk, kind, count in group
            )
            for group in eight_steps(min(rank, mirror), num_ranks // 2, half)
        )

    ranks = tuple(order(rank) for rank in range(num_ranks))
    away = tuple(range(num_ranks))
    return Schedule("dualpipe", num_ranks, num_microbatches, ranks, (away, away[::-1]))
