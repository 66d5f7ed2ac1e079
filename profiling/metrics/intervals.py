"""Sets of times as sorted, disjoint, half-open intervals, and the algebra on them that all metrics use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

from profiling.event import Event

Spans: TypeAlias = np.ndarray
"""``[n, 2]`` float64: start and end of each interval, in microseconds."""


def spans_of(events: Iterable[Event]) -> Spans:
    """``[n, 2]``: start and end of each event, in the order of the events; `union` makes a set of them.

    >>> spans_of([Event(0, "compute", 3.0, 4.0, "b"), Event(0, "compute", 0.0, 2.0, "a")])
    array([[3., 4.],
           [0., 2.]])
    """
    return np.array([(event.start, event.end) for event in events], np.float64).reshape(-1, 2)


def union(spans: Spans, merge_gap: float = 0.0) -> Spans:
    """The times in any of the intervals, as sorted, disjoint intervals that are not empty.

    Args:
      spans: ``[n, 2]`` in any order, overlapping or not.
      merge_gap: gaps no longer than this are filled; with 0, intervals that touch become one.

    Raises:
      ValueError: the shape is wrong, a time is no number, an end lies before its start, or the gap is negative.

    >>> union([[3, 4], [0, 2], [1, 2.5]])
    array([[0. , 2.5],
           [3. , 4. ]])
    >>> union([[0, 2], [3, 4]], merge_gap=1)
    array([[0., 4.]])
    """
    spans = checked(spans)
    if not merge_gap >= 0:
        raise ValueError(f"union(merge_gap={merge_gap!r}): a gap is a number of microseconds, not negative")
    spans = spans[spans[:, 1] > spans[:, 0]]
    if not len(spans):
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    opens = np.concatenate([[True], spans[1:, 0] > reach[:-1] + merge_gap])
    firsts = np.flatnonzero(opens)
    return np.stack([spans[firsts, 0], reach[np.append(firsts[1:], len(spans)) - 1]], axis=1)


def intersection(a: Spans, b: Spans) -> Spans:
    """The times in both sets.

    >>> intersection([[0, 4], [6, 9]], [[3, 7]])
    array([[3., 4.],
           [6., 7.]])
    """
    return _select(a, b, lambda in_a, in_b: in_a & in_b)


def difference(a: Spans, b: Spans) -> Spans:
    """The times in the first set and not in the second.

    >>> difference([[0, 4], [6, 9]], [[3, 7]])
    array([[0., 3.],
           [7., 9.]])
    """
    return _select(a, b, lambda in_a, in_b: in_a & ~in_b)


def length(spans: Spans) -> float:
    """The microseconds that intervals cover; times in several of them count once.

    >>> length([[0, 4], [3, 6], [7, 8]])
    7.0
    """
    spans = union(spans)
    return float(np.sum(spans[:, 1] - spans[:, 0]))


def covered(of: Spans, spans: Spans) -> np.ndarray:
    """``[n]``: microseconds of each interval that lie in a set; `union` made the set.

    >>> covered(np.array([[0, 4], [6, 9]]), np.array([[3, 7], [4, 6]]))
    array([2., 0.])
    """
    if not len(of):
        return np.zeros(len(spans))
    before = np.concatenate([[0.0], np.cumsum(of[:, 1] - of[:, 0])])

    def until(times: np.ndarray) -> np.ndarray:
        last = np.searchsorted(of[:, 0], times, "right") - 1
        inside = np.minimum(times, of[last, 1]) - of[last, 0]
        return np.where(last < 0, 0.0, before[last] + inside)

    return until(spans[:, 1]) - until(spans[:, 0])


def gaps(spans: Spans) -> Spans:
    """The times between the first start and the last end that no interval covers.

    >>> gaps([[0, 4], [6, 9]])
    array([[4., 6.]])
    """
    spans = union(spans)
    return np.stack([spans[:-1, 1], spans[1:, 0]], axis=1)


def _select(a: Spans, b: Spans, wanted) -> Spans:
    """The wanted stretches between neighbouring edges of either set, joined if they touch."""
    a, b = union(a), union(b)
    edges = np.unique(np.concatenate([a.ravel(), b.ravel()]))
    starts = edges[:-1]
    keep = wanted(_contains(a, starts), _contains(b, starts))
    return union(np.stack([starts[keep], edges[1:][keep]], axis=1))


def _contains(spans: Spans, times: np.ndarray) -> np.ndarray:
    """Whether each time is in a set; `union` made the set."""
    return np.searchsorted(spans[:, 0], times, "right") > np.searchsorted(spans[:, 1], times, "right")


def within(spans: Spans, start: float, end: float) -> Spans:
    """The times between two times that lie in any of the intervals.

    >>> within([[0, 4], [3, 6], [8, 9]], 1, 8)
    array([[1., 6.]])
    """
    spans = np.clip(union(spans), start, end)
    return spans[spans[:, 1] > spans[:, 0]]


def checked(spans: Spans) -> Spans:
    """``[n, 2]`` float64.

    Raises:
      ValueError: the shape is wrong, a time is no number, or an end lies before its start.
    """
    spans = np.asarray(spans, np.float64)
    if not spans.size:
        return np.empty((0, 2))
    if spans.ndim != 2 or spans.shape[1] != 2:
        raise ValueError(f"intervals of shape {spans.shape}: write [n, 2], a start and an end for each")
    wrong = ~(spans[:, 1] >= spans[:, 0])
    if wrong.any():
        start, end = spans[wrong][0]
        raise ValueError(f"interval [{start}, {end}): an end is a time that is not before its start")
    return spans
