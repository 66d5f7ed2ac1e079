"""What lockstep costs each schedule, and what its program needs: a Markdown table.

Lockstep ranks communicate only between ticks, and a tick lasts as long as its slowest rank. The table gives the
makespan of ranks that wait for nothing but their inputs, and how much longer the packed program and a program of
one group a tick take; simulated, in units of one forward.

    python examples/benchmarks/lockstep.py [--schedule dualpipe] [--quick]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from record import Recorder, make_parser, processor

from jaxpipe.runtime.lower import lower
from jaxpipe.runtime.pack import pack, pack_naive
from jaxpipe.schedule import build
from jaxpipe.schedule.simulator import Costs, simulate

COSTS = {
    "F=I=W=1": Costs(),
    "F=I=W=1, pair x0.85": Costs(overlapped=0.85 * 3),
    "F=1, I=1.2, W=0.8": Costs(backward_input=1.2, weight=0.8),
    "F=1, I=1.2, W=0.8, pair x0.85": Costs(backward_input=1.2, weight=0.8, overlapped=0.85 * 3),
}
PAIRED = ("dualpipe", "dualpipev")
SIZES = {
    "gpipe": [(4, 20), (8, 64), (16, 128)],
    "1f1b": [(4, 20), (8, 64), (16, 128)],
    "interleaved": [(4, 20), (8, 64), (16, 128)],
    "zb1p": [(4, 20), (8, 64), (16, 128)],
    "zbv": [(4, 20), (8, 64), (16, 128)],
    "dualpipe": [(4, 20), (8, 20), (8, 40), (8, 64), (16, 64), (16, 128)],
    "dualpipev": [(4, 10), (4, 20), (8, 20), (8, 64), (16, 128)],
}


def row(name: str, ranks: int, microbatches: int, label: str) -> dict[str, Any]:
    """One line of the table."""
    costs, schedule = COSTS[label], build(name, ranks, microbatches)
    ideal = simulate(schedule, costs).makespan
    begin = time.perf_counter()
    packed = pack(schedule, costs)
    seconds = time.perf_counter() - begin
    naive = pack_naive(schedule, costs)
    program = lower(schedule, packing=packed)
    return {
        "schedule": name,
        "ranks, microbatches": f"{ranks}, {microbatches}",
        "costs": label,
        "asynchronous": ideal,
        "packed": packed.makespan / ideal,
        "ticks": packed.num_ticks,
        "steps": program.num_steps,
        "permutes": int(program.communicate.sum()),
        "naive": naive.makespan / ideal,
        "naive ticks": naive.num_ticks,
        "search s": seconds,
        "in flight": program.num_message_slots,
        "stash": program.num_stash_slots,
        "weight stash": program.num_weight_stash_slots,
    }


def rows(names: list[str], quick: bool) -> Iterator[dict[str, Any]]:
    """The table's."""
    for name in names:
        for ranks, microbatches in SIZES[name]:
            for label in COSTS:
                skipped = quick and (ranks > 8 or label != "F=I=W=1")
                if not skipped and (name in PAIRED or "pair" not in label):
                    yield row(name, ranks, microbatches, label)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--schedule", choices=SIZES, help="only this schedule")
    parser.add_argument("--quick", action="store_true", help="unit costs and at most 8 ranks")
    args = parser.parse_args()
    table = rows([args.schedule] if args.schedule else list(SIZES), args.quick)
    Recorder.begin(args, processor(), "simulated").table(
        table, labels=3, formats={"asynchronous": "g", "search s": ".2f"}
    )


if __name__ == "__main__":
    main()
