"""The backward pass of weighted SwiGLU rows by our kernel for Hopper GPUs beside XLA's fusions: a Markdown table.

Hidden activations of DeepSeek-V3's experts, two halves of 2048 in bfloat16. Times are medians of calls that take turns;
TB/s count each byte of arguments and results once; the difference is the largest, as a share of the largest value.

    python examples/benchmarks/gated_rows.py [--rows 32768,65536,131072] [--plans] [--tiny]
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
from row_moves import KIB, medians_us

from eplb_jax.kernels import swiglu as gated_rows
from eplb_jax.kernels.backend import current_target
from eplb_jax.kernels.permute import Ring
from eplb_jax.moe.experts import gated_backward_by_xla

HEADER = "rows", "by", "difference", "ms", "TB/s"
PLANS = [
    gated_rows.GATED, Ring(12 * KIB, 4, 4, 1), Ring(12 * KIB, 4, 4, 2), Ring(12 * KIB, 3, 4, 1),
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


def measure(rows: int, width: int, plans: list[Ring], repeats: int) -> None:
    """Prints the lines of the table for a number of rows."""
    keys = jax.random.split(jax.random.key(rows), 3)
    hidden = jax.random.normal(keys[0], (rows, 2 * width), jnp.bfloat16)
    ct = jax.random.normal(keys[1], (rows, width), jnp.bfloat16)
    weight = jax.random.uniform(keys[2], (rows,))
    functions: dict[str, Any] = {"XLA": gated_backward_by_xla}
    target = current_target()
    if target.hopper:
        for plan in plans:
            name = f"{plan.part // KIB} KiB x {plan.stages}, {plan.blocks} blocks, {plan.behind} behind"
            functions[name] = functools.partial(gated_rows.gated_backward, cores=target.cores, plan=plan)
    calls = {name: functools.partial(jax.jit(function), hidden, weight, ct) for name, function in functions.items()}
    want = calls["XLA"]()
    differences = {name: float(difference(call(), want)) for name, call in calls.items()}
    for name, micros in medians_us(calls, repeats).items():
        rate = 6 * rows * width * hidden.dtype.itemsize / micros / 1e6
        cells = rows, name, f"{differences[name]:.1e}", f"{micros / 1e3:.3f}", f"{rate:.2f}"
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="32768,65536,131072")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plans", action="store_true", help="other divisions of the kernel's work, too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    plans = PLANS if arguments.plans else PLANS[:1]
    for rows in [64] if arguments.tiny else map(int, arguments.rows.split(",")):
        measure(rows, 256 if arguments.tiny else 2048, plans, arguments.repeats)


if __name__ == "__main__":
    main()
