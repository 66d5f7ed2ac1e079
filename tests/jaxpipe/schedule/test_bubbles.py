"""Simulated idle times and peaks are the published ones, exactly."""

import pytest

from jaxpipe.schedule import Costs, build, simulate
from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import closed_form_bubble

BY_HAND = {
    # (P - 1) (F + B), F = 1, B = 2
    "gpipe": {4: 9, 8: 21, 16: 45},
    "1f1b": {4: 9, 8: 21, 16: 45},
    # (P - 1) (F + B - 2 W), W = 1
    "zb1p": {4: 3, 8: 7, 16: 15},
    # (PP / 2 - 1) (F&B + B - 3 W), F&B = 3, PP the ranks
    "dualpipe": {4: 2, 8: 6, 16: 14},
    # the same, PP twice the ranks
    "dualpipev": {4: 6, 8: 14, 16: 30},
}
CASES = [(name, ranks, factor) for name in BY_HAND for ranks in (4, 8, 16) for factor in (2, 3, 5)]


@pytest.mark.parametrize("name, ranks, factor", CASES)
def test_every_rank_idles_as_long_as_the_closed_form_says(name, ranks, factor):
    expected = BY_HAND[name][ranks]
    timeline = simulate(build(name, ranks, factor * ranks))
    assert timeline.bubble == (expected,) * ranks
    assert closed_form_bubble(name, ranks) == expected


@pytest.mark.parametrize("name, ranks, microbatches", [("dualpipe", 4, 18), ("dualpipe", 8, 22), ("dualpipev", 4, 11)])
def test_microbatches_need_not_be_multiples_of_the_ranks(name, ranks, microbatches):
    assert simulate(build(name, ranks, microbatches)).bubble == (BY_HAND[name][ranks],) * ranks


@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("forward, grad, weight", [(1, 1, 1), (2, 3, 1), (2, 2.5, 1.5)])
def test_dualpipe_and_1f1b_follow_their_forms_at_other_costs(ranks, forward, grad, weight):
    costs = Costs(forward=forward, backward_input=grad, weight=weight)
    backward = grad + weight
    bubble = min(simulate(build("1f1b", ranks, 3 * ranks), costs).bubble)
    assert bubble == (ranks - 1) * (forward + backward) == closed_form_bubble("1f1b", ranks, costs)
    form = (ranks / 2 - 1) * (forward + backward + backward - 3 * weight)
    assert closed_form_bubble("dualpipe", ranks, costs) == form


def test_overlap_shortens_the_published_bubble():
    costs = Costs(overlapped=2.5)
    assert closed_form_bubble("dualpipe", 8, costs) == 3 * (2.5 + 2 - 3)
    assert closed_form_bubble("dualpipev", 8, costs) == 7 * (2.5 + 2 - 3)
    plain, overlapped = (simulate(build("dualpipe", 8, 20), c).makespan for c in (Costs(), costs))
    assert overlapped < plain


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("factor", [2, 3, 5])
class TestPeaks:
    """Stashes held at once, of any rank."""

    def test_dualpipe_holds_one_more_than_its_ranks(self, ranks, factor):
        assert simulate(build("dualpipe", ranks, factor * ranks)).peak_live == (ranks + 1,) * ranks

    def test_dualpipev_holds_one_more_than_its_stages(self, ranks, factor):
        # A microbatch more than the shortest lets the first overlap find a full rank.
        timeline = simulate(build("dualpipev", ranks, factor * ranks + 1))
        assert timeline.peak_live == (2 * ranks + 1,) * ranks

    def test_zb1p_holds_at_most_its_ranks(self, ranks, factor):
        assert max(simulate(build("zb1p", ranks, factor * ranks)).peak_live) <= ranks

    def test_zbv_holds_at_most_its_stages(self, ranks, factor):
        assert max(simulate(build("zbv", ranks, factor * ranks)).peak_live) <= 2 * ranks

    def test_1f1b_holds_the_ranks_that_follow(self, ranks, factor):
        timeline = simulate(build("1f1b", ranks, factor * ranks))
        assert timeline.peak_live == tuple(ranks - rank for rank in range(ranks))

    def test_gpipe_holds_everything(self, ranks, factor):
        assert simulate(build("gpipe", ranks, factor * ranks)).peak_live == (factor * ranks,) * ranks


def test_events_wait_for_the_rank_the_inputs_and_the_transfer():
    """Two ranks, one microbatch: nothing overlaps, and two transfers take half a unit each."""
    timeline = simulate(build("1f1b", 2, 1), Costs(p2p=0.5))
    times = [[(event.start, event.end) for event in events] for events in timeline.events]
    assert times == [[(0.0, 1.0), (5.0, 7.0)], [(1.5, 2.5), (2.5, 4.5)]]
    assert timeline.makespan == 7.0
    assert timeline.busy == (3.0, 3.0)
    assert timeline.bubble == (4.0, 4.0)


def test_peaks_of_split_backwards_count_until_their_own_half():
    """Three forwards, then I I I W W W: activations fall with I, stashes with W."""
    order = tuple((Action(0, kind, m),) for kind in (Kind.F, Kind.I, Kind.W) for m in range(3))
    timeline = simulate(Schedule("three", 1, 3, (order,), ((0,),)))
    assert (timeline.peak_live, timeline.peak_activations, timeline.peak_pending_weight) == ((3,), (3,), (3,))
    order = tuple((Action(0, kind, m),) for m in range(3) for kind in (Kind.F, Kind.I, Kind.W))
    timeline = simulate(Schedule("sequential", 1, 3, (order,), ((0,),)))
    assert (timeline.peak_live, timeline.peak_activations, timeline.peak_pending_weight) == ((1,), (1,), (1,))


@pytest.mark.parametrize("field", ["forward", "backward_input", "weight", "backward", "overlapped", "p2p"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_costs_are_times(field, value):
    with pytest.raises(ValueError, match=field):
        Costs(**{field: value})


def test_unknown_forms_and_deadlocks_are_refused():
    with pytest.raises(ValueError, match="no closed form for schedule 'zbv'"):
        closed_form_bubble("zbv", 4)
    backwards = (((Action(0, Kind.B, 0),), (Action(0, Kind.F, 0),)),)
    with pytest.raises(ValueError, match="deadlocks"):
        simulate(Schedule("backwards", 1, 1, backwards, ((0,),)))
