"""The loss of a model trained in FP8 beside bfloat16: same steps, batches and beginnings, for one seed or several.

    python examples/benchmarks/fp8_loss.py FOLDER [--seeds 4] [--again] [--decay] [--steps 300] [--only fp8] [--tiny]

Model, data, optimizer and step are those of `examples/pretrain.py` on one device, DualPipeV; a seed decides about the
first parameters and the order of the text, and each precision is compiled once for all of them. Each run leaves its
losses in FOLDER as PRECISION-SEED.npy; what is there already is not run again, so that --only and --first share the
work between machines.

The table has the mean loss of some steps in a row, over all seeds, and the gap: by how much FP8's is higher than
bfloat16's of the same seed, with the standard error of its mean where there are several seeds. A young model magnifies
whatever differs, also the order in which a GPU adds: --again trains every seed in bfloat16 a second time, and the gap
between the two says what no precision explains. FOLDER/loss.svg is the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import Recorder, command_line, machine, make_parser, write_records

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import data, trainer
from pretraining.flags import train_parser
from pretraining.run import set_up

PRECISIONS = ("bf16", "fp8")
AGAIN = "bf16 again"
WINDOWS = 6
"""Rows of the table; the last of them is "at the end"."""


def runs_of(flags: list[str], decay: bool) -> Callable[[int], np.ndarray]:
    """What makes the loss of every step of a run from its seed; compiled once."""
    args = train_parser().parse_args(flags)
    setup = set_up(args)
    optimizer = setup.optimizer
    if decay:
        optimizer = trainer.make_optimizer(dataclasses.replace(setup.train_config, final=0.0), setup.model)
    step = trainer.make_step(setup.pipeline, setup.model, optimizer, setup.mesh)
    begin = jax.jit(lambda seed: trainer.init_state(dataclasses.replace(setup.model, seed=seed), optimizer, setup.mesh))

    def losses(seed: int) -> np.ndarray:
        state, rng = begin(jnp.int32(seed)), jax.random.key(seed)
        found: list[jax.Array] = []
        skipped: list[jax.Array] = []
        for number in range(args.steps):
            batch = data.make_batch(setup.corpus.train, seed, number, setup.batch, setup.config.sequence)
            state, metrics = step(state, jax.device_put(batch, setup.sharding), rng)
            found.append(metrics["loss"])
            skipped.append(metrics["skipped_in_a_row"])
            if not (number + 1) % 50:
                print(f"seed {seed}, step {number + 1}: loss {float(found[-1]):.4f}", file=sys.stderr, flush=True)
        if any(map(int, skipped)):
            raise RuntimeError(f"{sum(int(count) > 0 for count in skipped)} steps were skipped: no run to compare")
        return np.asarray(jax.device_get(found), np.float64)

    return losses


def gaps(losses: np.ndarray, plain: np.ndarray) -> tuple[float, float]:
    """By how many percent means are above those of the same seeds in bfloat16: the mean, and its standard error.

    Args:
      losses, plain: [seeds, steps].

    Returns:
      The error is NaN of a single seed.
    """
    each = 100 * (losses.mean(1) / plain.mean(1) - 1)
    error = each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
    return float(each.mean()), float(error)


def rows(losses: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Of the table, one a stretch of steps; losses are [seeds, steps]."""
    seeds, steps = losses["bf16"].shape
    for part in np.array_split(np.arange(steps), min(WINDOWS, steps)):
        plain, scaled = (losses[precision][:, part] for precision in PRECISIONS)
        gap, error = gaps(scaled, plain)
        row = {
            "steps": f"{part[0] + 1} to {part[-1] + 1}",
            "bf16": plain.mean(),
            "fp8": scaled.mean(),
            "fp8 / bf16": 1 + gap / 100,
            "apart at most, one step, %": 100 * np.abs(scaled / plain - 1).max(),
        }
        if seeds > 1:
            row |= {"gap %": gap, "its standard error %": error}
        if AGAIN in losses:
            again, error = gaps(losses[AGAIN][:, part], plain)
            row["bf16 again, gap %"] = again
            if seeds > 1:
                row["bf16 again, its standard error %"] = error
        yield row


def draw(losses: Mapping[str, np.ndarray], file: pathlib.Path) -> None:
    """The curves, mean over seeds, and the gap between running means below, with two standard errors around it."""
    from matplotlib import pyplot  # noqa: PLC0415

    seeds, count = losses["bf16"].shape
    width = max(1, count // 12)
    ends = np.arange(width, count + 1)
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained"
    )
    for name, colour in zip((*PRECISIONS, AGAIN), ("tab:blue", "tab:orange", "tab:gray"), strict=True):
        if name not in losses:
            continue
        mean = losses[name].mean(0)
        above.plot(np.arange(1, count + 1), mean, color=colour, alpha=0.25, linewidth=0.8)
        above.plot(ends, np.convolve(mean, np.ones(width) / width, "valid"), color=colour, label=name)
        if name == "bf16":
            continue
        found = [gaps(losses[name][:, end - width : end], losses["bf16"][:, end - width : end]) for end in ends]
        gap, error = np.array(found).T
        below.plot(ends, gap, color=colour)
        if seeds > 1:
            below.fill_between(ends, gap - 2 * error, gap + 2 * error, color=colour, alpha=0.25, linewidth=0)
    above.set_ylabel("loss" if seeds == 1 else f"loss, mean of {seeds} seeds")
    above.set_yscale("log")
    above.legend()
    below.axhspan(-0.25, 0.25, color="tab:green", alpha=0.15)
    below.set_ylabel("above bf16 by %")
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
    parser.add_argument("--seeds", type=int, default=1, help="how many, each trained in both precisions")
    parser.add_argument(
        "--again", action="store_true", help="train every seed in bfloat16 twice, as a measure of noise"
    )
    parser.add_argument("--decay", action="store_true", help="let the learning rate end at zero, not at a tenth")
    parser.add_argument("--only", choices=(*PRECISIONS, AGAIN), help="run this one, and compare nothing")
    parser.add_argument("--first", type=int, default=0, help="the first seed that is run; those before must be there")
    parser.add_argument("--tiny", action="store_true", help="the model tiny-128, to see that the script runs")
    args = parser.parse_args()
    if args.seeds < 1 or not 0 <= args.first < args.seeds:
        raise ValueError(f"--seeds {args.seeds} --first {args.first}: at least one seed, and the first is one of them")
    args.folder.mkdir(parents=True, exist_ok=True)
    flags, noted = shlex.join([*_flags(args, ""), *["--decay"] * args.decay]), args.folder / "flags.txt"
    if noted.exists() and noted.read_text(encoding="utf-8") != flags:
        raise ValueError(f"{args.folder} has losses of other flags: {noted.read_text(encoding='utf-8')}")
    noted.write_text(flags, encoding="utf-8")
    names = (*PRECISIONS, AGAIN) if args.again else PRECISIONS
    files = {
        name: [args.folder / f"{name.replace(' ', '-')}-{seed}.npy" for seed in range(args.seeds)] for name in names
    }
    for precision in PRECISIONS:
        losses_of = None
        for name in names if args.only is None else (args.only,):
            for seed in range(args.first, args.seeds):
                file = files[name][seed]
                if name.partition(" ")[0] != precision or file.exists():
                    continue
                losses_of = losses_of or runs_of(_flags(args, precision), args.decay)
                np.save(file, losses_of(seed))
    if args.only is not None:
        return
    found = {name: [np.load(file) for file in of_name] for name, of_name in files.items()}
    if len({len(each) for of_name in found.values() for each in of_name}) > 1:
        raise ValueError(f"runs of different numbers of steps: remove {args.folder} and run all")
    losses = {name: np.stack(of_name) for name, of_name in found.items()}
    kind = "tiny-128" if args.tiny else args.config
    report = Recorder.begin(args, machine(), kind, f"{losses['fp8'].shape[1]} steps", f"{args.seeds} seeds")
    table = list(rows(losses))
    formats = dict.fromkeys(("bf16", "fp8", "fp8 / bf16"), ".4f")
    report.table(table, formats=formats | {name: ".3f" for name in table[-1] if name.endswith("%")})
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
