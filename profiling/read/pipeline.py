"""Finds the microbatch and the pipeline rank of the events of a jaxpipe step.

A microbatch is a number that the compiled step reads from a table, so no operation is named after one. But the step
runs its branches in the order of that table: the n-th run of an operation of a branch on a rank is the n-th entry of
that branch in the rank's column. Unrolled code has operations of its own for each step, or for each step of its loop's
body, as each rank has in code of its own, and stretches have some for each piece of their code; a scope says which.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxpipe.runtime.by_rank import code_in_stretches
from jaxpipe.runtime.program import Field, Program
from jaxpipe.runtime.stretches import loops, make_stretches, pieces
from jaxpipe.schedule.simulator import Costs
from profiling.event import Event, Trace
from profiling.read.scopes import Place, action_of, place

MOST_UNPLACED = 0.05
"""The largest share of the time in branches that operations may take that the compiler moved out of them."""


def pipeline_ranks(mesh: Mesh, axis: str = "pp") -> dict[int, int]:
    """The pipeline rank of each device: ``{device id: index on the pipeline axis}``.

    Args:
      mesh: mesh of the pipeline.
      axis: name of its pipeline axis.

    Raises:
      ValueError: the mesh has no such axis.
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"the mesh has axes {mesh.axis_names}, not {axis!r}: name the pipeline axis")
    position = mesh.axis_names.index(axis)
    return {device.id: index[position] for index, device in np.ndenumerate(mesh.devices)}


def attribute(trace: Trace, program: Program, ranks: Mapping[int, int], steps: int = 1) -> Trace:
    """Adds the microbatch of every event of an action and the pipeline rank of every device to a trace.

    Args:
      trace: trace of whole steps of one pipeline, read with its scopes.
      program: program of the pipeline, `Pipeline.program`.
      ranks: pipeline rank of each device; see `pipeline_ranks`.
      steps: number of steps in the trace.

    Returns:
      The trace. If a stage scans over its layers, the number of the trip is the layer of events that name none.

    Raises:
      ValueError: operations with more than 5% of the time did not run a whole number of times in each action of their
        branch. The trace is of another program, not of whole steps, or of another number of steps.
    """
    events = list(trace.events)
    for run in _runs(trace, program, ranks, steps):
        event = events[run.index]
        kinds = [op.value for op, _ in program.branches[run.branch]]
        action = action_of(event.phase)
        if action in kinds:
            operands = program.operands[run.row, ranks[event.device], kinds.index(action)]
            layer = run.trip if event.layer is None and run.trips > 1 else event.layer
            events[run.index] = dataclasses.replace(event, microbatch=int(operands[Field.MICROBATCH]), layer=layer)
    return dataclasses.replace(trace, events=tuple(events), ranks=dict(ranks))


def group_actions(trace: Trace, program: Program, ranks: Mapping[int, int], steps: int = 1) -> Trace:
    """Makes one event of every group of actions that a device ran, from its first operation to the end of its last.

    The result is as fine as a simulated timeline, see `read_timeline`. Arguments and errors are those of `attribute`.
    The phase of an event is the kinds of its actions, "F" or "FB".
    """
    spans: dict[tuple[int, int, int], list[float]] = {}
    branches: dict[tuple[int, int, int], int] = {}
    for run in _runs(trace, program, ranks, steps):
        event = trace.events[run.index]
        key = (event.device, run.step, run.row)
        start, end = spans.get(key, (event.start, event.end))
        spans[key] = [min(start, event.start), max(end, event.end)]
        branches[key] = run.branch
    events = []
    for key, (start, end) in spans.items():
        device, _, row = key
        phase = "".join(op.value for op, _ in program.branches[branches[key]])
        microbatch = int(program.operands[row, ranks[device], 0][Field.MICROBATCH])
        events.append(
            Event(
                device, "compute", start, end, phase, kind="action", group="compute", phase=phase, microbatch=microbatch
            )
        )
    events.sort(key=lambda event: (event.start, event.end))
    return dataclasses.replace(trace, title=f"{trace.title}: actions", events=tuple(events), ranks=dict(ranks))


def measured_costs(actions: Trace) -> Costs:
    """Median microseconds of each kind of action, for `jaxpipe.schedule.simulate` to predict the same step.

    Kinds that did not run follow from the others: I and W are half of B each, and B is their sum. If no backward ran
    alone, B is an overlapped pair less F.

    Args:
      actions: what `group_actions` returned.

    Raises:
      ValueError: there is no forward, or no backward in any form.

    >>> def action(phase, microseconds):
    ...     return Event(0, "compute", 0.0, microseconds, phase, phase=phase)
    >>> costs = measured_costs(Trace("", "xplane", (action("F", 3.0), action("FB", 8.0))))
    >>> costs.backward, costs.backward_input, costs.weight, costs.overlapped
    (5.0, 2.5, 2.5, 8.0)
    """
    durations: dict[str, list[float]] = collections.defaultdict(list)
    for event in actions.events:
        durations[event.phase].append(event.duration)
    median = {phase: float(np.median(values)) for phase, values in durations.items()}
    whole, pair = median.get("B"), median.get("FB", 0.0)
    if whole is None and not {"I", "W"} & set(median) and pair > median.get("F", pair):
        whole = pair - median["F"]
    half = {kind: median.get(kind, whole / 2 if whole is not None else None) for kind in ("I", "W")}
    if "F" not in median or half["I"] is None or half["W"] is None:
        raise ValueError(
            f"the trace has actions {sorted(median)}: costs need F, and B, both of I and W, or FB that is longer than F"
        )
    return Costs(
        forward=median["F"],
        backward_input=half["I"],
        weight=half["W"],
        backward=whole,
        overlapped=median.get("FB"),
    )


def loop_trips(program: Program, rank: int = 0, *, dispatch: str) -> list[tuple[str, float]]:
    """How often a rank runs each loop of no or one trip where it comes to it, on average.

    Give it as ``trips`` to `profiling.overlap` if the compiled step runs what ranks differ in as such loops.

    Args:
      program: of the pipeline.
      rank: which.
      dispatch: of the pipeline: "loops", which has a loop for each branch and each pattern of exchanges, "stretches",
        "by_rank", or another, which has none.

    >>> from jaxpipe.runtime.lower import lower
    >>> from jaxpipe.schedule import Costs, build
    >>> trips = dict(loop_trips(lower(build("1f1b", 2, 4), Costs()), dispatch="loops"))
    >>> round(trips["branch_1/"], 2), round(trips["/send/ppermute"], 2)  # of 18 steps
    (0.22, 0.28)
    >>> [(name, round(mean, 2)) for name, mean in
    ...  loop_trips(lower(build("1f1b", 2, 8), Costs()), rank=1, dispatch="stretches")][-1]
    ('choice_0/', 0.89)
    """
    if dispatch == "loops":
        branches = range(1, len(program.branches))
        trips = [(f"branch_{i}/", float(np.mean(program.branch[:, rank] == i))) for i in branches]
        patterns = np.unique(program.communicate[program.communicate.any(1)], axis=0)
        if not len(patterns):
            return trips
        return [*trips, ("/send/ppermute", float(program.communicate.any(1).mean()) / len(patterns))]
    if dispatch not in ("stretches", "by_rank"):
        return []
    found = loops(code_in_stretches(program, dispatch)[1])
    means = [float(loop.chosen[:, rank].sum() / max(loop.reached[:, rank].sum(), 1)) for loop in found]
    return [(f"choice_{i}/", means[i]) for i in reversed(range(len(means)))]  # what is within another comes before it


class _OperationRun(NamedTuple):
    """One run of one operation: its event in the trace, and its place in the tables of the program."""

    index: int
    branch: int
    step: int
    row: int
    trip: int
    trips: int


def _runs(trace: Trace, program: Program, ranks: Mapping[int, int], steps: int) -> Iterator[_OperationRun]:
    operations: dict[tuple[int, str, Place], list[int]] = collections.defaultdict(list)
    place_once = functools.cache(place)
    for i, event in enumerate(trace.events):
        at = place_once(event.scope)
        if at.branch is not None and event.hlo_op and event.device in ranks:
            at = Place("", None, None, at.branch, at.steps, at.piece)
            operations[event.device, event.hlo_op, at].append(i)
    in_pieces = any(at.piece is not None for _, _, at in operations)
    code = [piece.steps for piece in pieces(make_stretches(program))] if in_pieces else []
    total = unplaced = 0.0
    for (device, _, at), indices in operations.items():
        rows = _rows(program, code, at, ranks[device])
        time = sum(trace.events[i].duration for i in indices)
        total += time
        if not len(rows) or len(indices) % (len(rows) * steps):
            unplaced += time
            continue
        trips = len(indices) // (len(rows) * steps)
        for n, i in enumerate(indices):
            run, trip = divmod(n, trips)
            step, row = divmod(run, len(rows))
            yield _OperationRun(i, at.branch or 0, step, int(rows[row]), trip, trips)
    if unplaced > MOST_UNPLACED * total:
        raise ValueError(
            f"operations with {unplaced / total:.0%} of the time in the program's branches did not run a whole number "
            f"of times per action in {steps} steps: give the trace's own program, whole steps, and how many they are"
        )


def _rows(program: Program, code: Sequence[np.ndarray], at: Place, rank: int) -> np.ndarray:
    """The steps of the program in which a rank runs what is at a place."""
    if at.piece is not None:
        steps = code[at.piece][:, rank] if at.piece < len(code) else np.empty(0, np.int64)
        return steps[steps >= 0]
    mine = np.flatnonzero(program.branch[:, rank] == at.branch)
    return mine if at.steps is None else np.intersect1d(mine, np.asarray(at.steps))
