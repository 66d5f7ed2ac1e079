"""ZB-V: two stages a rank in a V; no rank waits once it has started, if F, I and W cost the same."""

from __future__ import annotations

import itertools

from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.ints import at_least
from jaxpipe.schedule.schedule import Schedule


def zbv(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V: rank r runs stages r and ``2 * num_ranks - 1 - r``, at most ``2 * num_ranks`` stashes a rank.

    With F = I = W a rank idles only for the ``num_ranks - 1`` forwards of the ramp: before its first action, while
    the first microbatch comes down to it, and after its last. Source: arXiv 2405.15362.

    Raises:
      ValueError: fewer than ``2 * num_ranks`` microbatches.

    >>> " ".join(str(action) for (action,) in zbv(1, 2).ranks[0])
    '0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1'
    """
    num_ranks = at_least("zbv", "num_ranks", num_ranks, 1)
    num_microbatches = at_least("zbv", "num_microbatches", num_microbatches, 2 * num_ranks)

    def order(rank: int) -> tuple[Group, ...]:
        stages = (rank, 2 * num_ranks - 1 - rank)
        done: dict[tuple[int, Kind], int] = dict.fromkeys(itertools.product((0, 1), Kind), 0)
        actions: list[Action] = []

        def run(chunk: int, *kinds: Kind) -> None:
            for kind in kinds:
                if done[chunk, kind] < num_microbatches:
                    actions.append(Action(stages[chunk], kind, done[chunk, kind]))
                    done[chunk, kind] += 1

        # Warm-up: fill the way down and back up the V until the first gradient can start.
        for _ in range(2 * (num_ranks - rank) - 1):
            run(0, Kind.F)
        for _ in range(rank):
            run(1, Kind.F)
            run(0, Kind.F)
        for _ in range(num_ranks - rank):
            run(1, Kind.F, Kind.I, Kind.W)
        # Steady state.
        while min(done[0, Kind.F], done[1, Kind.F]) < num_microbatches:
            run(0, Kind.F, Kind.I, Kind.W)
            run(1, Kind.F, Kind.I, Kind.W)
        # Cool-down: input gradients first, as other ranks wait for them; then what weight gradients remain.
        for _ in range(rank):
            run(0, Kind.I)
            run(1, Kind.I)
        for _ in range(num_ranks - rank):
            run(0, Kind.I)
            run(1 if done[1, Kind.W] < done[1, Kind.I] else 0, Kind.W)
        for chunk in (1, 0):
            while done[chunk, Kind.W] < done[chunk, Kind.I]:
                run(chunk, Kind.W)
        return tuple((action,) for action in actions)

    ranks = tuple(order(rank) for rank in range(num_ranks))
    last = 2 * num_ranks - 1
    route = tuple(min(stage, last - stage) for stage in range(2 * num_ranks))
    return Schedule("zbv", 2 * num_ranks, num_microbatches, ranks, (route,))
