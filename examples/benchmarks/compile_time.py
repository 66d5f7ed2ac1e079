"""Compile time and program size of a DualPipeV training step against the number of microbatches.

python examples/benchmarks/compile_time.py [--ranks 4] [--microbatches 8 16 32] [--dispatch stretches]
"""

import os
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from record import Recorder, machine, make_parser

import jaxpipe
from jaxpipe.runtime.options import DISPATCHERS


def stage(params, x, ctx):
    """Four residual MLP layers."""
    for layer in range(4):
        x = x + jax.nn.gelu(x @ params["up"][layer]) @ params["down"][layer]
    return x


def head(outer, y, data, ctx):
    """Mean square."""
    return jnp.mean(y**2)


def rows(ranks: int, counts: list[int], dispatch: str | None) -> Iterator[dict[str, Any]]:
    """The table's, one for each number of microbatches."""
    for microbatches in counts:
        start = time.perf_counter()
        schedule = jaxpipe.schedule.build("dualpipev", ranks, microbatches)
        step = jaxpipe.value_and_grad(
            stage, schedule, jaxpipe.make_mesh(pp=ranks), head=head, order="storage", dispatch=dispatch
        )
        tables = time.perf_counter()
        params = {"up": jnp.ones((2 * ranks, 4, 64, 256)), "down": jnp.ones((2 * ranks, 4, 256, 64))}
        lowered = jax.jit(step).lower(jaxpipe.Params(params), jnp.ones((2 * microbatches, 64)))
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        yield {
            "microbatches": microbatches,
            "lowering tables s": tables - start,
            "tracing s": traced - tables,
            "compiling s": done - traced,
            "tracing and compiling s": done - tables,
            "HLO kB": round(len(compiled.as_text() or "") / 1e3),
            "steps": step.program.num_steps,
        }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="of the pipeline")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="of a step")
    parser.add_argument("--dispatch", choices=DISPATCHERS, help="default: that of CPUs, sequential")
    args = parser.parse_args()
    text = f"{args.ranks} ranks{f', {args.dispatch}' if args.dispatch else ''}"
    Recorder.begin(args, machine(), text).table(rows(args.ranks, args.microbatches, args.dispatch))


if __name__ == "__main__":
    main()
