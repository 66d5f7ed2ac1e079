"""Steps of `make train` beside plans for their experts: how much slower they are, and what planning took of them.

    JAX_PLATFORMS=cpu python examples/benchmarks/steps_beside_plans.py [--rounds 5] [--steps 70]
    python examples/benchmarks/steps_beside_plans.py --read runs/*     # of runs that there are

Rounds without rebalancing and as `make train` has it take turns, with one compiled program. Figures are of the rounds'
metrics.jsonl, without the first steps. Fake devices share the processor's cores with each other and with whatever else
runs, so that one step says little. The first table has the steps of all rounds: those of rounds without rebalancing,
and of the others those with no plan, those that a plan ran beside (``planning_seconds``), and the first with a new
placement. Steps are divided by the median of their round's steps without a plan. "planning ms" is the processor's time
in the planning thread, "placing ms" that of the loop until a placement is in use, waiting included, each the most of
any step; "share %" is the most of both of a step, of the median step: as if it had stood still meanwhile, whatever else
ran.

The second table has what plans do to steps. "slower" is the median of such steps over that of steps without a plan;
"from" and "to" hold 95% of it where stretches between two plans are drawn anew. "by chance" is how often it is as large
or larger where the same pattern of steps is taken at another place of each round.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rebalancing import UNTIMED, Rounds, check
from record import Recorder, machine, make_parser

ALONE, APART, BESIDE, FIRST = "never rebalanced", "no plan", "beside a plan", "first with a placement"
DRAWS = 2000


class Steps(NamedTuple):
    """A round's timed steps.

    Attributes:
      seconds: of each.
      kind: one of the four of each.
      stretch: how many plans had been used before each.
      planning: the processor's seconds of plans that ended beside each.
      placing: the loop's seconds to place experts before each.
    """

    seconds: np.ndarray
    kind: np.ndarray
    stretch: np.ndarray
    planning: np.ndarray
    placing: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """Times over the median of the steps without a plan."""
        return self.seconds / self.median

    @property
    def median(self) -> float:
        """Seconds of the median step without a plan."""
        return float(np.median(self.seconds[(self.kind == ALONE) | (self.kind == APART)]))


def steps_of(lines: Sequence[dict[str, Any]]) -> Steps:
    """The steps of a metrics.jsonl."""
    planned = any("plan_of_step" in line for line in lines)
    found, plans = [], 0
    for line in lines:
        plans += "plan_of_step" in line
        if line["step"] <= UNTIMED or "step_seconds" not in line:
            continue
        kind = APART if planned else ALONE
        if line.get("planning_seconds"):
            kind = BESIDE
        elif "plan_of_step" in line:
            kind = FIRST
        taken = (line.get(name, 0.0) for name in ("planning_cpu_seconds", "rebalance_seconds"))
        found.append((line["step_seconds"], kind, plans, *taken))
    if not found:
        raise ValueError(f"no step after the first {UNTIMED} has its time: take longer runs")
    return Steps(*map(np.array, zip(*found, strict=True)))


def kinds(rounds: Sequence[Steps]) -> Iterator[dict[str, Any]]:
    """A line for each kind of steps."""
    for kind in (ALONE, APART, BESIDE, FIRST):
        chosen = [steps.kind == kind for steps in rounds]

        def of(values: Sequence[np.ndarray], chosen: Sequence[np.ndarray] = chosen) -> np.ndarray:
            return np.concatenate([each[which] for each, which in zip(values, chosen, strict=True)])

        times = of([steps.relative for steps in rounds])
        if not len(times):
            continue
        row = {
            "steps": kind,
            "number": len(times),
            "median ms": 1e3 * np.median(of([steps.seconds for steps in rounds])),
        }
        row |= {f"{100 * q:g}%": np.quantile(times, q) for q in (0.5, 0.9, 0.99)} | {"worst": times.max()}
        yield row | {
            "planning ms": 1e3 * of([steps.planning for steps in rounds]).max(),
            "placing ms": 1e3 * of([steps.placing for steps in rounds]).max(),
            "share %": 100 * of([(steps.planning + steps.placing) / steps.median for steps in rounds]).max(),
        }


def slower(rounds: Sequence[Steps]) -> Iterator[dict[str, Any]]:
    """What plans do to their steps."""
    rounds = [steps for steps in rounds if APART in steps.kind]
    if not rounds or not any(FIRST in steps.kind for steps in rounds):
        raise ValueError("no step has a new placement: take longer rounds, or runs with rebalancing")
    times, kind = (np.concatenate([getattr(steps, name) for steps in rounds]) for name in ("relative", "kind"))
    number = np.cumsum([0] + [steps.stretch.max() + 1 for steps in rounds])
    stretch = np.concatenate([steps.stretch + first for steps, first in zip(rounds, number, strict=False)])
    parts = [np.nonzero(stretch == each)[0] for each in np.unique(stretch)]
    for name, chosen in ((BESIDE, [BESIDE]), (FIRST, [FIRST]), ("either", [BESIDE, FIRST])):
        if not np.isin(kind, chosen).any():
            continue
        rng = np.random.default_rng(0)
        found, shifted, drawn = _ratio(times, kind, chosen), [], []
        for _ in range(DRAWS):
            moved = [np.roll(steps.kind, rng.integers(len(steps.kind))) for steps in rounds]
            shifted.append(_ratio(times, np.concatenate(moved), chosen))
            index = np.concatenate([parts[i] for i in rng.integers(len(parts), size=len(parts))])
            if np.isin(kind[index], chosen).any():
                drawn.append(_ratio(times[index], kind[index], chosen))
        low, high = np.quantile(drawn, [0.025, 0.975])
        chance = float(np.mean(np.array(shifted) >= found))
        yield {"steps": name, "slower": found, "from": low, "to": high, "by chance": chance}


def _ratio(times: np.ndarray, kind: np.ndarray, chosen: list[str]) -> float:
    return float(np.median(times[np.isin(kind, chosen)]) / np.median(times[kind == APART]))


def trained(args: argparse.Namespace, folder: pathlib.Path) -> list[Steps]:
    """The steps of rounds that take turns."""
    from pretraining.flags import train_parser  # noqa: PLC0415
    from pretraining.run import make_rebalancer  # noqa: PLC0415

    flags = train_parser().parse_args(["--steps", str(args.steps)])
    rounds, found, expected = Rounds(flags), [], None
    for turn in range(args.rounds):
        for name in ("never", "every"):
            rebalancer = make_rebalancer(flags, rounds.setup) if name == "every" else None
            lines = rounds.run(folder / f"{turn}-{name}", rebalancer)
            losses = np.array([line["loss"] for line in lines])
            expected = losses if expected is None else expected
            check(name, losses, expected, sum(line["dropped"] for line in lines))
            found.append(steps_of(lines))
    return found


def main() -> None:
    """Prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind")
    parser.add_argument("--steps", type=int, default=70, help="of a round; as many as `make train` has")
    parser.add_argument("--read", nargs="+", type=pathlib.Path, metavar="RUN", help="folders with metrics.jsonl")
    args = parser.parse_args()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        fake = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=1200"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fake}"
    report = Recorder.begin(args, machine(), f"{len(args.read) if args.read else args.rounds} rounds")
    if args.read:
        from pretraining.observe import METRICS, read_metrics  # noqa: PLC0415

        rounds = [steps_of(read_metrics(run / METRICS)) for run in args.read]
    else:
        with tempfile.TemporaryDirectory() as folder:
            rounds = trained(args, pathlib.Path(folder))
    report.table(kinds(rounds))
    report.table(slower(rounds), title="slower")


if __name__ == "__main__":
    main()
