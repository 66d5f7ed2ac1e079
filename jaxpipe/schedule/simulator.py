"""How long a schedule takes and what it holds, if every rank runs as soon as its inputs have arrived."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.dependencies import inputs
from jaxpipe.schedule.schedule import Schedule


def _check_time(owner: str, name: str, value: float) -> None:
    """Raises ValueError unless a time is one."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{owner}({name}={value!r}): a time is a finite number, not negative")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Times of one stage on one microbatch, in any unit.

    Attributes:
      forward, backward_input, weight: times of F, I and W.
      backward: time of a whole B; default I + W.
      overlapped: time of an overlapped F and B; default F + B, no gain.
      p2p: latency of a transfer between two ranks.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    weight: float = 1.0
    backward: float | None = None
    overlapped: float | None = None
    p2p: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _check_time("Costs", field.name, value)

    def of(self, kind: Kind) -> float:
        """The time of one action."""
        if kind is Kind.B:
            return self.backward_input + self.weight if self.backward is None else self.backward
        return {Kind.F: self.forward, Kind.I: self.backward_input, Kind.W: self.weight}[kind]

    def group(self, kinds: Sequence[Kind]) -> float:
        """The time of a group of actions that one rank runs together.

        >>> Costs(forward=1, backward=2, overlapped=2.5).group((Kind.F, Kind.B))
        2.5
        """
        if tuple(kinds) == (Kind.F, Kind.B) and self.overlapped is not None:
            return self.overlapped
        return sum(self.of(kind) for kind in kinds)

    @property
    def pair_share(self) -> float:
        """What an overlapped F and B take, as a share of both apart.

        >>> Costs(forward=1, backward=2, overlapped=2.25).pair_share
        0.75
        """
        apart = self.forward + self.of(Kind.B)
        return 1.0 if self.overlapped is None or not apart else self.overlapped / apart


@dataclasses.dataclass(frozen=True)
class StageCosts:
    """Times of stages that differ, on one microbatch, in any unit.

    The embedding runs right before the first stage's F and its gradient right after that stage's B or I, the head right
    after the last stage's F; each is on the rank of its stage and overlaps nothing.

    Attributes:
      stages: ``[num_stages]``, the times of each, without transfers.
      p2p: latency of a transfer between two ranks.
      embed, embed_grad, head: times of the ends.

    Raises:
      ValueError: a time that is not finite or negative; a stage with a latency of its own.

    >>> from jaxpipe.schedule.builders.one_f_one_b import one_f_one_b
    >>> slow, fast = Costs(3, 3, 3), Costs(1, 1, 1)
    >>> simulate(one_f_one_b(2, 4), StageCosts((slow, fast), head=2)).bubble
    (2.0, 18.0)
    """

    stages: tuple[Costs, ...]
    p2p: float = 0.0
    embed: float = 0.0
    embed_grad: float = 0.0
    head: float = 0.0

    def __post_init__(self) -> None:
        for name in ("p2p", "embed", "embed_grad", "head"):
            _check_time("StageCosts", name, getattr(self, name))
        for stage, costs in enumerate(self.stages):
            if costs.p2p:
                raise ValueError(
                    f"stage {stage} has p2p={costs.p2p!r}: transfers are the same between all ranks, so pass "
                    "StageCosts(stages, p2p=...) and leave it out of each stage's Costs"
                )

    def group(self, group: Group) -> float:
        """The time of a group of actions that one rank runs together, with the ends that go with them.

        A forward of one stage that overlaps a backward of another is shorter than the two apart by what each would be
        in a pair of its own stage.

        >>> costs = StageCosts((Costs(2, 2, 2, overlapped=3), Costs(1, 1, 1)))
        >>> costs.group((Action(0, Kind.F, 4), Action(1, Kind.B, 0)))  # half of 2, and 2
        3.0
        """
        kinds, costs = [action.kind for action in group], [self.stages[action.stage] for action in group]
        if all(each == costs[0] for each in costs):
            time = costs[0].group(kinds)
        else:
            share = [each.pair_share if kinds == [Kind.F, Kind.B] else 1.0 for each in costs]
            time = sum(each.of(kind) * part for each, kind, part in zip(costs, kinds, share, strict=True))
        return time + sum(map(self._ends, group))

    def _ends(self, action: Action) -> float:
        """The time of the ends that go with an action."""
        if action.kind is Kind.F:
            return self.embed * (action.stage == 0) + self.head * (action.stage == len(self.stages) - 1)
        return self.embed_grad * (action.stage == 0 and action.kind is not Kind.W)


@dataclasses.dataclass(frozen=True)
class TimedGroup:
    """One group on one rank, from start to end in the unit of the costs."""

    rank: int
    start: float
    end: float
    group: Group


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When every group runs.

    Attributes:
      schedule: what was simulated.
      costs: with which times, the same for all stages or each stage's.
      events: ``[num_ranks][groups]``.
    """

    schedule: Schedule
    costs: Costs | StageCosts
    events: tuple[tuple[TimedGroup, ...], ...]

    @property
    def makespan(self) -> float:
        """End of the last event."""
        return max(event.end for events in self.events for event in events)

    @property
    def busy(self) -> tuple[float, ...]:
        """``[num_ranks]``: time each rank works."""
        return tuple(sum(event.end - event.start for event in events) for events in self.events)

    @property
    def bubble(self) -> tuple[float, ...]:
        """``[num_ranks]``: time each rank is idle before the last event of all ends."""
        return tuple(self.makespan - busy for busy in self.busy)

    @functools.cached_property
    def peak_live(self) -> tuple[int, ...]:
        """``[num_ranks]``: most stashes held at once, each from the start of F to the end of B or W."""
        return tuple(_peak(groups, (Kind.F,), (Kind.B, Kind.W)) for groups in self.schedule.ranks)

    @functools.cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """``[num_ranks]``: the same, but until the end of B or I."""
        return tuple(_peak(groups, (Kind.F,), (Kind.B, Kind.I)) for groups in self.schedule.ranks)

    @functools.cached_property
    def peak_pending_weight(self) -> tuple[int, ...]:
        """``[num_ranks]``: most weight gradients put off at once, each from the start of I to the end of W."""
        return tuple(_peak(groups, (Kind.I,), (Kind.W,)) for groups in self.schedule.ranks)


def simulate(schedule: Schedule, costs: Costs | StageCosts = Costs()) -> Timeline:
    """Runs each rank's groups in order, each as soon as its inputs have arrived.

    Args:
      schedule: what each rank runs.
      costs: how long it takes: `Costs` where stages are alike, `StageCosts` where they differ.

    Raises:
      ValueError: the schedule deadlocks; `jaxpipe.schedule.check` shows where. Costs of another number of stages.

    >>> from jaxpipe.schedule.builders.dualpipe import dualpipe
    >>> simulate(dualpipe(8, 20)).bubble[0], simulate(dualpipe(8, 20)).peak_live[0]
    (6.0, 9)
    """
    if isinstance(costs, StageCosts) and len(costs.stages) != schedule.num_stages:
        raise ValueError(
            f"StageCosts of {len(costs.stages)} stages for schedule {schedule.name!r} of {schedule.num_stages}: "
            "give the Costs of each"
        )
    ends: dict[Action, float] = {}
    events: list[list[TimedGroup]] = [[] for _ in schedule.ranks]
    progress = True
    while progress:
        progress = False
        for rank, groups in enumerate(schedule.ranks):
            for group in groups[len(events[rank]) :]:
                arrival = _arrival(schedule, costs, ends, rank, group)
                if arrival is None:
                    break
                start = max(arrival, events[rank][-1].end if events[rank] else 0.0)
                end = start + duration(costs, group)
                ends.update((action, end) for action in group)
                events[rank].append(TimedGroup(rank, start, end, group))
                progress = True
    if any(len(done) < len(groups) for done, groups in zip(events, schedule.ranks, strict=True)):
        raise ValueError(f"schedule {schedule.name!r} deadlocks; jaxpipe.schedule.check(schedule) shows where")
    return Timeline(schedule, costs, tuple(map(tuple, events)))


def closed_form_bubble(name: str, num_ranks: int, costs: Costs = Costs()) -> float:
    """The published bubble of a rank: DeepSeek's README, PP being ``num_ranks`` (twice that for DualPipeV).

    The simulated bubble equals it, transfers taking no time: for gpipe and 1f1b at any costs; for zb1p with at least
    as many microbatches as ranks, while W is no longer than F or I; for dualpipe and dualpipev while W <= F = I and
    an overlapped pair takes no less than B. Where overlap gains time, ranks differ in how many pairs they overlap,
    and the form is the largest of their bubbles.

    Raises:
      ValueError: a schedule without a published form.

    >>> closed_form_bubble("dualpipe", 8), closed_form_bubble("1f1b", 8)
    (6.0, 21.0)
    """
    forward, backward, weight = costs.of(Kind.F), costs.of(Kind.B), costs.weight
    pair = costs.group((Kind.F, Kind.B))
    forms = {
        "gpipe": (num_ranks - 1) * (forward + backward),
        "1f1b": (num_ranks - 1) * (forward + backward),
        "zb1p": (num_ranks - 1) * (forward + backward - 2 * weight),
        "dualpipe": (num_ranks / 2 - 1) * (pair + backward - 3 * weight),
        "dualpipev": (num_ranks - 1) * (pair + backward - 3 * weight),
    }
    if name not in forms:
        raise ValueError(f"no closed form for schedule {name!r}; there is one for {', '.join(forms)}")
    return forms[name]


def duration(costs: Costs | StageCosts, group: Group) -> float:
    """The time of a group of actions that one rank runs together."""
    return costs.group(group) if isinstance(costs, StageCosts) else costs.group([action.kind for action in group])


def _arrival(
    schedule: Schedule, costs: Costs | StageCosts, ends: dict[Action, float], rank: int, group: Group
) -> float | None:
    """When the last input of a group from outside it is there; None while one has not run."""
    latest = 0.0
    for action in group:
        for options in inputs(schedule, action):
            if any(option in group for option in options):
                continue
            ran = next((option for option in options if option in ends), None)
            if ran is None:
                return None
            away = schedule.rank_of(ran.stage, ran.microbatch) != rank
            latest = max(latest, ends[ran] + costs.p2p * away)
    return latest


def _peak(groups: tuple[Group, ...], opening: tuple[Kind, ...], closing: tuple[Kind, ...]) -> int:
    live = peak = 0
    for group in groups:
        live += sum(action.kind in opening for action in group)
        peak = max(peak, live)
        live -= sum(action.kind in closing for action in group)
    return peak
