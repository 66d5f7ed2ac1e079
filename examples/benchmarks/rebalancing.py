"""Steps of training while experts are moved: the slowest over the median, with live rebalancing and without.

    python examples/benchmarks/rebalancing.py --record           # on two GPUs
    python examples/benchmarks/rebalancing.py --tiny --devices 2

Model, data, loop and rebalancer are those of `examples/pretrain.py`, experts and spare slots over two devices. One
program, compiled before, runs the steps of all rounds, and would refuse other shapes: turns without rebalancing and
with a plan every few steps, whose placement is taken however little it gains. Figures are of the runs' metrics.jsonl,
without the first steps. "near a plan" are the steps from the first that runs beside a plan to the first that has its
placement; "plan" is the time of the longest plan, in its thread, and "waited" what the loop waited for plans. "moved"
is what devices got that they had not: each copy once. "dropped" are choices of tokens beyond the capacity, of all
layers and steps: any is an error, so --capacity must be enough for both kinds.

Losses are checked against the first round, which is without rebalancing. Sums in another order make runs in bfloat16
differ more and more, so the first steps must agree within 1e-2, each, and the mean of the last ten within 5%.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from record import Recorder, command_line, machine, make_parser, write_records

UNTIMED = 6
"""First steps of a round, which are left out: of the first, something is compiled or allocated."""

FIRST, LAST = 8, 10
"""Steps of a round, at its begin and at its end, whose losses are compared."""


def arguments_of(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of `examples/pretrain.py` that make the model."""
    from pretraining.flags import train_parser  # noqa: PLC0415

    config, dtype, slots = ("tiny", "float32", "12") if args.tiny else (args.config, "bfloat16", str(args.slots))
    flags = ["--config", config, "--dtype", dtype, "--slots", slots, "--mesh", f"pp=1,ep={args.devices}"]
    flags += ["--microbatch-size", str(args.microbatch_size), "--learning-rate", "3e-4"]
    flags += ["--fetched", args.fetched, "--capacity", args.capacity]
    flags += ["--layers", "3"] if args.tiny else []
    flags += ["--microbatches", str(args.sequences // args.microbatch_size), "--steps", str(args.steps)]
    return train_parser().parse_args(flags)


class Rounds:
    """Runs that share a compiled step and begin alike, as the flags of `examples/pretrain.py` say."""

    def __init__(self, flags: argparse.Namespace):
        """Compiles."""
        import jax  # noqa: PLC0415
        from pretraining import data, trainer  # noqa: PLC0415
        from pretraining.run import set_up  # noqa: PLC0415

        self.steps, self.setup = flags.steps, set_up(flags)
        model, optimizer, mesh = self.setup.model, self.setup.optimizer, self.setup.mesh
        state = trainer.abstract_state(model, optimizer, mesh)
        batch = data.make_batch(self.setup.corpus.train, 0, 0, self.setup.batch, self.setup.config.sequence)
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.setup.sharding), batch
        )
        step = trainer.make_step(self.setup.pipeline, model, optimizer, mesh)
        self.step = step.lower(state, batch, jax.random.key(0)).compile()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        self.start = jax.jit(lambda: trainer.init_state(model, optimizer, mesh), out_shardings=shardings)

    def run(self, out: pathlib.Path, rebalancer: Any = None) -> list[dict[str, float]]:
        """Metrics of the steps of a round, with a `Rebalancer` or without."""
        import jax  # noqa: PLC0415
        from pretraining import loop  # noqa: PLC0415
        from pretraining.observe import METRICS, Observer, Throughput, read_metrics  # noqa: PLC0415
        from pretraining.run import balance_of, batches_of  # noqa: PLC0415

        setup, steps = self.setup, self.steps
        batches = batches_of(setup.corpus.train, 0, setup)
        program = loop.TrainFunctions(self.step, batches, jax.random.key(0), balance=balance_of(setup))
        tokens = Throughput(setup.batch * setup.config.sequence, setup.config.flops_per_token, None)
        with Observer(out, steps, 0, tokens, every=steps) as observer:
            loop.train(loop.LoopConfig(steps), program, self.start(), observer, rebalancer=rebalancer)
        return read_metrics(out / METRICS)


def summary(lines: list[dict[str, float]]) -> dict[str, float]:
    """The figures of a round's metrics."""
    import numpy as np  # noqa: PLC0415

    seconds = {int(line["step"]): line["step_seconds"] for line in lines if line["step"] > UNTIMED}
    plans = [line for line in lines if "plan_of_step" in line]
    near = {step for line in plans for step in range(int(line["plan_of_step"]) + 1, int(line["step"]) + 1)}
    median = float(np.median(list(seconds.values())))
    others = [taken for step, taken in seconds.items() if step not in near]
    beside = [taken for step, taken in seconds.items() if step in near]
    longest = max((line["plan_seconds"] for line in plans), default=0.0)
    return {
        "median ms": 1e3 * median,
        "worst / median": max(seconds.values()) / median,
        "worst near a plan / median": max(beside, default=float("nan")) / median,
        "worst of others / median": max(others, default=float("nan")) / median,
        "balance": float(np.mean([line["balancedness"] for line in lines if line["step"] > UNTIMED])),
        "plans": len(plans),
        "plan ms": 1e3 * longest,
        "waited ms": 1e3 * sum(line["plan_waited_seconds"] for line in plans),
        "dropped": int(sum(line["dropped"] for line in lines)),
        "copies moved": int(sum(line["replicas_moved"] for line in plans)),
        "moved MB": sum(line["moved_bytes"] for line in plans) / 1e6,
    }


def rows(args: argparse.Namespace, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The table: a row a round, without and with rebalancing in turn."""
    import numpy as np  # noqa: PLC0415
    from pretraining.trainer import Rebalancer  # noqa: PLC0415

    rounds, expected = Rounds(arguments_of(args)), None
    for turn in range(args.rounds):
        for interval in (0, args.every):
            name = f"every {interval} steps" if interval else "never"
            rebalancer = None
            if interval:
                rebalancer = Rebalancer(rounds.setup.model, args.devices, interval=interval, min_gain=0.0)
            lines = rounds.run(folder / f"{turn}-{interval}", rebalancer)
            losses = np.array([line["loss"] for line in lines])
            expected = losses if expected is None else expected
            figures = summary(lines)
            yield {"rebalancing": name, "round": str(turn + 1), **figures}
            check(name, losses, expected, figures["dropped"])


def check(name: str, losses: Any, expected: Any, dropped: float) -> None:
    """Raises AssertionError where losses are not those of the first round, or where tokens were dropped."""
    import numpy as np  # noqa: PLC0415

    first = np.allclose(losses[:FIRST], expected[:FIRST], rtol=1e-2, atol=0)
    if not first or not np.isclose(losses[-LAST:].mean(), expected[-LAST:].mean(), rtol=5e-2, atol=0):
        raise AssertionError(f"rebalancing {name}: losses {losses.tolist()} in place of {expected.tolist()}")
    if dropped:
        raise AssertionError(f"rebalancing {name}: {dropped} choices of tokens were dropped; take more --capacity")


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="moe-1b", help="of examples/pretrain.py")
    parser.add_argument("--slots", type=int, default=20, help="of a layer's experts and copies of them")
    parser.add_argument("--devices", type=int, default=2, help="that experts are over")
    parser.add_argument("--sequences", type=int, default=32, help="of a step")
    parser.add_argument("--microbatch-size", type=int, default=8, help="sequences of a microbatch, on all devices")
    parser.add_argument("--capacity", default="none", help="of examples/pretrain.py; none is enough for any routing")
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--every", type=int, default=5, help="steps between plans")
    parser.add_argument("--fetched", default="all", help="of examples/pretrain.py: how working copies are made")
    parser.add_argument("--rounds", type=int, default=1, help="of each kind")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, on fake devices where there are no GPUs")
    args = parser.parse_args()
    if args.steps <= UNTIMED + args.every or args.every < 1 or args.rounds < 1:
        raise ValueError(
            f"--steps {args.steps} --every {args.every} --rounds {args.rounds}: the first {UNTIMED} steps are not "
            "timed, and a plan follows each --every; take more"
        )
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        fake = f"--xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fake}"
    report = Recorder.begin(args, machine(args.devices), f"{args.sequences} sequences a step, {args.steps} steps")
    found: dict[str, list[dict[str, Any]]] = {}

    def kept(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
        for row in rows(args, folder):
            found.setdefault(row["rebalancing"], []).append(row)
            yield row

    with tempfile.TemporaryDirectory() as folder:
        report.table(kept(pathlib.Path(folder)), labels=2)
    if report.file:
        moved = found[f"every {args.every} steps"]
        keys = {
            "worst_step_over_median_with_rebalancing": max(row["worst near a plan / median"] for row in moved),
            "worst_step_over_median_without_rebalancing": max(row["worst / median"] for row in found["never"]),
        }
        write_records(
            report.file,
            {key: (value, "") for key, value in keys.items()},
            command=command_line(),
            machine=report.machine,
        )


if __name__ == "__main__":
    main()
