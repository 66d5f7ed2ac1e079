"""Layers of several kinds over stages: every division tried."""

import itertools

import numpy as np
import pytest

from jaxpipe.deepseek.balance import SLACK, balanced_counts


def divisions(layers, stages):
    for ends in itertools.combinations(range(1, layers), stages - 1):
        bounds = (0, *ends, layers)
        yield tuple(end - start for start, end in itertools.pairwise(bounds))


def judge(kinds, counts, costs, last):
    """(cost of the costliest stage, kinds of stages, slots)."""
    ends = np.cumsum((0, *counts))
    rows = [tuple(kinds[start:end]) for start, end in itertools.pairwise(ends)]
    every = [sum(costs[kind] for kind in row) for row in rows]
    every[-1] += last
    return max(every), len(set(rows)), max(counts)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_no_division_is_better(stages):
    rng = np.random.default_rng(stages)
    for _ in range(12):
        dense, moe, mtp = rng.integers(0, 4), rng.integers(5, 8), rng.integers(0, 2)
        kinds = ["dense"] * dense + ["moe"] * moe + ["mtp"] * mtp
        costs = dict(zip(("dense", "moe", "mtp"), rng.choice([0.5, 1.0, 1.001, 1.7], 3), strict=True))
        costs, last = {kind: float(costs[kind]) for kind in kinds}, float(rng.choice([0.0, 1.5]))
        found = judge(kinds, balanced_counts(kinds, stages, costs, last), costs, last)
        every = [judge(kinds, counts, costs, last) for counts in divisions(len(kinds), stages)]
        least = min(cost for cost, *_ in every)
        assert found[0] <= SLACK * least
        assert found[1:] == min((number, slots) for cost, number, slots in every if cost <= SLACK * least)


def test_deepseek_v3_has_three_kinds_of_stages_on_sixteen():
    kinds = ["dense"] * 3 + ["moe"] * 58 + ["mtp"]
    assert balanced_counts(kinds, 16, {"dense": 1.33, "moe": 1.34, "mtp": 1.54}) == (3, *[4] * 14, 3)
