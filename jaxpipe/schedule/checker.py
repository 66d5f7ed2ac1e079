"""Whether a schedule can run and computes everything once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.dependencies import Tokens, inputs
from jaxpipe.schedule.schedule import Schedule

Place = tuple[int, int]
"""(rank, position of a group in the rank's order)."""

Positions = Mapping[Action, int]
"""The position of each action's group in the order of its rank."""


def check(schedule: Schedule) -> None:
    """Raises ValueError, showing the grid with the bad groups marked, unless the schedule is sound.

    Sound: groups are one action or a forward with a backward; every stage runs for every microbatch, on the rank
    that the routes say, exactly one F and either one B or one I and one W, in that order; no rank waits for ever.

    >>> from jaxpipe.schedule.builders.gpipe import gpipe
    >>> check(gpipe(2, 2))
    """
    where = _check_groups(schedule)
    _check_complete(schedule, where)
    positions = _run(schedule)
    if any(position < len(groups) for position, groups in zip(positions, schedule.ranks, strict=True)):
        _check_order(schedule, where)
        _fail_deadlock(schedule, positions)


def _text(group: Group) -> str:
    return "&".join(map(str, group))


def _fail(schedule: Schedule, message: str, *marked: Place) -> None:
    raise ValueError(f"schedule {schedule.name!r}: {message}\n{schedule.grid(marked)}")


def _check_groups(schedule: Schedule) -> Positions:
    """Where each action is; fails on malformed groups, unknown stages or microbatches, wrong ranks, duplicates."""
    directions = len(schedule.routes)
    if not directions or schedule.num_microbatches < 1 or schedule.num_microbatches % directions:
        _fail(schedule, f"{schedule.num_microbatches} microbatches do not divide into {directions} directions")
    for route in schedule.routes:
        if len(route) != schedule.num_stages or not set(route) <= set(range(schedule.num_ranks)):
            _fail(schedule, f"route {route} must name one of {schedule.num_ranks} ranks for each stage")
    alone = {(kind,) for kind in Kind}
    pairs = {(Kind.F, Kind.B), (Kind.F, Kind.I)}
    ranks_of = [schedule.routes[schedule.direction(m)] for m in range(schedule.num_microbatches)]
    where: dict[Action, int] = {}
    for rank, groups in enumerate(schedule.ranks):
        for position, group in enumerate(groups):
            kinds = tuple([action[1] for action in group])
            if kinds not in alone and kinds not in pairs:
                _fail(
                    schedule,
                    f"group {_text(group)!r} of rank {rank} is not one action, nor F with B or I",
                    (rank, position),
                )
            for action in group:
                stage, _, microbatch = action
                if not (0 <= stage < schedule.num_stages and 0 <= microbatch < schedule.num_microbatches):
                    sizes = f"{schedule.num_stages} stages and {schedule.num_microbatches} microbatches"
                    _fail(schedule, f"{action} on rank {rank} is outside the {sizes}", (rank, position))
                at = ranks_of[microbatch][stage]
                if at != rank:
                    _fail(schedule, f"{action} is on rank {rank}, but its stage is on rank {at}", (rank, position))
                if action in where:
                    _fail(schedule, f"{action} is twice on rank {rank}", (rank, where[action]), (rank, position))
                where[action] = position
    return where


def _check_complete(schedule: Schedule, where: Positions) -> None:
    bits = {kind: 1 << number for number, kind in enumerate(Kind)}
    whole, divided = bits[Kind.F] + bits[Kind.B], bits[Kind.F] + bits[Kind.I] + bits[Kind.W]
    runs = [[0] * schedule.num_microbatches for _ in range(schedule.num_stages)]
    for stage, kind, m in where:
        runs[stage][m] |= bits[kind]
    for stage, row in enumerate(runs):
        if row.count(whole) + row.count(divided) == len(row):
            continue
        m = next(m for m, found in enumerate(row) if found not in (whole, divided))
        rank, kinds = schedule.rank_of(stage, m), [kind for kind in Kind if Action(stage, kind, m) in where]
        _fail(
            schedule,
            f"stage {stage} runs {', '.join(kind.value for kind in kinds) or 'nothing'} for microbatch {m} on rank "
            f"{rank}; it needs F and B, or F, I and W",
            *((rank, where[Action(stage, kind, m)]) for kind in kinds),
        )


def _check_order(schedule: Schedule, where: Positions) -> None:
    """F before B or I before W on the rank; a group does not wait for itself."""
    for action, position in where.items():
        rank = schedule.rank_of(action.stage, action.microbatch)
        for option in itertools.chain.from_iterable(inputs(schedule, action)):
            here = option in where and schedule.rank_of(option.stage, option.microbatch) == rank
            if here and where[option] >= position:
                _fail(schedule, f"{action} on rank {rank} needs {option}, which is not before it", (rank, position))


def _run(schedule: Schedule) -> list[int]:
    """Runs the ranks on tokens until all are done or none can go on: how many groups of each rank ran."""
    tokens = Tokens(schedule)
    positions = [0] * schedule.num_ranks
    progress = True
    while progress:
        progress = False
        for rank, groups in enumerate(schedule.ranks):
            before, positions[rank] = positions[rank], tokens.run(groups, positions[rank])
            progress |= positions[rank] > before
    return positions


def _fail_deadlock(schedule: Schedule, positions: Sequence[int]) -> None:
    rows = list(zip(schedule.ranks, positions, strict=True))
    done = {action for groups, position in rows for group in groups[:position] for action in group}
    stuck = [(rank, groups[position]) for rank, (groups, position) in enumerate(rows) if position < len(groups)]
    waits = "; ".join(
        f"rank {rank} at {_text(group)} waits for {_text(_waits_for(schedule, group, done))}" for rank, group in stuck
    )
    _fail(schedule, f"deadlock: {waits}", *((rank, positions[rank]) for rank, _ in stuck))


def _waits_for(schedule: Schedule, group: Group, done: set[Action]) -> tuple[Action, ...]:
    """For each input of a group that has not run, the first action that would make it."""
    missing = (options[0] for action in group for options in inputs(schedule, action) if done.isdisjoint(options))
    return tuple(action for action in missing if action not in group)
