"""What a pipeline of many microbatches costs before anything is traced: a Markdown table.

"build" makes the schedule, "check" proves that it can run, "pack" finds its ticks, and "lower" writes the tables of the
program, what the executor reads them by included: all that `jaxpipe.value_and_grad` does when it is called. Seconds
are of the wall; "processor" is the total without what other processes took, and "searched" the microbatches of the
schedule that the search for ticks saw. The makespan is that of the lockstep program over that of ranks which wait for
their inputs alone, simulated, F = I = W = 1.

    python examples/benchmarks/lowering.py [--ranks 8] [--microbatches 128 512 2048] [--schedule zbv] [--shared-ends]
"""

from __future__ import annotations

import gc
import itertools
import time
from typing import Any

from record import Recorder, make_parser, processor

from jaxpipe.runtime.actions import read_actions
from jaxpipe.runtime.execute import make_tables
from jaxpipe.runtime.lower import forwards, lower
from jaxpipe.runtime.pack import pack
from jaxpipe.runtime.periods import find_steady
from jaxpipe.runtime.unrolled import is_short
from jaxpipe.schedule import BUILDERS, Costs, build, check, simulate

SECONDS = ("build s", "check s", "pack s", "lower s", "total s", "processor s")


def row(name: str, ranks: int, microbatches: int, *, shared_ends: bool, forward_only: bool) -> dict[str, Any]:
    """One line of the table."""
    gc.collect()
    begun, times = time.process_time(), [time.perf_counter()]
    schedule = build(name, ranks, microbatches)
    times.append(time.perf_counter())
    check(schedule)
    times.append(time.perf_counter())
    kept = forwards(schedule) if forward_only else schedule
    packing = pack(kept, Costs(), shared_ends=shared_ends)
    times.append(time.perf_counter())
    program = lower(schedule, packing=packing, shared_ends=shared_ends, forward_only=forward_only)
    is_short(program)
    make_tables(program, "stretches")
    times.append(time.perf_counter())
    used = time.process_time() - begun
    steady = find_steady(read_actions(kept))
    searched = microbatches if steady is None else steady.actions.num_microbatches
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return {
        "schedule": name,
        "ranks": ranks,
        "microbatches": microbatches,
        **dict(zip(SECONDS, [*seconds, times[-1] - times[0], used], strict=True)),
        "searched": searched,
        "steps": program.num_steps,
        "packed / asynchronous": program.makespan / simulate(kept).makespan,
    }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="of the pipeline")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[128, 512, 2048], help="of a step")
    parser.add_argument("--schedule", choices=BUILDERS, nargs="+", default=list(BUILDERS), help="which")
    parser.add_argument("--shared-ends", action="store_true", help="all ranks run embedding and head")
    parser.add_argument("--forward-only", action="store_true", help="programs without a backward pass")
    args = parser.parse_args()
    options = dict(shared_ends=args.shared_ends, forward_only=args.forward_only)
    row("1f1b", 2, 8, shared_ends=False, forward_only=False)  # what runs for the first time takes longer
    sizes = itertools.product(args.schedule, args.ranks, args.microbatches)
    table = (row(name, ranks, microbatches, **options) for name, ranks, microbatches in sizes)
    Recorder.begin(args, processor()).table(table, labels=3, formats=dict.fromkeys(SECONDS, ".2f"))


if __name__ == "__main__":
    main()
