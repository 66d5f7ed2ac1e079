"""What it costs to put fewer weight gradients off at once: a Markdown table, simulated.

    python examples/benchmarks/deferred.py [--sizes 4x16,8x32,16x64] [--costs DeepSeek-V3]

For every weight gradient between its I and its W a rank keeps what crosses from one to the other.
`jaxpipe.schedule.bound_deferred` allows a number of them, "deferred"; the first row of a schedule is the schedule as it
is. "longer %" is the makespan beside that row's where ranks wait for their inputs alone, "bubble %" the share of it in
which the rank that is idle longest waits, "packed" the time of the program, whose ranks run in lockstep ticks, over
that of the first row's. "stashes" is how many microbatches a rank holds for their weight gradients. Costs are of a
rank's share of the model; "DeepSeek-V3" has those of clusters.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from clusters import MEASURED, scaled
from record import Recorder, make_parser

from jaxpipe.runtime.pack import pack
from jaxpipe.schedule import Costs, bound_deferred, build, simulate

COSTS = {"F=I=W": Costs(), "DeepSeek-V3": MEASURED}
SCHEDULES = ("zb1p", "zbv", "dualpipe", "dualpipev")
BOUNDS = (16, 8, 4, 2, 1, 0)


def rows_of(label: str, name: str, ranks: int, microbatches: int) -> Iterator[dict[str, Any]]:
    """The lines of one schedule."""
    schedule = build(name, ranks, microbatches)
    costs = scaled(COSTS[label], ranks / schedule.num_stages)
    whole = simulate(schedule, costs)
    most, ticks = max(whole.peak_pending_weight), pack(schedule, costs).makespan
    for bound in (most, *(bound for bound in BOUNDS if bound < most)):
        found = simulate(bound_deferred(schedule, bound, costs), costs)
        yield {
            "costs": label,
            "schedule": name,
            "ranks, microbatches": f"{ranks}, {microbatches}",
            "deferred": str(bound),
            "longer %": 100 * (found.makespan / whole.makespan - 1),
            "bubble %": 100 * max(found.bubble) / found.makespan,
            "packed": pack(found.schedule, costs).makespan / ticks,
            "stashes": max(found.peak_live),
        }


def rows(sizes: Sequence[tuple[int, int]], labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The table's."""
    for label in labels:
        for ranks, microbatches in sizes:
            for name in SCHEDULES:
                yield from rows_of(label, name, ranks, microbatches)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", default="4x16,8x32,16x64", help="ranks and microbatches")
    parser.add_argument("--costs", choices=COSTS, help="only these")
    args = parser.parse_args()
    sizes = [(int(ranks), int(count)) for ranks, count in (size.split("x") for size in args.sizes.split(","))]
    found = rows(sizes, [args.costs] if args.costs else list(COSTS))
    Recorder.begin(args, "simulated").table(found, labels=4, formats={"longer %": ".1f", "bubble %": ".1f"})


if __name__ == "__main__":
    main()
