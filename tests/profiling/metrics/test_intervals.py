"""Interval algebra is set algebra: what every operation covers, counted point by point."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiling.metrics.intervals import difference, gaps, intersection, length, union

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda pair: (pair[0], sum(pair))), max_size=12)


def points(spans):
    """The unit cells that intervals between integers cover."""
    return {cell for start, end in np.asarray(spans).reshape(-1, 2).astype(int) for cell in range(start, end)}


def is_normal(spans):
    return spans.shape[1] == 2 and bool(np.all(np.diff(spans.ravel()) > 0))


@given(SPANS, SPANS)
def test_operations_are_those_of_sets(a, b):
    for operation, expected in (
        (intersection(a, b), points(a) & points(b)),
        (difference(a, b), points(a) - points(b)),
        (union([*a, *b]), points(a) | points(b)),
    ):
        assert is_normal(operation)
        assert points(operation) == expected
        assert length(operation) == len(expected)


@given(SPANS, SPANS)
def test_parts_add_up(a, b):
    assert length(intersection(a, b)) + length(difference(a, b)) == length(a)
    assert length(a) + length(b) == length([*a, *b]) + length(intersection(a, b))


@given(SPANS, st.integers(0, 5))
def test_merging_fills_just_the_short_gaps(spans, merge_gap):
    holes = gaps(spans)
    short = holes[holes[:, 1] - holes[:, 0] <= merge_gap]
    merged = union(spans, merge_gap)
    assert is_normal(merged)
    assert points(merged) == points(spans) | points(short)


@given(SPANS)
def test_gaps_lie_between_and_complete(spans):
    covered = points(spans)
    whole = set(range(min(covered), max(covered) + 1)) if covered else set()
    assert points(gaps(spans)) == whole - covered


@given(SPANS, SPANS)
def test_what_is_normal_stays_as_it_is_and_order_does_not_matter(a, b):
    once = union(a)
    np.testing.assert_array_equal(union(once), once)
    np.testing.assert_array_equal(union(a[::-1]), once)
    np.testing.assert_array_equal(intersection(a, b), intersection(b, a))


def test_nothing():
    assert union([]).shape == gaps([]).shape == intersection([], [[0, 1]]).shape == difference([], []).shape == (0, 2)
    assert length([]) == length([[3, 3]]) == 0.0
    np.testing.assert_array_equal(difference([[0, 1]], []), [[0, 1]])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[2, 1]], r"interval \[2.0, 1.0\): an end"),
        ([[0, float("nan")]], r"interval \[0.0, nan\)"),
        ([1, 2, 3], r"intervals of shape \(3,\)"),
        ([[1, 2, 3]], r"intervals of shape \(1, 3\)"),
    ],
)
def test_no_intervals(spans, message):
    with pytest.raises(ValueError, match=message):
        union(spans)


def test_no_gap():
    with pytest.raises(ValueError, match="merge_gap=-1"):
        union([[0, 1]], merge_gap=-1)
