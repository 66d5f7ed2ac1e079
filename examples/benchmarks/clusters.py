"""Schedules on clusters that are not here, from times measured on one GPU: a Markdown table and a picture.

    python examples/benchmarks/clusters.py [--ranks 8,16] [--microbatches 20,64,128,256] [--plot clusters.png]

The times are of a rank's share of a model, one microbatch: by default four MoE layers of DeepSeek-V3, 4,096 tokens,
experts over 64 devices, as docs/measured/profiling.md has them: F, I and W on one H100 in bfloat16, and the exchanges
of a network as DeepEP reports it. Alone, a forward and an input gradient wait for their exchanges; an overlapped pair
hides them, and is as long as its predicted timeline. "lockstep" is how much longer the program of this library takes
than ranks that wait for their inputs alone (its messages count as free, so that it may seem shorter); microbatches in
flight are those of the rank that holds most.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from record import Recorder, make_parser

from jaxpipe.runtime.lower import lower
from jaxpipe.schedule import build, simulate
from jaxpipe.schedule.compare import compare
from jaxpipe.schedule.simulator import Costs

EXCHANGES = 4 * (2.09 + 4.04)
"""Milliseconds in which four layers' tokens travel to their experts and back."""

MEASURED = Costs(
    forward=35.7 + EXCHANGES, backward_input=51.6 + EXCHANGES, weight=34.3, overlapped=136.9, p2p=59e6 / 50e9 * 1e3
)
"""Milliseconds; a message is 4,096 tokens of 7,168 bfloat16 values at 50 GB/s."""


def scaled(costs: Costs, factor: float) -> Costs:
    """Costs of a part of a rank's share."""
    times = {
        field.name: value * factor
        for field in dataclasses.fields(costs)
        if field.name != "p2p" and (value := getattr(costs, field.name)) is not None
    }
    return dataclasses.replace(costs, **times)


def rows(ranks: int, microbatches: int, costs: Costs, stash_gib: float | None) -> list[dict[str, Any]]:
    """All schedules for one size."""
    found = []
    ideal = microbatches * (costs.forward + costs.backward_input + costs.weight)
    for row in compare(ranks, microbatches, costs):
        if row.reason is not None:
            continue
        schedule = build(row.name, ranks, microbatches)
        share = scaled(costs, ranks / schedule.num_stages)
        packed = lower(schedule, costs=share).makespan / simulate(schedule, share).makespan
        found.append(
            {
                "ranks, microbatches": f"{ranks}, {microbatches}",
                "schedule": row.name,
                "step s": row.makespan / 1e3,
                "of 1F1B": 0.0,
                "bubble %": 100 * row.bubble / row.makespan,
                "without bubble or overlap": row.makespan / ideal,
                "in flight": row.stash,
                **({} if stash_gib is None else {"stash GiB": row.stash * stash_gib}),
                "parameter copies": row.copies,
                "lockstep": packed,
            }
        )
    base = next(row["step s"] for row in found if row["schedule"] == "1f1b")
    for row in found:
        row["of 1F1B"] = row["step s"] / base
    return found


def plot(table: list[dict[str, Any]], path: str) -> None:
    """Step time relative to 1F1B over microbatches, a panel for each number of ranks."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    for row in table:
        row["ranks"], row["count"] = map(int, row["ranks, microbatches"].split(", "))
    sizes = sorted({row["ranks"] for row in table})
    figure, panels = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4), sharey=True, squeeze=False)
    for panel, ranks in zip(panels[0], sizes, strict=True):
        for name in dict.fromkeys(row["schedule"] for row in table):
            points = [(r["count"], r["of 1F1B"]) for r in table if (r["ranks"], r["schedule"]) == (ranks, name)]
            panel.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2 if "dualpipe" in name else 1)
        panel.set(title=f"{ranks} pipeline ranks", xlabel="microbatches", xscale="log")
        panel.set_xticks([p for p, _ in points], [str(p) for p, _ in points], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("step time, 1F1B = 1")
    panels[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", default="8,16", help="of the pipeline")
    parser.add_argument(
        "--microbatches", default="20,64,128,256", help="where there are fewer than twice the ranks, none"
    )
    for field in dataclasses.fields(Costs):
        name, default = field.name.replace("_", "-"), getattr(MEASURED, field.name)
        parser.add_argument(f"--{name}", type=float, default=default, help="milliseconds of a rank's share")
    parser.add_argument("--stash", type=float, metavar="GiB", help="that a rank's share keeps of one microbatch")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture into this file")
    args = parser.parse_args()
    costs = Costs(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Costs)})
    report = Recorder.begin(args, "simulated", f"milliseconds: {costs}")
    table = []
    for ranks in map(int, args.ranks.split(",")):
        for microbatches in map(int, args.microbatches.split(",")):
            if microbatches >= 2 * ranks:
                table += rows(ranks, microbatches, costs, args.stash)
    report.table(table, labels=2, formats={"in flight": "g"})
    if args.plot:
        plot(table, args.plot)


if __name__ == "__main__":
    main()
