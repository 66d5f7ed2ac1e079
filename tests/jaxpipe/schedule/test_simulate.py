"""Simulated time and memory are the published ones."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.schedule import BUILDERS, Action, Costs, Kind, StageCosts, build, check, interleaved, simulate, zbv
from jaxpipe.schedule.simulator import closed_form_bubble

CLOSED_FORMS = ["gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"]


def times(timeline, rank):
    """(text, start, end) of each group of a rank."""
    return [("&".join(map(str, e.group)), e.start, e.end) for e in timeline.events[rank]]


def hand_written(*ranks):
    """A GPipe-like schedule of 2 ranks and stages with the given orders."""
    rows = tuple(tuple(tuple(map(Action.parse, group.split("&"))) for group in rank.split()) for rank in ranks)
    schedule = dataclasses.replace(build("gpipe", 2, 2), ranks=rows)
    check(schedule)
    return schedule


@pytest.mark.parametrize("num_ranks", [4, 8, 16])
@pytest.mark.parametrize("more", [0, 2, 8, 96])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_bubbles_are_the_closed_forms(name, num_ranks, more):
    """On every rank, with F = I = W = 1; DualPipeV counts its 2 * num_ranks stages as PP."""
    timeline = simulate(build(name, num_ranks, 2 * num_ranks + more))
    assert timeline.bubble == (closed_form_bubble(name, num_ranks),) * num_ranks


@pytest.mark.parametrize(
    ("name", "bubbles"),
    [
        ("gpipe", (9, 21, 45)),
        ("1f1b", (9, 21, 45)),
        ("zb1p", (3, 7, 15)),
        ("dualpipe", (2, 6, 14)),
        ("dualpipev", (6, 14, 30)),
        ("interleaved", (9, 21, 45)),
        ("zbv", (3, 7, 15)),
    ],
)
def test_bubbles_in_figures(name, bubbles):
    """At 4, 8 and 16 ranks, in units of one stage; a rank of two stages does twice the work a microbatch."""
    assert tuple(simulate(build(name, n, 4 * n)).bubble[0] for n in (4, 8, 16)) == bubbles


quarters = st.integers(1, 20).map(lambda n: n / 4)


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 20), quarters, quarters, quarters)
@settings(max_examples=60, deadline=None)
def test_closed_forms_of_whole_backwards_hold_at_any_costs(name, num_ranks, num_microbatches, f, i, w):
    costs = Costs(f, i, w)
    bubble = simulate(build(name, num_ranks, num_microbatches), costs).bubble
    assert set(bubble) == {closed_form_bubble(name, num_ranks, costs)}


@given(st.integers(1, 8), st.integers(0, 12), quarters, quarters, quarters)
@settings(max_examples=60, deadline=None)
def test_closed_form_of_zb1p_holds_while_w_is_the_shortest(num_ranks, more, f, i, w):
    costs = Costs(f, i, min(f, i, w))
    bubble = simulate(build("zb1p", num_ranks, num_ranks + more), costs).bubble
    assert set(bubble) == {closed_form_bubble("zb1p", num_ranks, costs)}


@given(st.sampled_from(["dualpipe", "dualpipev"]), st.integers(1, 4), st.integers(0, 6), quarters, quarters, st.data())
@settings(max_examples=100, deadline=None)
def test_closed_form_of_dualpipe_is_the_largest_bubble(name, half_ranks, more, one, other, data):
    """While W <= F = I and a pair takes between B and F + B; on every rank if a pair gains nothing."""
    w, f = sorted((one, other))
    gain = data.draw(st.integers(0, round(4 * f))) / 4
    costs = Costs(f, f, w, overlapped=f + f + w - gain)
    num_ranks = 2 * half_ranks
    bubble = simulate(build(name, num_ranks, 2 * num_ranks + 2 * more), costs).bubble
    assert max(bubble) == closed_form_bubble(name, num_ranks, costs)
    assert gain or len(set(bubble)) == 1


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4])
def test_chunks_shrink_the_bubble_of_interleaved(num_chunks):
    """(P - 1)(F + B) of one chunk, so a share of 1 / num_chunks of that of whole stages."""
    costs = Costs(1 / num_chunks, 1 / num_chunks, 1 / num_chunks)
    bubble = simulate(interleaved(4, 16, num_chunks), costs).bubble
    assert bubble == pytest.approx((9 / num_chunks,) * 4)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("more", [0, 1, 20])
def test_no_rank_of_zbv_waits_once_it_has_started(num_ranks, more):
    timeline = simulate(zbv(num_ranks, 2 * num_ranks + more))
    for rank, events in enumerate(timeline.events):
        assert events[0].start == rank
        assert events[-1].end - events[0].start == timeline.busy[rank]
    assert set(timeline.bubble) == {num_ranks - 1}


def test_closed_form_of_an_unknown_schedule():
    with pytest.raises(ValueError, match="no closed form for schedule 'zbv'; there is one for gpipe, 1f1b"):
        closed_form_bubble("zbv", 4)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("more", [0, 10])
def test_stashes_are_the_published_ones(num_ranks, more):
    """Stage-microbatches held, pending weight gradients included."""
    num_microbatches = 2 * num_ranks + more
    live = {name: simulate(build(name, num_ranks, num_microbatches)).peak_live for name in ("gpipe", "1f1b", "zb1p")}
    assert live["gpipe"] == (num_microbatches,) * num_ranks
    assert live["1f1b"] == tuple(range(num_ranks, 0, -1))
    assert live["zb1p"] == (num_ranks,) * num_ranks
    assert max(simulate(build("zbv", num_ranks, num_microbatches)).peak_live) <= 2 * num_ranks
    assert simulate(build("dualpipe", num_ranks, num_microbatches)).peak_live == (num_ranks + 1,) * num_ranks
    assert simulate(build("dualpipev", num_ranks, num_microbatches)).peak_live == (2 * num_ranks + 1,) * num_ranks


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_pending_weight_gradients(num_ranks):
    """Rank r puts off r + 1 weight gradients: in DualPipeV counted from rank 0, in DualPipe from the nearer end."""
    v = simulate(build("dualpipev", num_ranks, 3 * num_ranks)).peak_pending_weight
    assert v == tuple(range(1, num_ranks + 1))
    two_ways = simulate(build("dualpipe", num_ranks, 4 * num_ranks)).peak_pending_weight
    assert two_ways == tuple(min(rank, num_ranks - 1 - rank) + 1 for rank in range(num_ranks))
    assert simulate(build("1f1b", num_ranks, 8)).peak_pending_weight == (0,) * num_ranks


def test_peaks_by_hand():
    """A stash is live until its weight gradient is done, its activations until the input gradient is."""
    schedule = hand_written("0F0 0F1 0I0 0I1 0W0 0W1", "1F0 1I0 1F1 1I1 1W0 1W1")
    timeline = simulate(schedule)
    assert timeline.peak_live == (2, 2)
    assert timeline.peak_activations == (2, 1)
    assert timeline.peak_pending_weight == (2, 2)


def test_a_pair_holds_the_new_stash_beside_the_old_one():
    schedule = hand_written("0F0 0F1 0B0 0B1", "1F0 1F1&1B0 1B1")
    assert simulate(schedule).peak_live == (2, 2)


def test_times_by_hand():
    """1F1B of 2 ranks and 2 microbatches: F = 1, B = 2 + 0.5, transfers 0.25."""
    timeline = simulate(build("1f1b", 2, 2), Costs(1, 2, 0.5, p2p=0.25))
    assert times(timeline, 0) == [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 5, 7.5), ("0B1", 8.5, 11)]
    assert times(timeline, 1) == [("1F0", 1.25, 2.25), ("1B0", 2.25, 4.75), ("1F1", 4.75, 5.75), ("1B1", 5.75, 8.25)]
    assert timeline.makespan == 11
    assert timeline.busy == (7, 7)
    assert timeline.bubble == (4, 4)


def test_a_transfer_within_a_rank_takes_no_time():
    """The V's turn: stages 1 and 2 of 2 ranks share rank 1, so only 0 -> 1, 2 -> 3 and back are transfers."""
    slow, fast = (simulate(build("dualpipev", 1, 2), Costs(p2p=latency)) for latency in (10, 0))
    assert slow.makespan == fast.makespan
    first = {str(e.group[0]): e for rank in simulate(zbv(2, 4), Costs(p2p=10)).events for e in rank}
    assert first["2F0"].start >= first["1F0"].end
    assert first["1F0"].start == first["0F0"].end + 10
    assert first["3F0"].start == first["2F0"].end + 10


def test_costs_of_groups():
    costs = Costs(1, 2, 0.5, backward=2.25, overlapped=2.75)
    assert [costs.group([kind]) for kind in Kind] == [1, 2.25, 2, 0.5]
    assert costs.group([Kind.F, Kind.B]) == 2.75
    assert costs.group([Kind.F, Kind.I]) == 3
    assert Costs(1, 2, 0.5).group([Kind.F, Kind.B]) == 3.5


def test_an_overlapped_pair_starts_and_ends_together():
    schedule = hand_written("0F0 0F1 0B0 0B1", "1F0 1F1&1B0 1B1")
    timeline = simulate(schedule, Costs(overlapped=2.5))
    assert times(timeline, 1) == [("1F0", 1, 2), ("1F1&1B0", 2, 4.5), ("1B1", 4.5, 6.5)]
    assert times(timeline, 0)[2] == ("0B0", 4.5, 6.5)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Costs)])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_time_is_finite_and_not_negative(field, value):
    with pytest.raises(ValueError, match=rf"Costs\({field}={value!r}\): a time is a finite number, not negative"):
        Costs(**{field: value})


def test_deadlock_is_refused():
    deadlocked = dataclasses.replace(build("gpipe", 1, 1), ranks=(((Action(0, Kind.B, 0),), (Action(0, Kind.F, 0),)),))
    with pytest.raises(ValueError, match=r"schedule 'gpipe' deadlocks; jaxpipe\.schedule\.check"):
        simulate(deadlocked)


@given(st.sampled_from(list(BUILDERS)), quarters, quarters, quarters, st.integers(0, 8).map(lambda n: n / 4))
@settings(max_examples=60, deadline=None)
def test_timelines_respect_the_schedule(name, f, i, w, p2p):
    """Ranks run in order without overlap; every input is there; no group waits longer than for its last reason."""
    schedule = build(name, 4, 12)
    timeline = simulate(schedule, Costs(f, i, w, p2p=p2p))
    assert tuple(tuple(event.group for event in events) for events in timeline.events) == schedule.ranks
    ends = {(a.stage, a.kind is Kind.F, a.microbatch): (e.end, e.rank) for events in timeline.events for e in events
            for a in e.group if a.kind is not Kind.W}  # fmt: skip
    for rank, events in enumerate(timeline.events):
        free = 0.0
        for event in events:
            ready = [free]
            for stage, kind, microbatch in event.group:
                if kind is not Kind.W:
                    before = stage - 1 if kind is Kind.F else stage + 1
                    end, at = ends.get((before, kind is Kind.F, microbatch), (0.0, rank))
                    ready.append(end + p2p * (at != rank))
            assert event.start == max(ready)
            free = event.end


def test_equal_stages_take_what_plain_costs_say():
    """To the last figure, with pairs that gain and with transfers, on every schedule."""
    costs = Costs(0.3, 0.7, 0.4, backward=1.3, overlapped=1.1)
    for name in BUILDERS:
        schedule = build(name, 4, 12)
        each = StageCosts((costs,) * schedule.num_stages, p2p=0.1)
        assert simulate(schedule, each).events == simulate(schedule, dataclasses.replace(costs, p2p=0.1)).events


def test_times_of_a_slow_and_a_fast_stage_by_hand():
    """1F1B: rank 0 never waits for the fast stage but at the start and the end; transfers 0.25."""
    timeline = simulate(build("1f1b", 2, 3), StageCosts((Costs(2, 3, 1), Costs(1, 1, 1)), p2p=0.25))
    assert times(timeline, 0) == [
        ("0F0", 0, 2), ("0F1", 2, 4), ("0B0", 5.5, 9.5), ("0F2", 9.5, 11.5), ("0B1", 11.5, 15.5), ("0B2", 15.5, 19.5),
    ]  # fmt: skip
    assert times(timeline, 1) == [
        ("1F0", 2.25, 3.25), ("1B0", 3.25, 5.25), ("1F1", 5.25, 6.25), ("1B1", 6.25, 8.25), ("1F2", 11.75, 12.75),
        ("1B2", 12.75, 14.75),
    ]  # fmt: skip
    assert timeline.busy == (18, 9) and timeline.bubble == (1.5, 10.5)


def test_ends_run_on_the_rank_of_their_stage():
    """The embedding before 0F, its gradient after 0I and not after 0W, the head after the last F."""
    schedule = hand_written("0F0 0F1 0I0 0W0 0B1", "1F0 1F1&1B0 1B1")
    timeline = simulate(schedule, StageCosts((Costs(),) * 2, embed=0.5, embed_grad=0.25, head=4))
    assert times(timeline, 0) == [
        ("0F0", 0, 1.5), ("0F1", 1.5, 3), ("0I0", 13.5, 14.75), ("0W0", 14.75, 15.75), ("0B1", 15.75, 18),
    ]  # fmt: skip
    assert times(timeline, 1) == [("1F0", 1.5, 6.5), ("1F1&1B0", 6.5, 13.5), ("1B1", 13.5, 15.5)]


def test_a_head_that_other_ranks_hide_takes_no_time():
    """The last stage is as much faster as the head takes: the step is that of equal stages."""
    schedule = build("1f1b", 4, 16)
    with_head = StageCosts((*[Costs(4, 4, 4)] * 3, Costs(2, 4, 4)), head=2)
    assert simulate(schedule, with_head).makespan == simulate(schedule, Costs(4, 4, 4)).makespan


def test_pairs_of_two_stages_gain_in_proportion():
    forward, backward = Costs(2, 2, 2, overlapped=4.5), Costs(1, 2, 1, overlapped=2)
    costs = StageCosts((forward, backward))
    pair = Action(0, Kind.F, 1), Action(1, Kind.B, 0)
    assert costs.group(pair) == 2 * 0.75 + 3 * 0.5
    assert costs.group((Action(0, Kind.F, 1), Action(0, Kind.B, 0))) == 4.5
    assert costs.group((Action(1, Kind.F, 1), Action(0, Kind.I, 0))) == 1 + 2
    free = StageCosts((Costs(0, 0, 0, overlapped=0), backward))
    assert free.group(pair) == 1.5


def test_costs_of_stages_are_checked():
    with pytest.raises(ValueError, match=r"StageCosts\(head=-1\): a time is a finite number, not negative"):
        StageCosts((Costs(),), head=-1)
    with pytest.raises(ValueError, match=r"stage 1 has p2p=2: .*StageCosts\(stages, p2p=...\)"):
        StageCosts((Costs(), Costs(p2p=2)))
    with pytest.raises(ValueError, match=r"StageCosts of 3 stages for schedule '1f1b' of 2: give the Costs of each"):
        simulate(build("1f1b", 2, 2), StageCosts((Costs(),) * 3))
