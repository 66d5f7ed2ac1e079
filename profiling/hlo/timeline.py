"""Simulates a scheduled program: compute runs in order, and collectives run beside it from their start on."""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Callable, Sequence

from jaxpipe.planning.chips import Achieved, Chip
from profiling.event import Event
from profiling.hlo.collective import Exchange, exchange, is_asynchronous
from profiling.hlo.cost import Cost, Times, cost, measured_us
from profiling.hlo.text import Computation, Instruction, Module

LANES = (("^send", "send"), ("^recv", "receive"))
"""Sends and receives have streams of their own on a GPU; all other collectives share one."""

_MOST_EVENTS = 200_000
_ODD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration)
_CALLS = ("while", "conditional", "call", "call-start", "async-start")  # those that start no collective themselves


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a simulation.

    Attributes:
      chip: chip to simulate.
      achieved: share of the chip's best that is reached.
      times: measured times; they count before all estimates.
      trips: (regular expression of a loop's name or of an op_name in it, how often it runs) for loops of which the
        compiler does not know; a fraction if it runs that often on average.
      lanes: (regular expression of a collective's kind, lane); what none matches is on the lane "communication".
        Collectives of one lane run one after another.
      node_size: number of devices in a node.
    """

    chip: Chip
    achieved: Achieved
    times: Times = ()
    trips: Sequence[tuple[str, float]] = ()
    lanes: Sequence[tuple[str, str]] = LANES
    node_size: int = 8

    def __post_init__(self) -> None:
        if self.node_size < 1:
            raise ValueError(f"node_size={self.node_size}: a node has at least one device")
        for pattern, count in self.trips:
            if not count >= 0:
                raise ValueError(f"trips={(pattern, count)!r}: a loop does not run less than 0 times")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A simulated collective.

    Attributes:
      start, done: positions at which its computation starts it and waits for it; done is None without a wait there.
      exchange: what it sends.
      us: microseconds that it takes.
      hidden_us: microseconds of them in which the device computes.
      is_asynchronous: whether the device goes on meanwhile.
    """

    start: int
    done: int | None
    exchange: Exchange
    us: float
    hidden_us: float
    is_asynchronous: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """A simulated computation.

    Attributes:
      computation: the computation.
      count: how often it runs in one run of the program.
      us, flops: microseconds and FLOPs of each instruction with what it calls; collectives have none.
      is_product: whether each instruction multiplies matrices, or may, if it is opaque.
      transfers: collectives of the computation.
    """

    computation: Computation
    count: float
    us: tuple[float, ...]
    flops: tuple[float, ...]
    is_product: tuple[bool, ...]
    transfers: tuple[Transfer, ...]


@dataclasses.dataclass(frozen=True)
class ProgramTimeline:
    """A simulated program.

    Attributes:
      runs: runs of every computation that the schedule reaches, the entry last.
      events: events on the lanes of device 0; of a conditional, those of the branch that takes longest.
      us: microseconds from start to end.
      compute_us: microseconds of them in which the device computes.
      notes: what was assumed.
    """

    runs: tuple[Run, ...]
    events: tuple[Event, ...]
    us: float
    compute_us: float
    notes: tuple[str, ...]


@dataclasses.dataclass
class _Clock:
    """The state of a simulation; `times` and `busy` say how long the device had computed at each edge."""

    now: float = 0.0
    times: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    busy: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    lanes: dict[str, float] = dataclasses.field(default_factory=dict)
    events: list[Event] = dataclasses.field(default_factory=list)

    def copy(self) -> _Clock:
        return _Clock(self.now, [*self.times], [*self.busy], {**self.lanes}, [*self.events])

    def advance(self, us: float, computing: float) -> None:
        if us > 0:
            self.now += us
            self.times.append(self.now)
            self.busy.append(self.busy[-1] + computing)

    def computed(self, start: float, end: float) -> float:
        """How long the device computed between two past times."""

        def until(time: float) -> float:
            i = bisect.bisect_right(self.times, time)
            if i == len(self.times):
                return self.busy[-1]
            t0, t1, b0, b1 = self.times[i - 1], self.times[i], self.busy[i - 1], self.busy[i]
            return b0 + (b1 - b0) * (time - t0) / (t1 - t0)

        return until(end) - until(start)

    def repeat(self, since: float, first_event: int, times: float) -> bool:
        """Repeats what happened since then, and returns whether the events of all repetitions were added."""
        period, computing = self.now - since, self.computed(since, self.now)
        events = self.events[first_event:]
        fits = len(self.events) + len(events) * times <= _MOST_EVENTS
        for i in range(1, int(times) + 1 if fits else 1):
            shift = i * period
            self.events += (dataclasses.replace(e, start=e.start + shift, end=e.end + shift) for e in events)
        for lane, free in self.lanes.items():
            if free > since:
                self.lanes[lane] = free + times * period
        self.advance(times * period, times * computing)
        return fits


def play(module: Module, settings: Settings) -> ProgramTimeline:
    """Simulates a module on one device, from its entry computation on.

    A collective that is started before a loop or a branch and waited for after it runs on meanwhile; nothing else
    crosses the edge of one. The longest branch of a conditional counts; `runs` holds every branch.

    Raises:
      ValueError: the module is not scheduled, so the order of its text means nothing.
    """
    if not module.is_scheduled:
        raise ValueError(
            f"module {module.name!r} is not scheduled, so the order of its text means nothing: give the text of a "
            "compiled program (`jax.jit(f).lower(...).compile().as_text()`)"
        )
    walk = _Walk(module, settings, [], {})
    clock = walk.run(module[module.entry], _Clock(), 1)
    events = tuple(sorted(clock.events, key=lambda event: event.start))
    notes = tuple(f"{text}: {_few(names)}" for text, names in walk.doubts.items())
    return ProgramTimeline(tuple(walk.runs), events, clock.now, clock.busy[-1], notes)


@dataclasses.dataclass(frozen=True)
class _Walk:
    module: Module
    settings: Settings
    runs: list[Run]
    doubts: dict[str, list[str]]  # what had to be assumed, and of which instructions

    def _doubt(self, text: str, instruction: Instruction) -> None:
        self.doubts.setdefault(text, []).append(instruction.name)

    def run(self, computation: Computation, clock: _Clock, count: float) -> _Clock:
        """One run of a computation that runs `count` times in all; returns the clock at its end."""
        us, flops, is_product = [], [], []
        transfers: dict[int, Transfer] = {}
        ends: dict[int, tuple[float, float]] = {}
        for i, instruction in enumerate(computation.instructions):
            before, spent = clock.busy[-1], Cost(0.0, 0.0, 0.0, True)
            try:
                sent = exchange(self.module, computation, instruction, self.settings.node_size)
                start = _started_at(computation, instruction)
                waits = sent is not None and not is_asynchronous(instruction)
                trips = self._trips(instruction) if instruction.opcode == "while" else 1
            except _ODD as error:
                raise _unreadable(computation, instruction, error) from error
            if sent is not None:
                ends[i] = self._transfer(clock, instruction, sent, waits)
                begin, end = ends[i]
                transfers[i] = Transfer(i, None, sent, end - begin, 0.0, not waits)
            elif start in transfers:
                clock.advance(ends[start][1] - clock.now, 0.0)
                hidden = clock.computed(*ends[start])
                transfers[start] = dataclasses.replace(transfers[start], done=i, hidden_us=hidden)
            elif instruction.opcode in _CALLS:
                clock, spent = self._called(instruction, clock, count, trips)
            else:
                spent = self._compute(computation, instruction, clock)
            us.append(clock.busy[-1] - before)
            flops.append(spent.flops)
            is_product.append(spent.flops > 0 or not spent.is_known)
        for i, transfer in transfers.items():
            if transfer.done is None and transfer.is_asynchronous:
                begin, end = ends[i]
                hidden = clock.computed(min(begin, clock.now), min(end, clock.now))
                transfers[i] = dataclasses.replace(transfer, hidden_us=hidden)
        self.runs.append(Run(computation, count, tuple(us), tuple(flops), tuple(is_product), tuple(transfers.values())))
        return clock

    def _compute(self, computation: Computation, instruction: Instruction, clock: _Clock) -> Cost:
        settings = self.settings
        try:
            spent = cost(self.module, computation, instruction, settings.chip, settings.achieved, settings.times)
        except _ODD as error:
            raise _unreadable(computation, instruction, error) from error
        if spent.us:
            kind = "GEMM" if spent.flops else "other compute"
            clock.events.append(_event("compute", clock.now, clock.now + spent.us, instruction, kind, "compute"))
        if not spent.is_known:
            self._doubt(f"of {instruction.target} kernels only the bytes are known, give their times", instruction)
        clock.advance(spent.us, spent.us)
        return spent

    def _transfer(self, clock: _Clock, instruction: Instruction, sent: Exchange, waits: bool) -> tuple[float, float]:
        """When a collective begins and ends; one that the device waits for holds it up."""
        settings = self.settings
        measured = measured_us(instruction, settings.times)
        us = sent.us(settings.chip, settings.achieved) if measured is None else measured
        lane = next((lane for pattern, lane in settings.lanes if re.search(pattern, sent.kind)), "communication")
        begin = max(clock.now, clock.lanes.get(lane, 0.0))
        clock.lanes[lane] = begin + us
        if us:
            clock.events.append(_event(lane, begin, begin + us, instruction, sent.kind, "transfer"))
        if waits:
            clock.advance(begin + us - clock.now, 0.0)
        return begin, begin + us

    def _called(self, instruction: Instruction, clock: _Clock, count: float, trips: float) -> tuple[_Clock, Cost]:
        """Runs what an instruction calls, a loop `trips` times; returns the clock after it, and its products."""
        called = self.module.called(instruction)
        first_run = len(self.runs)
        if instruction.opcode == "conditional":
            self._doubt("of conditionals the branch that takes longest counts", instruction)
            ends = [self.run(branch, clock.copy(), count) for branch in called]
            return max(ends, key=lambda end: end.now), self._products(first_run, called, max)
        since, first_event = clock.now, len(clock.events)
        once = clock.copy() if trips < 1 else clock
        for computation in called:
            once = self.run(computation, once, count * trips)
        if trips < 1:  # too seldom to be drawn
            clock.advance(trips * (once.now - since), trips * once.computed(since, once.now))
            once = clock
        elif trips > 1 and not once.repeat(since, first_event, trips - 1):
            self._doubt("of long loops only the first iteration is in the trace", instruction)
        return once, self._products(first_run, called, lambda flops: trips * sum(flops))

    def _trips(self, loop: Instruction) -> float:
        if loop.trip_count is not None:
            return loop.trip_count
        labels = [inner.op_name for called in self.module.called(loop) for inner in called.instructions]
        for pattern, trips in self.settings.trips:
            if any(re.search(pattern, label) for label in (loop.name, *labels)):
                return trips
        self._doubt("loops that may run any number of times count as running once", loop)
        return 1

    def _products(self, first_run: int, called: Sequence[Computation], total: Callable[[list[float]], float]) -> Cost:
        """The products of the computations that just ran; is_known is False if there may be more."""
        names = {computation.name for computation in called}
        runs = [run for run in self.runs[first_run:] if run.computation.name in names]
        return Cost(0.0, total([sum(run.flops) for run in runs]), 0.0, not any(any(run.is_product) for run in runs))


def _unreadable(computation: Computation, instruction: Instruction, error: Exception) -> ValueError:
    return ValueError(
        f"{instruction.opcode} {instruction.name!r} in computation {computation.name!r} has attributes that cannot be "
        f"read ({type(error).__name__}: {error}): the text is damaged, or its XLA prints them in a new way"
    )


def _few(names: Sequence[str], most: int = 4) -> str:
    names = list(dict.fromkeys(names))
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _started_at(computation: Computation, instruction: Instruction) -> int:
    """The instruction that started what this one waits for; -1 if it waits for none."""
    if not instruction.opcode.endswith(("-done", "-update")):
        return -1
    start = instruction
    while start.opcode.endswith(("-done", "-update")) and start.operands:
        start = computation[start.operands[0]]
    return computation.index[start.name] if instruction.opcode.endswith("-done") else -1


def _event(lane: str, start: float, end: float, instruction: Instruction, kind: str, group: str) -> Event:
    name = instruction.name
    return Event(0, lane, start, end, name, hlo_op=name, scope=instruction.op_name, kind=kind, group=group)
