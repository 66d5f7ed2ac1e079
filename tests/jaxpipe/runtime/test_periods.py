"""The steady state of long schedules: searched once, repeated, and as good as what a search of all of it finds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxpipe.runtime import pack as packing_module
from jaxpipe.runtime.actions import Actions, read_actions
from jaxpipe.runtime.graph import GroupGraph, make_graph, make_reach
from jaxpipe.runtime.lower import forwards, lower
from jaxpipe.runtime.pack import Packing, pack, pack_naive
from jaxpipe.runtime.periods import find_steady
from jaxpipe.runtime.search import search
from jaxpipe.schedule import BUILDERS, Costs, Schedule, build, check, interleaved, simulate
from tests.cases import cases
from tests.jaxpipe.runtime.test_lower import assert_right
from tests.jaxpipe.runtime.test_pack import UNEVEN, UNIT, assert_legal

LONG = [(name, ranks, count * (1 + (name == "dualpipe"))) for name in BUILDERS for ranks, count in ((2, 40), (4, 80))]
SHORT = [size for size in LONG if size[1] == 2 or size[0] in ("interleaved", "dualpipe", "dualpipev")]


def searched_whole(schedule: Schedule, costs: Costs, shared_ends: bool = False) -> Packing:
    """The best packing that the search finds in the schedule as it is."""
    graph = make_graph(read_actions(schedule), costs, shared_ends)
    reach, paths = make_reach(graph), search(graph)
    found = [Packing(tuple(map(tuple, path[1:].tolist())), float(reach.durations(path).sum())) for path in paths]
    return min(found, key=lambda packing: (round(packing.makespan, 6), packing.num_ticks))


def slots(schedule: Schedule, packing: Packing, **options: bool) -> tuple[int, ...]:
    """How many of each kind a program needs."""
    program = lower(schedule, packing=packing, **options)
    return (
        program.num_message_slots, program.num_stash_slots, program.num_weight_stash_slots, program.num_cross_slots,
        len(program.channels), int(program.communicate.sum()),
    )  # fmt: skip


def one_thing_late(schedule: Schedule, rank: int) -> Schedule:
    """The schedule, of which a rank in the middle of its order runs one weight gradient a group later."""
    row = list(schedule.ranks[rank])
    at = next(i for i in range(len(row) // 2, len(row)) if row[i][0].kind.value == "W")
    row[at], row[at + 1] = row[at + 1], row[at]
    rows = [tuple(row) if r == rank else other for r, other in enumerate(schedule.ranks)]
    return dataclasses.replace(schedule, ranks=tuple(rows))


def every_third_late(schedule: Schedule) -> Schedule:
    """The schedule, all of whose ranks run the weight gradient of every third microbatch a group later."""
    rows = [list(row) for row in schedule.ranks]
    for row in rows:
        for i in [i for i, (a,) in enumerate(row[:-1]) if a.kind.value == "W" and a.microbatch % 3 == 1]:
            row[i], row[i + 1] = row[i + 1], row[i]
    return dataclasses.replace(schedule, ranks=tuple(map(tuple, rows)))


@cases(("name", "ranks", "microbatches"), LONG, quick=SHORT)
@cases("costs", [UNIT, UNEVEN], quick=[UNEVEN], ids=["unit", "uneven"])
def test_repeated_ticks_are_as_good_as_searched_ones(name: str, ranks: int, microbatches: int, costs: Costs) -> None:
    schedule = build(name, ranks, microbatches)
    assert find_steady(read_actions(schedule)) is not None
    packed, whole = pack(schedule, costs), searched_whole(schedule, costs)
    assert_legal(schedule, costs, packed)
    assert packed.makespan <= whole.makespan + 1e-6
    assert packed.num_ticks <= whole.num_ticks
    assert np.all(np.array(slots(schedule, packed)) <= slots(schedule, whole))


@cases(("name", "ranks", "microbatches"), LONG, quick=SHORT)
def test_so_they_are_with_shared_ends_and_forwards_alone(name: str, ranks: int, microbatches: int) -> None:
    schedule = build(name, ranks, microbatches)
    packed, whole = (f(schedule, UNIT, shared_ends=True) for f in (pack, searched_whole))
    assert (packed.makespan, packed.num_ticks) <= (whole.makespan, whole.num_ticks)
    assert np.all(np.array(slots(schedule, packed, shared_ends=True)) <= slots(schedule, whole, shared_ends=True))
    packed, whole = pack(forwards(schedule), UNIT), searched_whole(forwards(schedule), UNIT)
    assert_legal(forwards(schedule), UNIT, packed)
    assert (packed.makespan, packed.num_ticks) <= (whole.makespan, whole.num_ticks)
    assert np.all(np.array(slots(schedule, packed, forward_only=True)) <= slots(schedule, whole, forward_only=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_long_programs_are_right(name: str) -> None:
    schedule = build(name, 4, 88)
    assert_right(lower(schedule), embed_grad=True)
    assert_right(lower(schedule, shared_ends=True, embed_grad=False), embed_grad=False)
    assert_right(lower(schedule, forward_only=True), embed_grad=False)


@pytest.mark.parametrize("name", BUILDERS)
def test_search_does_not_grow_with_the_microbatches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[GroupGraph] = []

    def recorded(graph: GroupGraph) -> list[np.ndarray]:
        searched.append(graph)
        return search(graph)

    monkeypatch.setattr(packing_module, "search", recorded)
    for microbatches in (128, 512):
        schedule = build(name, 4, microbatches)
        packed = pack(schedule, UNIT)
        assert len(packed.progress) > microbatches  # all of it, although
    assert len(searched) == 2  # neither was searched whole, and
    for field in dataclasses.fields(GroupGraph):  # both as the same schedule of few microbatches
        np.testing.assert_array_equal(*(getattr(graph, field.name) for graph in searched))
    assert len(searched[0].cost) < sum(map(len, build(name, 4, 64).ranks))


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_lockstep_costs_at_most_one_percent_however_many_microbatches(name: str) -> None:
    schedule = build(name, 8, 1000)
    assert pack(schedule, UNIT).makespan <= 1.002 * simulate(schedule, UNIT).makespan


@pytest.mark.parametrize("chunks", [1, 3])
def test_longer_periods_are_found(chunks: int) -> None:
    """Interleaved 1F1B of any number of chunks repeats itself after as many microbatches as there are ranks."""
    schedule = interleaved(4, 120, chunks)
    steady = find_steady(read_actions(schedule))
    assert steady is not None
    assert steady.actions.num_microbatches < 50
    packed = pack(schedule, UNIT)
    assert_legal(schedule, UNIT, packed)
    assert packed.makespan <= searched_whole(schedule, UNIT).makespan


def test_what_repeats_is_found_in_any_schedule() -> None:
    schedule = every_third_late(build("zb1p", 3, 90))
    check(schedule)
    actions = read_actions(schedule)
    steady = find_steady(actions)
    assert steady is not None
    (region,) = steady.regions
    assert (region.period == 9).all()  # F, I and W of three microbatches
    packed = pack(schedule, UNEVEN)
    assert_legal(schedule, UNEVEN, packed)
    assert packed.makespan <= searched_whole(schedule, UNEVEN).makespan + 1e-6
    assert_right(lower(schedule, packing=packed), embed_grad=True)


@pytest.mark.parametrize("rank", range(3))
def test_what_does_not_repeat_is_searched_whole(rank: int) -> None:
    schedule = one_thing_late(build("zb1p", 3, 60), rank)
    check(schedule)
    assert find_steady(read_actions(schedule)) is None
    packed = pack(schedule, UNIT)
    assert_legal(schedule, UNIT, packed)
    assert packed.makespan == searched_whole(schedule, UNIT).makespan


def test_a_long_deadlock_is_an_error() -> None:
    """The last rank runs every backward before its forward."""
    schedule = build("1f1b", 2, 80)
    first, last = schedule.ranks
    swapped = tuple(group for pair in zip(last[1::2], last[::2], strict=True) for group in pair)
    for packer in (pack, pack_naive):
        with pytest.raises(ValueError, match="wait for each other"):
            packer(dataclasses.replace(schedule, ranks=(first, swapped)), UNIT)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_shorter_schedule_is_the_builders(name: str) -> None:
    """Cutting periods out of a schedule gives what the builder makes for fewer microbatches."""
    actions = read_actions(build(name, 4, 120))
    steady = find_steady(actions)
    assert steady is not None
    shorter = read_actions(build(name, 4, steady.actions.num_microbatches))
    for field in dataclasses.fields(Actions):
        np.testing.assert_array_equal(getattr(steady.actions, field.name), getattr(shorter, field.name))


def test_ways_that_do_not_fit_are_refused() -> None:
    """Against a plain check of every action's needs, on ways with a tick left out, twice, or another rank further."""
    rng, verdicts = np.random.default_rng(0), []
    for name in ("dualpipe", "dualpipev", "zbv"):
        schedule = build(name, 2, 6)
        reach = make_reach(make_graph(read_actions(schedule), UNIT, False))
        right = np.array([(0, 0), *pack_naive(schedule, UNIT).progress])
        for _ in range(60):
            way, tick = right.copy(), rng.integers(len(right))
            match rng.integers(3):
                case 0:
                    way = np.delete(way, tick, axis=0)
                case 1:
                    way = np.insert(way, tick, way[tick], axis=0)
                case 2:
                    way[tick, rng.integers(2)] += rng.choice([-1, 1])
            verdicts.append(reach.allows(way))
            makespan = float(reach.durations(np.clip(way, 0, reach.lengths)).sum())
            packing = Packing(tuple(map(tuple, way[1:].tolist())), makespan)
            assert verdicts[-1] == ((way[0] == 0).all() and is_legal(schedule, packing)), (name, way)
    assert 10 < sum(verdicts) < 170


def is_legal(schedule: Schedule, packing: Packing) -> bool:
    try:
        assert_legal(schedule, UNIT, packing)
    except AssertionError:
        return False
    return True
