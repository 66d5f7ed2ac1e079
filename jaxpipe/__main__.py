"""The command line: ``python -m jaxpipe show`` draws a schedule, ``python -m jaxpipe compare`` helps to choose one."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jaxpipe.schedule.compare import compare, table
from jaxpipe.schedule.csv import from_csv, to_csv
from jaxpipe.schedule.draw import draw_perfetto, draw_text
from jaxpipe.schedule.registry import BUILDERS, build
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, simulate
from jaxpipe.schedule.svg import draw_svg


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; bad input ends it with a message and status 2."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxpipe", description="Pipeline schedules.")
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser("show", help="print one schedule and its figures")
    show.add_argument("name", nargs="?", help=", ".join(BUILDERS))
    show.add_argument("--from-csv", metavar="FILE", type=pathlib.Path, help="read the schedule from PyTorch's CSV")
    show.add_argument("--svg", metavar="FILE", type=pathlib.Path, help="write a picture")
    show.add_argument("--perfetto", metavar="FILE", type=pathlib.Path, help="write a trace for ui.perfetto.dev")
    show.add_argument("--csv", metavar="FILE", type=pathlib.Path, help="write PyTorch's CSV")
    show.set_defaults(run=_show)

    versus = commands.add_parser("compare", help="all schedules for one model on the same ranks")
    versus.set_defaults(run=_compare)

    for command in (show, versus):
        command.add_argument("--ranks", type=int, default=8)
        command.add_argument("--microbatches", type=int, default=20)
        command.add_argument("--forward", type=float, default=1, help="time of a forward")
        command.add_argument("--backward", type=float, default=2, help="time of a whole backward")
        command.add_argument("--weight", type=float, default=1, help="time of its weight-gradient part")
        command.add_argument("--overlapped", type=float, help="time of an overlapped pair; default: no gain")
        command.add_argument("--p2p", type=float, default=0, help="latency of a transfer between ranks")
    return parser


def _costs(args: argparse.Namespace) -> Costs:
    if args.weight > args.backward:
        raise ValueError(f"--weight {args.weight:g} is a part of --backward {args.backward:g}: it cannot be larger")
    return Costs(args.forward, args.backward - args.weight, args.weight, args.backward, args.overlapped, args.p2p)


def _schedule(args: argparse.Namespace) -> Schedule:
    if (args.name is None) == (args.from_csv is None):
        raise ValueError(f"give the name of a schedule ({', '.join(BUILDERS)}) or --from-csv FILE")
    if args.from_csv is not None:
        return from_csv(args.from_csv.read_text(encoding="utf-8"), name=args.from_csv.stem)
    return build(args.name, args.ranks, args.microbatches)


def _show(args: argparse.Namespace) -> None:
    schedule = _schedule(args)
    timeline = simulate(schedule, _costs(args))
    print(draw_text(timeline))
    bubbles = " ".join(f"{bubble:g}" for bubble in timeline.bubble)
    print(f"makespan {timeline.makespan:g}   bubble of each rank {bubbles}")
    print(f"peak stash of each rank {' '.join(map(str, timeline.peak_live))}, in microbatches of one stage")
    writers = ((args.svg, lambda: draw_svg(timeline)), (args.perfetto, lambda: draw_perfetto(timeline)))
    for path, draw in (*writers, (args.csv, lambda: to_csv(schedule))):
        if path is not None:
            path.write_text(draw(), encoding="utf-8")
            print(f"wrote {path}")


def _compare(args: argparse.Namespace) -> None:
    print(table(compare(args.ranks, args.microbatches, _costs(args))))


if __name__ == "__main__":
    sys.exit(main())
