"""A bound on deferred weight gradients: kept, with all else in its order and no more memory; gradients stay."""

import dataclasses
import random

import numpy as np
import pytest

import jaxpipe
from jaxpipe.runtime.lower import lower
from jaxpipe.schedule import BUILDERS, Action, Costs, Kind, Schedule, bound_deferred, build, check, simulate
from tests.jaxpipe.runtime import models
from tests.jaxpipe.runtime.test_execute import compare
from tests.jaxpipe.schedule.test_improve import random_costs


def divided(schedule, draw):
    """The schedule with some whole backwards in halves, each W anywhere behind its I, and some pairs taken apart."""

    def order(groups):
        groups = [list(group) for group in groups]
        for group in list(groups):
            if group[-1].kind is Kind.B and draw.random() < 0.7:
                whole = group[-1]
                group[-1] = whole._replace(kind=Kind.I)
                at = draw.randint(groups.index(group) + 1, len(groups))
                groups.insert(at, [whole._replace(kind=Kind.W)])
            if len(group) == 2 and draw.random() < 0.3:
                groups.insert(groups.index(group) + 1, [group.pop()])
        return tuple(map(tuple, groups))

    return dataclasses.replace(schedule, ranks=tuple(map(order, schedule.ranks)))


def random_schedules(count):
    """Schedules, bounds and costs."""
    draw = random.Random(23)
    while count:
        name, ranks = draw.choice(list(BUILDERS)), draw.choice([1, 2, 3, 4])
        try:
            schedule = build(name, ranks, draw.randint(1, 6) * draw.choice([1, ranks]))
        except ValueError:
            continue
        schedule = divided(schedule, draw)
        yield schedule, draw.randint(0, 4), random_costs(draw, schedule.num_stages)
        count -= 1


def others(groups):
    """The groups of a rank without its Ws; a backward is one whether whole or not."""
    kinds = {Kind.F: Kind.F, Kind.B: Kind.B, Kind.I: Kind.B}
    return [tuple(a._replace(kind=kinds[a.kind]) for a in group) for group in groups if group[0].kind is not Kind.W]


def places(groups):
    """Of each backward how many groups that are no Ws have run when its weights' gradient has been made."""
    found, count = {}, 0
    for group in groups:
        count += group[0].kind is not Kind.W
        found |= {a[::2]: count for a in group if a.kind in (Kind.B, Kind.W)}
    return found


def test_random_schedules_keep_to_the_bound():
    bounded = 0
    for schedule, slots, costs in random_schedules(100):
        found = bound_deferred(schedule, slots, costs)
        check(found)
        before, after = simulate(schedule, costs), simulate(found, costs)
        assert max(after.peak_pending_weight) <= slots
        if max(before.peak_pending_weight) <= slots:
            assert found is schedule
            continue
        bounded += 1
        assert (found.name, found.routes) == (f"{schedule.name}_deferred{slots}", schedule.routes)
        for old, new in zip(schedule.ranks, found.ranks, strict=True):
            assert others(new) == others(old)
            earlier, later = places(new), places(old)
            assert all(earlier[each] <= later[each] for each in later)
        assert np.all(np.array(after.peak_live) <= before.peak_live)
        assert np.all(np.array(after.peak_activations) <= before.peak_activations)
        assert np.all(np.array(after.peak_pending_weight) <= before.peak_pending_weight)
        if not slots:
            assert all(a.kind in (Kind.F, Kind.B) for groups in found.ranks for group in groups for a in group)
    assert bounded > 30


@pytest.mark.parametrize("name", ["zb1p", "zbv", "dualpipe", "dualpipev"])
def test_a_program_has_so_many_cross_slots_and_no_larger_pool(name):
    schedule = build(name, 4, 8)
    whole = lower(schedule)
    for slots in range(whole.num_cross_slots + 1):
        program = lower(bound_deferred(schedule, slots))
        assert program.num_cross_slots == slots
        assert program.num_stash_slots <= whole.num_stash_slots
        assert program.num_weight_stash_slots <= whole.num_weight_stash_slots


def test_a_weight_gradient_runs_before_the_input_gradient_that_needs_its_slot():
    """By hand: nothing of rank 1 waits once it has begun, so each W but the last is put before the next I."""
    found = bound_deferred(build("zb1p", 2, 3), 1)
    assert " ".join(str(action) for (action,) in found.ranks[1]) == "1F0 1I0 1F1 1W0 1I1 1F2 1W1 1I2 1W2"


def test_a_weight_gradient_fills_a_gap():
    """By hand: rank 1 waits from 12 to 16 for its second forward, and one W less is left at the end."""
    rows = (
        "0F0 0F1 0F2 0B0 0B1 0B2",
        "1F0 1I0 1F1 1F2 1I1 1I2 1W0 1W1 1W2",
    )
    ranks = tuple(tuple((Action.parse(text),) for text in row.split()) for row in rows)
    schedule = Schedule("own", 2, 3, ranks, ((0, 1),))
    costs = jaxpipe.schedule.StageCosts((Costs(8, 1, 1), Costs(2, 2, 2)))
    found = bound_deferred(schedule, 1, costs)
    assert [str(action) for (action,) in found.ranks[1]][:4] == ["1F0", "1I0", "1W0", "1F1"]
    assert (simulate(schedule, costs).makespan, simulate(found, costs).makespan) == (36, 34)


def test_whole_backwards_are_taken_where_they_are_faster():
    costs = Costs(1, 1, 1, backward=1.1)
    found = bound_deferred(build("zb1p", 2, 6), 1, costs)
    assert any(action.kind is Kind.B for (action,) in found.ranks[1])


def test_costs_of_dualpipev_on_16_ranks():
    """A quarter of the slots costs about a percent; with equal actions, so by counting."""
    schedule = build("dualpipev", 16, 64)
    spans = [simulate(bound_deferred(schedule, slots)).makespan for slots in (16, 4)]
    assert max(simulate(schedule).peak_pending_weight) == 16
    assert spans[0] == 414 and spans[1] <= 419


def test_bad_bounds_are_refused():
    with pytest.raises(ValueError, match="dualpipev with slots=-1: it must be an integer of at least 0"):
        bound_deferred(build("dualpipev", 2, 4), -1)
    broken = dataclasses.replace(build("zb1p", 2, 2), num_microbatches=3)
    with pytest.raises(ValueError, match="it needs F and B, or F, I and W"):
        bound_deferred(broken, 1)


@pytest.mark.parametrize(
    "name, ranks, slots",
    [
        ("zb1p", 2, 1),
        pytest.param("zbv", 2, 1, marks=pytest.mark.slow),
        pytest.param("dualpipev", 4, 1, marks=pytest.mark.slow),
        pytest.param("dualpipe", 4, 0, marks=pytest.mark.slow),
        pytest.param("zb1p", 8, 3, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_the_plain_program_s(x64, name, ranks, slots):
    schedule = bound_deferred(build(name, ranks, 2 * ranks), slots)
    assert schedule.name.endswith(f"_deferred{slots}")
    compare(
        schedule,
        models.deepseek_params(schedule, 8, 16),
        models.deepseek_batch(schedule, 8, sequence=4),
        stage=models.deepseek_stage,
        embed=models.deepseek_embed,
        head=models.deepseek_head,
    )
