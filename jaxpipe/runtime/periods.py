"""The steady state of a schedule: where every rank repeats itself, microbatch after microbatch.

A schedule of many microbatches is packed as the same schedule with fewer of them, whose ticks are then repeated as
often as the steady state is longer. That the ticks fit the whole schedule is not argued here; `pack` checks it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxpipe.runtime.actions import Actions, B, F, I, W

_KEPT = 4  # about how many microbatches of each direction for each rank stay in the shorter schedule
_UNIT = 12  # microbatches are cut in multiples of about this many, so that ticks may repeat every 1, 2, 3, 4, 6 or 12


class Region(NamedTuple):
    """Groups ``begin`` to ``end`` of each rank: each is that ``period`` groups before it, with later microbatches."""

    begin: np.ndarray  # int[ranks]
    end: np.ndarray
    period: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Steady:
    """A schedule without most of its steady state.

    Attributes:
      actions: the shorter schedule.
      regions: where its ranks repeat themselves, in order; GPipe has two, most others one.
      cut: how many periods are missing from each region.
    """

    actions: Actions
    regions: tuple[Region, ...]
    cut: int


def find_steady(actions: Actions) -> Steady | None:
    """The shorter schedule; None where no steady state is found, or where it is too short to be worth it."""
    kept, length = _KEPT * len(actions.lengths), int(actions.lengths[0])
    begin = length // 5  # past the beginning, and before GPipe changes half-way
    for shift in range(1, actions.num_microbatches // len(actions.routes) // 8 + 1):
        sample = _steps(actions, shift, begin, min(begin + 2 * kept, length))
        if not len(sample) or (sample != sample[0]).any() or not sample[0]:
            continue
        regions, periods = _find_regions(actions, shift)
        unit = -(-_UNIT // shift)
        cut = (periods - max(kept // shift, 2)) // unit * unit
        if regions and 2 * cut > periods:
            shorter = _shorten(actions, regions, cut, shift)
            if shorter is not None:
                return Steady(shorter, _shorten_regions(regions, cut), cut)
    return None


def extend(steady: Steady, path: np.ndarray, durations: np.ndarray) -> np.ndarray | None:
    """The positions of a way through the whole schedule from those of one through the shorter one.

    In each region the ticks are repeated between which the ranks advance by whole periods in the least time. None
    where a region has no such ticks.
    """
    times = np.concatenate([[0.0], np.cumsum(durations)])
    rounded = np.round(times / max(times[-1], 1e-300) * 1e9)
    for region in reversed(steady.regions):  # so that what comes before, and its times, stays as it is
        found = _best_round(region, steady.cut, path, rounded)
        if found is None:
            return None
        begin, end, periods = found
        more = np.arange(1, steady.cut // periods + 1)[:, None, None] * (periods * region.period)
        rounds = (path[begin + 1 : end + 1] + more).reshape(-1, path.shape[1])
        path = np.concatenate([path[: end + 1], rounds, path[end + 1 :] + steady.cut * region.period])
    return path


def _best_round(region: Region, cut: int, path: np.ndarray, times: np.ndarray) -> tuple[int, int, int] | None:
    """(first tick, last tick, periods between) of the ticks of a region to repeat."""
    (inside,) = np.nonzero(((region.begin <= path) & (path <= region.end)).all(-1))
    number = path[inside, 0] // region.period[0]
    _, same = np.unique(path[inside] - number[:, None] * region.period, axis=0, return_inverse=True)
    same = same.reshape(-1)
    periods = number[None, :] - number[:, None]
    begin, end = np.nonzero((same[None, :] == same[:, None]) & (periods > 0))
    begin, end = begin[cut % periods[begin, end] == 0], end[cut % periods[begin, end] == 0]
    if not len(begin):
        return None
    periods = periods[begin, end]
    begin, end = inside[begin], inside[end]
    best = np.lexsort((periods, (end - begin) / periods, np.round((times[end] - times[begin]) / periods)))[0]
    return int(begin[best]), int(end[best]), int(periods[best])


def _find_regions(actions: Actions, shift: int) -> tuple[tuple[Region, ...], int]:
    """Where all ranks repeat themselves with microbatches ``shift`` later, and how often at least."""
    steps, ranks = _steps(actions, shift, 0, len(actions.rank)), len(actions.lengths)
    begins = np.flatnonzero(np.diff(steps, prepend=-1) | np.diff(actions.rank, prepend=-1))
    lengths, steps = np.diff(begins, append=len(steps)), steps[begins]
    periods = np.where(steps > 0, lengths // np.maximum(steps, 1), 0)
    long = (periods > 0) & (2 * periods >= periods.max(initial=0))
    begins, lengths, steps, rank = begins[long], lengths[long], steps[long], actions.rank[begins[long]]
    counts = np.bincount(rank, minlength=ranks)
    if not len(begins) or (counts != counts[0]).any():
        return (), 0
    begins -= actions.offsets[rank]
    columns = (column.reshape(ranks, -1).T for column in (begins, begins + lengths + steps, steps))
    return tuple(map(Region, *columns)), int(periods[long].min())


def _steps(actions: Actions, shift: int, begin: int, end: int) -> np.ndarray:
    """How many groups later each of the groups ``begin`` to ``end`` comes again with microbatches ``shift`` later.

    It is 0 where the group never does.
    """
    among = slice(*np.searchsorted(actions.group, [begin, end]))
    group, place, microbatch = actions.group[among], actions.place[among], actions.microbatch[among]
    last = (actions.direction[among] + 1) * (actions.num_microbatches // len(actions.routes)) - 1
    later = np.minimum(microbatch + shift, last)
    again = actions.where[actions.kind[among], actions.stage[among], later]
    size, size_again = actions.sizes[group], actions.sizes[actions.group[again]]
    same = (later == microbatch + shift) & (again >= 0) & (actions.place[again] == place) & (size_again == size)
    steps = np.where(same, actions.group[again] - group, 0)
    least, most = np.full(end - begin, len(actions.rank)), np.zeros(end - begin, np.int64)
    np.minimum.at(least, group - begin, steps)  # both actions of a pair have to come again together
    np.maximum.at(most, group - begin, steps)
    return np.where((least == most) & (least > 0), least, 0)


def _shorten(actions: Actions, regions: tuple[Region, ...], cut: int, shift: int) -> Actions | None:
    """The schedule without ``cut`` periods of each region; None where that leaves something out or twice."""
    place = np.arange(len(actions.rank)) - actions.offsets[actions.rank]
    kept = np.ones(len(actions.rank), bool)
    for begin, _, period in regions:
        first = begin[actions.rank]
        kept &= (place < first) | (place >= first + cut * period[actions.rank])
    stays, fewer = kept[actions.group], cut * shift
    half = actions.num_microbatches // len(actions.routes)
    number = actions.microbatch - half * actions.direction
    # F, backward of the input and of the weights each miss a run of microbatches; those after it take their numbers.
    missing = np.full((3, actions.num_stages, len(actions.routes)), half)
    kind_of = np.array([0, 1, 1, 2])[actions.kind]
    for first, kinds in zip(missing, ((F,), (B, I), (B, W)), strict=True):
        gone = ~stays & np.isin(actions.kind, kinds)
        np.minimum.at(first, (actions.stage[gone], actions.direction[gone]), number[gone])
    number = number - fewer * (number >= missing[kind_of, actions.stage, actions.direction])
    if (number[stays] < 0).any() or (number[stays] >= half - fewer).any():
        return None
    shorter = Actions(
        group=(np.cumsum(kept) - 1)[actions.group[stays]],
        place=actions.place[stays],
        kind=actions.kind[stays],
        stage=actions.stage[stays],
        microbatch=((half - fewer) * actions.direction + number)[stays],
        lengths=np.bincount(actions.rank[kept], minlength=len(actions.lengths)),
        routes=actions.routes,
        num_microbatches=actions.num_microbatches - fewer * len(actions.routes),
    )
    once = (shorter.where >= 0).sum() == len(shorter.kind)
    return shorter if once and _kinds(shorter) <= _kinds(actions) else None


def _kinds(actions: Actions) -> set[int]:
    """Which sets of kinds a stage runs for a microbatch."""
    return set(np.unique(((actions.where >= 0) << np.arange(4)[:, None, None]).sum(0)).tolist())


def _shorten_regions(regions: tuple[Region, ...], cut: int) -> tuple[Region, ...]:
    """The regions in the shorter schedule."""
    shorter, gone = [], 0
    for begin, end, period in regions:
        shorter.append(Region(begin - gone, end - gone - cut * period, period))
        gone = gone + cut * period
    return tuple(shorter)
