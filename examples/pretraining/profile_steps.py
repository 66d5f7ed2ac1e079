"""A profile of some steps of a run, as the page that `profiling` makes."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import jaxpipe
from profiling.capture import annotate_step, capture
from profiling.html import write_html
from profiling.pipeline import attribute, group_actions, measured_costs, pipeline_ranks
from profiling.read_timeline import read_timeline
from profiling.read_xplane import read_xplane
from profiling.report import report

SETTLED = 2
"""Steps of a process before the profile: the first compiles, the second may still allocate."""


def profiler(
    folder: pathlib.Path, mesh: Mesh, start: int, steps: int
) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """The context for each step of a run: `SETTLED` steps after ``start``, it captures ``steps`` of them.

    Args:
      folder: for the profile of each process.
      mesh: of the pipeline.
      start: steps done when the run begins.
      steps: to capture; 0: none.
    """
    stack = contextlib.ExitStack()
    first = start + SETTLED

    @contextlib.contextmanager
    def around(step: int) -> Iterator[None]:
        if not first <= step < first + steps:
            yield
            return
        if step == first:
            jax.block_until_ready(jax.live_arrays())
            stack.enter_context(capture(folder, ranks=pipeline_ranks(mesh), session="steps"))
        with annotate_step(step):
            yield
            jax.block_until_ready(jax.live_arrays())
        if step == first + steps - 1:
            stack.close()

    return around


def write_report(folder: pathlib.Path, mesh: Mesh, pipeline: jaxpipe.Pipeline, steps: int) -> pathlib.Path:
    """Writes ``report.html`` into the folder of a profile, on the first process; all must call it.

    Raises:
      ValueError: there is no such profile.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("profiles are written")
    page = folder / "report.html"
    if jax.process_index() == 0:
        ranks = pipeline_ranks(mesh)
        trace = attribute(read_xplane(folder), pipeline.program, ranks, steps)
        actions = group_actions(trace, pipeline.program, ranks, steps)
        schedule = pipeline.program.schedule
        predicted = read_timeline(jaxpipe.schedule.simulate(schedule, measured_costs(actions)))
        # The prediction is of one step.
        write_html(page, report(actions, predicted) if steps == 1 else report(actions))
    return page
