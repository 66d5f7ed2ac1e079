"""What a pipeline of many microbatches costs before anything is traced: a Markdown table.

"build" makes the schedule, "check" proves that it can run, "pack" finds its ticks, and "lower" writes the tables of the
program, what the executor reads them by included: all that `jaxpipe.value_and_grad` does when it is called. Seconds
are of the wall; "processor" is the total without what other processes took, and "searched" the microbatches of the
schedule that the search for ticks saw. The makespan is that of the lockstep program over that of ranks which wait for
their inputs alone, simulated, F = I = W = 1.

    python examples/benchmarks/lowering.py [--ranks 8] [--microbatches 128 512 2048] [--schedule zbv] [--shared-ends]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import time

from jaxpipe.runtime.actions import read_actions
from jaxpipe.runtime.execute import make_tables
from jaxpipe.runtime.lower import forwards, lower
from jaxpipe.runtime.pack import pack
from jaxpipe.runtime.periods import find_steady
from jaxpipe.runtime.unrolled import is_short
from jaxpipe.schedule import BUILDERS, Costs, build, check, simulate

HEADER = (
    "schedule", "ranks", "microbatches", "build", "check", "pack", "lower", "total s", "processor s", "searched",
    "steps", "packed / asynchronous",
)  # fmt: skip


def row(name: str, ranks: int, microbatches: int, *, shared_ends: bool, forward_only: bool) -> str:
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
    make_tables(program)
    times.append(time.perf_counter())
    processor = time.process_time() - begun
    steady = find_steady(read_actions(kept))
    searched = microbatches if steady is None else steady.actions.num_microbatches
    seconds = [after - before for before, after in itertools.pairwise(times)]
    cells = (
        name, ranks, microbatches, *(f"{s:.2f}" for s in (*seconds, times[-1] - times[0], processor)), searched,
        program.num_steps, f"{program.makespan / simulate(kept).makespan:.3f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--schedule", choices=BUILDERS, nargs="+", default=list(BUILDERS))
    parser.add_argument("--shared-ends", action="store_true")
    parser.add_argument("--forward-only", action="store_true")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}\n")
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    row("1f1b", 2, 8, shared_ends=False, forward_only=False)  # what runs for the first time takes longer
    for name in arguments.schedule:
        for ranks in arguments.ranks:
            for microbatches in arguments.microbatches:
                options = dict(shared_ends=arguments.shared_ends, forward_only=arguments.forward_only)
                print(row(name, ranks, microbatches, **options), flush=True)


if __name__ == "__main__":
    main()
