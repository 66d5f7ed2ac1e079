"""Metrics: DeepSeek's trace against published reference values, small traces against values worked out by hand."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiling.event import Event, Trace
from profiling.metrics import (
    DEFINITIONS,
    breakdown,
    communication_lanes,
    concurrency,
    lanes,
    layer_spans,
    layers,
    measure,
    overlap,
    phase_durations,
    skew,
    time_by,
    unattributed_share,
)
from profiling.metrics.intervals import intersection, length, spans_of

BUSY = {
    "attn(F)": (4311, 4263, 4438, 4467),
    "mlp(B)": (5693, 5408, 5407, 4716),
    "mlp(W)": (5325, 5050, 5249, 4627),
    "mlp(F)": (4250, 4384, 5175, 4606),
    "attn(B)": (9018, 9368, 9452, 9525),
    "attn(W)": (2375, 2382, 2392, 2405),
    "combine(B)": (4380, 5224, 6207, 7266),
    "dispatch(F)": (6059, 5706, 7077, 7919),
    "dispatch(B)": (7302, 7909, 7271, 7465),
    "combine(F)": (7325, 8260, 9521, 9630),
}
TRANSFER = {
    "combine(B)": (3320, 3575, 3613, 3113),
    "dispatch(F)": (4604, 4154, 4437, 4188),
    "dispatch(B)": (6549, 6543, 5889, 6492),
    "combine(F)": (6002, 6074, 5847, 6052),
}
WAIT = {
    "combine(B)": (1008, 1315, 2245, 3807),
    "dispatch(F)": (1381, 1436, 2562, 3589),
    "dispatch(B)": (753, 1366, 1382, 973),
    "combine(F)": (1323, 2186, 3674, 3578),
}


def event(start, end, group="compute", lane="7", device=0, **facts):
    return Event(device, lane, float(start), float(end), facts.pop("name", "k"), group=group, **facts)


@pytest.fixture(scope="module")
def measured(deepseek):
    return measure(deepseek)


@pytest.fixture
def metrics(measured):
    (metrics,) = measured.devices
    return metrics


class TestDeepSeek:
    @pytest.mark.parametrize(
        ("definition", "communication", "compute", "overlapped", "ratio", "exposed", "share", "under"),
        [
            ("transfer", 80_452, 124_366, 77_509, 0.9634, 2_943, 0.0228, 0.623),
            ("transfer+wait", 113_030, 124_366, 108_881, 0.9633, 4_149, 0.0322, 0.876),
            ("lanes", 114_521, 124_286, 110_292, 0.9631, 4_229, 0.0328, 0.887),
        ],
    )
    def test_overlap(
        self, metrics, measured, definition, communication, compute, overlapped, ratio, exposed, share, under
    ):
        found = metrics.overlaps[definition]
        assert (found.communication, found.compute, found.overlapped) == (communication, compute, overlapped)
        assert (found.window, found.exposed) == (129_012, exposed)
        assert found.ratio == pytest.approx(ratio, abs=5e-5)
        assert found.exposed_share == pytest.approx(share, abs=5e-5)
        # The reference rounds 0.8755 up.
        assert found.compute_under_communication == pytest.approx(under, abs=6e-4)
        assert measured.summary.overlaps[definition] == found

    def test_gain(self, metrics):
        found = metrics.overlaps["lanes"]
        assert found.serial == 238_807
        assert found.speedup == pytest.approx(1.851, abs=5e-4)
        assert found.ideal_speedup == pytest.approx(1.921, abs=5e-4)
        assert found.efficiency == pytest.approx(0.959, abs=5e-4)

    def test_launch_gaps(self, metrics):
        found = [(o.merge_gap, round(o.ratio, 4), o.exposed) for o in metrics.sensitivity["lanes"]]
        assert found == [
            (0, 0.9631, 4229),
            (2, 0.9707, 3358),
            (5, 0.9748, 2883),
            (20, 0.9751, 2847),
            (50, 0.9762, 2729),
        ]

    def test_steady_state(self, metrics):
        assert metrics.steady_window == (29_908, 93_764)
        found = metrics.steady["lanes"]
        assert (found.window, found.exposed) == (63_856, 649)
        assert found.ratio == pytest.approx(0.9886, abs=5e-5)

    def test_breakdown(self, metrics):
        found = metrics.breakdown
        assert (found.compute, found.idle, found.gaps, found.longest_gap) == (124_366, 497, 243, 42)
        assert found.compute + found.noncompute + found.idle == found.window == 129_012
        assert found.device_idle == pytest.approx(0.0039, abs=5e-5)
        assert found.compute_bubble == pytest.approx(1 - 0.9640, abs=5e-5)

    def test_nothing_is_unknown(self, measured):
        assert measured.unclassified_share == measured.unattributed_share == 0
        assert measured.skew is None
        assert measured.summary.bubbles == ()

    def test_lanes(self, metrics, deepseek):
        assert communication_lanes(deepseek.events) == ("27",)
        shares = {row.lane: round(row.busy / 129_012, 3) for row in metrics.lanes}
        assert shares == {"7": 0.916, "27": 0.888, "23": 0.088}
        assert [row.count for row in metrics.lanes] == [927, 40, 16]
        assert metrics.concurrency[0] == 497
        assert sum(metrics.concurrency) == 129_012
        seven, side = (spans_of(e for e in deepseek.events if e.lane == lane) for lane in ("7", "23"))
        assert length(intersection(seven, side)) == 5_262

    def test_layers(self, metrics):
        table = {row.layer: {phase.name: phase for phase in row.phases} for row in metrics.layers}
        for phase, times in BUSY.items():
            assert [table[layer][phase].busy for layer in range(4)] == list(times)
        for group, expected in (("transfer", TRANSFER), ("wait", WAIT)):
            for phase, times in expected.items():
                assert [table[layer][phase].by_group[group] for layer in range(4)] == list(times)
        assert [span.end - span.start for span in metrics.layer_spans] == [29_908, 31_298, 32_558, 35_248]

    def test_overlap_by_layer(self, metrics, deepseek):
        found = [overlap(deepseek.events, "transfer+wait", window=(s.start, s.end)) for s in metrics.layer_spans]
        assert [round(o.ratio, 4) for o in found] == [0.9587, 0.9895, 0.9881, 0.9218]
        assert [o.exposed for o in found] == [1029, 281, 354, 2485]

    def test_phases_and_actions(self, metrics):
        assert {row.name: row.busy for row in metrics.phases} == {
            "attn(B)": 37_363,
            "mlp(B)": 21_224,
            "mlp(W)": 20_251,
            "mlp(F)": 18_415,
            "attn(F)": 17_479,
            "attn(W)": 9_554,
            "combine(F)": 34_736,
            "dispatch(B)": 29_947,
            "dispatch(F)": 26_761,
            "combine(B)": 23_077,
        }
        assert {row.name for row in metrics.actions} == set("FBW")
        weights = next(row for row in metrics.actions if row.name == "W")
        assert (weights.busy, weights.total) == (29_805, 35_067)

    def test_kinds(self, metrics):
        rows = {row.name: row for row in metrics.kinds}
        assert [row.total for row in metrics.kinds] == sorted((row.total for row in metrics.kinds), reverse=True)
        assert (rows["weight-gradient GEMM"].total, rows["weight-gradient GEMM"].busy) == (32_756, 27_494)
        assert all(row.total == row.busy for name, row in rows.items() if name != "weight-gradient GEMM")
        assert rows["dispatch"].blocks == rows["combine"].blocks == (20, 20)
        assert rows["barrier"].blocks == (9, 20)


class TestByHand:
    """The numbers follow from the docstring of the fixture, layer by layer, times three."""

    def test_overlap(self, three_layers):
        found = measure(three_layers).devices[0].overlaps
        figures = {
            name: (o.communication / 3, o.compute / 3, o.overlapped / 3, o.exposed / 3) for name, o in found.items()
        }
        assert figures == {
            "transfer": (170, 240, 50, 120),
            "transfer+wait": (200, 240, 50, 150),
            "lanes": (210, 230, 50, 160),
        }
        assert found["transfer"].ratio == pytest.approx(5 / 17)
        assert found["lanes"].efficiency == pytest.approx((440 - 400) / 210)

    def test_breakdown(self, three_layers):
        found = measure(three_layers).devices[0].breakdown
        assert dataclasses.astuple(found) == (1200, 720, 450, 30, 3, 10)
        assert found.compute_bubble == pytest.approx(0.4)
        assert found.device_idle == 0.025

    def test_times(self, three_layers):
        (found,) = measure(three_layers, gaps_us=(0, 10)).devices
        assert {row.name: row.total / 3 for row in found.phases} == {
            "combine(F)": 100, "dispatch(F)": 110, "mlp(W)": 100, "mlp(F)": 98, "attn(F)": 80,
        }  # fmt: skip
        assert {(row.name, row.total / 3, row.busy / 3) for row in found.actions} == {("F", 388, 388), ("W", 100, 100)}
        assert [(row.lane, row.busy / 3) for row in found.lanes] == [("27", 210), ("7", 178), ("23", 100)]
        # Streams 7 and 23 from 202 to 250, 27 and 23 from 150 to 200.
        assert [time / 3 for time in found.concurrency] == [10, 292, 98, 0]
        assert found.lanes[2].alone / 3 == 2
        # Transfers begin 20 us after compute has stopped, so that no gap of 10 us hides one.
        assert [o.exposed / 3 for o in found.sensitivity["transfer"]] == [120, 120]
        assert found.steady_window == (400, 800)
        assert found.steady["transfer"].exposed == 120

    def test_layers(self, three_layers):
        assert phase_durations(three_layers.events)[2] == {
            "attn(F)": 80, "dispatch(F)": 110, "mlp(W)": 100, "mlp(F)": 98, "combine(F)": 100,
        }  # fmt: skip
        assert [(s.layer, s.start, s.end) for s in layer_spans(three_layers.events)] == [
            (0, 0, 400), (1, 400, 800), (2, 800, 1200),
        ]  # fmt: skip

    def test_window(self, three_layers):
        """Cut in the middle of the second layer's dispatch: what is cut counts as far as it reaches."""
        found = measure(three_layers, window=(550.0, 600.0)).devices[0]
        assert (found.overlaps["transfer"].communication, found.overlaps["transfer"].ratio) == (50, 1)
        assert overlap(three_layers.events, window=(550.0, 600.0)) == found.overlaps["transfer"]


def test_without_communication_there_is_no_ratio():
    found = measure(Trace("", "xplane", (event(0, 5), event(7, 9))))
    for one in found.devices[0].overlaps.values():
        assert one.ratio is one.exposed_share is one.efficiency is one.speedup is one.ideal_speedup is None
        assert one.compute_under_communication is None
        assert one.exposed == 0
    assert found.devices[0].steady_window is None
    assert found.devices[0].steady == found.summary.steady == {}


def test_communication_alone_is_all_exposed():
    found = overlap([event(0, 5, "transfer")])
    assert (found.ratio, found.exposed_share, found.efficiency) == (0, 1, None)


def test_events_without_duration_have_no_ratio():
    found = measure(Trace("", "xplane", (event(3, 3, "transfer"),))).devices[0]
    assert found.overlaps["transfer"].ratio is found.breakdown.compute_bubble is found.breakdown.device_idle is None


def test_what_is_unknown_is_neither_compute_nor_communication_but_no_idleness():
    found = breakdown([event(0, 4), event(4, 6, "unclassified"), event(6, 10, "transfer")])
    assert (found.compute, found.noncompute, found.idle) == (4, 6, 0)
    assert overlap([event(0, 6, "unclassified"), event(0, 6, "transfer")]).ratio == 0


def test_loops_round_other_events_count_nowhere():
    loop = event(0, 100, "control", kind="control flow")
    inside = (event(10, 20), event(20, 50, "transfer", "27"), event(40, 60))
    plain, looped = (measure(Trace("", "xplane", events), window=(0.0, 100.0)) for events in (inside, (loop, *inside)))
    assert looped == plain
    assert plain.devices[0].breakdown.idle == 50


def test_gaps_of_compute_can_be_merged():
    events = [event(0, 4), event(6, 10), event(0, 10, "transfer", "27")]
    assert [overlap(events, merge_gap_us=gap).exposed for gap in (0, 1, 2)] == [2, 2, 0]
    assert overlap(events, merge_gap_us=2).compute == 8


def test_bubbles_are_shares_of_the_common_window():
    """Rank 1 has two devices, which are busy for 4 and 2 of 10 us; its transfers are no compute."""
    events = (
        event(0, 8),
        event(8, 10, "wait"),
        event(2, 6, device=1),
        event(0, 2, device=2),
        event(2, 5, "transfer", device=2),
    )
    trace = Trace("", "simulated", events, ranks={0: 0, 1: 1, 2: 1})
    found = measure(trace)
    assert [dataclasses.astuple(bubble) for bubble in found.summary.bubbles] == [
        (0, pytest.approx(0.2), 0.0),
        (1, pytest.approx(0.7), pytest.approx(0.55)),
    ]
    assert [metrics.rank for metrics in found.devices] == [0, 1, 1]
    assert found.summary.breakdown.window == 30


def test_ratios_of_devices_are_weighed_by_their_time():
    events = (event(0, 9, "transfer"), event(0, 9, lane="1"), event(0, 1, "transfer", device=1), event(1, 9, device=1))
    assert measure(Trace("", "kineto", events)).summary.overlaps["transfer"].ratio == 0.9


def test_layers_that_alternate_have_no_spans():
    """Two microbatches through two stages: layer 0 runs again after layer 2 has begun."""
    passes = [event(10 * n, 10 * n + 9, layer=layer, phase="F") for n, layer in enumerate((0, 1, 2, 0, 1, 2))]
    assert layer_spans(passes) == ()
    assert [row.layer for row in layers(passes)] == [0, 1, 2]
    assert layer_spans([event(0, 1)]) == ()
    backward = [event(10 * n, 10 * n + 9, layer=layer) for n, layer in enumerate((2, 1, 0))]
    assert [span.layer for span in layer_spans(backward)] == [2, 1, 0]


def test_layers_without_evidence_have_no_steady_state():
    """Three all-reduces that were counted are no layers, nor are three parts that have nothing in common."""

    def steady(groups, phases=("attn",) * 3):
        events = [event(10 * n, 10 * n + 9, group, layer=n, phase=phases[n]) for n, group in enumerate(groups)]
        return measure(Trace("", "kineto", tuple(events))).devices[0].steady_window

    assert steady(["transfer"] * 3) is None
    assert steady(["compute", "transfer", "compute"]) is None
    assert steady(["compute"] * 3, ("embed", "attn", "head")) is None
    assert steady(["compute"] * 2) is None
    assert steady(["compute"] * 3) == (10, 20)


def test_efficiency_is_left_out_where_idle_time_decides():
    """4 us of each in a window of 8 or less tell what overlap gained; in 100 us they do not."""
    events = [event(0, 4), event(4, 8, "transfer")]
    assert overlap(events).efficiency == 0
    assert overlap(events, window=(0.0, 100.0)).efficiency is None
    assert overlap([event(0, 4), event(0, 4, "transfer")]).efficiency == 1


def test_skew():
    def meeting(device, start, end, n, group="transfer"):
        return event(start, end, group, "comm", device, hlo_op=f"all-to-all.{n}", phase="F")

    events = (
        meeting(0, 0, 10, 1), meeting(1, 4, 10, 1),
        meeting(0, 20, 30, 2), meeting(1, 22, 31, 2),
        meeting(0, 40, 41, 1), meeting(1, 40, 43, 1),
        meeting(0, 50, 55, 3, "wait"), meeting(1, 53, 55, 3, "wait"),
        meeting(1, 60, 90, 9),
    )  # fmt: skip
    found = skew(Trace("", "xplane", events))
    assert found is not None
    assert found.matched == 4
    assert (found.start_spread, found.max_start_spread) == (9 / 4, 4)
    assert (found.end_spread, found.max_end_spread) == (3 / 4, 2)
    early, late = found.devices
    assert (early.wait, early.peer_wait, early.lateness) == (5, 4 + 1, 0)
    assert (late.wait, late.peer_wait, late.lateness, late.last) == (2, 2, 9 / 4, 3 / 4)
    assert found.straggler == 1
    assert skew(Trace("", "xplane", events[:1])) is None
    assert skew(Trace("", "xplane", (event(0, 1), event(0, 1, device=1)))) is None


def test_nothing_to_measure():
    with pytest.raises(ValueError, match=r"trace 'empty' has no events in the window None"):
        measure(Trace("empty", "xplane", ()))
    with pytest.raises(ValueError, match=r"no events in the window \(5.0, 6.0\)"):
        measure(Trace("", "xplane", (event(0, 1),)), window=(5.0, 6.0))
    with pytest.raises(ValueError, match="the start must lie before the end"):
        measure(Trace("", "xplane", (event(0, 1),)), window=(6.0, 5.0))
    with pytest.raises(ValueError, match="definition 'nccl': choose one of transfer"):
        overlap([event(0, 1)], "nccl")
    assert unattributed_share(Trace("", "xplane", ())) == 0
    assert time_by([], lambda event: event.kind) == lanes([]) == layers([]) == ()
    assert concurrency([]) == (0.0,)


EVENTS = st.lists(
    st.builds(
        lambda start, duration, group, lane, device: event(start, start + duration, group, lane, device),
        st.integers(0, 50),
        st.integers(0, 20),
        st.sampled_from(["compute", "transfer", "wait", "unclassified", "control"]),
        st.sampled_from("abc"),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=20,
)


@given(EVENTS)
def test_parts_add_up_on_any_trace(events):
    trace = Trace("", "simulated", tuple(sorted(events, key=lambda e: e.start)), ranks={0: 0, 1: 1, 2: 0})
    found = measure(trace)
    for metrics in found.devices:
        parts = metrics.breakdown
        assert parts.compute + parts.noncompute + parts.idle == pytest.approx(found.makespan)
        assert min(parts.compute, parts.noncompute, parts.idle) >= 0
        assert list(metrics.overlaps) == list(DEFINITIONS)
        for one in (*metrics.overlaps.values(), *metrics.sensitivity["lanes"]):
            assert 0 <= one.exposed <= one.communication <= one.window
            assert one.overlapped <= min(one.communication, one.window)
            assert one.ratio is None or 0 <= one.ratio <= 1
            assert one.efficiency is None or (math.isfinite(one.efficiency) and one.efficiency <= 1 + 1e-9)
        assert sum(row.total for row in metrics.kinds) == sum(row.total for row in metrics.phases)
        assert all(row.busy <= row.total for row in metrics.kinds)
        assert [o.exposed for o in metrics.sensitivity["transfer"]] == sorted(
            (o.exposed for o in metrics.sensitivity["transfer"]), reverse=True
        )
