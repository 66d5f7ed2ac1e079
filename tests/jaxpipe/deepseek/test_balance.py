"""Layers of several kinds over stages: every division tried."""

import itertools

import numpy as np
import pytest

import jaxpipe
from jaxpipe.deepseek.balance import SLACK, balanced_counts, even_out_ranks


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


def busiest(kinds, counts, costs, last, routes, first=0.0):
    """What the rank with most work has of a microbatch, the mean of the directions."""
    ends = np.cumsum((0, *counts))
    stages = [sum(costs[kind] for kind in kinds[start:end]) for start, end in itertools.pairwise(ends)]
    stages[-1] += last
    stages[0] += first
    ranks = np.zeros(max(map(max, routes)) + 1)
    for route in routes:
        np.add.at(ranks, list(route), np.array(stages) / len(routes))
    return ranks.max()


@pytest.mark.parametrize("name", ["dualpipev", "dualpipe", "1f1b", "interleaved"])
def test_the_busiest_rank_has_about_the_least_it_can(name):
    """Within half a layer of the best of all divisions, and never more than before."""
    rng, schedule = np.random.default_rng(0), jaxpipe.schedule.build(name, 2, 4)
    for _ in range(12):
        dense, moe = int(rng.integers(0, 3)), int(rng.integers(5, 9))
        kinds, costs = ["dense"] * dense + ["moe"] * moe, {"dense": float(rng.choice([0.5, 1.2])), "moe": 1.0}
        last, first = float(rng.choice([0.0, 1.3])), float(rng.choice([0.0, 0.3]))
        before = balanced_counts(kinds, schedule.num_stages, {kind: costs[kind] for kind in kinds}, last, first)
        after = even_out_ranks(before, kinds, costs, last, schedule.routes, first)
        assert sum(after) == len(kinds) and min(after[:-1]) >= 1 and after[-1] >= (not last or not dense)
        judged = lambda counts: busiest(kinds, counts, costs, last, schedule.routes, first)  # noqa: B023, E731
        least = min(map(judged, divisions(len(kinds), schedule.num_stages)))
        assert judged(after) <= min(judged(before), least + 0.5) + 1e-9


def test_the_last_stage_of_deepseek_v3_has_its_two_heads_alone():
    """On a V of 16 ranks, by products of a token: a head costs 0.93 of a layer's 0.75, and there are two of them.

    With a layer on either stage rank 0 has 3.46, 1.15 of what a rank with four layers has. Layers then move up by one.
    """
    kinds = ["dense"] * 3 + ["moe"] * 58 + ["mtp"]
    costs, routes = {"dense": 0.75, "moe": 0.75, "mtp": 0.85}, jaxpipe.schedule.build("dualpipev", 16, 32).routes
    before = (1, *[2] * 30, 1)
    after = even_out_ranks(before, kinds, costs, 1.85, routes)
    assert after == (*[2] * 31, 0)
    assert busiest(kinds, before, costs, 1.85, routes) == pytest.approx(3.45)
    assert busiest(kinds, after, costs, 1.85, routes) == pytest.approx(3.35)


def test_a_head_on_a_v_leaves_its_rank_less():
    """As of moe-1b: nine layers that are alike and a head of 1.3. Six layers became five, and 4 + 1.3."""
    kinds, routes = ["moe"] * 9, jaxpipe.schedule.build("dualpipev", 2, 4).routes
    before = balanced_counts(kinds, 4, {"moe": 1.0}, 1.3)
    after = even_out_ranks(before, kinds, {"moe": 1.0}, 1.3, routes)
    assert busiest(kinds, before, {"moe": 1.0}, 1.3, routes) == 6
    assert busiest(kinds, after, {"moe": 1.0}, 1.3, routes) == pytest.approx(5.3)


def test_ranks_of_the_same_layers_are_equal_whatever_their_sums_round_to():
    """DeepSeek-V3 by planned milliseconds in FP8: of equals for the busiest rank, no stage has a third layer."""
    kinds, routes = ["dense"] * 3 + ["moe"] * 58 + ["mtp"], jaxpipe.schedule.build("dualpipev", 16, 32).routes
    costs = {"dense": 28.4, "moe": 33.6, "mtp": 39.0}
    after = even_out_ranks(balanced_counts(kinds, 32, costs, 69.5, 6.15), kinds, costs, 69.5, routes, 6.15)
    assert after == (*[2] * 31, 0)


def test_two_ranks_of_deepseek_v2_lite_have_rows_of_one_length():
    """By operations its head counts 2.24 layers and a stage has eight; by time 1.45, and all fit in seven."""
    kinds, routes = ["dense"] + ["moe"] * 26, jaxpipe.schedule.build("dualpipev", 2, 4).routes
    costs = {"dense": 4.6, "moe": 6.65}
    assert even_out_ranks(balanced_counts(kinds, 4, costs, 9.6), kinds, costs, 9.6, routes) == (7, 7, 7, 6)
