"""The code that runs a Program of several ranks: stretches of ticks, each a loop over rounds of the same code.

Ranks of one program differ in what they run, and what only some of them run is a loop of no or one trip. A GPU waits
whenever the host reads such a loop's condition: once where a rank does not run it, twice where it does. So the code of
a stretch has only the branches that occur in it, in an order in which as many ranks as possible run the same one at
once; what the same ranks run in the same rounds is one loop, loops stand in loops where that saves reads, and what all
ranks run is in none. Where stretches begin, and what is in their code, is chosen here: the fewest reads for a bounded
amount of code.

Within a tick nothing is sent, so each rank's branches may run at any time in the tick, in their order. A tick whose
branches do not fit the code once takes several rounds of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpipe.runtime.program import Op, Program

MOST_CODE = 1.75
"""Code of all stretches in units of each branch's once, unless no division into stretches has so little."""

MOST_TICKS = 4
"""The longest round of a stretch, in ticks."""

_CODE = {Op.F: 2, Op.B: 4, Op.I: 2, Op.W: 2, Op.EMBED: 1, Op.HEAD: 2, Op.EMBED_GRAD: 1}
"""Size of each operation's code, about."""

_PERMUTE = 2.5
"""What a permute that carries nothing costs, in reads: 0.1 ms for 33 MB within a node."""

_MOST_LOOKS = 120
"""How many changes of a stretch's code are tried."""

_KEPT = 12
"""Ticks of a repeated part that the search sees, about."""

_LONGEST = 60
"""The longest period of a repeated part, in ticks."""


class Piece(NamedTuple):
    """A branch in the code, and when it runs.

    Attributes:
      branch: an index into ``Program.branches``.
      steps: ``int[rounds, ranks]``, the step of the program that a rank runs; -1 for none.
    """

    branch: int
    steps: np.ndarray


class Guarded(NamedTuple):
    """Code that some ranks run in some rounds: a loop of no or one trip.

    Attributes:
      nodes: the code, in order.
      chosen: ``bool[rounds, ranks]``, which run it.
    """

    nodes: tuple[Piece | Guarded, ...]
    chosen: np.ndarray


class Sending(NamedTuple):
    """Messages on some channels at once.

    Attributes:
      channels: on which.
      steps: ``int[rounds]``, the step of the program after which they move; -1 for none.
    """

    channels: tuple[int, ...]
    steps: np.ndarray

    @property
    def always(self) -> bool:
        """Whether they move in every round."""
        return bool((self.steps >= 0).all())


class Tick(NamedTuple):
    """What happens between two moments at which messages move.

    Attributes:
      nodes: the code, in order; pieces are what all ranks run in all rounds.
      exchanges: what moves then, of which at most one in each round. Any that does not in every round is a loop.
    """

    nodes: tuple[Piece | Guarded, ...]
    exchanges: tuple[Sending, ...]


class Stretch(NamedTuple):
    """``times`` rounds of the same code."""

    times: int
    ticks: tuple[Tick, ...]


@functools.lru_cache(16)
def make_stretches(program: Program) -> tuple[Stretch, ...]:
    """The stretches of a program of several ranks that take few reads of loops' conditions.

    >>> from jaxpipe.schedule import build
    >>> from jaxpipe.runtime.lower import lower
    >>> [stretch.times for stretch in make_stretches(lower(build("dualpipe", 2, 32)))]
    [1, 1, 14, 1, 1]
    """
    table = TickTable(program)
    return tuple(table.stretch(shape) for shape in _choose(table))


def pieces(stretches: Iterable[Stretch]) -> list[Piece]:
    """All pieces of code, in the order of the code."""

    def inside(nodes: Iterable[Piece | Guarded]) -> Iterator[Piece]:
        for node in nodes:
            if isinstance(node, Piece):
                yield node
            else:
                yield from inside(node.nodes)

    return [piece for stretch in stretches for tick in stretch.ticks for piece in inside(tick.nodes)]


class Loop(NamedTuple):
    """A loop of no or one trip, of a choice or an exchange.

    Attributes:
      reached: ``bool[rounds, ranks]``, where its condition is read.
      chosen: ``bool[rounds, ranks]``, where it has a trip.
    """

    reached: np.ndarray
    chosen: np.ndarray


def loops(stretches: Iterable[Stretch]) -> list[Loop]:
    """All loops, in the order of the code; one comes before those within."""

    def inside(nodes: Iterable[Piece | Guarded], reached: np.ndarray) -> Iterator[Loop]:
        for node in nodes:
            if isinstance(node, Guarded):
                yield Loop(reached, node.chosen)
                yield from inside(node.nodes, node.chosen)

    found: list[Loop] = []
    for stretch in stretches:
        for tick in stretch.ticks:
            every = np.ones_like(pieces([Stretch(1, (tick,))])[0].steps, bool)
            found += inside(tick.nodes, every)
            found += [Loop(every, every & (e.steps >= 0)[:, None]) for e in tick.exchanges if not e.always]
    return found


def host_reads(stretches: Iterable[Stretch]) -> np.ndarray:
    """``int[ranks]``: how often a rank reads the condition of a loop of no or one trip: with no trip once, else twice.

    >>> from jaxpipe.schedule import build
    >>> from jaxpipe.runtime.lower import lower
    >>> host_reads(make_stretches(lower(build("1f1b", 2, 8)))).tolist()  # in 34 steps
    [56, 51]
    """
    return np.asarray(sum((loop.reached.sum(0) + loop.chosen.sum(0) for loop in loops(stretches)), np.int64(0)))


def loop_reads(program: Program) -> np.ndarray:
    """``int[ranks]``: the same of a scan over all steps with a loop for each branch and each pattern of sends.

    >>> from jaxpipe.schedule import build
    >>> from jaxpipe.runtime.lower import lower
    >>> loop_reads(lower(build("1f1b", 2, 8))).tolist()  # in 34 steps
    [245, 237]
    """
    moves = program.communicate.any(1)
    patterns = len(np.unique(program.communicate[moves], axis=0))
    loops = len(program.branches) - 1 + patterns
    return loops * program.num_steps + (program.branch > 0).sum(0) + int(moves.sum())


def size_of_code(program: Program, branches: Iterable[int]) -> int:
    """Of branches, in halves of a forward's."""
    return sum(_CODE[op] for branch in branches for op, _ in program.branches[branch])


class _Shape(NamedTuple):
    """A stretch: its ticks, how many of them a round has, and the branches in the code of each of these."""

    first: int
    stop: int
    period: int
    codes: tuple[tuple[int, ...], ...]


_Sequences = tuple[tuple[int, ...], ...]
"""The branches that each rank runs in a tick."""


class _Embedded(NamedTuple):
    """How a tick runs in some code: in how many rounds, and (place, (round, rank) as bits) of what is run."""

    rounds: int
    places: tuple[tuple[int, int], ...]


class TickTable:
    """The ticks of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        ticks = program.ticks
        self.begins = [*np.searchsorted(ticks, np.arange(int(ticks.max(initial=-1)) + 1)).tolist(), len(ticks)]
        self.together = frozenset(i for i, branch in enumerate(program.branches) if program.together(branch))
        self.sequences = [self._sequences(tick) for tick in range(len(self.begins) - 1)]
        self.names = [_align(each, self.together) for each in self.sequences]
        last = np.asarray(self.begins[1:], np.int64) - 1
        self.moves = [tuple(np.flatnonzero(row).tolist()) for row in program.communicate[last]]
        numbers: dict[_Sequences, int] = {}
        self.kinds = [numbers.setdefault(each, len(numbers)) for each in self.sequences]  # alike but for what moves
        self.known: dict[tuple[tuple[int, ...], int], _Embedded] = {}

    def _sequences(self, tick: int) -> _Sequences:
        rows = self.program.branch[self.begins[tick] : self.begins[tick + 1]]
        return tuple(tuple(branch for branch in column if branch) for column in rows.T.tolist())

    def embed(self, code: tuple[int, ...], tick: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each rank (round, place) of each of its branches in the code; see `_embed`."""
        return _embed(code, self.sequences[tick], self.together)

    def embedded(self, code: tuple[int, ...], tick: int) -> _Embedded:
        """The same as bits."""
        key = code, self.kinds[tick]
        if key not in self.known:
            bits: dict[int, int] = {}
            for rank, at in enumerate(self.embed(code, tick)):
                for number, place in at:
                    bits[place] = bits.get(place, 0) | 1 << (number * self.program.num_ranks + rank)
            rounds = max((mask.bit_length() - 1) // self.program.num_ranks for mask in bits.values()) + 1 if bits else 1
            self.known[key] = _Embedded(rounds, tuple(bits.items()))
        return self.known[key]

    def stretch(self, shape: _Shape) -> Stretch:
        """The code of a stretch, with the steps that each piece runs."""
        ticks = [self._tick(shape, offset) for offset in range(shape.period)]
        return Stretch(len(pieces([Stretch(1, (ticks[0],))])[0].steps), tuple(ticks))

    def _tick(self, shape: _Shape, offset: int) -> Tick:
        code, branch = shape.codes[offset], self.program.branch
        columns: list[np.ndarray] = []
        sends: list[int] = []
        moved: list[tuple[int, ...]] = []
        for tick in range(shape.first + offset, shape.stop, shape.period):
            places = self.embed(code, tick)
            rounds = 1 + max((at[-1][0] for at in places if at), default=0)
            steps = np.full((rounds, len(code), len(places)), -1, np.int64)
            for rank, at in enumerate(places):
                (mine,) = np.nonzero(branch[self.begins[tick] : self.begins[tick + 1], rank])
                for (number, place), step in zip(at, mine.tolist(), strict=True):
                    steps[number, place, rank] = self.begins[tick] + step
            columns.append(steps)
            sends += [-1] * (rounds - 1) + [self.begins[tick + 1] - 1]
            moved += [()] * (rounds - 1) + [self.moves[tick]]
        steps = np.concatenate(columns)
        masks = [_bits(steps[:, i] >= 0) for i in range(len(code))]
        full = _bits(np.ones_like(steps[:, 0], bool))
        _, tree = _nest(masks, full, int.bit_count)

        def node(part: Any) -> Piece | Guarded:
            if isinstance(part, int):
                return Piece(code[part], steps[:, part])
            chosen = np.zeros_like(steps[:, 0], bool)
            for i in _leaves(part):
                chosen |= steps[:, i] >= 0
            return Guarded(tuple(map(node, part)), chosen)

        groups = _groups(moved, [1.0] * len(moved))[1]
        exchanges = [
            Sending(
                channels, np.array([step if each in patterns else -1 for step, each in zip(sends, moved, strict=True)])
            )
            for channels, patterns in groups
        ]
        return Tick(tuple(map(node, tree)), tuple(exchanges))


def _groups(
    moved: Sequence[tuple[int, ...]], weights: Sequence[float]
) -> tuple[float, list[tuple[tuple[int, ...], set[tuple[int, ...]]]]]:
    """(reads, exchanges as (channels, patterns)) for the channels that move in each round, and rounds' weights.

    All that move in some round move in every one, or in every one in which some do, or each pattern has a loop of its
    own. A permute that carries nothing counts as some reads.
    """
    patterns = sorted(set(moved) - {()})
    union = tuple(sorted({channel for pattern in patterns for channel in pattern}))
    rounds = float(sum(weights))
    busy = sum(weight for each, weight in zip(moved, weights, strict=True) if each)
    idle = sum(weight * (len(union) - len(each)) for each, weight in zip(moved, weights, strict=True) if each)
    apart = len(patterns) * rounds + busy if len(patterns) > 1 or busy < rounds else 0.0
    options = [(apart, [(pattern, {pattern}) for pattern in patterns])]
    if patterns:
        options.append((_PERMUTE * idle + (rounds + busy) * (busy < rounds), [(union, set(patterns))]))
    return min(options, key=lambda option: option[0])


def _bits(chosen: np.ndarray) -> int:
    """A bool array as the bits of a number."""
    return int.from_bytes(np.packbits(chosen.reshape(-1)).tobytes(), "big")


def _leaves(part: Any) -> Iterator[int]:
    if isinstance(part, int):
        yield part
    else:
        for each in part:
            yield from _leaves(each)


def _nest(masks: Sequence[int], full: int, weigh: Any) -> tuple[float, tuple[Any, ...]]:
    """(reads, the code as nested tuples of places: each tuple within is a loop of no or one trip).

    Places that nobody runs are left out. ``weigh`` is the number of (round, rank) among the bits of a number.
    """
    places = [i for i, mask in enumerate(masks) if mask]
    masks = [masks[i] for i in places]
    count = len(places)
    union = [[0] * (count + 1) for _ in range(count + 1)]
    for i in range(count):
        for j in range(i, count):
            union[i][j + 1] = union[i][j] | masks[j]
    weights = functools.cache(weigh)
    known: dict[tuple[int, int, int], tuple[float, tuple[Any, ...]]] = {}

    def items(i: int, j: int, reached: int, whole: bool) -> tuple[float, tuple[Any, ...]]:
        """The best row of parts for places i to j; ``whole``: a single loop round all of them is allowed."""
        key = (i, j, reached)
        if whole and key in known:
            return known[key]
        best: list[tuple[float, tuple[Any, ...]]] = [(0.0, ())]
        for stop in range(i + 1, j + 1):
            options = []
            for start in range(i, stop):
                if (start, stop) == (i, j) and not whole:
                    continue
                before, row = best[start - i]
                options.append(_plus(before, row, part(start, stop, reached)))
            best.append(min(options, key=lambda option: option[0]) if options else (np.inf, ()))
        if whole:
            known[key] = best[-1]
        return best[-1]

    inner: dict[tuple[int, int], tuple[float, tuple[Any, ...]]] = {}

    def part(start: int, stop: int, reached: int) -> tuple[float, tuple[Any, ...]]:
        mask = union[start][stop]
        if mask == reached:
            return (0.0, (places[start],)) if stop - start == 1 else (np.inf, ())
        cost = weights(reached) + weights(mask)
        if stop - start == 1:
            return cost, ((places[start],),)
        if (start, stop) not in inner:
            inner[start, stop] = items(start, stop, mask, False)
        more, row = inner[start, stop]
        return cost + more, (row,)

    return items(0, count, full, True)


def _rough(masks: Sequence[int], full: int, weigh: Callable[[int], float]) -> float:
    """The reads of `_nest` with at most one loop round another, which are quick to find."""
    masks = [mask for i, mask in enumerate(masks) if mask and mask != (masks[i - 1] if i else 0)]
    least = [0.0]
    everyone = weigh(full)
    weights = [weigh(mask) for mask in masks]
    for stop in range(1, len(masks) + 1):
        own = masks[stop - 1]
        best = least[-1] + (0.0 if own == full else everyone + weights[stop - 1])
        union, each, equal = own, weights[stop - 1], 1
        for start in range(stop - 2, -1, -1):
            mask = masks[start]
            if mask | union != union:
                union |= mask
                equal = 0
            if union == full:
                break
            equal += mask == union
            each += weights[start]
            whole = weigh(union)
            inside = (stop - start - equal) * whole + each - equal * whole
            best = min(best, least[start] + everyone + whole + inside)
        least.append(best)
    return least[-1]


def _plus(before: float, row: tuple[Any, ...], more: tuple[float, tuple[Any, ...]]) -> tuple[float, tuple[Any, ...]]:
    return before + more[0], (*row, *more[1])


@functools.lru_cache(4096)
def _align(sequences: _Sequences, together: frozenset[int]) -> tuple[int, ...]:
    """A common supersequence of the ranks' branches, in which as many ranks as possible run a branch at once.

    Of the branches that some rank is to run next, that one is taken which the fewest others run later, for those would
    have to run it once more; among equals that of the most ranks.
    """
    rest, names = list(sequences), []
    while any(rest):
        heads = [sequence[0] for sequence in rest if sequence]
        ready = [head for head in heads if head not in together] or heads
        later = [sum(branch in s[1:] for s in rest if s[:1] != (branch,)) for branch in ready]
        _, _, branch = min(zip(later, (-heads.count(branch) for branch in ready), ready, strict=True))
        names.append(branch)
        rest = [sequence[sequence[:1] == (branch,) :] for sequence in rest]
    return tuple(names)


@functools.lru_cache(16384)
def _merge(code: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    """A shortest common supersequence of two."""
    common = np.zeros((len(code) + 1, len(more) + 1), np.int64).tolist()
    for i in range(len(code) - 1, -1, -1):
        for j in range(len(more) - 1, -1, -1):
            same = code[i] == more[j]
            common[i][j] = common[i + 1][j + 1] + 1 if same else max(common[i + 1][j], common[i][j + 1])
    merged, i, j = [], 0, 0
    while i < len(code) and j < len(more):
        if code[i] == more[j]:
            merged.append(code[i])
            i, j = i + 1, j + 1
        elif common[i + 1][j] >= common[i][j + 1]:
            merged.append(code[i])
            i += 1
        else:
            merged.append(more[j])
            j += 1
    return (*merged, *code[i:], *more[j:])


@functools.lru_cache(65536)
def _embed(
    code: tuple[int, ...], sequences: _Sequences, together: frozenset[int]
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """(round, place) in the code of each rank's branches, each as early as possible; together at the same for all."""
    at = [(0, -1)] * len(sequences)
    found: list[list[tuple[int, int]]] = [[] for _ in sequences]
    longest = max(map(len, sequences), default=0)

    def after(where: tuple[int, int], branch: int) -> tuple[int, int]:
        number, place = where
        rest = code[place + 1 :]
        return (number, place + 1 + rest.index(branch)) if branch in rest else (number + 1, code.index(branch))

    done = [0] * len(sequences)
    for _ in range(longest + 1):
        for rank, sequence in enumerate(sequences):
            while done[rank] < len(sequence) and sequence[done[rank]] not in together:
                at[rank] = after(at[rank], sequence[done[rank]])
                found[rank].append(at[rank])
                done[rank] += 1
        waiting = [rank for rank, sequence in enumerate(sequences) if done[rank] < len(sequence)]
        if not waiting:
            break
        assert len(waiting) == len(sequences)
        meeting = after(max(at), sequences[0][done[0]])
        for rank in waiting:
            at[rank] = meeting
            found[rank].append(meeting)
            done[rank] += 1
    return tuple(map(tuple, found))


class _Shortened(NamedTuple):
    """Ticks without most of a part that repeats itself.

    Attributes:
      kept: the ticks.
      weights: how many each stands for.
      first, stop: the repeated part, in numbers of kept ticks.
      period: its period.
      middle: before which kept tick some are missing.
      cut: how many.
    """

    kept: list[int]
    weights: np.ndarray
    first: int
    stop: int
    period: int
    middle: int
    cut: int


def _shorten(kinds: np.ndarray) -> _Shortened:
    total = len(kinds)
    length, first, period = 0, 0, 1
    for candidate in range(1, min(_LONGEST, total // 2) + 1):
        others = np.flatnonzero(kinds[:-candidate] != kinds[candidate:])
        breaks = np.array([-1, *others, total - candidate])
        widest = int(np.diff(breaks).argmax())
        found = int(breaks[widest + 1] - breaks[widest]) - 1 + candidate
        if found >= 2 * candidate and found > length + candidate:
            length, first, period = found, int(breaks[widest]) + 1, candidate
    unit = 2 * period
    cut = max(0, (length - max(_KEPT, 2 * period)) // unit * unit)
    middle = first + (length - cut) // 2 // period * period
    kept = [*range(middle), *range(middle + cut, total)]
    weights = np.ones(len(kept))
    weights[first : first + length - cut] = length / max(length - cut, 1)
    return _Shortened(kept, weights, first, first + length - cut, period, middle, cut)


def _choose(table: TickTable) -> list[_Shape]:
    """The stretches with the fewest reads for so much code, by dynamic programming over the ticks where they may begin.

    A part of the program that repeats itself is seen shortened, each of its ticks counted for several.
    """
    numbers: dict[Any, int] = {}
    kinds = [numbers.setdefault(key, len(numbers)) for key in zip(table.kinds, table.moves, strict=True)]
    short = _shorten(np.array(kinds))
    total = len(short.kept)
    limit = int(MOST_CODE * size_of_code(table.program, range(len(table.program.branches))))
    begins = _begins(short)
    best = np.full((total + 1, limit + 1), np.inf)
    best[0] = 0
    choice: list[dict[int, tuple[_Shape, int]]] = [{} for _ in range(total + 1)]
    for i, first in enumerate(begins):
        for stop in begins[i + 1 :]:
            for shape in dict.fromkeys(_candidates(table, short, first, stop)):
                code = size_of_code(table.program, [branch for code in shape.codes for branch in code])
                if code > limit:
                    continue
                reads = _weigh(table, short, shape)
                given = best[first, : limit + 1 - code] + reads
                better = given < best[stop, code:] - 1e-9
                best[stop, code:][better] = given[better]
                for c in (np.flatnonzero(better) + code).tolist():
                    choice[stop][c] = (shape, c - code)
    shapes: list[_Shape] = []
    stop, code = total, limit
    while stop:
        shape, code = choice[stop][code]
        shapes.insert(0, shape)
        stop = shape.first

    shapes = _improve(table, short, shapes, limit)

    def long(tick: int) -> int:
        return tick + short.cut * (tick > short.middle or tick == short.middle == total)

    return [shape._replace(first=long(shape.first), stop=long(shape.stop)) for shape in shapes]


def _improve(table: TickTable, short: _Shortened, shapes: list[_Shape], limit: int) -> list[_Shape]:
    """The stretches with pieces moved, added and left out one at a time, as long as that saves reads."""

    def size(code: Iterable[int]) -> int:
        return size_of_code(table.program, code)

    free = limit - sum(size(code) for shape in shapes for code in shape.codes)
    costs = [_weigh(table, short, shape) for shape in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        if shapes[i].period > 1:
            continue
        looked, better = 0, True
        while better:
            better = False
            (code,) = shapes[i].codes
            for changed in _changes(code):
                more = size(changed) - size(code)
                if more > free or looked > _MOST_LOOKS:
                    continue
                looked += 1
                shape = shapes[i]._replace(codes=(changed,))
                cost = _weigh(table, short, shape)
                if cost < costs[i] - 1e-9:
                    shapes[i], costs[i], free, better = shape, cost, free - more, True
                    break
    return shapes


def _changes(code: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The code with one piece elsewhere, one less of those that stand twice, or one more."""
    count = len(code)
    for i, branch in enumerate(code):
        rest = (*code[:i], *code[i + 1 :])
        if branch in rest:
            yield rest
        for j in range(count):
            if j != i:
                yield (*rest[:j], branch, *rest[j:])
    for branch in dict.fromkeys(code):
        for j in range(count + 1):
            yield (*code[:j], branch, *code[j:])


def _begins(short: _Shortened) -> list[int]:
    """Where stretches may begin and end: near both ends of the program and of its repeated part, and in the middle."""
    total = len(short.kept)
    ends = {0, 1, 2, 3, total - 3, total - 2, total - 1, total}
    around = {edge + step for edge in (short.first, short.stop) for step in range(-2, 3)}
    middles = {short.first // 2, (short.stop + total) // 2}
    found = {tick for tick in ends | around | middles if 0 <= tick <= total}
    return sorted(tick for tick in found if not (short.cut and short.first + 2 < tick < short.stop - 2))


def _candidates(table: TickTable, short: _Shortened, first: int, stop: int) -> Iterator[_Shape]:
    """Stretches of the kept ticks from one to another."""
    ticks, spans = short.kept[first:stop], short.cut and first < short.middle < stop
    for code in _codes(table, ticks, short.weights[first:stop]):
        yield _Shape(first, stop, 1, (code,))
    for period in range(2, min(MOST_TICKS, len(ticks) // 2) + 1):
        if len(ticks) % period == 0 and ((period % short.period == 0 == short.cut % period) or not spans):
            codes = tuple(functools.reduce(_merge, [table.names[t] for t in ticks[o::period]]) for o in range(period))
            yield _Shape(first, stop, period, codes)


def _codes(table: TickTable, ticks: list[int], weights: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Codes for rounds of one tick: fit for the most frequent ticks, or for more of them; they have all branches."""
    counts: dict[tuple[int, ...], float] = {}
    for tick, weight in zip(ticks, weights, strict=True):
        counts[table.names[tick]] = counts.get(table.names[tick], 0.0) + weight
    needed = sorted({branch for names in counts for branch in names})
    code: tuple[int, ...] = ()
    for names in sorted(counts, key=lambda names: (-counts[names], names)):
        code = _merge(code, names)
        yield (*code, *(branch for branch in needed if branch not in code))
    yield tuple(needed)


def _weigh(table: TickTable, short: _Shortened, shape: _Shape) -> float:
    """The reads of a stretch; permutes that carry nothing count as some."""
    ranks, reads = table.program.num_ranks, 0.0
    for offset, code in enumerate(shape.codes):
        numbers = range(shape.first + offset, shape.stop, shape.period)
        masks, heavy, row, weight = [0] * len(code), 0, 0, 1.0
        moved: list[tuple[int, ...]] = []
        weights: list[float] = []
        for number in numbers:
            tick, own = short.kept[number], float(short.weights[number])
            rounds, places = table.embedded(code, tick)
            for place, bits in places:
                masks[place] |= bits << row * ranks
            if own != 1:
                weight = own
                heavy |= ((1 << rounds * ranks) - 1) << row * ranks
            moved += [()] * (rounds - 1) + [table.moves[tick]]
            weights += [own] * rounds
            row += rounds

        def weigh(mask: int, heavy: int = heavy, weight: float = weight) -> float:
            return (mask & ~heavy).bit_count() + weight * (mask & heavy).bit_count()

        reads += _rough(masks, (1 << row * ranks) - 1, functools.cache(weigh)) / ranks
        reads += _groups(moved, weights)[0]
    return reads
