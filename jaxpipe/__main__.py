"""Schedules at the command line: ``python -m jaxpipe show`` draws one, ``python -m jaxpipe compare`` all."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jaxpipe.schedule.builders import build, builders
from jaxpipe.schedule.compare import compare, format_table, recommend
from jaxpipe.schedule.csv import from_csv, to_csv
from jaxpipe.schedule.draw import draw_perfetto, draw_text
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulate import Costs, Timeline, simulate
from jaxpipe.schedule.svg import draw_svg


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns 0.

    Args:
      argv: the arguments after the program's name; default those of the process.

    Raises:
      SystemExit: with status 2 and a message on standard error, for bad arguments, files or schedules.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m jaxpipe", description="Pipeline schedules, drawn and compared.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="draw one schedule", description="Draws one schedule.")
    show.set_defaults(command=_show)
    show.add_argument("name", nargs="?", help=f"one of {', '.join(builders)}")
    show.add_argument("--from-csv", metavar="FILE", type=pathlib.Path, help="read the schedule in PyTorch's notation")
    show.add_argument("--ranks", type=int, help="pipeline ranks")
    show.add_argument("--microbatches", type=int, help="microbatches of a step")
    show.add_argument("--svg", metavar="FILE", type=pathlib.Path, help="write a drawing")
    show.add_argument("--perfetto", metavar="FILE", type=pathlib.Path, help="write a trace for ui.perfetto.dev")
    show.add_argument("--csv", metavar="FILE", type=pathlib.Path, help="write the schedule in PyTorch's notation")
    _add_costs(show, "one stage")

    table = commands.add_parser("compare", help="compare all schedules", description="Compares all schedules.")
    table.set_defaults(command=_compare)
    table.add_argument("--ranks", type=int, required=True, help="pipeline ranks")
    table.add_argument("--microbatches", type=int, required=True, help="microbatches of a step")
    _add_costs(table, "a rank's whole share of the model")
    return parser


def _add_costs(parser: argparse.ArgumentParser, of: str) -> None:
    costs = parser.add_argument_group("times", f"of {of} on one microbatch, in any unit")
    costs.add_argument("--forward", type=float, default=1.0, help="default 1")
    costs.add_argument("--backward", type=float, default=2.0, help="the whole backward; default 2")
    costs.add_argument("--weight", type=float, default=1.0, help="the backward's weight gradients; default 1")
    costs.add_argument("--overlapped", type=float, help="an overlapped forward and backward; default their sum")
    costs.add_argument("--p2p", type=float, default=0.0, help="latency of a transfer between ranks; default 0")


def _costs(args: argparse.Namespace) -> Costs:
    """The costs from the options, of which ``--backward`` is input and weight gradients together."""
    if args.weight > args.backward:
        raise ValueError(
            f"--weight {args.weight:g} is more than --backward {args.backward:g}; the weight gradients are a part of "
            "the backward, so lower --weight or raise --backward"
        )
    for option in ("forward", "backward", "weight", "overlapped", "p2p"):
        value = getattr(args, option)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"--{option} {value:g}: a time is a finite number, not negative")
    return Costs(
        forward=args.forward,
        backward_input=args.backward - args.weight,
        weight=args.weight,
        backward=args.backward,
        overlapped=args.overlapped,
        p2p=args.p2p,
    )


def _schedule(args: argparse.Namespace) -> Schedule:
    """The schedule that `show` was asked for: by name and sizes, or from a file."""
    if args.from_csv is not None:
        if (args.name, args.ranks, args.microbatches) != (None, None, None):
            raise ValueError(
                "--from-csv has the schedule and its sizes; leave out the name, --ranks and --microbatches"
            )
        return from_csv(args.from_csv.read_text(encoding="utf-8"), name=args.from_csv.stem)
    if None in (args.name, args.ranks, args.microbatches):
        raise ValueError("show needs a schedule's name, --ranks and --microbatches; or --from-csv FILE")
    return build(args.name, args.ranks, args.microbatches)


def _show(args: argparse.Namespace) -> None:
    timeline = simulate(_schedule(args), _costs(args))
    for path, draw in ((args.svg, draw_svg), (args.perfetto, draw_perfetto)):
        if path is not None:
            path.write_text(draw(timeline), encoding="utf-8")
    if args.csv is not None:
        args.csv.write_text(to_csv(timeline.schedule), encoding="utf-8")
    print(draw_text(timeline))
    print(_summary(timeline))


def _summary(timeline: Timeline) -> str:
    """Makespan, bubbles and stashes of a timeline, one line each."""
    bubbles = " ".join(f"{bubble:.4g}" for bubble in timeline.bubble)
    return "\n".join(
        (
            f"makespan         {timeline.makespan:.4g}",
            f"bubble per rank  {bubbles}",
            f"peak stash       {' '.join(map(str, timeline.peak_live))} (microbatches of one stage, per rank)",
        )
    )


def _compare(args: argparse.Namespace) -> None:
    rows = compare(args.ranks, args.microbatches, _costs(args))
    print(f"{format_table(rows)}\n\n{recommend(rows)}")


if __name__ == "__main__":
    sys.exit(main())
