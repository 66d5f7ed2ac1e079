"""Plans of DeepSeek-V3 on the GPUs that it was trained on: memory and speed of a step, nothing runs.

DualPipeV of 16 ranks, 64 devices of experts, 128 microbatches of a sequence, rooms of 1.1, exchange by nodes, ZeRO-1, a
stash of as many bytes as fit, layers over stages by planned time, embedding and head on the ranks of the first and the
last stage, the head's matrix gathered once a step: the plan of `python examples/pretrain.py plan --config dsv3-671b
--mesh pp=16,dp=2,ep=64 --chip H800 --microbatches 128 --capacity 1.1 --exchange nodes --zero1 --stash auto --ends apart
--layer-costs auto --gather-head step --deferred 1 --schedules dualpipev`, and its likes; H200s have room for all weight
gradients that the schedule puts off. "bf16" is the precision of the configuration: bfloat16 products, dispatches in 8
bits. "busiest" is the work of the rank that has most, over the mean of all. A second table has seconds of single ranks:
of overlapped pairs, of forwards and backwards alone, of embedding and head, of waiting, and of what is done once.

    python examples/benchmarks/v3_plan.py [--gpus "2,048 H800" "1,024 H200"] [--precision bf16 fp8]
        [--ends apart together] [--tiny] [--record-as "plan dsv3"]
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from record import Recorder, command_line, make_parser, write_records

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import flags
from pretraining import plan as planning

import jaxpipe
from jaxpipe.planning.chips import chip
from jaxpipe.planning.mesh import mesh_sizes
from jaxpipe.planning.parts import imbalance
from jaxpipe.schedule.simulator import duration

GIGA = 1e9
MESHES = {"2,048 H800": "pp=16,dp=2,ep=64", "1,024 H200": "pp=16,ep=64"}
PRECISIONS = ("bf16", "fp8")
DEFERRED = {"2,048 H800": ["--deferred", "1"], "1,024 H200": []}
"""Where memory is short, weight gradients are not put off."""


def options(gpus: str, precision: str, ends: str, *, tiny: bool) -> argparse.Namespace:
    """What `examples/pretrain.py plan` is told."""
    parser = argparse.ArgumentParser()
    planning.add_arguments(parser)
    size = ["--config", "dsv3-671b", "--microbatches", "128", "--mesh", MESHES[gpus]]
    size += ["--precision", "fp8"] if precision == "fp8" else []
    if tiny:
        size = ["--config", "tiny", "--microbatches", "8", "--mesh", "pp=2,ep=2"]
    rest = "--capacity 1.1 --zero1 --stash auto --layer-costs auto --schedules dualpipev"
    rest += "" if tiny else " --exchange nodes --gather-head step"
    return parser.parse_args([*size, "--chip", gpus.split()[-1], "--ends", ends, *DEFERRED[gpus], *rest.split()])


def seconds_of_ranks(plan: jaxpipe.Plan) -> Iterator[tuple[int, dict[str, float]]]:
    """(rank, seconds by what it does in a step) of the first two ranks, one in the middle, and the last."""
    costs, ranks = plan.stage_costs, len(plan.timeline.events)
    without = dataclasses.replace(costs, embed=0.0, embed_grad=0.0, head=0.0)
    for rank in sorted({0, 1, ranks // 2, ranks - 1}):
        found: dict[str, float] = dict.fromkeys(("pairs s", "F s", "B s", "I s", "W s", "ends s"), 0.0)
        for event in plan.timeline.events[rank]:
            alone = duration(without, event.group)
            found[f"{event.group[0].kind.value} s" if len(event.group) == 1 else "pairs s"] += alone
            found["ends s"] += max(duration(costs, event.group) - alone, 0.0)
        yield rank, {**found, "waiting s": plan.timeline.bubble[rank], "once s": plan.seconds - plan.timeline.makespan}


def row(gpus: str, precision: str, ends: str, *, tiny: bool) -> tuple[dict[str, Any], jaxpipe.Plan]:
    """One line of the table, and its plan."""
    args = options(gpus, precision, ends, tiny=tiny)
    sizes = mesh_sizes(args.mesh)
    found = planning.plan(
        flags.sized_config(args, sizes["ep"], auto_costs=True),
        sizes,
        schedules=args.schedules,
        microbatches=args.microbatches,
        deferred=args.deferred,
        chip=chip(args.chip),
        stash=args.stash,
        by_time=args.layer_costs == flags.AUTO_COSTS,
    )
    (one,) = found.rows
    if one.plan is None or one.memory is None:
        raise ValueError(f"{gpus}, {precision}: {one.reason}")
    devices = 1
    for size in sizes.values():
        devices *= size
    line = {
        "GPUs": gpus,
        "precision": precision if ends == "apart" else f"{precision}, ends together",
        "GB": one.memory.total / GIGA,
        "stash GB": one.memory.stash / GIGA,
        "step s": one.seconds,
        "tokens/s a GPU": one.tokens / devices,
        "MFU %": 100 * one.mfu,
        "busiest": imbalance(one.plan),
    }
    return line, one.plan


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--gpus", nargs="+", choices=list(MESHES), default=list(MESHES), help="which, and how many")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of products")
    parser.add_argument("--ends", nargs="+", choices=list(flags.ENDS), default=["apart"], help="who runs them")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that the script runs")
    args = parser.parse_args()
    report = Recorder.begin(args, "planned", "dualpipev, 128 microbatches of 4,096 tokens")
    rows: list[dict[str, Any]] = []
    spent: list[dict[str, Any]] = []

    def each() -> Iterator[dict[str, Any]]:
        for gpus in args.gpus:
            for precision in args.precision:
                for ends in args.ends:
                    line, plan = row(gpus, precision, ends, tiny=args.tiny)
                    rows.append(line)
                    names = {"GPUs": gpus, "precision": line["precision"]}
                    spent.extend({**names, "rank": rank, **each} for rank, each in seconds_of_ranks(plan))
                    yield line

    formats = {"GB": ".1f", "stash GB": ".1f", "step s": ".1f", "tokens/s a GPU": ",.0f", "MFU %": ".1f"}
    report.table(each(), labels=2, formats=formats)
    report.table(spent, labels=3, title="ranks")
    named = {one["precision"]: one for one in rows if one["GPUs"] == "2,048 H800"}
    values = {
        f"v3_plan_h800_{name}_tokens": (named[name]["tokens/s a GPU"], "tokens/s")
        for name in PRECISIONS
        if name in named
    }
    if report.file and not args.tiny and values:
        if len(values) == len(PRECISIONS):
            values["v3_plan_h800_gb"] = max(named[name]["GB"] for name in PRECISIONS), "GB"
        write_records(report.file, values, command=command_line(), machine=report.machine)


if __name__ == "__main__":
    main()
