"""A step with residuals in the host's memory beside the same step without: time and memory, and what plans say of both.

    python examples/benchmarks/offload.py [--ranks 1] [--schedule 1f1b] [--dispatches loops,unrolled] [--shares 0,0.5,1]

A stage of residual MLP layers in bfloat16, compiled as `jaxpipe.compiler_options` would have it. A share is of what the
stage keeps of a microbatch. On one GPU each microbatch's backward pass comes right behind its forward, and all that is
chosen goes to the host and back all the same.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from record import Recorder, machine, make_parser, medians_ms

import jaxpipe
from jaxpipe.planning.chips import chip_of

MEGA = 1e6


def stage(params, x, ctx):
    """Residual MLP layers."""
    for layer in range(params["up"].shape[0]):
        x = x + jnp.tanh(x @ params["up"][layer]) @ params["down"][layer]
    return x


def head(outer, y, data, ctx):
    """Mean square."""
    return jnp.mean(y.astype(jnp.float32) ** 2)


def measure(args: argparse.Namespace, dispatch: str) -> Iterator[dict[str, Any]]:
    """The rows of a dispatcher, whose steps take turns."""
    schedule = jaxpipe.schedule.build(args.schedule, args.ranks, args.microbatches)
    mesh, stages = jaxpipe.make_mesh(pp=args.ranks), schedule.num_stages
    shapes = {
        "up": (stages, args.layers, args.width, 4 * args.width),
        "down": (stages, args.layers, 4 * args.width, args.width),
    }
    kept = args.layers * 5 * args.width * args.tokens * 2  # each layer's input, and what tanh returns

    def make(offload: int) -> jaxpipe.Pipeline:
        return jaxpipe.value_and_grad(
            stage, schedule, mesh, head=head, dispatch=dispatch, order="storage", offload=offload
        )

    shardings = make(0).shardings(jaxpipe.Params({n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes.items()}))
    keys = jax.random.split(jax.random.key(0), 3)

    def init() -> jaxpipe.Params:
        scaled = [(keys[i], item) for i, item in enumerate(shapes.items())]
        return jaxpipe.Params(
            {name: jax.random.normal(key, shape, jnp.bfloat16) / shape[2] ** 0.5 for key, (name, shape) in scaled}
        )

    params = jax.jit(init, out_shardings=shardings)()
    batch = jax.random.normal(keys[2], (args.microbatches * args.tokens, args.width), jnp.bfloat16)
    chip = chip_of(jax.devices()[0].device_kind)
    found = []
    for share in map(float, args.shares.split(",")):
        pipeline = make(int(share * kept))
        options: Any = None if chip is None else jaxpipe.compiler_options(0, chip.memory, offload=share > 0)
        compiled = jax.jit(pipeline).lower(params, batch).compile(compiler_options=options)
        found.append((share, compiled, jaxpipe.plan(pipeline, params, batch, chip or "H200")))
    times = medians_ms([lambda step=step: step(params, batch) for _, step, _ in found], args.repeats, warm=2)
    for (share, compiled, plan), ms in zip(found, times, strict=True):
        memory: Any = compiled.memory_analysis()
        yield {
            "dispatch": dispatch,
            "share": f"{share:g}",
            "ms": ms,
            "planned ms": plan.seconds * 1e3,
            "link, planned ms": max(there + back for there, back, _ in plan.transfers) * 1e3,
            "not hidden, planned ms": max(exposed for *_, exposed in plan.transfers) * 1e3,
            "temp MB": memory.temp_size_in_bytes / MEGA,
            "planned temp MB": plan.memory.temporary / MEGA,
            "host MB": memory.host_temp_size_in_bytes / MEGA,
            "planned host MB": plan.memory.host / MEGA,
        }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=1, help="of the pipeline, each a GPU")
    parser.add_argument("--schedule", default="1f1b", help="of the pipeline")
    parser.add_argument("--dispatches", default="loops,unrolled", help="how ranks run their branches")
    parser.add_argument("--shares", default="0,0.5,1", help="of what a stage keeps, which go to the host")
    parser.add_argument("--layers", type=int, default=6, help="of a stage")
    parser.add_argument("--width", type=int, default=4096, help="of the activations; the MLPs' is four times that")
    parser.add_argument("--tokens", type=int, default=8192, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step")
    parser.add_argument("--repeats", type=int, default=10, help="steps of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.width, args.tokens, args.microbatches = 2, 16, 16, 4
    size = f"{args.schedule}, {args.layers} layers of width {args.width} a stage, {args.tokens} tokens a microbatch"
    rows = (row for dispatch in args.dispatches.split(",") for row in measure(args, dispatch))
    Recorder.begin(args, machine(args.ranks), size).table(rows, labels=2)


if __name__ == "__main__":
    main()
