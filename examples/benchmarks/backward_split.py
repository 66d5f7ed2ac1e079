"""What dividing the backward pass costs: the input's half and the weights' half beside the whole, of the same chunk.

    python examples/benchmarks/backward_split.py [--repeats 9] [--tiny]

Each is a program of its own; "jax.vjp" is the backward pass that JAX makes of the stage without jaxpipe. Bytes are what
crosses from the first half to the second.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from chunks import Chunk, chunks, gib, nbytes
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

import jaxpipe
from jaxpipe.stage import split_stage


def measure(chunk: Chunk, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    mesh = jaxpipe.make_mesh(ep=1)
    ctx = jaxpipe.Context(jnp.int32(0), jnp.int32(0), None, None)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), chunk.init(jax.random.key(0)))
    x, ct = jax.random.normal(jax.random.key(1), (2, 1, chunk.tokens, chunk.width), jnp.bfloat16)

    def stage(params: Any, x: jax.Array) -> jax.Array:
        return chunk.stage(params, x, ctx)

    def alone(function: Any) -> Any:
        """Compiled for one device of the experts' axis."""
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))

    def forward(params: Any, x: jax.Array) -> Any:
        split = split_stage(stage, params, x)
        prepared = split.prepare(params)
        return prepared, split.forward(prepared, x)[1]

    def first(prepared: Any, kept: Any, ct: jax.Array, params: Any, x: jax.Array) -> Any:
        return split_stage(stage, params, x).backward_input(prepared, kept, ct)

    def second(prepared: Any, kept: Any, crossing: Any, params: Any, x: jax.Array) -> Any:
        return split_stage(stage, params, x).backward_weight(prepared, kept, crossing)

    def whole(prepared: Any, kept: Any, ct: jax.Array, params: Any, x: jax.Array) -> Any:
        return split_stage(stage, params, x).backward(prepared, kept, ct)

    prepared, kept = alone(forward)(params, x)
    run_first, run_second, run_whole = alone(first), alone(second), alone(whole)
    _, crossing = run_first(prepared, kept, ct, params, x)
    pull = alone(lambda params, x, ct: jax.vjp(stage, params, x)[1](ct))
    only_forward = alone(stage)
    input_ms, weight_ms, whole_ms, both_ms, forward_ms = medians_ms(
        [
            lambda: run_first(prepared, kept, ct, params, x),
            lambda: run_second(prepared, kept.weight, crossing, params, x),
            lambda: run_whole(prepared, kept, ct, params, x),
            lambda: pull(params, x, ct),
            lambda: only_forward(params, x),
        ],
        repeats,
    )
    return {
        "chunk": chunk.name,
        "forward ms": forward_ms,
        "I ms": input_ms,
        "W ms": weight_ms,
        "I + W ms": input_ms + weight_ms,
        "whole backward ms": whole_ms,
        "ratio": (input_ms + weight_ms) / whole_ms,
        "jax.vjp less forward ms": both_ms - forward_ms,
        "stash GiB": gib(nbytes(kept)),
        "crossing GiB": gib(nbytes(crossing)),
    }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="runs of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    rows = (measure(chunk, args.repeats) for chunk in chunks(args.tiny))
    Recorder.begin(args, machine(), "bfloat16, one microbatch").table(rows)


if __name__ == "__main__":
    main()
