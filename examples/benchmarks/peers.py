"""Every schedule of this library and, where it is installed, SpectraX's DualPipeV, on the same MLP stages: one table.

    pip install spectrax-lib==0.1.4     # wanted, not needed
    python examples/benchmarks/peers.py [--ranks 4] [--microbatches 8] [--width 512] [--layers 2]

Each row is a process of its own with fake CPU devices, one a rank: seconds until the first step is done (tracing and
compiling included), median of later steps, and the process's largest memory. The model is the same in every row.
"plain" is gradient accumulation on one device. CPU devices share cores, so that a bubble costs nothing here: this
compares what programs cost beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from record import Recorder, make_parser, medians_ms, processor

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")


def run(step: Callable[[], Any], block: Callable[[Any], Any], repeats: int) -> dict[str, float]:
    """First step's and later steps' seconds, the loss, and this process's peak memory."""
    start = time.perf_counter()
    result = block(step())
    first = time.perf_counter() - start
    (ms,) = medians_ms([step], repeats, warm=0, wait=block)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first": first, "step": ms, "peak": peak, "loss": float(result[0])}


def ours(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One of our schedules, or "plain"."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    import jaxpipe  # noqa: PLC0415

    schedule = jaxpipe.schedule.build("gpipe" if name == "plain" else name, args.ranks, args.microbatches)
    # All cut the same model: as many layers in all, whatever the number of stages.
    layers = 2 * args.ranks * args.layers // schedule.num_stages
    shape = (schedule.num_stages, layers, args.width, args.width)
    model = {
        part: jax.random.normal(key, shape) * args.width**-0.5
        for part, key in zip("ab", jax.random.split(jax.random.key(0), 2), strict=True)
    }
    stages = jaxpipe.stack_stages(model, schedule, order="storage")
    batch = jax.random.normal(jax.random.key(1), (args.microbatches * args.rows, args.width))

    def stage(params: Any, x: jax.Array, ctx: Any) -> jax.Array:
        for i in range(layers):
            x = x + jnp.tanh(x @ params["a"][i]) @ params["b"][i]
        return x

    def head(outer: Any, y: jax.Array, data: jax.Array, ctx: Any) -> jax.Array:
        return jnp.mean(y**2)

    if name == "plain":

        def loss(stages: Any, x: jax.Array) -> jax.Array:
            for i in range(schedule.num_stages):
                x = stage({name: leaf[i] for name, leaf in stages.items()}, x, None)
            return jnp.mean(x**2)

        def accumulate(stages: Any, batch: jax.Array) -> Any:
            def one(grads: Any, x: jax.Array) -> Any:
                value, more = jax.value_and_grad(loss)(stages, x)
                return jax.tree.map(jnp.add, grads, more), value

            micro = batch.reshape(args.microbatches, -1, args.width)
            grads, values = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, stages), micro)
            return values.mean(), grads

        function: Any = jax.jit(accumulate)
        return run(lambda: function(stages, batch), jax.block_until_ready, args.repeats)
    mesh = jaxpipe.make_mesh(pp=args.ranks)
    step = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, head=head, order="storage"))
    params = jaxpipe.Params(stages)

    def call() -> Any:
        (loss, _), grads = step(params, batch)
        return loss, grads

    return run(call, jax.block_until_ready, args.repeats)


def spectrax(args: argparse.Namespace) -> dict[str, float]:
    """SpectraX's DualPipeV."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    spx: Any = importlib.import_module("spectrax")
    runtime: Any = importlib.import_module("spectrax.runtime")
    make_stage: Any = importlib.import_module("spectrax_stage").Stage
    rngs = spx.Rngs(0)
    # On the host: an array on a device counts as assigned to the stage that the device belongs to.
    stages = [jax.tree.map(np.asarray, make_stage(args.width, args.layers, rngs)) for _ in range(2 * args.ranks)]
    model = importlib.import_module("spectrax.nn").PipelineSequential(*stages)
    mesh = spx.create_mesh(axis_dims=(args.ranks, 1, -1, 1, 1, 1), mpmd_axis="pp")
    batch = jax.random.normal(jax.random.key(1), (args.microbatches * args.rows, args.width))

    def loss(y: jax.Array) -> jax.Array:  # one function: compiled programs are kept by its identity
        return jnp.mean(y**2)

    schedule = runtime.DualPipeV(args.microbatches)

    def step() -> Any:
        return runtime.sxcall(model, (batch,), mesh=mesh, schedule=schedule, loss_fn=loss)

    return run(step, jax.block_until_ready, args.repeats)


def measure(name: str, argv: list[str], ranks: int) -> dict[str, Any] | None:
    """A row of the table from a process of its own; None, with the reason printed, if it fails."""
    flags = f"--xla_force_host_platform_device_count={ranks} --xla_cpu_collective_call_terminate_timeout_seconds=1200"
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    command = [sys.executable, __file__, "--row", name, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        print(f"{name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


def rows(names: list[str], ranks: int) -> Iterator[dict[str, Any]]:
    """The table's; the first is what the others are compared with."""
    plain = None
    for name in names:
        row = measure(name, sys.argv[1:], ranks)
        if row is None:
            continue
        plain = row["step"] if plain is None else plain
        yield {
            "program": "SpectraX DualPipeV" if name == "spectrax" else name,
            "first step s": row["first"],
            "step ms": row["step"],
            "of plain": row["step"] / plain,
            "peak memory MiB": row["peak"] / 2**20,
            "loss": row["loss"],
        }


def main() -> None:
    """Prints the table, or in a process of its own one row."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="of the pipeline")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step")
    parser.add_argument("--width", type=int, default=512, help="of the activations")
    parser.add_argument("--layers", type=int, default=2, help="of one of two stages a rank")
    parser.add_argument("--rows", type=int, default=256, help="of a microbatch")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(spectrax(args) if args.row == "spectrax" else ours(args.row, args)))
        return
    size = f"{args.ranks} ranks, {args.microbatches} microbatches of {args.rows} x {args.width}"
    names = ["plain", *SCHEDULES, *(["spectrax"] if importlib.util.find_spec("spectrax") else [])]
    formats = {"first step s": ".1f", "step ms": ".0f", "of plain": ".2f", "peak memory MiB": ".0f", "loss": ".4f"}
    Recorder.begin(args, processor(), size).table(rows(names, args.ranks), formats=formats)


if __name__ == "__main__":
    main()
