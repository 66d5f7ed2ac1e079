"""Attention of a decode step over caches of latents by our kernel for Hopper GPUs beside XLA: a Markdown table.

One token of each request, 512 latent and 64 rotary columns as DeepSeek-V3 has them, bfloat16. A time is that of one
call of a program of several, medians of programs that take turns. "read us" is what reading the caches once would take
at 4.8 TB/s; TFLOP/s count scores and sums of the keys in use; the difference is the largest, as a share of XLA's
largest value. "even" requests use all keys, "uneven" ones any number of them. Small caches stay in the L2 cache.

    python examples/benchmarks/latent_attention.py [--requests 1,16,64,128] [--keys 1024,4096,16384] [--heads 16,128]
        [--uneven] [--splits 1,2] [--repeats 5] [--tiny]
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from record import Recorder, machine, make_parser, medians_ms
from swiglu import difference

from eplb_jax.kernels.backend import current_target
from eplb_jax.kernels.latent_attention import mosaic, xla

LATENT, ROTARY = 512, 64
PEAK = 4.8e12
"""Bytes a second of an H200's memory."""
CALLS = 8
"""Of a program."""


def program(attend: Callable[..., jax.Array], operands: tuple[Any, ...]) -> Callable[[], Any]:
    """A program of several calls, compiled."""

    @jax.jit
    def several(queries: tuple[jax.Array, ...], cache: jax.Array, lengths: jax.Array) -> list[jax.Array]:
        return [attend(query, cache, lengths) for query in queries]

    return functools.partial(several.lower(*operands).compile(), *operands)


def measure(
    requests: int, keys: int, heads: int, lengths: str, splits: list[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """The lines of a case."""
    widths = LATENT + ROTARY
    draws = jax.random.split(jax.random.key(keys), 3)
    queries = tuple(jax.random.normal(draws[0], (CALLS, requests, heads, widths), jnp.bfloat16))
    cache = jax.random.normal(draws[1], (requests, keys, widths), jnp.bfloat16)
    counts = jnp.full(requests, keys, jnp.int32)
    if lengths == "uneven":
        counts = jax.random.randint(draws[2], (requests,), 1, keys + 1)
    total = int(counts.sum())
    static: dict[str, Any] = dict(latent=LATENT, scale=0.1)
    calls = {"XLA": program(functools.partial(xla.attend_latents, **static), (queries, cache, counts))}
    if current_target().hopper:
        chosen = mosaic.splits_for(requests, heads, keys, current_target().cores)
        for count in dict.fromkeys((chosen, *splits)):
            attend = functools.partial(mosaic.attend_in_parts, **static, splits=count)
            calls[f"kernel, {count} splits"] = program(attend, (queries, cache, counts))
    want = calls["XLA"]()
    differences = [float(difference(call(), want)) for call in calls.values()]
    del want
    times = medians_ms(list(calls.values()), repeats, inner=0.02)
    for name, off, ms in zip(calls, differences, times, strict=True):
        us = 1e3 * ms / CALLS
        yield {
            "requests": str(requests),
            "keys": str(keys),
            "heads": str(heads),
            "lengths": lengths,
            "by": name,
            "difference": off,
            "us": us,
            "read us": 1e6 * total * widths * cache.dtype.itemsize / PEAK,
            "TFLOP/s": 2 * heads * total * (widths + LATENT) / us / 1e6,
        }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--requests", default="1,16,64,128", help="of a decode step, with commas")
    parser.add_argument("--keys", default="1024,4096,16384", help="that a cache holds, with commas")
    parser.add_argument("--heads", default="16,128", help="that share keys, with commas")
    parser.add_argument("--uneven", action="store_true", help="requests of different lengths, too")
    parser.add_argument("--splits", default="", help="other numbers of blocks that divide a request's keys, too")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    if args.tiny:
        args.requests, args.keys, args.heads = "2", "16", "2"
    splits = [int(count) for count in args.splits.split(",") if count]
    sizes = ([int(size) for size in text.split(",")] for text in (args.requests, args.keys, args.heads))
    lengths = ("even", "uneven") if args.uneven else ("even",)
    table = (
        line
        for requests, keys, heads in itertools.product(*sizes)
        for kind in lengths
        for line in measure(requests, keys, heads, kind, splits, args.repeats)
    )
    formats = {"difference": ".1e", "us": ".1f", "read us": ".1f", "TFLOP/s": ".0f"}
    Recorder.begin(args, machine()).table(table, labels=5, formats=formats)


if __name__ == "__main__":
    main()
