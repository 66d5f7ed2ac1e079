"""Finds the calls of collectives, and matches calls on several devices that are one collective."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

from profiling.event import Event
from profiling.metrics.intervals import length, spans_of

SYNCHRONISING = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "barrier")
"""Kinds that cannot end on one rank before the last rank of the group has begun: each rank needs data of all."""

POINT_TO_POINT = ("send", "receive", "recv", "permute", "collective-permute", "coalesced")
"""How kinds begin that do not involve the whole group. The n-th ones of two ranks need not belong together."""

_Described: TypeAlias = tuple[int, str, tuple[int, ...] | None, int | None]
"""A device, and the name, ranks and size of a process group as its profile describes them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """A process group, as the profiler describes it.

    Attributes:
      name: name of the group; "" if it is unknown or differs between ranks.
      ranks: members in order; None if unknown.
      size: number of ranks; None if unknown.
    """

    name: str
    ranks: tuple[int, ...] | None
    size: int | None

    @property
    def label(self) -> str:
        """A label for people: the ranks if they are known, otherwise the name or the size.

        >>> Group("7", tuple(range(0, 64, 8)), 8).label, Group("tp", None, 4).label, Group("", (3, 5), 2).label
        ('7 (ranks 0-56 by 8)', 'tp (4 ranks)', 'ranks 3, 5')
        """
        if self.ranks is not None:
            members = f"ranks {ranges(self.ranks)}"
        else:
            members = "" if self.size is None else f"{self.size} rank{'s' * (self.size != 1)}"
        return f"{self.name} ({members})" if self.name and members else self.name or members or "unknown"


def ranges(numbers: Sequence[int]) -> str:
    """A short text for a list of numbers.

    >>> ranges((0, 1, 2, 3)), ranges((0, 2)), ranges((5,)), ranges((1, 5, 9)), ranges((0, 1, 4))
    ('0-3', '0, 2', '5', '1-9 by 4', '0, 1, 4')
    """
    strides = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 2 and len(strides) == 1:
        (stride,) = strides
        return f"{numbers[0]}-{numbers[-1]}" + (f" by {stride}" if stride != 1 else "")
    shown = [str(number) for number in numbers]
    return ", ".join([*shown[:8], "...", shown[-1]] if len(shown) > 9 else shown)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One collective on one device.

    Attributes:
      device: index of the device.
      kind: "all-reduce" and so on, as in `Collective.kind`.
      group: process group.
      start, end: first start and last end of the kernels, in microseconds.
      time: microseconds with any of the kernels.
      sent, received: bytes of the input and of the output on this rank; None if unknown.
      sequence: number of the collective within its group; None if unknown.
      step: number of the step that launched it; None if unknown.
      group_of_time: "transfer" or "wait", as in `Event.group` of the first kernel.
    """

    device: int
    kind: str
    group: Group
    start: float
    end: float
    time: float
    sent: int | None
    received: int | None
    sequence: int | None
    step: int | None
    group_of_time: str

    @property
    def bytes(self) -> int | None:
        """The size S that NCCL's tests divide by the time; None if unknown.

        It is the whole array for an all-gather, a reduce-scatter and an all-to-all, otherwise the input of a rank.
        Source: NVIDIA/nccl-tests, doc/PERFORMANCE.md.
        """
        if self.kind in ("all-gather", "gather"):
            whole, part = self.received, self.sent
        elif self.kind in ("reduce-scatter", "scatter"):
            whole, part = self.sent, self.received
        else:
            return max((size for size in (self.sent, self.received) if size is not None), default=None)
        # Only the root of a gather or a scatter has the whole array; elsewhere it is None or empty.
        return part * self.group.size if not whole and part is not None and self.group.size else whole


def has_group(event: Event) -> bool:
    """Whether the profiler says which process group an event belongs to."""
    of = event.collective
    return of is not None and bool(of.group or of.ranks is not None)


def calls(events: Iterable[Event]) -> list[Call]:
    """The collectives of a trace in the order of their starts on each device.

    Kernels that follow one another on a device with the same group, kind and sequence number are one call. Its bytes
    are those of each kernel if all are equal, otherwise the sum, as they are parts that were sent together.

    >>> from profiling.event import Collective
    >>> of = Collective("all-reduce", "dp", (0, 1), 2, sent=1 << 20, received=1 << 20, sequence=5)
    >>> halves = [Event(0, "20", t, t + 4.0, "nccl", group="transfer", collective=of) for t in (0.0, 2.0)]
    >>> other = Event(0, "20", 8.0, 9.0, "nccl", group="transfer", collective=dataclasses.replace(of, sequence=6))
    >>> [(call.start, call.end, call.time, call.bytes) for call in calls([*halves, other])]
    [(0.0, 6.0, 6.0, 1048576), (8.0, 9.0, 1.0, 1048576)]
    """
    # Long lists of ranks are slow to look up: first by which list it is, then by what is in it.
    same: dict[tuple[int, str, int, int | None], list[Event]] = {}
    for event in events:
        of = event.collective
        if of is not None and event.group not in ("compute", "control"):
            same.setdefault((event.device, of.group, id(of.ranks), of.size), []).append(event)
    lists: dict[_Described, list[Event]] = {}
    for members in same.values():
        of = members[0].collective
        assert of is not None
        lists.setdefault((members[0].device, of.group, of.ranks, of.size), []).extend(members)
    groups = _groups(lists)
    found: list[Call] = []
    for what, members in lists.items():
        device, group = what[0], groups[what]
        members.sort(key=lambda event: (event.start, event.end))
        # A number that never changes is no sequence number.
        numbered = len({event.collective.sequence for event in members if event.collective}) > 1
        parts: dict[str, tuple[int, list[Event]]] = {}
        for event in members:
            of = event.collective
            assert of is not None
            sequence = of.sequence if numbered else None
            last = parts.get(of.kind)
            if last is not None and sequence is not None and last[0] == sequence:
                last[1].append(event)
                continue
            if last is not None:
                found.append(_call(device, group, last[1], numbered))
            parts[of.kind] = (-1 if sequence is None else sequence, [event])
        found += [_call(device, group, last[1], numbered) for last in parts.values()]
    found.sort(key=lambda call: (call.start, call.device))
    return found


def _groups(described: Collection[_Described]) -> dict[_Described, Group]:
    """Process groups by their ranks, and also by name if a device has several names for these ranks."""
    names: dict[tuple[int, ...], dict[int, set[str]]] = {}
    for device, name, ranks, _ in described:
        if ranks is not None:
            names.setdefault(tuple(sorted(ranks)), {}).setdefault(device, set()).add(name)
    groups = {}
    for what in described:
        _, name, ranks, size = what
        ordered = None if ranks is None else tuple(sorted(ranks))
        of = {} if ordered is None else names[ordered]
        if len(set[str]().union(*of.values())) > 1 and all(len(each) == 1 for each in of.values()):
            name = ""
        groups[what] = Group(name, ordered, size or (len(ordered) if ordered else None))
    return groups


def _call(device: int, group: Group, events: Sequence[Event], numbered: bool) -> Call:
    first = events[0].collective
    assert first is not None
    single = len(events) == 1
    facts = {(of.sent, of.received): None for event in events if (of := event.collective)}
    return Call(
        device=device,
        kind=first.kind,
        group=group,
        start=events[0].start,
        end=events[0].end if single else max(event.end for event in events),
        time=events[0].end - events[0].start if single else length(spans_of(events)),
        sent=first.sent if single else _added(sent for sent, _ in facts),
        received=first.received if single else _added(received for _, received in facts),
        sequence=first.sequence if numbered else None,
        step=events[0].step,
        group_of_time=events[0].group,
    )


def _added(numbers: Iterable[int | None]) -> int | None:
    known = list(numbers)
    return None if None in known else sum(n for n in known if n is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class MatchedCollective:
    """A collective on several devices.

    Attributes:
      group: process group of all calls.
      calls: one call for each device of the group in the trace, in the order of the devices.
    """

    group: Group
    calls: tuple[Call, ...]

    @property
    def kind(self) -> str:
        """The kind of all calls."""
        return self.calls[0].kind

    def lies_in(self, window: tuple[float, float] | None) -> bool:
        """Whether the collective begins and ends within a window on every device."""
        return window is None or all(window[0] <= call.start and call.end <= window[1] for call in self.calls)


def match_calls(found: Sequence[Call]) -> tuple[list[MatchedCollective], list[str]]:
    """Matches calls on several devices that are one collective, with notes on what could not be matched.

    Such calls have the same process group and kind. They also have the same sequence number, or they are the n-th of
    their kind in the group on each device, and in their step if all calls know it. Counting needs equally many calls on
    every device and, for an all-reduce, an all-gather or a reduce-scatter, n-th calls of equal size.

    >>> def one(device, start, ranks):
    ...     return Call(device, "all-reduce", Group("", ranks, 2), start, start + 5, 5, 8, 8, None, None, "transfer")
    >>> [len(row.calls) for row in match_calls([one(0, 0.0, (0, 1)), one(1, 2.0, (0, 1))])[0]]
    [2]
    >>> match_calls([one(0, 0.0, (0, 2)), one(1, 2.0, (1, 3))])[0]
    []
    """
    matched: list[MatchedCollective] = []
    notes: list[str] = []
    groups: dict[Group, list[Call]] = {}
    for call in found:
        if call.group.name or call.group.ranks is not None:
            groups.setdefault(call.group, []).append(call)
    for group, members in groups.items():
        by_device: dict[int, dict[str, list[Call]]] = {}
        for call in members:
            by_device.setdefault(call.device, {}).setdefault(call.kind, []).append(call)
        devices = sorted(by_device)
        if len(devices) < 2:
            continue
        for kind in dict.fromkeys(call.kind for call in members):
            if kind.startswith(POINT_TO_POINT):
                continue
            rows = [by_device[device].get(kind, []) for device in devices]
            together, note = _together(rows)
            if note:
                counts = ", ".join(f"{len(row)} on device {device}" for device, row in zip(devices, rows, strict=True))
                notes.append(f"{kind} in group {group.label}: {note} ({counts})")
            matched += [MatchedCollective(group, row) for row in together]
    matched.sort(key=lambda row: row.calls[0].start)
    return matched, notes


def _together(rows: Sequence[Sequence[Call]]) -> tuple[list[tuple[Call, ...]], str]:
    if all(call.sequence is not None for row in rows for call in row):
        numbers = [{call.sequence: call for call in row} for row in rows]
        if all(len(of) == len(row) for of, row in zip(numbers, rows, strict=True)):
            common = set.intersection(*(set(of) for of in numbers))
            missing = max(len(row) for row in rows) - len(common)
            note = f"{missing:,} are not on every device, as the profiles do not begin and end together"
            return [tuple(of[n] for of in numbers) for n in numbers[0] if n in common], note if missing else ""
    if any(call.step is None for row in rows for call in row):
        return _in_order(rows)
    steps: dict[int | None, list[list[Call]]] = {}
    for place, row in enumerate(rows):
        for call in row:
            steps.setdefault(call.step, [[] for _ in rows])[place].append(call)
    parts = [_in_order(part) for part in steps.values()]
    doubts = [note for _, note in parts if note]
    note = f"in {len(doubts):,} of {len(steps):,} steps {doubts[0]}" if doubts else ""
    return [calls_of_one for part, _ in parts for calls_of_one in part], note


def _in_order(rows: Sequence[Sequence[Call]]) -> tuple[list[tuple[Call, ...]], str]:
    if len({len(row) for row in rows}) > 1:
        return [], "the devices have different numbers of them, and none says which belong together"
    together = list(zip(*rows, strict=True))
    if together and together[0][0].kind in ("all-reduce", "all-gather", "reduce-scatter"):
        for calls_of_one in together:
            if len({call.bytes for call in calls_of_one}) > 1:
                return [], "the n-th on each device are of different sizes, so that they do not belong together"
    return together, ""
