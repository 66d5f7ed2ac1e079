"""An embedding's gradient, added to float32 sums of all rows: several ways, on one device.

    python examples/benchmarks/embedding_grad.py [--sizes 129280x7168,32768x2048] [--tokens 4096,32768] [--tiny]

Cotangents are bfloat16, as activations are. Tokens are distributed as words are (Zipf's law), or alike; "most" says how
often the most frequent one comes. Sums are updated in place, as in a pipeline's loop.

* "array": as JAX has it, rows added to zeros of the table's size, in bfloat16, which are then added to the sums.
  The more often a token comes, the larger is its "error", of the most frequent tokens' sums.
* "array in float32": the same with rows in float32.
* "rows": rows added to the sums themselves, as the pipeline does; see jaxpipe/runtime/row_grads.py.
* "sorted rows": in the order of their tokens, which XLA is told.
* "merged rows": in that order too, rows of one token among 128 in a row added up by a product; of each the first row is
  added to the sums.
* "product": one-hot tokens times cotangents, where the table has at most 32,768 rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import Recorder, machine, make_parser, medians_ms

BLOCK = 128
"""Rows that one product of "merged rows" takes."""
MOST_ROWS = 32768
"""Of a table that "product" is tried with."""


def array(total: jax.Array, tokens: jax.Array, ct: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Through an array of the table's size."""
    return total + jnp.zeros(total.shape, dtype).at[tokens].add(ct.astype(dtype)).astype(total.dtype)


def rows(total: jax.Array, tokens: jax.Array, ct: jax.Array) -> jax.Array:
    """Each token's row by itself."""
    return total.at[tokens].add(ct.astype(total.dtype))


def sorted_rows(total: jax.Array, tokens: jax.Array, ct: jax.Array) -> jax.Array:
    """Rows in the order of their tokens."""
    order = jnp.argsort(tokens)
    return total.at[tokens[order]].add(ct[order].astype(total.dtype), indices_are_sorted=True)


def merged_rows(total: jax.Array, tokens: jax.Array, ct: jax.Array) -> jax.Array:
    """The same, with fewer rows; the number of tokens is a multiple of `BLOCK`."""
    order = jnp.argsort(tokens)
    here, ct = tokens[order].reshape(-1, BLOCK), ct[order].reshape(-1, BLOCK, ct.shape[-1])
    same = here[:, :, None] == here[:, None, :]
    sums = jnp.einsum("bij,bjd->bid", same.astype(ct.dtype), ct, preferred_element_type=total.dtype)
    first = jnp.concatenate([jnp.ones_like(here[:, :1], jnp.bool_), here[:, 1:] != here[:, :-1]], 1)
    places = jnp.where(first, here, jnp.asarray(len(total), here.dtype)).reshape(-1)  # beyond the table: left out
    return total.at[places].add(sums.reshape(-1, ct.shape[-1]), mode="drop")


def product(total: jax.Array, tokens: jax.Array, ct: jax.Array) -> jax.Array:
    """By one product."""
    hot = jax.nn.one_hot(tokens, len(total), dtype=ct.dtype)
    return total + jnp.einsum("tv,td->vd", hot, ct, preferred_element_type=total.dtype)


WAYS: dict[str, Callable[..., jax.Array]] = {
    "array": array,
    "array in float32": functools.partial(array, dtype=jnp.float32),
    "rows": rows,
    "sorted rows": sorted_rows,
    "merged rows": merged_rows,
    "product": product,
}


def make_tokens(kind: str, count: int, size: int) -> np.ndarray:
    """Tokens of a vocabulary, ``int32[count]``."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, size + 1) if kind == "Zipf" else np.ones(size)
    names = rng.permutation(size)  # frequent tokens are anywhere
    return names[rng.choice(size, count, p=shares / shares.sum())].astype(np.int32)


def measure(size: int, width: int, count: int, kind: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of the table: one for each way."""
    tokens = make_tokens(kind, count, size)
    given = jnp.asarray(tokens), jax.random.normal(jax.random.key(1), (count, width), jnp.bfloat16)
    chosen = [name for name in WAYS if name != "product" or size <= MOST_ROWS]
    often = np.bincount(tokens, minlength=size)
    seen = np.argsort(-often)[:16]
    places = [np.flatnonzero(tokens == token) for token in seen]
    expected = np.stack([np.asarray(given[1][own], np.float64).sum(0) for own in places])
    held = {"total": jnp.zeros((size, width), jnp.float32)}

    def call(step: Callable[..., jax.Array]) -> jax.Array:
        held["total"] = step(held["total"], *given)
        return held["total"]

    steps, errors = {}, {}
    for name in chosen:
        steps[name] = jax.jit(WAYS[name], donate_argnums=0)
        held["total"] = jnp.zeros_like(held["total"])
        found = np.asarray(call(steps[name])[seen], np.float64)
        errors[name] = float(np.abs(found - expected).max() / np.abs(expected).max())
        assert name == "array" or errors[name] < 1e-5, (name, errors[name])
    times = medians_ms([functools.partial(call, step) for step in steps.values()], repeats, inner=0.05)
    for name, ms in zip(steps, times, strict=True):
        yield {
            "table": f"{size} x {width}",
            "tokens": count,
            "distribution": kind,
            "way": name,
            "most": int(often.max()),
            "ms": ms,
            "GB/s of rows": 1e-6 * count * width * (2 + 4 + 4) / ms,
            "error": f"{errors[name]:.1e}",
        }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", default="129280x7168,32768x2048", help="of tables, rows x width")
    parser.add_argument("--tokens", default="4096,32768", help="of a microbatch, multiples of 128")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in ("512x64" if args.tiny else args.sizes).split(",")]
    counts = [int(count) for count in ("256" if args.tiny else args.tokens).split(",")]
    if wrong := [count for count in counts if count % BLOCK]:
        parser.error(f"--tokens {args.tokens}: {wrong} are no multiples of {BLOCK}")
    cases = itertools.product(sizes, counts, ("Zipf", "uniform"))
    found = (row for (size, width), count, kind in cases for row in measure(size, width, count, kind, args.repeats))
    Recorder.begin(args, machine(), "float32 sums, bfloat16 cotangents").table(found, labels=4)


if __name__ == "__main__":
    main()
