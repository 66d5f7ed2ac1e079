"""Every way to spoil a schedule is found, and the message marks the cell."""

import dataclasses
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.schedule import BUILDERS, Action, Kind, build, check, simulate

SCHEDULES = {name: build(name, 2, 4) for name in BUILDERS}


def actions(text):
    """One rank's groups from text, as in ``"0F0 0F1&0B0"``."""
    return tuple(tuple(Action.parse(part) for part in group.split("&")) for group in text.split())


def with_ranks(schedule, *ranks):
    """The schedule with other orders, one text a rank."""
    return dataclasses.replace(schedule, ranks=tuple(map(actions, ranks)))


def edited(schedule, rank, edit):
    """The schedule after ``edit`` of the list of one rank's groups."""
    ranks = [list(groups) for groups in schedule.ranks]
    edit(ranks[rank])
    return dataclasses.replace(schedule, ranks=tuple(map(tuple, ranks)))


def failure(schedule):
    """What check says of an unsound schedule: the sentence, and the marked cells as (rank, text)."""
    with pytest.raises(ValueError) as error:
        check(schedule)
    sentence, *grid = str(error.value).splitlines()
    assert len(grid) == schedule.num_ranks
    return sentence, [(rank, cell) for rank, row in enumerate(grid) for cell in re.findall(">(.*?)<", row)]


GPIPE = with_ranks(build("gpipe", 2, 2), "0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
SPLIT = with_ranks(GPIPE, "0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1F1 1I1 1W0 1W1")


def test_the_schedules_to_be_spoilt_are_sound():
    check(GPIPE)
    check(SPLIT)
    for schedule in SCHEDULES.values():
        check(schedule)


def test_whole_and_divided_backwards_may_mix():
    check(with_ranks(GPIPE, "0F0 0F1 0I0 0W0 0B1", "1F0 1F1 1B0 1I1 1W1"))


def test_a_forward_may_overlap_b_or_i():
    check(with_ranks(GPIPE, "0F0 0F1 0B0 0B1", "1F0 1F1&1B0 1B1"))
    check(with_ranks(GPIPE, "0F0 0F1 0B0 0B1", "1F0 1F1&1I0 1W0 1B1"))


def test_the_message_is_the_sentence_and_the_grid():
    with pytest.raises(ValueError) as error:
        check(with_ranks(GPIPE, "0F0 0B0 0B1 0F1", "1F0 1F1 1B0 1B1"))
    assert str(error.value) == (
        "schedule 'gpipe': 0B1 on rank 0 needs 0F1, which is not before it\n"
        "rank 0   0F0   0B0  >0B1<  0F1\n"
        "rank 1   1F0   1F1   1B0   1B1"
    )


@pytest.mark.parametrize(
    ("ranks", "sentence", "marked"),
    [
        pytest.param(
            ("0F0 0F1 0B0", "1F0 1F1 1B0 1B1"),
            "stage 0 runs F for microbatch 1 on rank 0; it needs F and B, or F, I and W",
            [(0, "0F1")],
            id="dropped B",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0B1", "1F1 1B0 1B1"),
            "stage 1 runs B for microbatch 0 on rank 1; it needs F and B, or F, I and W",
            [(1, "1B0")],
            id="dropped F",
        ),
        pytest.param(
            ("0F0 0F1 0I0 0W0 0B1", "1F0 1F1 1B0 1I1"),
            "stage 1 runs F, I for microbatch 1 on rank 1",
            [(1, "1F1"), (1, "1I1")],
            id="dropped W",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0B1", "1F0 1B0"),
            "stage 1 runs nothing for microbatch 1 on rank 1",
            [],
            id="dropped microbatch",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0B1 0W1", "1F0 1F1 1B0 1B1"),
            "stage 0 runs F, B, W for microbatch 1 on rank 0",
            [(0, "0F1"), (0, "0B1"), (0, "0W1")],
            id="B and W",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
            "0F1 is twice on rank 0",
            [(0, "0F1"), (0, "0F1")],
            id="duplicated",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0B1 1B1", "1F0 1F1 1B0"),
            "1B1 is on rank 0, but its stage is on rank 1",
            [(0, "1B1")],
            id="wrong rank",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0B1", "1F0 1B1 1F1 1B0"),
            "1B1 on rank 1 needs 1F1, which is not before it",
            [(1, "1B1")],
            id="B before F",
        ),
        pytest.param(
            ("0F0 0F1 0W0 0I0 0B1", "1F0 1F1 1B0 1B1"),
            "0W0 on rank 0 needs 0I0, which is not before it",
            [(0, "0W0")],
            id="W before I",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0B1", "1F0&1B0 1F1 1B1"),
            "1B0 on rank 1 needs 1F0, which is not before it",
            [(1, "1F0&1B0")],
            id="overlapped with itself",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0B1", "1F0 1B0&1F1 1B1"),
            "group '1B0&1F1' of rank 1 is not one action, nor F with B or I",
            [(1, "1B0&1F1")],
            id="backward first in a group",
        ),
        pytest.param(
            ("0F0&0F1 0B0 0B1", "1F0 1F1 1B0 1B1"),
            "group '0F0&0F1' of rank 0 is not one action",
            [(0, "0F0&0F1")],
            id="two forwards in a group",
        ),
        pytest.param(
            ("0F0 0F1 0F2 0B0 0B1", "1F0 1F1 1B0 1B1"),
            "0F2 on rank 0 is outside the 2 stages and 2 microbatches",
            [(0, "0F2")],
            id="microbatch too many",
        ),
        pytest.param(
            ("0F0 0F1 0B0 0B1", "1F0 1F1 2F0 1B0 1B1"),
            "2F0 on rank 1 is outside the 2 stages and 2 microbatches",
            [(1, "2F0")],
            id="stage too many",
        ),
        pytest.param(
            ("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"),
            "deadlock: rank 0 at 0B0 waits for 1B0; rank 1 at 1F1 waits for 0F1",
            [(0, "0B0"), (1, "1F1")],
            id="deadlock",
        ),
    ],
)
def test_spoilt(ranks, sentence, marked):
    found, cells = failure(with_ranks(GPIPE, *ranks))
    assert found.startswith(f"schedule 'gpipe': {sentence}")
    assert cells == marked


@pytest.mark.parametrize("bad", [Action(-1, Kind.F, 0), Action(0, Kind.F, -1), Action(1, Kind.F, -1)], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_numbers_are_not_counted_from_the_end(bad, rank):
    sentence, cells = failure(edited(GPIPE, rank, lambda groups: groups.append((bad,))))
    assert f"{bad} on rank {rank} is outside the 2 stages and 2 microbatches" in sentence
    assert cells == [(rank, str(bad))]


def test_empty_group():
    sentence, cells = failure(edited(GPIPE, 1, lambda groups: groups.insert(2, ())))
    assert "group '' of rank 1 is not one action" in sentence
    assert cells == [(1, "")]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"routes": ()}, "2 microbatches do not divide into 0 directions"),
        ({"num_microbatches": 0}, "0 microbatches do not divide into 1 directions"),
        ({"num_microbatches": 3, "routes": ((0, 1), (1, 0))}, "3 microbatches do not divide into 2 directions"),
        ({"routes": ((0,),)}, "route (0,) must name one of 2 ranks for each stage"),
        ({"routes": ((0, 2),)}, "route (0, 2) must name one of 2 ranks for each stage"),
    ],
)
def test_sizes_and_routes_agree(change, sentence):
    assert sentence in failure(dataclasses.replace(GPIPE, **change))[0]


def test_dualpipes_second_half_belongs_on_the_mirror_ranks():
    """Microbatch 2 of 4 travels in direction 1, so its stage 0 is on rank 1."""
    schedule = SCHEDULES["dualpipe"]
    sentence, cells = failure(edited(schedule, 0, lambda groups: groups.insert(0, (Action(0, Kind.F, 2),))))
    assert "0F2 is on rank 0, but its stage is on rank 1" in sentence
    assert cells == [(0, "0F2")]


def test_deadlock_of_three_ranks_names_those_that_are_stuck():
    """Rank 2 wants microbatch 1 first, rank 0 a gradient of microbatch 0: rank 1 waits for both."""
    spoilt = with_ranks(build("1f1b", 3, 2), "0F0 0B0 0F1 0B1", "1F0 1F1 1B1 1B0", "2F1 2F0 2B0 2B1")
    sentence, cells = failure(spoilt)
    assert sentence == (
        "schedule '1f1b': deadlock: rank 0 at 0B0 waits for 1B0; rank 1 at 1F1 waits for 0F1; "
        "rank 2 at 2F1 waits for 1F1"
    )
    assert cells == [(0, "0B0"), (1, "1F1"), (2, "2F1")]


def test_microbatches_need_not_be_in_order():
    """Out of turn, yet nobody waits for ever."""
    check(with_ranks(GPIPE, "0F0 0F1 0B0 0B1", "1F1 1F0 1B1 1B0"))


def test_overlapped_pair_can_deadlock_across_ranks():
    """Each rank's pair holds what the other's needs."""
    spoilt = with_ranks(GPIPE, "0F0 0F1&0B0 0B1", "1F0 1F1&1B0 1B1")
    sentence, cells = failure(spoilt)
    assert "rank 0 at 0F1&0B0 waits for 1B0; rank 1 at 1F1&1B0 waits for 0F1" in sentence
    assert cells == [(0, "0F1&0B0"), (1, "1F1&1B0")]


@st.composite
def places(draw):
    """A schedule, a rank and a position in its order."""
    schedule = SCHEDULES[draw(st.sampled_from(list(BUILDERS)))]
    rank = draw(st.integers(0, schedule.num_ranks - 1))
    return schedule, rank, draw(st.integers(0, len(schedule.ranks[rank]) - 1))


@given(places())
@settings(max_examples=100, deadline=None)
def test_any_dropped_group_is_missed(place):
    schedule, rank, position = place
    sentence, cells = failure(edited(schedule, rank, lambda groups: groups.pop(position)))
    dropped = {(action.stage, action.microbatch) for action in schedule.ranks[rank][position]}
    named = re.search(r"stage (\d+) runs .* for microbatch (\d+) on rank (\d+)", sentence)
    assert (int(named[1]), int(named[2])) in dropped and int(named[3]) == rank
    assert cells and all(at == rank for at, _ in cells)


@given(places(), st.data())
@settings(max_examples=100, deadline=None)
def test_any_duplicated_group_is_found(place, data):
    schedule, rank, position = place
    group = schedule.ranks[rank][position]
    to = data.draw(st.integers(0, len(schedule.ranks[rank])))
    sentence, cells = failure(edited(schedule, rank, lambda groups: groups.insert(to, group)))
    assert re.search(rf"\d+[FBIW]\d+ is twice on rank {rank}", sentence)
    text = "&".join(map(str, group))
    assert cells == [(rank, text), (rank, text)]


@given(places())
@settings(max_examples=100, deadline=None)
def test_any_group_on_another_rank_is_found(place):
    schedule, rank, position = place
    group = schedule.ranks[rank][position]
    moved = edited(schedule, rank, lambda groups: groups.pop(position))
    sentence, cells = failure(edited(moved, 1 - rank, lambda groups: groups.insert(0, group)))
    assert f"{group[0]} is on rank {1 - rank}, but its stage is on rank {rank}" in sentence
    assert cells == [(1 - rank, "&".join(map(str, group)))]


@given(places(), st.data())
@settings(max_examples=200, deadline=None)
def test_swapped_groups_are_sound_or_marked(place, data):
    """Either the schedule still runs to the end, or both checker and simulator refuse it."""
    schedule, rank, position = place
    other = data.draw(st.integers(0, len(schedule.ranks[rank]) - 1))

    def swap(groups):
        groups[position], groups[other] = groups[other], groups[position]

    swapped = edited(schedule, rank, swap)
    try:
        simulate(swapped)
    except ValueError:
        _, cells = failure(swapped)
        assert cells
    else:
        check(swapped)


@pytest.mark.parametrize("seed", range(40))
def test_any_order_can_run_or_not_as_simulated(seed):
    """Groups of each rank in random order: those that check lets pass are those that the simulator can run."""
    rng = random.Random(seed)
    schedule = build(rng.choice(["1f1b", "zb1p", "dualpipev", "interleaved"]), 2, 4)
    ranks = [list(groups) for groups in schedule.ranks]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(ranks)
        at = rng.randrange(len(row) - 1)
        row[at], row[at + 1] = row[at + 1], row[at]
    schedule = dataclasses.replace(schedule, ranks=tuple(map(tuple, ranks)))
    try:
        simulate(schedule)
    except ValueError:
        with pytest.raises(ValueError, match=r"which is not before it|deadlock"):
            check(schedule)
    else:
        check(schedule)
