"""The loss of a model trained in FP8 beside the same run in bfloat16: same steps, same batches, same beginning.

    python examples/benchmarks/fp8_loss.py FOLDER [--config moe-1b] [--steps 300] [--only fp8] [--tiny]

Model, data, optimizer and step are those of `examples/pretrain.py` on one device, DualPipeV. Each run leaves its losses
in FOLDER as PRECISION.npy; what is there already is not run again, so that --only lets two machines share the work.
The table has the mean loss of some steps in a row, and how far apart the two are; FOLDER/loss.svg is the picture.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from record import Recorder, command_line, machine, make_parser, write_records

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import data, trainer
from pretraining.flags import train_parser
from pretraining.run import set_up

PRECISIONS = ("bf16", "fp8")
WINDOWS = 6
"""Rows of the table; the last of them is "at the end"."""


def losses_of(flags: list[str]) -> np.ndarray:
    """The loss of every step of a run."""
    args = train_parser().parse_args(flags)
    setup = set_up(args)
    step = trainer.make_step(setup.pipeline, setup.model, setup.optimizer, setup.mesh)
    state, rng = trainer.init_state(setup.model, setup.optimizer, setup.mesh), jax.random.key(args.seed)
    found: list[jax.Array] = []
    skipped: list[jax.Array] = []
    for number in range(args.steps):
        batch = data.make_batch(setup.corpus.train, args.seed, number, setup.batch, setup.config.sequence)
        state, metrics = step(state, jax.device_put(batch, setup.sharding), rng)
        found.append(metrics["loss"])
        skipped.append(metrics["skipped_in_a_row"])
        if not (number + 1) % 50:
            print(f"step {number + 1}: loss {float(found[-1]):.4f}", file=sys.stderr, flush=True)
    if any(map(int, skipped)):
        raise RuntimeError(f"{sum(int(count) > 0 for count in skipped)} steps were skipped: no run to compare")
    return np.asarray(jax.device_get(found), np.float64)


def rows(losses: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Of the table, one a stretch of steps."""
    plain, scaled = (
        np.array_split(losses[precision], min(WINDOWS, len(losses[precision]))) for precision in PRECISIONS
    )
    begin = 0
    for a, b in zip(plain, scaled, strict=True):
        end = begin + len(a)
        yield {
            "steps": f"{begin + 1} to {end}",
            "bf16": a.mean(),
            "fp8": b.mean(),
            "fp8 / bf16": b.mean() / a.mean(),
            "apart at most, one step, %": 100 * np.abs(b / a - 1).max(),
        }
        begin = end


def draw(losses: Mapping[str, np.ndarray], file: pathlib.Path) -> None:
    """Both curves, and the gap between their running means below."""
    from matplotlib import pyplot  # noqa: PLC0415

    width = max(1, len(losses["bf16"]) // 12)
    smooth = {name: np.convolve(each, np.ones(width) / width, "valid") for name, each in losses.items()}
    steps = np.arange(width, len(losses["bf16"]) + 1)
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained"
    )
    for name, colour in zip(PRECISIONS, ("tab:blue", "tab:orange"), strict=True):
        above.plot(np.arange(1, len(losses[name]) + 1), losses[name], color=colour, alpha=0.25, linewidth=0.8)
        above.plot(steps, smooth[name], color=colour, label=name)
    above.set_ylabel("loss")
    above.set_yscale("log")
    above.legend()
    below.plot(steps, 100 * (smooth["fp8"] / smooth["bf16"] - 1), color="black")
    below.axhspan(-0.25, 0.25, color="tab:green", alpha=0.15)
    below.set_ylabel("fp8 higher by %")
    below.set_xlabel(f"step; means of {width} steps")
    figure.savefig(file)


def main() -> None:
    """Trains, and compares."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="of losses and picture")
    parser.add_argument("--config", default="moe-1b", help="of examples/pretrain.py")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step")
    parser.add_argument("--microbatch-size", type=int, default=4, help="sequences")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="after the warm-up")
    parser.add_argument("--only", choices=PRECISIONS, help="run this one, and compare nothing")
    parser.add_argument("--tiny", action="store_true", help="the model tiny-128, to see that the script runs")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    flags, noted = shlex.join(_flags(args, "")), args.folder / "flags.txt"
    if noted.exists() and noted.read_text(encoding="utf-8") != flags:
        raise ValueError(f"{args.folder} has losses of other flags: {noted.read_text(encoding='utf-8')}")
    noted.write_text(flags, encoding="utf-8")
    for precision in PRECISIONS if args.only is None else (args.only,):
        file = args.folder / f"{precision}.npy"
        if not file.exists():
            np.save(file, losses_of(_flags(args, precision)))
    if args.only is not None:
        return
    losses = {precision: np.load(args.folder / f"{precision}.npy") for precision in PRECISIONS}
    if len({len(each) for each in losses.values()}) > 1:
        raise ValueError(f"runs of {[len(each) for each in losses.values()]} steps: remove {args.folder} and run both")
    report = Recorder.begin(args, machine(), "tiny-128" if args.tiny else args.config, f"{len(losses['fp8'])} steps")
    table = list(rows(losses))
    report.table(table, formats=dict.fromkeys(("bf16", "fp8", "fp8 / bf16"), ".4f"))
    draw(losses, args.folder / "loss.svg")
    if report.file:
        gap = abs(table[-1]["fp8 / bf16"] - 1)
        write_records(report.file, {"fp8_loss_gap": (gap, "")}, command=command_line(), machine=report.machine)


def _flags(args: argparse.Namespace, precision: str) -> list[str]:
    flags = ["--config", "tiny-128" if args.tiny else args.config, "--mesh", "pp=1,ep=1", "--precision", precision]
    flags += ["--dtype", "bfloat16", "--steps", str(args.steps), "--learning-rate", str(args.learning_rate)]
    flags += ["--warmup", str(min(100, args.steps // 3))]
    return [*flags, "--microbatches", str(args.microbatches), "--microbatch-size", str(args.microbatch_size)]


if __name__ == "__main__":
    main()
