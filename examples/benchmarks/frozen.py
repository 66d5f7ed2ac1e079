"""Frozen parameters: memory and time of a step that trains adapters alone, beside one that trains everything.

    python examples/benchmarks/frozen.py [--ranks 1] [--microbatches 8] [--rank 16] [--tiny]

The model is that of `examples/lora.py`, a Llama with experts, and the step is with AdamW, float32 masters and bfloat16
products. "all" trains the model without adapters; "adapters" trains `nnx.LoRAParam` alone; in the last row what is
frozen is kept in bfloat16, which loses nothing. Arguments are parameters, the optimizer's state and the batch,
temporaries working copies, gradients and what the schedule stashes, both of one device, as XLA allocates them. FLOPs
are those of all devices.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lora import AdaptedLlama, LlamaSizes, loss, make_tokens, narrow_frozen

import jaxpipe
from jaxpipe.flax import from_nnx

GIB = 2**30


def measure(
    name: str, sizes: LlamaSizes, mesh: Any, schedule: Any, tokens: jax.Array, repeats: int, *, narrow: bool
) -> dict[str, Any]:
    """A line of the table."""
    pipe = from_nnx(
        lambda: AdaptedLlama(sizes, nnx.Rngs(0)), schedule, mesh,
        blocks="layers", loss=loss, trainable=nnx.LoRAParam if sizes.rank else None, compute_dtype=jnp.bfloat16,
    )  # fmt: skip
    optimizer = jaxpipe.floating_only(optax.adamw(1e-4), trainable=pipe.trainable)

    def train(params: Any, state: Any, tokens: jax.Array) -> Any:
        _, grads = pipe(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = narrow_frozen(pipe.params, pipe.trainable) if narrow else pipe.params
    state = jax.jit(optimizer.init)(params)
    tokens = jax.device_put(tokens, NamedSharding(mesh, P()))
    flops = jaxpipe.plan(pipe.pipeline, params, tokens, "H200").executed
    trained = sum(
        leaf.size for leaf, kind in zip(jax.tree.leaves(params), jax.tree.leaves(pipe.trainable), strict=True) if kind
    )
    program = jax.jit(train, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
    memory = program.memory_analysis()
    assert memory is not None, "this backend does not report memory"
    held = [params, state]
    del params, state, pipe  # the step gives its parameters and its state back in place

    def step() -> Any:
        held[:] = program(*held, tokens)
        return held[0]

    (ms,) = medians_ms([step], repeats)
    return {
        "trained": name,
        "parameters": trained,
        "arguments GiB": memory.argument_size_in_bytes / GIB,
        "temporaries GiB": memory.temp_size_in_bytes / GIB,
        "TFLOP": flops / 1e12,
        "step ms": ms,
    }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=1, help="of the pipeline")
    parser.add_argument("--microbatches", type=int, default=8, help="of 2 sequences of 2048 tokens each")
    parser.add_argument("--layers", type=int, default=8, help="of the model")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    sizes, sequences, length = LlamaSizes(32768, 2048, 4096, 16, args.layers, rank=args.rank), 2, 2048
    if args.tiny:
        sizes, length = LlamaSizes(64, 32, 64, 2, 2 * args.ranks, rank=4), 16
    mesh, schedule = jaxpipe.make_mesh(pp=args.ranks), jaxpipe.schedule.build("1f1b", args.ranks, args.microbatches)
    tokens = make_tokens(jax.random.key(0), args.microbatches * sequences, length + 1, sizes.vocabulary)
    everything = dataclasses.replace(sizes, rank=0)
    report = Recorder.begin(
        args, machine(args.ranks), f"{sizes.layers} layers of {sizes.width}, {sizes.experts} experts of {sizes.hidden}",
        f"1f1b, {args.microbatches} microbatches of {sequences * length} tokens",
    )  # fmt: skip

    def rows() -> Iterator[dict[str, Any]]:
        yield measure("all", everything, mesh, schedule, tokens, args.repeats, narrow=False)
        yield measure("adapters", sizes, mesh, schedule, tokens, args.repeats, narrow=False)
        yield measure("adapters, bfloat16 beside", sizes, mesh, schedule, tokens, args.repeats, narrow=True)

    formats = {"arguments GiB": ".2f", "temporaries GiB": ".2f", "TFLOP": ".1f", "step ms": ".0f"}
    with jax.numpy_dtype_promotion("standard"):  # Flax and optax promote
        report.table(rows(), formats=formats)


if __name__ == "__main__":
    main()
