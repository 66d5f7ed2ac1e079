"""All builders: sound on a grid of sizes, placed and ordered as named, refusing what does not exist."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.schedule import BUILDERS, Action, Kind, Schedule, build, check, interleaved, simulate

MINIMUM = {"zbv": 2, "dualpipe": 2, "dualpipev": 2}  # microbatches per rank, of those that need more than one in all


@st.composite
def schedules(draw):
    """Any schedule of up to 8 ranks."""
    name = draw(st.sampled_from(list(BUILDERS)))
    num_ranks = draw(st.integers(1, 8))
    if name == "dualpipe":
        num_ranks = 2 * draw(st.integers(1, 4))
    num_microbatches = max(1, MINIMUM.get(name, 0) * num_ranks) + draw(st.integers(0, 12))
    if name == "dualpipe":
        num_microbatches += num_microbatches % 2
    if name == "interleaved":
        num_microbatches = num_ranks * draw(st.integers(1, 4))
    return build(name, num_ranks, num_microbatches)


@given(schedules())
@settings(max_examples=150, deadline=None)
def test_every_schedule_is_sound(schedule):
    check(schedule)
    assert len(simulate(schedule).events) == schedule.num_ranks


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_the_microbatches_of_a_direction_stay_in_order(schedule):
    """On a rank, each kind of each stage takes a direction's microbatches in turn (I and B count as one kind)."""
    for groups in schedule.ranks:
        seen = {}
        for stage, kind, microbatch in (action for group in groups for action in group):
            key = stage, "B" if kind is Kind.I else kind.value, schedule.direction(microbatch)
            assert microbatch > seen.get(key, -1)
            seen[key] = microbatch


def assert_meets_the_protocol(name, builder, num_ranks, num_microbatches):
    """What `jaxpipe.schedule.Builder` says of the schedule for numbers that it exists for."""
    schedule = builder(num_ranks, num_microbatches)
    assert isinstance(schedule, Schedule)
    sizes = schedule.name, schedule.num_ranks, schedule.num_microbatches
    assert sizes == (name, num_ranks, num_microbatches)
    assert schedule.num_stages % num_ranks == 0
    check(schedule)
    again = builder(np.int64(num_ranks), np.int32(num_microbatches))
    assert again == schedule and hash(again) == hash(schedule)
    assert {type(number) for number in (again.num_microbatches, again.num_stages)} == {int}
    for bad in (0, True, 2.0):
        with pytest.raises(ValueError, match=repr(bad)):
            builder(num_ranks, bad)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 4), (4, 8), (8, 48)])
def test_every_builder_meets_the_protocol(name, num_ranks, num_microbatches):
    assert_meets_the_protocol(name, BUILDERS[name], num_ranks, num_microbatches)
    assert build(name, num_ranks, num_microbatches) == BUILDERS[name](num_ranks, num_microbatches)


@pytest.mark.parametrize(
    "builder",
    [
        lambda ranks, microbatches: build("1f1b", ranks, microbatches),
        lambda ranks, microbatches: dataclasses.replace(build("1f1b", 2, 4), name="mine"),
        lambda ranks, microbatches: dataclasses.replace(build("1f1b", ranks, microbatches), name="mine", ranks=()),
        lambda ranks, microbatches: dataclasses.replace(build("1f1b", int(ranks), int(microbatches)), name="mine"),
    ],
    ids=["another name", "other sizes", "no actions", "True is taken"],
)
def test_the_protocol_is_checked(builder):
    """The checks above can fail."""
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        assert_meets_the_protocol("mine", builder, 4, 8)


@pytest.mark.parametrize(
    ("name", "routes"),
    [
        ("gpipe", ((0, 1, 2, 3),)),
        ("1f1b", ((0, 1, 2, 3),)),
        ("interleaved", ((0, 1, 2, 3, 0, 1, 2, 3),)),
        ("zb1p", ((0, 1, 2, 3),)),
        ("zbv", ((0, 1, 2, 3, 3, 2, 1, 0),)),
        ("dualpipe", ((0, 1, 2, 3), (3, 2, 1, 0))),
        ("dualpipev", ((0, 1, 2, 3, 3, 2, 1, 0),)),
    ],
)
def test_stages_are_on_the_ranks_of_the_paper(name, routes):
    schedule = build(name, 4, 8)
    assert schedule.routes == routes
    assert schedule.num_stages == len(routes[0])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("gpipe", "FB"), ("1f1b", "FB"), ("interleaved", "FB"), ("zb1p", "FIW"), ("zbv", "FIW"), ("dualpipe", "FBIW"),
     ("dualpipev", "FBIW")],
)  # fmt: skip
def test_which_schedules_divide_the_backward(name, kinds):
    schedule = build(name, 4, 8)
    assert {action.kind.value for groups in schedule.ranks for group in groups for action in group} == set(kinds)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb1p", "zbv"])
def test_only_dualpipe_and_dualpipev_overlap(name):
    assert all(len(group) == 1 for groups in build(name, 4, 8).ranks for group in groups)


def test_dualpipes_microbatches_come_from_both_ends():
    schedule = build("dualpipe", 4, 8)
    first = [groups[0][0] for groups in schedule.ranks]
    assert first[0] == Action(0, Kind.F, 0)
    assert first[3] == Action(0, Kind.F, 4)
    assert [schedule.direction(m) for m in range(8)] == [0] * 4 + [1] * 4


def test_interleaved_of_one_chunk_is_1f1b():
    for num_ranks, num_microbatches in ((1, 3), (2, 4), (4, 8), (4, 12)):
        assert interleaved(num_ranks, num_microbatches, 1).ranks == build("1f1b", num_ranks, num_microbatches).ranks


def test_interleaved_order_by_hand():
    """Megatron's order on 2 ranks of 2 stages, 4 microbatches: rank 0 runs 4 ahead, then one forward, one backward."""
    assert " ".join(str(action) for (action,) in interleaved(2, 4).ranks[0]) == (
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3"
    )


# (stages per rank, microbatches, ranks) of PyTorch's test of its own interleaved schedules.
PYTORCH_GRID = [
    (2, 2, 2), (2, 4, 4), (2, 8, 2), (2, 8, 4), (2, 8, 8), (4, 4, 4), (4, 8, 4), (4, 8, 8), (4, 16, 4), (4, 32, 4),
    (4, 64, 4), (4, 16, 16), (4, 32, 32), (4, 128, 64), (3, 2, 2), (3, 8, 2), (3, 12, 4), (4, 6, 3), (4, 10, 5),
    (2, 3, 4), (2, 10, 4), (2, 15, 4),
]  # fmt: skip


@pytest.mark.parametrize(("num_chunks", "num_microbatches", "num_ranks"), PYTORCH_GRID)
def test_interleaved_on_pytorchs_grid(num_chunks, num_microbatches, num_ranks):
    schedule = interleaved(num_ranks, num_microbatches, num_chunks)
    check(schedule)
    assert all(len(groups) == 2 * num_chunks * num_microbatches for groups in schedule.ranks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipe2", 4, 8), "unknown schedule 'dualpipe2'.*gpipe, 1f1b, interleaved, zb1p, zbv, dualpipe, dualpipev"),
        (("dualpipe", 3, 8), "dualpipe with 3 ranks and 8 microbatches: both must be even"),
        (("dualpipe", 4, 9), "dualpipe with 4 ranks and 9 microbatches: both must be even"),
        (("dualpipe", 4, 6), "num_microbatches=6: it must be an integer of at least 8"),
        (("dualpipev", 3, 5), "num_microbatches=5: it must be an integer of at least 6"),
        (("zbv", 4, 7), "num_microbatches=7: it must be an integer of at least 8"),
        (("interleaved", 4, 9), "9 microbatches on 4 ranks.*use a multiple of 4, such as 8"),
    ],
)
def test_refusals_show_the_values_and_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("bad", [0, -2, 2.0, True, "4", None])
def test_sizes_are_positive_integers(name, bad):
    with pytest.raises(ValueError, match=f"{name} with num_ranks={bad!r}: it must be an integer"):
        build(name, bad, 8)
    with pytest.raises(ValueError, match=f"{name} with num_microbatches={bad!r}: it must be an integer"):
        build(name, 2, bad)
    with pytest.raises(ValueError, match=f"num_chunks={bad!r}"):
        interleaved(2, 4, bad)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev"])
def test_one_rank(name):
    """A pipeline of one rank is a plain program; DualPipe needs two ends."""
    schedule = build(name, 1, 4)
    check(schedule)
    assert simulate(schedule).bubble == (0.0,)


def test_prints_as_a_grid():
    assert str(build("1f1b", 2, 2)) == (
        "rank 0   0F0   0F1   0B0   0B1\n"
        "rank 1   1F0   1B0   1F1   1B1"
    )  # fmt: skip
    lines = str(build("gpipe", 11, 1)).splitlines()
    assert lines[0].index("0F0") == lines[10].index("10F0")
