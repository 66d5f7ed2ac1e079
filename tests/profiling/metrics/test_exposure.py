"""Stretches of exposed communication, and what they are put down to."""

import pytest

from profiling.event import Event, Trace
from profiling.metrics import DEFINITIONS, measure
from profiling.metrics.exposure import exposed_segments


def test_deepseek(deepseek):
    """In the last layer attention waits 1.8 ms for a dispatch and an MLP 0.3 ms; the start is slow to be launched."""
    first, second, third, *_ = exposed_segments(deepseek)
    assert (first.start, first.duration) == (115_100, 1_758)
    assert first.reason == "attn(B) of layer 3 waits for dispatch(B) of layer 3"
    assert first.communication.kind == "combine"
    assert (third.start, third.duration) == (100_768, 271)
    assert third.reason == "mlp(B) of layer 3 waits for combine(B) of layer 3"
    assert second.start < 1_300 and not second.stalled
    assert second.reason == "attn(F) of layer 0 starts late, beside or after combine(B) of layer 0"
    assert first.share == pytest.approx(1758 / 4149)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_all_stretches_are_all_that_is_exposed(deepseek, three_layers, definition):
    for trace in (deepseek, three_layers):
        found = exposed_segments(trace, top=10_000, definition=definition)
        metrics = measure(trace).devices[0]
        assert sum(segment.duration for segment in found) == metrics.overlaps[definition].exposed
        assert sum(segment.share for segment in found) == pytest.approx(1)
        assert [segment.duration for segment in found] == sorted((s.duration for s in found), reverse=True)
        merged = exposed_segments(trace, top=10_000, definition=definition, merge_gap_us=5)
        assert sum(segment.duration for segment in merged) == metrics.sensitivity[definition][2].exposed


def test_hand_written(three_layers):
    found = exposed_segments(three_layers, top=6)
    assert [(s.start, s.end) for s in found] == [
        (300, 400),
        (700, 800),
        (1100, 1200),
        (100, 150),
        (500, 550),
        (900, 950),
    ]
    assert [s.reason for s in found[1:4]] == [
        "attn(F) of layer 2 waits for combine(F) of layer 1",
        "nothing follows combine(F) of layer 2",
        # mlp(W) needs no dispatch: it starts while that still runs.
        "mlp(W) of layer 0 starts late, beside or after dispatch(F) of layer 0",
    ]
    assert found[0].kinds == ("barrier", "combine")
    assert found[0].phases == ("combine(F)",)
    assert found[0].communication.kind == "combine"
    assert len(exposed_segments(three_layers, top=2)) == 2
    assert exposed_segments(three_layers, top=0) == ()


def test_devices_are_told_apart():
    transfers = [Event(d, "27", 0.0, 4.0 + d, "t", kind="all-to-all", group="transfer") for d in (0, 1)]
    compute = Event(0, "7", 4.0, 9.0, "c", kind="GEMM", group="compute")
    late, waiting = exposed_segments(Trace("", "xplane", (*transfers, compute)))
    assert (late.device, late.duration, late.reason, late.next_compute) == (1, 5, "nothing follows all-to-all", None)
    assert (waiting.device, waiting.reason, waiting.share) == (0, "GEMM waits for all-to-all", 1)
    assert waiting.next_compute == compute


def test_compute_much_later_did_not_wait():
    transfer = Event(0, "27", 0.0, 4.0, "t", kind="all-to-all", group="transfer")
    compute = Event(0, "7", 50.0, 60.0, "c", kind="GEMM", group="compute")
    (segment,) = exposed_segments(Trace("", "xplane", (transfer, compute)))
    assert not segment.stalled


def test_nothing_exposed():
    assert exposed_segments(Trace("", "xplane", (Event(0, "7", 0.0, 4.0, "c", group="compute"),))) == ()
    with pytest.raises(ValueError, match="top=-1"):
        exposed_segments(Trace("", "xplane", ()), top=-1)
