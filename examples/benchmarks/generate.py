"""Answers of a model with random weights: tokens per second of prompts and of decoding, and memory, by batch.

    python examples/benchmarks/generate.py [--config moe-16b] [--batches 1,64] [--dtype bfloat16] [--tiny]

All prompts are as long, and no token ends an answer. Compilation is not timed; of several runs the fastest decoding
counts. Weights are those of the device, caches those of all requests when the last token has come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import Recorder, machine, make_parser

from jaxpipe.deepseek import Server, model_config
from jaxpipe.deepseek.serving import serve_random

GIB = 2**30


def measure(server: Server, batch: int, prompt: int, new: int, repeats: int) -> dict[str, Any]:
    """A line of the table."""
    config = server.config
    prompts = np.random.default_rng(0).integers(0, config.vocab, (batch, prompt))
    runs = [server.generate(list(prompts), new) for _ in range(repeats + 1)][1:]
    best = min(runs, key=lambda run: run.decode_seconds)
    item = server.model.embedding.dtype.itemsize
    return {
        "requests": str(batch),
        "prompts tokens/s": batch * prompt / min(run.prefill_seconds for run in runs),
        "decoding tokens/s": best.tokens_per_second,
        "a token ms": 1e3 * best.decode_seconds / (new - 1),
        "weights GiB": sum(leaf.nbytes for leaf in jax.tree.leaves(server.model)) / GIB,
        "caches GiB": batch * (prompt + new - 1) * config.layers * (config.latent + config.rotary) * item / GIB,
    }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="moe-16b", help="a name of jaxpipe.deepseek.MODELS")
    parser.add_argument("--batches", default="1,64", help="numbers of requests, with commas")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer, 2 or more")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the computation")
    parser.add_argument("--precision", choices=["bf16", "fp8"], help="of matrices; default: the configuration's")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    config, prompt, new = model_config("tiny" if args.tiny else args.config), args.prompt, args.new
    if args.tiny:
        config, prompt, new = dataclasses.replace(config, layers=2), 8, 4
    if args.precision is not None:
        config = config.in_precision(args.precision)
    server = Server(config, serve_random(config, 0, dtype=jnp.dtype(args.dtype)))
    name = "tiny" if args.tiny else args.config
    report = Recorder.begin(
        args, machine(), f"{name}: {config.layers} layers, {config.total / 1e9:.2f}G parameters", args.dtype,
        f"{config.precision}, prompts of {prompt} tokens, answers of {new}",
    )  # fmt: skip

    def rows() -> Iterator[dict[str, Any]]:
        for batch in args.batches.split(","):
            yield measure(server, int(batch), prompt, new, args.repeats)

    report.table(rows(), formats={"prompts tokens/s": ".0f", "decoding tokens/s": ".1f"})


if __name__ == "__main__":
    main()
