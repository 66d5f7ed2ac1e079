"""Improved orders are sound, hold no more than allowed, lose to no builder, and go below no lower bound."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.schedule import BUILDERS, Action, Costs, Kind, StageCosts, build, check, improve, lower_bound, simulate
from jaxpipe.schedule.problem import Problem, peak
from tests.jaxpipe.runtime.models import deepseek_batch, deepseek_embed, deepseek_head, deepseek_params, deepseek_stage
from tests.plain import plain_value_and_grad

PLACEMENTS = (("gpipe", "1f1b", "zb1p"), ("zbv", "dualpipev"), ("dualpipe",), ("interleaved",))
"""Builders whose stages are on the same ranks."""


def random_costs(draw, stages):
    """Costs of all stages alike or of each, with and without a pair that gains, and messages."""

    def one():
        forward, backward_input, weight = draw.uniform(0.5, 2), draw.uniform(0.5, 2), draw.uniform(0.1, 2)
        backward = draw.choice([None, (backward_input + weight) * draw.uniform(0.8, 1.1)])
        pair = draw.choice([None, draw.uniform(0.6, 1.1) * (forward + (backward or backward_input + weight))])
        return Costs(forward, backward_input, weight, backward, pair)

    p2p = draw.choice([0.0, draw.uniform(0, 0.3)])
    if draw.random() < 0.6:
        return dataclasses.replace(one(), p2p=p2p)
    ends = {name: draw.uniform(0, 1) for name in ("embed", "embed_grad", "head")}
    return StageCosts(tuple(one() for _ in range(stages)), p2p, **ends)


def seeds_of(placement, ranks, microbatches):
    """Those of the builders that there are for these numbers."""
    found = []
    for name in placement:
        try:
            found.append(build(name, ranks, microbatches))
        except ValueError:
            continue
    return found


def check_improved(seeds, costs, moves):
    """(makespan of the best seed, of what is found)."""
    timelines = [simulate(seed, costs) for seed in seeds]
    best = min(timelines, key=lambda timeline: timeline.makespan)
    found = improve(seeds, costs, moves=moves)
    check(found)
    assert found.routes == seeds[0].routes and found.num_microbatches == seeds[0].num_microbatches
    timeline = simulate(found, costs)
    stash = max(best.peak_live)
    assert timeline.makespan <= best.makespan
    assert max(timeline.peak_live) <= stash
    assert lower_bound(found, costs, stash) <= timeline.makespan * (1 + 1e-9)
    for other in timelines:
        assert lower_bound(found, costs, max(other.peak_live)) <= other.makespan * (1 + 1e-9)
    return best.makespan, timeline.makespan


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda names: names[0])
def test_no_builder_beats_the_search_at_random_costs(placement):
    """200 sets of costs in all, 50 for each placement of stages."""
    draw, better = random.Random(22), 0
    for _ in range(50):
        ranks = draw.choice([2, 2, 4]) if placement == ("dualpipe",) else draw.choice([2, 2, 3])
        seeds = seeds_of(placement, ranks, 2 * ranks + 2 * draw.randrange(2))
        before, after = check_improved(seeds, random_costs(draw, seeds[0].num_stages), 60)
        better += after < before * (1 - 1e-9)
    assert better > 10  # the search is no mere copy of its seeds


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda names: names[0])
def test_no_builder_beats_the_search_on_more_ranks(placement):
    draw = random.Random(4)
    for _ in range(50):
        seeds = seeds_of(placement, 4, draw.choice([8, 16]))
        check_improved(seeds, random_costs(draw, seeds[0].num_stages), 1000)


def rank_orders(stage, divided):
    """All orders of a rank of one stage and two microbatches in turn."""
    letters = [Kind.F, Kind.I, Kind.W] if divided else [Kind.F, Kind.B]
    for row in set(itertools.permutations(letters * 2)):
        counts = dict.fromkeys(letters, 0)
        actions = []
        for kind in row:
            actions.append((Action(stage, kind, counts[kind]),))
            counts[kind] += 1
        places = {action: i for i, (action,) in enumerate(actions)}
        if all(
            places[Action(stage, a, m)] < places[Action(stage, b, m)]
            for m in range(2)
            for a, b in itertools.pairwise(letters)
        ):
            yield tuple(actions)


@pytest.mark.parametrize(
    "costs", [Costs(), Costs(1, 2, 1, p2p=0.5), Costs(2, 1, 3), StageCosts((Costs(1, 1, 1), Costs(2, 3, 1)), head=1)]
)
def test_bound_and_search_against_all_orders(costs):
    """Two ranks and two microbatches, backwards divided: the best of all orders is above the bound, and is found."""
    seed = build("zb1p", 2, 2)
    problem, best = Problem(seed, costs), float("inf")
    rows = [[[problem.code(group) for group in row] for row in rank_orders(stage, True)] for stage in range(2)]
    for orders in itertools.product(*rows):
        timing = problem.time(list(orders))
        if timing is not None:
            best = min(best, timing.makespan)
    found = simulate(improve(seed, costs, stash=2, moves=500), costs).makespan
    assert lower_bound(seed, costs, stash=2) <= best
    assert found == pytest.approx(best)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_problem_is_timed_as_the_simulator_does(name):
    draw = random.Random(1)
    schedule = build(name, 4, 8)
    for _ in range(5):
        costs = random_costs(draw, schedule.num_stages)
        problem, timeline = Problem(schedule, costs), simulate(schedule, costs)
        orders = problem.read(schedule)
        timing = problem.time(orders)
        assert timing is not None and timing.makespan == timeline.makespan
        assert timing.starts == [[event.start for event in events] for events in timeline.events]
        assert [peak(row) for row in orders] == list(timeline.peak_live)
        assert problem.write(orders, name) == schedule


def test_a_problem_knows_orders_that_cannot_run():
    problem = Problem(build("gpipe", 2, 2), Costs())
    orders = problem.read(problem.schedule)
    orders[0] = orders[0][::-1]
    assert problem.time(orders) is None


def test_more_memory_is_used_where_it_is_allowed():
    """With as many stashes as ZB-2P holds, nothing but the ramp is left of a linear pipeline's bubble."""
    seed = build("zb1p", 4, 12)
    costs = Costs(1, 1.3, 0.7)
    tight, loose = (improve(seed, costs, stash=stash, moves=1000) for stash in (None, 8))
    assert simulate(loose, costs).makespan < simulate(tight, costs).makespan
    assert max(simulate(tight, costs).peak_live) == 4 < max(simulate(loose, costs).peak_live) <= 8


def test_the_same_arguments_give_the_same_schedule():
    seed, costs = build("dualpipe", 4, 8), Costs(1, 1.2, 0.8, 1.9, 2.6)
    found = improve(seed, costs, moves=200)
    assert found == improve(seed, costs, moves=200)
    assert found.name == "improved_dualpipe"
    assert improve(found, costs, moves=1).name == "improved_dualpipe"


def test_a_seed_that_cannot_be_beaten_is_returned():
    seed = build("zbv", 4, 8)
    assert improve([build("dualpipev", 4, 8), seed], Costs()) is seed
    assert simulate(seed).makespan == lower_bound(seed, Costs())


def test_bad_seeds_are_refused():
    with pytest.raises(ValueError, match="pass one, such as"):
        improve([], Costs())
    with pytest.raises(ValueError, match=r"'dualpipe'.*other routes or microbatches than .*'1f1b'"):
        improve([build("1f1b", 4, 8), build("dualpipe", 4, 8)], Costs())
    with pytest.raises(ValueError, match="stash=3: the seeds hold at least 4 stashes"):
        improve(build("1f1b", 4, 8), Costs(), stash=3)


@pytest.mark.parametrize("name, ranks", [("dualpipev", 2), pytest.param("dualpipe", 4, marks=pytest.mark.slow)])
def test_an_improved_schedule_runs_and_equals_the_plain_program(x64, name, ranks):
    seed, costs = build(name, ranks, 2 * ranks), Costs(1, 1.4, 0.6, 1.9, 2.5, 0.1)
    schedule = improve(seed, costs, moves=500)
    assert schedule.name == f"improved_{name}"
    params = deepseek_params(schedule, 8, 16)
    batch = deepseek_batch(schedule, 8, 2, 4)
    functions = dict(embed=deepseek_embed, head=deepseek_head)
    mesh = jaxpipe.make_mesh(pp=ranks)
    step = jax.jit(jaxpipe.value_and_grad(deepseek_stage, schedule, mesh, costs=costs, **functions))
    (loss, _), grads = step(params, batch)
    (expected, _), plain = plain_value_and_grad(deepseek_stage, schedule, **functions)(params, batch)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), grads, plain)
