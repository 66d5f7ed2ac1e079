"""A profile of some steps of a run, as the page that `profiling` makes."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import jaxpipe
from profiling.event import Trace
from profiling.read.pipeline import attribute, group_actions, measured_costs, pipeline_ranks
from profiling.read.timeline import read_timeline
from profiling.read.xplane import read_xplane
from profiling.recording import annotate_step, capture
from profiling.reports.html import write_html
from profiling.reports.making import report

SESSION = "steps"
"""The name of the profile, the same on all processes."""

SETTLED = 2
"""Steps of a process before the profile: the first compiles, the second may still allocate."""


def profiler(
    folder: pathlib.Path, mesh: Mesh, start: int, steps: int
) -> Callable[[int], contextlib.AbstractContextManager[bool]]:
    """The context for each step of a run: `SETTLED` steps after ``start``, it captures ``steps`` of them.

    It gives whether this is one of them.

    What the profiler cannot do is a warning: the steps run all the same.

    Args:
      folder: for the profile of each process.
      mesh: of the pipeline.
      start: steps done when the run begins.
      steps: to capture; 0: none.
    """
    stack = contextlib.ExitStack()
    first = start + SETTLED

    @contextlib.contextmanager
    def around(step: int) -> Iterator[bool]:
        if not first <= step < first + steps:
            yield False
            return
        if step == first:
            jax.block_until_ready(jax.live_arrays())
            with _warning("no profile"):
                stack.enter_context(capture(folder, ranks=pipeline_ranks(mesh), session=SESSION))
        with annotate_step(step):
            yield True
            jax.block_until_ready(jax.live_arrays())
        if step == first + steps - 1:
            with _warning("no profile"):
                stack.close()

    return around


def write_report(
    folder: pathlib.Path, mesh: Mesh, pipeline: jaxpipe.Pipeline, steps: int
) -> tuple[pathlib.Path, str] | None:
    """Writes ``report.html`` into the folder of a profile, on the first process; all must call it.

    Returns:
      On the first process the page and what it is of, "1 step", "ranks 0-3 of 8 in 2 steps"; None on others, and where
      there is a warning because it could not be made.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("profiles are written")
    if jax.process_index() > 0:
        return None
    page = folder / "report.html"
    with _warning(f"no report of the profile in {folder}"):
        ranks = pipeline_ranks(mesh)
        trace = attribute(read_xplane(folder), pipeline.program, ranks, steps)
        actions = group_actions(trace, pipeline.program, ranks, steps)
        if not actions.events:
            raise ValueError("it holds no action of this pipeline")
        of = f"{steps} step{'s' * (steps != 1)}"
        if missing := missing_ranks(actions.devices, ranks):
            of = f"{missing} in {of}"
            actions = dataclasses.replace(actions, notes=(f"the trace has {missing} alone", *actions.notes))
        write_html(page, report(actions, _predicted(actions, pipeline) if steps == 1 else None))
        return page, of
    return None


def missing_ranks(devices: Iterable[int], ranks: Mapping[int, int]) -> str:
    """What devices a trace has, where it does not have all; "" where it does.

    Args:
      devices: in the trace.
      ranks: pipeline rank of each device of the mesh.

    >>> ranks = {device: device // 2 for device in range(8)}
    >>> missing_ranks(range(4), ranks), missing_ranks((0, 2, 4, 6), ranks), missing_ranks(range(8), ranks)
    ('ranks 0-1 of 4', '4 of 8 devices', '')
    """
    seen = set(devices) & set(ranks)
    if len(seen) == len(ranks):
        return ""
    whole = sorted(rank for rank in set(ranks.values()) if {d for d, r in ranks.items() if r == rank} <= seen)
    if {device for device, rank in ranks.items() if rank in whole} != seen or not whole:
        return f"{len(seen)} of {len(ranks)} devices"
    runs: list[list[int]] = []
    for rank in whole:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' * (len(whole) > 1)} {spans} of {len(set(ranks.values()))}"


def _predicted(actions: Trace, pipeline: jaxpipe.Pipeline) -> Trace | None:
    """The step that the schedule would take with the measured times of its actions."""
    with _warning("the report has no simulated step beside the measured one"):
        return read_timeline(jaxpipe.schedule.simulate(pipeline.program.schedule, measured_costs(actions)))
    return None


@contextlib.contextmanager
def _warning(otherwise: str) -> Iterator[None]:
    """Warns of whatever goes wrong within: the training is done, or goes on."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{otherwise}: {type(error).__name__}: {error}", stacklevel=4)
