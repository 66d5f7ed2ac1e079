"""The backward pass of weighted SwiGLU rows by our kernel for Hopper GPUs beside XLA's fusions: a Markdown table.

Hidden activations of DeepSeek-V3's experts, two halves of 2048 in bfloat16. Times are medians of calls that take turns;
TB/s count each byte of arguments and results once; the difference is the largest, as a share of the largest value.

    python examples/benchmarks/swiglu.py [--rows 32768,65536,131072] [--plans] [--tiny]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from permute_rows import by_plan
from record import Recorder, machine, make_parser, medians_ms

from eplb_jax.kernels import swiglu
from eplb_jax.kernels.permute import Ring
from eplb_jax.moe.experts import gated_backward_by_xla

KIB = 1024
PLANS = [
    swiglu.GATED, Ring(12 * KIB, 4, 4, 1), Ring(12 * KIB, 4, 4, 2), Ring(12 * KIB, 3, 4, 1),
    Ring(12 * KIB, 6, 3, 2), Ring(12 * KIB, 5, 3, 1), Ring(12 * KIB, 8, 2, 2), Ring(6 * KIB, 8, 4, 3),
    Ring(6 * KIB, 6, 5, 2),
]  # fmt: skip


@jax.jit
def difference(got: Any, want: Any) -> jax.Array:
    """The largest difference of each result, as a share of its largest value: the largest of them."""

    def share(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.abs(a - b).max() / jnp.abs(b).max()

    return jnp.stack(jax.tree.leaves(jax.tree.map(share, got, want))).max()


def measure(rows: int, width: int, plans: list[Ring], repeats: int) -> Iterator[dict[str, Any]]:
    """The lines of the table for a number of rows."""
    keys = jax.random.split(jax.random.key(rows), 3)
    hidden = jax.random.normal(keys[0], (rows, 2 * width), jnp.bfloat16)
    ct = jax.random.normal(keys[1], (rows, width), jnp.bfloat16)
    weight = jax.random.uniform(keys[2], (rows,))
    calls = by_plan(gated_backward_by_xla, swiglu.gated_backward, plans, hidden, weight, ct)
    want = calls["XLA"]()
    differences = [float(difference(call(), want)) for call in calls.values()]
    times = medians_ms(list(calls.values()), repeats, inner=0.02)
    for name, off, ms in zip(calls, differences, times, strict=True):
        rate = 6 * rows * width * hidden.dtype.itemsize / ms / 1e9
        yield {"rows": rows, "by": name, "difference": off, "ms": ms, "TB/s": rate}


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--rows", default="32768,65536,131072", help="of the activations")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--plans", action="store_true", help="other divisions of the kernel's work, too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    plans, width = PLANS if args.plans else PLANS[:1], 256 if args.tiny else 2048
    sizes = [64] if args.tiny else map(int, args.rows.split(","))
    table = (line for rows in sizes for line in measure(rows, width, plans, args.repeats))
    Recorder.begin(args, machine()).table(table, labels=2, formats={"difference": ".1e", "TB/s": ".2f"})


if __name__ == "__main__":
    main()
