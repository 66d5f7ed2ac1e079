"""How long the actions of a pipeline take and how its ranks run them, from the work found in its traced step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from jaxpipe.api import Pipeline
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.mesh import Network
from jaxpipe.planning.work import DeviceWork, Works
from jaxpipe.schedule.action import Group, Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts, Timeline, simulate

Runs = Mapping[tuple[str, int], int]
"""How often a rank runs an action of a kind of stage, or an end as one of kind 0: by letter and kind."""


def stage_costs(
    pipeline: Pipeline,
    found: Works,
    given: Costs | StageCosts | None,
    chip: Chip,
    achieved: Achieved,
    network: Network,
) -> StageCosts:
    """Seconds of each stage's actions, of messages, and of the ends; those that are given in place of found ones.

    Raises:
      ValueError: costs of another number of stages.
    """
    num_stages = pipeline.program.schedule.num_stages
    if isinstance(given, StageCosts):
        if len(given.stages) != num_stages:
            raise ValueError(f"costs are of {len(given.stages)} stages, the pipeline has {num_stages}: give each one's")
        return given
    seconds = {letter: _seconds(work, chip, achieved, network) for letter, work in found.ends.items()}
    ends = dict(embed=seconds.get("E", 0.0), embed_grad=seconds.get("G", 0.0), head=seconds.get("H", 0.0))
    if given is not None:
        return StageCosts((dataclasses.replace(given, p2p=0.0),) * num_stages, given.p2p, **ends)
    kinds = [_costs(works, chip, achieved, network) for works in found.kinds]
    p2p = sum(network.seconds("permute", [pipeline.axes.pipeline], size) for size in found.boundary)
    return StageCosts(tuple(kinds[kind] for kind in found.kind_of), p2p, **ends)


def longest(costs: StageCosts) -> Costs:
    """Of each action the stage's that takes longest, and of a message."""
    each = costs.stages
    whole, paired = (any(getattr(c, name) is not None for c in each) for name in ("backward", "overlapped"))
    return Costs(
        forward=max(c.forward for c in each),
        backward_input=max(c.backward_input for c in each),
        weight=max(c.weight for c in each),
        backward=max(c.of(Kind.B) for c in each) if whole else None,
        overlapped=max(c.group((Kind.F, Kind.B)) for c in each) if paired else None,
        p2p=costs.p2p,
    )


def timeline(pipeline: Pipeline, costs: StageCosts) -> Timeline:
    """The schedule with these costs, of a forward pass its forwards alone; without ends that all ranks share."""
    program = pipeline.program
    if program.shared_ends:
        costs = dataclasses.replace(costs, embed=0.0, embed_grad=0.0, head=0.0)
    return simulate(_forwards(program.schedule) if program.forward_only else program.schedule, costs)


def seconds_of_shared_ends(pipeline: Pipeline, costs: StageCosts) -> float:
    """What ends add to a step where all ranks run them together: nothing hides them."""
    if not pipeline.program.shared_ends:
        return 0.0
    count = pipeline.program.schedule.num_microbatches
    return count * (costs.embed + costs.embed_grad) + count * costs.head


def _seconds(work: DeviceWork, chip: Chip, achieved: Achieved, network: Network) -> float:
    return work.compute(chip, achieved) + work.communicate(network) + work.exposed(chip, achieved, network)


def _costs(actions: Mapping[str, DeviceWork], chip: Chip, achieved: Achieved, network: Network) -> Costs:
    """Seconds of each action of a kind of stage.

    A forward and a backward that overlap take as long as their kernels, which collectives beside them slow down, or as
    their collectives, or as what goes to the host's memory or comes from there, whichever is longest; other actions
    take the sum of kernels and collectives, and what these do not hide of transfers.
    """
    total = {letter: _seconds(work, chip, achieved, network) for letter, work in actions.items()}
    pair = None
    if "B" in total:
        both = [actions.get(letter, DeviceWork()) for letter in "FB"]
        pair = max(_pair(both, chip, achieved, network), *_both_ways(both, chip, achieved))
    # A schedule whose backward is always whole has no halves; then W is nothing of it.
    return Costs(
        forward=total.get("F", 0.0),
        backward_input=total.get("I", total.get("B", 0.0)),
        weight=total.get("W", 0.0),
        backward=total.get("B"),
        overlapped=pair,
    )


def _pair(both: Sequence[DeviceWork], chip: Chip, achieved: Achieved, network: Network) -> float:
    """Seconds of kernels and collectives that overlap."""
    computes = sum(work.compute(chip, achieved) for work in both)
    communicates = sum(work.communicate(network) for work in both)
    return max(computes + achieved.occupied * communicates, communicates)


def _both_ways(works: Sequence[DeviceWork], chip: Chip, achieved: Achieved) -> tuple[float, float]:
    """Seconds that the link to the host is busy: to it, and from it."""
    ways = [work.transfer(chip, achieved) for work in works]
    return sum(there for there, _ in ways), sum(back for _, back in ways)


def _forwards(schedule: Schedule) -> Schedule:
    """The schedule's forwards alone."""
    ranks = tuple(
        tuple(group for group in (tuple(a for a in group if a.kind is Kind.F) for group in groups) if group)
        for groups in schedule.ranks
    )
    return dataclasses.replace(schedule, ranks=ranks)


def count_runs(pipeline: Pipeline, found: Works, simulated: Timeline) -> list[Runs]:
    """How often each rank runs each action of a stage, the embedding E, its gradient G and the head H."""
    schedule, shared = pipeline.program.schedule, pipeline.program.shared_ends
    runs: list[collections.Counter[tuple[str, int]]] = [collections.Counter() for _ in range(schedule.num_ranks)]
    for rank, events in enumerate(simulated.events):
        for event in events:
            runs[rank].update((action.kind.value, found.kind_of[action.stage]) for action in event.group)
    for microbatch in range(schedule.num_microbatches):
        for letter, stage in (("E", 0), ("G", 0), ("H", schedule.num_stages - 1)):
            holders = range(schedule.num_ranks) if shared else [schedule.rank_of(stage, microbatch)]
            for rank in holders:
                runs[rank][letter, 0] += 1
    return [*runs]


def transfers(
    found: Works, simulated: Timeline, chip: Chip, achieved: Achieved, network: Network
) -> tuple[tuple[float, float, float], ...]:
    """Of each rank (seconds to the host, seconds from it, seconds of both that nothing hides) in a step."""
    given = chip, achieved, network

    def of(group: Group) -> tuple[float, float, float]:
        works = [found.of(action.kind.value, found.kind_of[action.stage]) for action in group]
        there, back = _both_ways(works, chip, achieved)
        if [action.kind for action in group] == [Kind.F, Kind.B]:
            return there, back, max(0.0, max(there, back) - _pair(works, *given))
        return there, back, sum(work.exposed(*given) for work in works)

    def total(spent: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
        there, back, exposed = (sum(each) for each in zip(*spent, strict=True))
        return there, back, exposed

    known = {event.group: of(event.group) for events in simulated.events for event in events}
    return tuple(total([known[event.group] for event in events]) for events in simulated.events)


def step_flops(
    pipeline: Pipeline, found: Works, runs: Sequence[Runs], others: int, *, frozen: bool
) -> tuple[float, float]:
    """(FLOPs of a step on all devices as the model needs them, those that the devices run).

    Args:
      pipeline: gives who runs the ends.
      found: the work of one run of each action.
      runs: how often each rank runs each.
      others: devices that do what a rank does, each on its part.
      frozen: whether some floating parameters have no gradient.
    """
    # Backward takes two products for each of forward; a head computes both at once.
    factors = {"F": 1, "E": 1, "H": 1} if pipeline.program.forward_only else {"F": 3, "E": 3, "H": 1}
    if frozen:  # one product of these two, and what else the backward has is all that the model needs
        factors = dict.fromkeys("FEHBIWG", 1)
    executed = flops = 0.0
    for counts in runs:
        for (letter, kind), count in counts.items():
            work = found.of(letter, kind)
            executed += count * work.flops * others
            if pipeline.program.shared_ends and letter in "EH":  # all ranks run the same one together
                flops += count / len(runs) * factors[letter] * work.model_flops(len(runs)) * others
            else:
                flops += count * factors.get(letter, 0) * work.model_flops() * others
    return flops, executed


def uncounted(found: Works, runs: Sequence[Runs]) -> tuple[tuple[str, float], ...]:
    """(kernel whose FLOPs no rule knows, times a step on the device that runs it most)."""
    most: dict[str, float] = {}
    for counts in runs:
        here: dict[tuple[str, str], float] = {}
        for (letter, kind), count in counts.items():
            for name, times in found.of(letter, kind).unknown:
                here[letter, name] = here.get((letter, name), 0.0) + count * times
        for (_, name), times in here.items():
            most[name] = max(most.get(name, 0.0), times)
    return tuple(most.items())


def best_rate(found: Works, chip: Chip) -> float:
    """FLOP/s of what multiplies in most of the kernels."""
    units = [kernel.unit for work in found.actions.values() for kernel in work.kernels if kernel.unit]
    return chip.flops(max(sorted(set(units)), key=units.count)) if units else chip.bf16
