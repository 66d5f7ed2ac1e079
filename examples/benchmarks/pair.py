"""An overlapped pair of DeepSeek-V3's chunk, F of one microbatch and I and W of another, against the matmul ceiling.

    python examples/benchmarks/pair.py [--layers 4] [--precision bf16] [--repeats 7] [--profile FOLDER] [--tiny]

The pair is the body of `python -m profiling run train`: four MoE layers, 4,096 tokens each way, bfloat16, the experts
of one device of 64; with --precision fp8 Linears and experts multiply numbers of 8 bits, casts included. Its time is
half of what two more pairs in a call take. FLOPs are the model's: matrix products, and causal attention's, three times
the forward; nothing counts that is computed again. "plain product" is the best of some bfloat16 matrix products, which
take turns with the pair. With --profile a table follows of where the time goes, from a profile of the same program;
XLA_FLAGS=--xla_gpu_enable_command_buffer= lets it name operations.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from chunks import compile_all, tiny_fp8
from record import Recorder, machine, make_parser, medians_ms

from profiling.metrics import time_by
from profiling.workloads import SIZES, Sizes
from profiling.workloads.run import make_mesh, prepare, run

CEILING = (8192, 8192, 8192), (16384, 8192, 7168), (4096, 7168, 16384)
"""Plain products: rows, summed over, columns."""

MOST = 40
"""Rows of the profile's table."""


def forward_flops(sizes: Sizes) -> float:
    """Of one token through all layers, its attention to half of the sequence included."""
    matrices = sizes.layer_matrices(sizes.moe.router.top_k)
    return float(sizes.layers * (2 * matrices + sizes.score_flops(sizes.sequence)))


def products(sizes: tuple[int, int, int]) -> Any:
    """A call that multiplies two matrices."""
    rows, inner, columns = sizes
    a = jax.random.normal(jax.random.key(0), (rows, inner), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(1), (inner, columns), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(a, b)


def main() -> None:
    """Prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of the model's share")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp8"], help="of Linears and experts")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--profile", metavar="FOLDER", help="where a profile goes, replaced if there is one")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    sizes = dataclasses.replace(tiny_fp8() if args.tiny else SIZES["dsv3"], layers=args.layers)
    plain = ((64, 64, 64),) if args.tiny else CEILING
    mesh = make_mesh(1)
    made = [prepare("train", sizes, mesh, jnp.bfloat16, pairs=pairs, precision=args.precision) for pairs in (1, 3)]
    compiled = compile_all([function.lower(*arguments) for function, arguments in made])
    calls = [functools.partial(step, *arguments) for step, (_, arguments) in zip(compiled, made, strict=True)]
    one, three, *alone = medians_ms([*calls, *map(products, plain)], args.repeats)
    pair = (three - one) / 2
    rates = [2 * a * b * c / ms / 1e9 for (a, b, c), ms in zip(plain, alone, strict=True)]
    flops = 3 * forward_flops(sizes) * sizes.sequence
    report = Recorder.begin(args, machine(), f"{sizes.layers} layers, {sizes.sequence} tokens, {args.precision}")
    report.table(
        [
            {
                "pair ms": pair,
                "TFLOP": flops / 1e12,
                "TFLOP/s": flops / pair / 1e9,
                "plain product TFLOP/s": max(rates),
                "share %": 100 * flops / pair / 1e9 / max(rates),
            }
        ],
        labels=0,
    )
    if args.profile:
        found = run("train", sizes, args.profile, mesh=mesh, dtype=jnp.bfloat16, precision=args.precision)
        events = [event for event in found.trace.events if event.group != "control"]
        whole = sum(event.duration for event in events)
        rows = time_by(events, lambda event: f"{event.phase or 'else'}: {event.kind}")
        shares = [{"phase and kind": row.name, "share %": 100 * row.total / whole} for row in rows[:MOST]]
        report.table(shares, title="profile")


if __name__ == "__main__":
    main()
