"""How often the host reads a condition while a program of several ranks runs: a Markdown table, counted, not measured.

A GPU waits at each read. "reads" and "most reads" are those of a step of the program, on the average rank and on the
one with most; "each branch a loop" is what a scan over all steps with a loop for each branch and each pattern of sends
would read. "code" is that of all stretches in units of each branch's once. "permutes" is how many there are for each
that carries something.

    python examples/benchmarks/host_reads.py [--ranks 2 4 8 16] [--microbatches 8 16 64] [--schedule zbv]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from record import Recorder, make_parser, processor

from jaxpipe.runtime.lower import lower
from jaxpipe.runtime.stretches import host_reads, loop_reads, make_stretches, pieces, size_of_code
from jaxpipe.schedule import BUILDERS, build


def rows(ranks: list[int], microbatches: list[int], schedules: list[str]) -> Iterator[dict[str, Any]]:
    """The table's; sizes that a schedule does not have are left out."""
    for name, count, number in itertools.product(schedules, ranks, microbatches):
        try:
            schedule = build(name, count, number)
        except ValueError:
            continue
        program = lower(schedule)
        stretches = make_stretches(program)
        reads, steps = host_reads(stretches), program.num_steps
        code = size_of_code(program, [piece.branch for piece in pieces(stretches)])
        exchanges = [exchange for s in stretches for tick in s.ticks for exchange in tick.exchanges]
        permutes = sum(len(each.channels) * int((each.steps >= 0).sum()) for each in exchanges)
        yield {
            "schedule": name,
            "ranks": count,
            "microbatches": number,
            "steps": steps,
            "each branch a loop": float(loop_reads(program).mean()) / steps,
            "reads": float(reads.mean()) / steps,
            "most reads": float(reads.max()) / steps,
            "code": code / size_of_code(program, range(len(program.branches))),
            "permutes": permutes / max(int(program.communicate.sum()), 1),
        }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16], help="of the pipeline")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 64], help="of a step")
    names = ["1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"]
    parser.add_argument("--schedule", choices=BUILDERS, nargs="+", default=names, help="which")
    args = parser.parse_args()
    formats = dict.fromkeys(["each branch a loop", "reads", "most reads", "code", "permutes"], ".2f")
    table = rows(args.ranks, args.microbatches, args.schedule)
    Recorder.begin(args, processor()).table(table, labels=3, formats=formats)


if __name__ == "__main__":
    main()
