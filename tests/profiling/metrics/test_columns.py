"""Events as arrays: the same events, each array made once, sums that rounding does not break."""

import random

import numpy as np
import pytest

from profiling.event import Event, Trace
from profiling.metrics import by_device, overlap, time_by
from profiling.metrics.columns import columns
from profiling.metrics.intervals import covered, intersection, length, spans_of, union, within


def event(start, end, group="compute", lane="7", device=0, **facts):
    return Event(device, lane, float(start), float(end), "k", group=group, **facts)


def test_columns_are_the_events_and_are_made_once():
    events = [event(3, 4, "wait", "a", blocks=7), event(0, 2, "control", "b"), event(1, 9, lane="a")]
    found = columns(events)
    assert columns(found) is found and list(found) == events and found[1] is events[1] and len(found) == 3
    assert found.spans.tolist() == [[3, 4], [0, 2], [1, 9]] and found.spans is found.spans
    assert found.of_groups("wait", "compute").tolist() == [True, False, True]
    assert found.lanes.values == ("a", "b") and found.lanes.index.tolist() == [0, 1, 0]
    assert list(found.counted) == [events[0], events[2]]
    assert found.counted.counted is found.counted
    with pytest.raises(ValueError, match="an end is a time that is not before its start"):
        overlap([event(5, 3)])


def test_the_sum_of_a_kind_is_never_less_than_its_union():
    """Of times that are no whole numbers, too: rounding must not make a part larger than the whole."""
    rng = random.Random(0)
    events = []
    for _ in range(500):
        start = rng.random() * 1e6
        events.append(event(start, start + rng.random() * 1e-3))
    (row,) = time_by(events, lambda event: event.kind)
    assert row.busy <= row.total
    assert row.busy == pytest.approx(length(spans_of(events)))


def test_devices_are_told_apart_in_the_order_of_the_trace():
    events = tuple(event(n, n + 1, device=n % 3) for n in range(9))
    found = by_device(Trace("", "kineto", events))
    assert {device: list(of) for device, of in found.items()} == {d: list(events[d::3]) for d in range(3)}
    assert list(by_device(Trace("", "kineto", events[::3]))[0]) == list(events[::3])
    assert by_device(Trace("", "kineto", ())) == {}


@pytest.mark.parametrize("seed", range(3))
def test_what_a_set_covers_of_an_interval_is_their_intersection(seed):
    rng = random.Random(seed)

    def some(count):
        return np.array([(start, start + rng.randrange(9)) for start in (rng.randrange(100) for _ in range(count))])

    of, spans = union(some(12)), union(some(12))
    assert covered(of, spans).tolist() == [length(intersection(of, span[None])) for span in spans]
    assert within(of, 20, 60).tolist() == intersection(of, np.array([[20, 60]])).tolist()
    assert covered(union(np.empty((0, 2))), spans).tolist() == [0] * len(spans)
