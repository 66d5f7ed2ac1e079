"""A training step of a whole model on one GPU and on two: pipelines of two ranks, and experts over two devices.

    python examples/benchmarks/pretrain_gpus.py [--config moe-1b] [--programs one,ep,dualpipev] [--sequences 64]
        [--tiny]

Model, data, optimizer and step are those of `examples/pretrain.py`, float32 masters and bfloat16 products, and so are
its defaults: who runs embedding and head, and how ranks run their branches. All programs train from the same weights
on the same batches, of as many sequences; losses that differ by more than 1% after these steps are an error. "planned"
is the time that `examples/pretrain.py plan` foresees on this chip.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chunks import gib
from record import Recorder, command_line, machine, make_parser, write_records

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import data, trainer
from pretraining import plan as planning
from pretraining.flags import train_parser
from pretraining.run import Setup, set_up

from jaxpipe.planning.chips import chip_of

PIPELINES = ("1f1b", "zb1p", "zbv", "dualpipe", "dualpipev")
PROGRAMS = ("one", "ep", *PIPELINES)
"""One GPU; two that have half of the experts and of each microbatch; two ranks of a pipeline, by their schedule."""
UNTIMED = 2
"""Steps before those that are timed."""


class TrainingProgram(NamedTuple):
    """A program on its way.

    Attributes:
      setup: what it trains.
      step, start: of the state, being compiled.
    """

    setup: Setup
    step: Future[Any]
    start: Future[Any]


def arguments_of(program: str, args: argparse.Namespace) -> argparse.Namespace:
    """The flags of `examples/pretrain.py` that make a program."""
    devices = {"one": "pp=1,ep=1", "ep": "pp=1,ep=2"}.get(program, "pp=2,ep=1")
    size = args.microbatch_size * (2 if program == "ep" else 1)
    flags = ["--config", "tiny" if args.tiny else args.config, "--mesh", devices]
    flags += ["--schedule", program if program in PIPELINES else "dualpipev", "--microbatch-size", str(size)]
    flags += ["--microbatches", str(args.sequences // size), "--learning-rate", "3e-4", "--rebalance-every", "0"]
    return train_parser().parse_args([*flags, "--dtype", "float32" if args.tiny else "bfloat16"])


def begin(setup: Setup, pool: ThreadPoolExecutor) -> TrainingProgram:
    """Traces a program and has it compiled."""
    batch = data.make_batch(setup.corpus.train, 0, 0, setup.batch, setup.config.sequence)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=setup.sharding), batch)
    step = trainer.make_step(setup.pipeline, setup.model, setup.optimizer, setup.mesh)
    state = trainer.abstract_state(setup.model, setup.optimizer, setup.mesh)
    lowered = step.lower(state, shapes, jax.random.key(0))
    start = jax.jit(
        lambda: trainer.init_state(setup.model, setup.optimizer, setup.mesh),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    ).lower()
    return TrainingProgram(setup, pool.submit(lowered.compile), pool.submit(start.compile))


def train(program: TrainingProgram, steps: int) -> tuple[list[float], list[float], int]:
    """Seconds and loss of each step, and the compiler's bytes of temporaries."""
    setup, step, start = program.setup, program.step.result(), program.start.result()
    batches = [
        jax.device_put(data.make_batch(setup.corpus.train, 0, n, setup.batch, setup.config.sequence), setup.sharding)
        for n in range(steps)
    ]
    state, rng = start(), jax.random.key(0)
    jax.block_until_ready((state, batches))
    seconds, losses = [], []
    for batch in batches:
        begun = time.perf_counter()
        state, metrics = step(state, batch, rng)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - begun)
    return seconds, losses, step.memory_analysis().temp_size_in_bytes


def planned_seconds(setup: Setup, args: argparse.Namespace) -> float:
    """What a plan says of a program; NaN where it knows no such chip."""
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is None:
        return float("nan")
    plan = planning.plan(
        setup.config,
        {"pp": setup.mesh.shape["pp"], "ep": setup.mesh.shape.get("ep", 1)},
        schedules=[setup.schedule.name],
        microbatches=setup.schedule.num_microbatches,
        microbatch_size=args.microbatch_size,
        dtype=jnp.bfloat16,
        chip=chip,
    )
    (row,) = plan.rows
    return row.seconds if row.memory is not None else float("nan")


def rows(programs: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The table: a row a program, the first one first."""
    reference: tuple[float, float] | None = None
    with ThreadPoolExecutor(2 * len(programs)) as pool:
        begun = {name: begin(set_up(arguments_of(name, args)), pool) for name in programs}
        planned = {name: planned_seconds(program.setup, args) for name, program in begun.items()}  # meanwhile
        for name, program in begun.items():
            seconds, losses, temporaries = train(program, args.steps)
            taken = float(np.median(seconds[UNTIMED:]))
            reference = first = reference or (taken, losses[-1])
            if abs(losses[-1] / first[1] - 1) > 1e-2:
                raise AssertionError(f"{name}: a loss of {losses[-1]} after {args.steps} steps in place of {first[1]}")
            yield {
                "program": name,
                "shared ends": "yes" if program.setup.model.shared_ends else "no",
                "step ms": 1e3 * taken,
                "tokens/s": round(program.setup.batch * program.setup.config.sequence / taken),
                f"speed / {programs[0]}": first[0] / taken,
                "planned ms": 1e3 * planned[name],
                "step / planned": taken / planned[name],
                "temporaries GiB": gib(temporaries),
                "last loss": losses[-1],
            }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="moe-1b", help="of examples/pretrain.py")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which, in this order")
    parser.add_argument("--sequences", type=int, default=64, help="of a step")
    parser.add_argument("--microbatch-size", type=int, default=4, help="sequences of a microbatch on a device")
    parser.add_argument("--steps", type=int, default=8, help="of each program")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, to see that the script runs")
    args = parser.parse_args()
    programs = args.programs.split(",")
    if unknown := [name for name in programs if name not in PROGRAMS]:
        raise ValueError(f"--programs {args.programs}: {unknown} are none of {', '.join(PROGRAMS)}")
    if args.steps <= UNTIMED:
        raise ValueError(f"--steps {args.steps}: the first {UNTIMED} are not timed; take more")
    report = Recorder.begin(args, machine(), f"{args.sequences} sequences a step, {args.steps} steps")
    found: dict[str, float] = {}

    def kept() -> Iterator[dict[str, Any]]:
        for row in rows(programs, args):
            found[row["program"]] = row["tokens/s"]
            yield row

    report.table(kept())
    pipelines = [found[name] for name in PIPELINES if name in found]
    if report.file and {"one", "ep"} <= set(found) and pipelines:
        keys = {"moe1b_two_gpus_pp_over_one": max(pipelines), "moe1b_two_gpus_ep_over_one": found["ep"]}
        ratios = {key: (speed / found["one"], "") for key, speed in keys.items()}
        write_records(report.file, ratios, command=command_line(), machine=report.machine)


if __name__ == "__main__":
    main()
