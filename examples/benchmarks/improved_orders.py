"""How much a search for better orders gains over the builders, at several costs: a Markdown table, simulated.

    python examples/benchmarks/improved_orders.py [--sizes 4x8,8x20] [--moves 4000]

Costs are of a rank's share of the model for one microbatch, in milliseconds; two stages of a rank halve it. Schedules
with the same stages on the same ranks are seeds of one search, which holds as many stashes as the fastest of them:
`jaxpipe.schedule.improve`. "bound" is `jaxpipe.schedule.lower_bound`, for the same stashes. "faster %" is the gain over
the fastest seed where ranks wait for their inputs alone. "packed" is the time of the program, whose ranks run in
lockstep ticks, over that of the seed's: above 1 the gain is lost again. "DeepSeek-V3" has the costs of clusters.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from clusters import MEASURED, scaled
from record import Recorder, make_parser

from jaxpipe.runtime.pack import pack
from jaxpipe.schedule import Costs, Schedule, build, improve, lower_bound, simulate

COSTS = {
    "F=I=W": Costs(10, 10, 10),
    "F=10, I=13, W=7": Costs(10, 13, 7),
    "F=10, I=12, W=8, pair x0.85": Costs(10, 12, 8, 19, 0.85 * 29),
    "DeepSeek-V3": MEASURED,
}
PLACEMENTS = (("gpipe", "1f1b", "zb1p"), ("interleaved",), ("zbv", "dualpipev"), ("dualpipe",))


def seeds_of(names: Sequence[str], ranks: int, microbatches: int) -> list[Schedule]:
    """Those of the builders that there are for these numbers; without GPipe, which stashes everything."""
    found = []
    for name in names:
        try:
            found.append(build(name, ranks, microbatches))
        except ValueError:
            continue
    return [seed for seed in found if seed.name != "gpipe"] or found


def row(label: str, seeds: Sequence[Schedule], moves: int) -> dict[str, Any]:
    """One line of the table."""
    ranks, microbatches = seeds[0].num_ranks, seeds[0].num_microbatches
    costs = scaled(COSTS[label], ranks / seeds[0].num_stages)
    best = min((simulate(seed, costs) for seed in seeds), key=lambda timeline: timeline.makespan)
    found = improve(seeds, costs, moves=moves)
    makespan, stash = simulate(found, costs).makespan, max(best.peak_live)
    packed = [pack(schedule, costs).makespan for schedule in (best.schedule, found)]
    return {
        "costs": label,
        "ranks, microbatches": f"{ranks}, {microbatches}",
        "fastest builder": best.schedule.name,
        "its ms": best.makespan,
        "improved ms": makespan,
        "bound ms": lower_bound(found, costs, stash),
        "faster %": 100 * (1 - makespan / best.makespan),
        "packed": packed[1] / packed[0],
    }


def rows(sizes: Sequence[tuple[int, int]], labels: Sequence[str], moves: int) -> Iterator[dict[str, Any]]:
    """The table's."""
    for label in labels:
        for ranks, microbatches in sizes:
            for names in PLACEMENTS:
                seeds = seeds_of(names, ranks, microbatches)
                if seeds:
                    yield row(label, seeds, moves)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", default="4x8,4x16", help="ranks and microbatches")
    parser.add_argument("--costs", choices=COSTS, help="only these")
    parser.add_argument("--moves", type=int, default=4000, help="local moves from each order to begin with")
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    found = rows([(ranks, count) for ranks, count in sizes], [args.costs] if args.costs else list(COSTS), args.moves)
    formats = {"its ms": ".1f", "improved ms": ".1f", "bound ms": ".1f", "faster %": ".1f"}
    Recorder.begin(args, "simulated").table(found, labels=3, formats=formats)


if __name__ == "__main__":
    main()
