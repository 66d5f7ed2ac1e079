"""Packing: legal, in order, and close to what ranks that never wait for each other would take."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.runtime import search
from jaxpipe.runtime.pack import Packing, pack, pack_naive
from jaxpipe.schedule import BUILDERS, build
from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, simulate
from tests.cases import cases

UNIT = Costs()
UNEVEN = Costs(forward=1.0, backward_input=1.2, weight=0.8)
HIDDEN = 0.85 * 3  # an overlapped pair hides 15% of its time
SIZES = [(name, 4, 8) for name in BUILDERS]


def assert_legal(schedule: Schedule, costs: Costs, packing: Packing) -> None:
    """Each tick needs only what earlier ticks, or earlier groups of the same rank, have made."""
    tick_of, place_of, begin, makespan = {}, {}, [0] * schedule.num_ranks, 0.0
    for tick, progress in enumerate(packing.progress):
        longest = 0.0
        for rank, row in enumerate(schedule.ranks):
            assert begin[rank] <= progress[rank] <= len(row)
            groups = row[begin[rank] : progress[rank]]
            longest = max(longest, sum(costs.group(tuple(a.kind for a in group)) for group in groups))
            for place, group in enumerate(groups, start=begin[rank]):
                for action in group:
                    tick_of[action], place_of[action] = tick, (rank, place)
        assert list(progress) != begin, f"tick {tick} is empty"
        begin, makespan = list(progress), makespan + longest
    assert begin == [len(row) for row in schedule.ranks]
    assert packing.makespan == pytest.approx(makespan)

    def assert_after(action: Action, *needed: Action) -> None:
        (need,) = [n for n in needed if n in tick_of]
        if place_of[need][0] == place_of[action][0]:
            assert place_of[need] < place_of[action], (need, action)
        else:
            assert tick_of[need] < tick_of[action], (need, action)

    for action in tick_of:
        stage, kind, microbatch = action
        if kind is Kind.F and stage > 0:
            assert_after(action, Action(stage - 1, Kind.F, microbatch))
        if kind in (Kind.B, Kind.I):
            assert_after(action, Action(stage, Kind.F, microbatch))
            if stage < schedule.num_stages - 1:
                assert_after(action, Action(stage + 1, Kind.B, microbatch), Action(stage + 1, Kind.I, microbatch))
        if kind is Kind.W:
            assert_after(action, Action(stage, Kind.I, microbatch))


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SIZES)
@pytest.mark.parametrize("costs", [UNIT, UNEVEN], ids=["unit", "uneven"])
def test_packings_are_legal_and_packing_never_loses(name: str, ranks: int, microbatches: int, costs: Costs) -> None:
    schedule = build(name, ranks, microbatches)
    packed, naive = pack(schedule, costs), pack_naive(schedule, costs)
    assert_legal(schedule, costs, packed)
    assert_legal(schedule, costs, naive)
    assert packed.makespan <= naive.makespan + 1e-6
    assert packed.makespan >= simulate(schedule, costs).makespan - 1e-6
    assert all(b - a <= 1 for x, y in zip(naive.progress, naive.progress[1:], strict=False)
               for a, b in zip(x, y, strict=True))  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    costs=st.tuples(*[st.floats(0.0, 4.0) for _ in range(5)]),
)
def test_any_costs_pack_legally(size: tuple[str, int, int], costs: tuple[float, ...]) -> None:
    schedule = build(*size)
    drawn = Costs(*costs)
    packed = pack(schedule, drawn)
    assert_legal(schedule, drawn, packed)
    assert packed.makespan <= pack_naive(schedule, drawn).makespan + 1e-6


# (ranks, microbatches, unit makespan, ticks)
DUALPIPE = [(4, 20, 62, 25), (8, 20, 66, 34), (8, 64, 198, 78), (16, 64, 207, 95)]
DUALPIPEV = [(4, 10, 66, 34), (4, 20, 126, 54), (8, 20, 135, 71), (8, 64, 399, 159)]


@pytest.mark.parametrize(
    ("name", "size"), [("dualpipe", size) for size in DUALPIPE] + [("dualpipev", size) for size in DUALPIPEV]
)
def test_lockstep_costs_at_most_one_percent(name: str, size: tuple[int, int, int, int]) -> None:
    ranks, microbatches, makespan, ticks = size
    schedule = build(name, ranks, microbatches)
    packed = pack(schedule, UNIT)
    assert packed.makespan <= makespan
    assert packed.num_ticks <= ticks
    assert packed.makespan <= 1.01 * simulate(schedule, UNIT).makespan


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("dualpipe", *size[:2]) for size in DUALPIPE] + [("dualpipev", *size[:2]) for size in DUALPIPEV],
)
@cases(
    "costs",
    [UNEVEN, dataclasses.replace(UNIT, overlapped=HIDDEN), dataclasses.replace(UNEVEN, overlapped=HIDDEN)],
    quick=[dataclasses.replace(UNEVEN, overlapped=HIDDEN)],
    ids=["uneven", "overlapped", "uneven, overlapped"],
)
def test_uneven_costs_lose_at_most_three_percent(name: str, ranks: int, microbatches: int, costs: Costs) -> None:
    schedule = build(name, ranks, microbatches)
    assert pack(schedule, costs).makespan <= 1.03 * simulate(schedule, costs).makespan


@cases("name", BUILDERS, quick=["gpipe", "interleaved", "dualpipe", "dualpipev"])
def test_large_schedules_take_few_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are the positions of the ranks that the search goes on from, most of the work of packing."""
    advance, looked_at = search._advance, []

    def counted(space: search._Space, beam: search._Beam) -> search._Beam:
        looked_at.append(len(beam.places))
        return advance(space, beam)

    monkeypatch.setattr(search, "_advance", counted)
    pack(build(name, 16, 128), UNEVEN)
    assert 0 < sum(looked_at) < 600_000  # at most 540,000 when written


def test_a_deadlock_is_an_error() -> None:
    rows = (((Action(0, Kind.B, 0),), (Action(0, Kind.F, 0),)), ((Action(1, Kind.F, 0),), (Action(1, Kind.B, 0),)))
    schedule = Schedule("broken", 2, 1, rows, ((0, 1),))
    with pytest.raises(ValueError, match="wait for each other"):
        pack(schedule, UNIT)
    with pytest.raises(ValueError, match="wait for each other"):
        pack_naive(schedule, UNIT)
