"""How many layers each stage gets where layers differ in what they cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

SLACK = 1.01
"""Costs are known no better than this: so much above the least, a division into fewer kinds of stages is preferred."""


def balanced_counts(
    kinds: Sequence[str], stages: int, costs: Mapping[str, float], last: float = 0.0, first: float = 0.0
) -> tuple[int, ...]:
    """Layers of each stage, in the order of the forward pass.

    A pipeline waits for its costliest stage, so that one costs as little as can be. Among such divisions there are as
    few kinds of stages as can be, because a program has code for each; then as few slots; then stages as equal as
    can be.

    Args:
      kinds: of each layer; layers of a kind follow each other.
      stages: how many, at most the layers.
      costs: of a layer of each kind.
      last, first: what else the last and the first stage cost.

    Raises:
      ValueError: costs that are not positive, or not of these kinds.

    >>> balanced_counts(["dense"] * 3 + ["moe"] * 8 + ["mtp"], 4, {"dense": 1.0, "moe": 1.0, "mtp": 1.2})
    (3, 3, 3, 3)
    >>> balanced_counts(["dense"] + ["moe"] * 8, 2, {"dense": 1.0, "moe": 1.0}, last=2.0)
    (5, 4)
    """
    _check(kinds, costs, last, first)
    sums = [0.0, *itertools.accumulate(costs[kind] for kind in kinds)]

    def cost(stage: int, start: int, end: int) -> float:
        return sums[end] - sums[start] + last * (stage == stages - 1) + first * (stage == 0)

    limit = SLACK * _least(len(kinds), stages, cost)
    # best[end, start]: of divisions of the first `end` layers whose last stage begins with layer `start`, the one with
    # the least (kinds, slots, sum of squares), and where its stage before the last begins. Stages of a kind can stand
    # side by side, as layers of a kind do: so kinds are counted where neighbours differ.
    best: dict[tuple[int, int], tuple[tuple[float, ...], int]] = {(0, 0): ((0, 0, 0.0), 0)}
    steps = []
    for stage in range(stages):
        before, best = best, {}
        ending: dict[int, list[int]] = {}
        for end, start in before:
            ending.setdefault(end, []).append(start)
        for start, previous in ending.items():
            for end in range(start + 1, len(kinds) - (stages - 1 - stage) + 1):
                mine = cost(stage, start, end)
                if mine > limit:
                    break
                row = kinds[start:end]
                for at in previous:
                    (found, slots, squares), _ = before[start, at]
                    new = stage == 0 or kinds[at:start] != row
                    key = (found + new, max(slots, end - start), squares + mine**2)
                    if (end, start) not in best or key < best[end, start][0]:
                        best[end, start] = key, at
        steps.append(best)
    end, start = min((place for place in best if place[0] == len(kinds)), key=lambda place: best[place][0])
    counts = []
    for step in reversed(steps):
        counts.append(end - start)
        end, start = start, step[end, start][1]
    return tuple(reversed(counts))


def busiest_rank(stages: Sequence[float], routes: Sequence[Sequence[int]]) -> float:
    """What the rank with most work has of a microbatch, given what each stage costs.

    Args:
      stages: the cost of each.
      routes: the rank of each stage, for each direction of microbatches, which share them evenly.

    >>> busiest_rank([1, 2, 3, 4], [(0, 1, 1, 0)]), busiest_rank([1, 2], [(0, 1), (1, 0)])
    (5.0, 1.5)
    """
    ranks = dict.fromkeys(itertools.chain(*routes), 0.0)
    for route in routes:
        for rank, cost in zip(route, stages, strict=True):
            ranks[rank] += cost / len(routes)
    return max(ranks.values())


def even_out_ranks(
    counts: Sequence[int],
    kinds: Sequence[str],
    costs: Mapping[str, float],
    last: float,
    routes: Sequence[Sequence[int]],
    first: float = 0.0,
) -> tuple[int, ...]:
    """The counts with layers moved between stages, as long as that leaves the busiest rank less to do.

    A rank of a V-shaped schedule has two stages, and what both take is what others wait for: the costliest stage alone
    decides little. The last stage may give all its layers away where it has something ``last`` to do and layers are of
    several kinds; of one kind all stages run as many slots. Where the busiest rank would gain less than `SLACK` the
    counts stay.

    Args:
      counts: layers of each stage.
      kinds, costs, last: as `balanced_counts` takes them.
      routes: the rank of each stage, for each direction of microbatches.
      first: as of `balanced_counts`.

    >>> even_out_ranks((1, 2, 2, 1), ["moe"] * 6, {"moe": 1.0}, 0.0, [(0, 1, 1, 0)])
    (2, 1, 2, 1)
    >>> kinds, costs = ["dense"] + ["moe"] * 9, {"dense": 1.0, "moe": 1.0}
    >>> even_out_ranks((1, 2, 2, 2, 2, 1), kinds, costs, 3.4, [(0, 1, 2, 2, 1, 0)])
    (1, 3, 2, 2, 2, 0)
    """
    sums = [0.0, *itertools.accumulate(costs[kind] for kind in kinds)]

    def key(counts: Sequence[int]) -> tuple[float, float, float]:
        """(the busiest rank's cost as a share of all layers', the costliest stage's, the sum of squares)."""
        ends = [0, *itertools.accumulate(counts)]
        stages = [sums[end] - sums[start] for start, end in itertools.pairwise(ends)]
        stages[0] += first
        stages[-1] += last
        # Ranks of equal layers must not differ by the rounding of their sums.
        return round(busiest_rank(stages, routes) / sums[-1], 9), max(stages), sum(cost**2 for cost in stages)

    may_be_empty = len(counts) - 1 if last and len(costs) > 1 else None
    best, found = tuple(counts), key(counts)
    while True:
        moved = [
            tuple(count - (stage == giver) + (stage == taker) for stage, count in enumerate(best))
            for giver, taker in itertools.permutations(range(len(best)), 2)
            if best[giver] > (giver != may_be_empty)
        ]
        better = min(moved, key=key, default=best)
        if key(better) >= found:
            return best if SLACK * found[0] < key(counts)[0] else tuple(counts)
        best, found = better, key(better)


def _least(layers: int, stages: int, cost: Callable[[int, int, int], float]) -> float:
    """What the costliest stage costs at least."""
    least = [0.0] + [math.inf] * layers
    for stage in range(stages):
        least = [
            min((max(least[start], cost(stage, start, end)) for start in range(end)), default=math.inf)
            for end in range(layers + 1)
        ]
    return least[layers]


def _check(kinds: Sequence[str], costs: Mapping[str, float], last: float, first: float) -> None:
    every = *costs.items(), ("head", last), ("embedding", first)
    wrong = {kind: value for kind, value in every if not 0 <= value < math.inf}
    wrong |= {kind: value for kind, value in costs.items() if not value}
    if set(costs) != set(kinds) or wrong:
        raise ValueError(
            f"costs={dict(costs)}, {last} of the head, {first} of the embedding: give a positive number for each of "
            f"{list(dict.fromkeys(kinds))} and no other kind of layer"
        )
