"""What a step of several ranks moves into slots, out of them and from place to place, counted in the compiled program.

"reads" and "writes" are slices as large as a microbatch's activations that are read at a place that is a number of the
program's and written there; "copies" are whole arrays of that size or more, pools among them, that are copied as they
are. All are those of a step on the average rank, each loop counted as often as it runs. "MB" is what they move, where
activations are 32 kB. "host reads" are conditions of loops. The program is compiled for CPUs, which fuse other things
than GPUs do: what is compared is the one way to run a program with the other.

    python examples/benchmarks/slot_copies.py [--schedules dualpipev zbv 1f1b] [--ranks 2] [--dispatch by_rank]
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from record import Recorder, machine, make_parser

import jaxpipe
from jaxpipe.runtime.by_rank import code_in_stretches
from jaxpipe.runtime.stretches import host_reads
from jaxpipe.schedule import BUILDERS
from profiling.hlo.text import Computation, Instruction, Module, parse
from profiling.read.pipeline import loop_trips

WIDTH, HIDDEN, TOKENS, LAYERS = 32, 64, 256, 2
ACTIVATIONS = TOKENS * WIDTH * 4
"""Bytes of a microbatch's; parameters of a layer take a quarter."""


def stage(params, x, ctx):
    """Residual MLP layers."""
    for layer in range(LAYERS):
        x = x + jax.nn.gelu(x @ params["up"][layer]) @ params["down"][layer]
    return x


def embed(outer, data, ctx):
    """Activations of a microbatch that is one number."""
    return jnp.tanh(data[:, :1] * outer)


def head(outer, y, data, ctx):
    """Mean square."""
    return jnp.mean(y**2)


def compiled_step(name: str, ranks: int, microbatches: int, dispatch: str) -> tuple[Any, str]:
    """(the pipeline, its compiled text)."""
    schedule = jaxpipe.schedule.build(name, ranks, microbatches)
    step = jaxpipe.value_and_grad(
        stage, schedule, jaxpipe.make_mesh(pp=ranks), embed=embed, head=head, order="storage", dispatch=dispatch
    )
    count = schedule.num_stages
    stages = {"up": jnp.ones((count, LAYERS, WIDTH, HIDDEN)), "down": jnp.ones((count, LAYERS, HIDDEN, WIDTH))}
    params = jaxpipe.Params(stages, jnp.ones((TOKENS, WIDTH)))
    return step, jax.jit(step).lower(params, jnp.ones((microbatches, 1))).compile().as_text() or ""


def count_moves(module: Module, trips: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Reads, writes and copies of activations, and their bytes; ``trips`` as of `profiling.overlap`."""
    found: dict[str, float] = defaultdict(float)

    def times(loop: Instruction) -> float:
        if loop.trip_count is not None:
            return loop.trip_count
        labels = [inner.op_name for called in module.called(loop) for inner in called.instructions]
        return next((mean for pattern, mean in trips if any(re.search(pattern, label) for label in labels)), 1.0)

    def walk(computation: Computation, weight: float) -> None:
        for each in computation.instructions:
            kind, nbytes = move(computation, each)
            if nbytes >= ACTIVATIONS:
                found[kind] += weight
                found["bytes"] += weight * nbytes
            for called in module.called(each):
                walk(called, weight * (times(each) if each.opcode == "while" else 1.0))

    walk(module[module.entry], 1.0)
    return found


def move(computation: Computation, each: Instruction) -> tuple[str, int]:
    """(what kind of move an instruction is, bytes); ("", 0) if it is none."""
    nbytes = sum(array.bytes for array in each.arrays)
    operands = computation.operands(each)
    if each.opcode == "dynamic-slice":
        return "reads", nbytes
    if each.opcode == "dynamic-update-slice":
        return "writes", sum(array.bytes for array in operands[1].arrays)
    if each.opcode in ("copy", "copy-start") and operands[0].arrays[0].layout == each.arrays[0].layout:
        return "copies", each.arrays[0].bytes
    return "", 0


def rows(names: list[str], ranks: int, microbatches: int, ways: list[str]) -> Iterator[dict[str, Any]]:
    """The table's, one for each schedule and way to run it."""
    for name in names:
        for way in ways:
            step, text = compiled_step(name, ranks, microbatches, way)
            module = parse(text)
            each = [count_moves(module, loop_trips(step.program, rank, dispatch=way)) for rank in range(ranks)]
            yield {
                "schedule": name,
                "ranks": ranks,
                "microbatches": microbatches,
                "dispatch": way,
                **{kind: float(np.mean([found[kind] for found in each])) for kind in ("reads", "writes", "copies")},
                "MB": float(np.mean([found["bytes"] for found in each])) / 1e6,
                "host reads": float(host_reads(code_in_stretches(step.program, way)[1]).mean()),
                "HLO kB": round(len(text) / 1e3),
            }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--schedules", choices=BUILDERS, nargs="+", default=["dualpipev", "zbv", "1f1b"], help="which")
    parser.add_argument("--ranks", type=int, default=2, help="of the pipeline")
    parser.add_argument("--microbatches", type=int, default=16, help="of a step")
    parser.add_argument(
        "--dispatch", choices=["stretches", "by_rank"], nargs="+", default=["stretches", "by_rank"], help="compared"
    )
    args = parser.parse_args()
    formats = dict.fromkeys(["reads", "writes", "copies", "host reads"], ".0f") | {"MB": ".1f"}
    table = rows(args.schedules, args.ranks, args.microbatches, args.dispatch)
    Recorder.begin(args, machine()).table(table, labels=4, formats=formats)


if __name__ == "__main__":
    main()
