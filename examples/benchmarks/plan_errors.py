"""What plans say today of every step that was measured on H200s: a Markdown table, nothing runs.

The measured steps are those of docs/measured.json, of pretrain_step.py, pretrain_gpus.py and one_rank.py; each is
planned as the example that ran it plans it. "before" is what the plan said when the step was measured.

    JAX_PLATFORMS=cpu python examples/benchmarks/plan_errors.py [--only "moe-1b" ...] [--tiny]
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import one_rank
from record import Recorder, Records, make_parser, read_records

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import flags
from pretraining import plan as planning

from jaxpipe.planning.chips import chip
from jaxpipe.planning.mesh import mesh_sizes
from jaxpipe.planning.rank_time import rank_seconds

RANK = "--rank 0,8,15 --own --deferred 4 --slots 256 --ends apart --precision"
"""Of one_rank.py, as it was measured in each precision."""
RANKS = {"bf16": "dsv3", "fp8": "dsv3 in FP8"}
"""The name of the rows of each precision."""


class Measured(NamedTuple):
    """A measured step.

    Attributes:
      name: of the row.
      key: of its time in docs/measured.json, and what that is in seconds.
      unit: seconds of one of the key's.
      before: key of what was planned then, in the same unit; None: it is not kept.
      mesh, schedule, microbatches, size, precision: of moe-1b.
    """

    name: str
    key: str
    unit: float
    before: str | None
    mesh: str
    schedule: str
    microbatches: int
    size: int
    precision: str = "bf16"


def _on_two(program: str, mesh: str, schedule: str, microbatches: int) -> Measured:
    """A row of pretrain_gpus.py."""
    keys = (f"pretrain_gpus/{program}/{column} ms" for column in ("step", "planned"))
    key, before = keys
    return Measured(f"moe-1b, {program}, 64 sequences", key, 1e-3, before, mesh, schedule, microbatches, 4)


STEPS = (
    Measured("moe-1b, one GPU, bf16", "pretrain_step H200/DualPipeV, one rank/step ms", 1e-3,
             "plan moe-1b before/bf16/step ms", "pp=1,ep=1", "dualpipev", 8, 4),
    Measured("moe-1b, one GPU, fp8", "pretrain_step H200/DualPipeV, one rank, fp8/step ms", 1e-3,
             "plan moe-1b before/fp8/step ms", "pp=1,ep=1", "dualpipev", 8, 4, "fp8"),
    _on_two("one", "pp=1,ep=1", "dualpipev", 16),
    _on_two("ep", "pp=1,ep=2", "dualpipev", 8),
    _on_two("dualpipe", "pp=2,ep=1", "dualpipe", 16),
    _on_two("dualpipev", "pp=2,ep=1", "dualpipev", 16),
)  # fmt: skip
"""Steps of moe-1b."""


def planned_seconds(step: Measured, *, tiny: bool) -> float:
    """What the plan says of a step of moe-1b."""
    parser = argparse.ArgumentParser()
    planning.add_arguments(parser)
    config = "tiny" if tiny else "moe-1b"
    args = parser.parse_args(["--config", config, "--precision", step.precision, "--mesh", step.mesh])
    sizes = mesh_sizes(args.mesh)
    found = planning.plan(
        flags.sized_config(args, sizes["ep"]),
        sizes,
        schedules=[step.schedule],
        microbatches=step.microbatches,
        microbatch_size=step.size,
        chip=chip("H200"),
    )
    return found.rows[0].seconds


def rows(only: list[str], records: Records, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """The table's."""
    for step in STEPS:
        if any(part in step.name for part in only) and not (tiny and step.precision == "fp8"):
            yield _row(step.name, records, step.key, step.before, step.unit, planned_seconds(step, tiny=tiny))
    for precision, name in RANKS.items():
        if tiny or not any(part in name for part in only):
            continue
        args = one_rank.parse([*shlex.split(RANK), precision])
        alone = one_rank.set_up(args)
        for rank in args.rank:
            key = f"one_rank/dualpipev_deferred4/{precision}/{rank}/"
            seconds = rank_seconds(alone.device.pipeline, alone.plan, rank)
            yield _row(f"{name}, rank {rank} of 16", records, f"{key}step s", f"{key}planned s", 1.0, seconds)


def _row(name: str, records: Records, key: str, before: str | None, unit: float, seconds: float) -> dict[str, Any]:
    measured = unit * records[key]["value"]
    then = unit * records[before]["value"] if before in records else float("nan")
    return {
        "step": name,
        "measured ms": 1e3 * measured,
        "planned ms": 1e3 * seconds,
        "measured / planned": measured / seconds,
        "before: measured / planned": measured / then,
    }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=["moe-1b", "dsv3"], help="rows whose names have one of these")
    parser.add_argument("--tiny", action="store_true", help="a small model's plans, to see that the script runs")
    args = parser.parse_args()
    report = Recorder.begin(args, "planned for H200s", "measured on them: docs/measured.json")
    formats = {"measured ms": ".1f", "planned ms": ".1f"}
    report.table(rows(args.only, read_records(), tiny=args.tiny), formats=formats)


if __name__ == "__main__":
    main()
