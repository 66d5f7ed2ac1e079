"""Rows moved by our kernels for Hopper GPUs beside XLA's fusions, values compared and timed: a Markdown table.

Tokens of DeepSeek-V3's width, 7168 in bfloat16, 8 choices of 32 experts: `permute` copies each token to its rows,
`unpermute` adds them again. Times are medians in µs of calls that take turns, TB/s count each byte once.

    python examples/benchmarks/permute_rows.py [--tokens 128,4096,16384] [--plans] [--tiny]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from record import Recorder, machine, make_parser, medians_ms

from eplb_jax.kernels import permute as kernels
from eplb_jax.kernels.backend import current_target
from eplb_jax.kernels.permute import Ring
from eplb_jax.moe import permute as permute_in_xla
from eplb_jax.moe.dispatch import make_capacities, sort_by_slot

EXPERTS, CHOICES = 32, 8
KIB = 1024
COPIES = [
    kernels.COPIES, Ring(16 * KIB, 12, 1, 4), Ring(16 * KIB, 6, 1, 2), Ring(8 * KIB, 10, 2, 3),
    Ring(16 * KIB, 3, 4, 1), Ring(16 * KIB, 6, 2, 2),
]  # fmt: skip
SUMS = [
    kernels.SUMS, Ring(32 * KIB, 3, 2), Ring(16 * KIB, 4, 3), Ring(32 * KIB, 2, 3), Ring(16 * KIB, 3, 4),
    Ring(32 * KIB, 6, 1), Ring(8 * KIB, 4, 6),
]  # fmt: skip
Call = Callable[[], jax.Array]


def by_plan(xla: Any, kernel: Any, plans: list[Ring], *arguments: jax.Array) -> dict[str, Call]:
    """XLA's form of a call, and the kernel with each plan where there is a Hopper GPU."""
    target = current_target()
    functions = {"XLA": xla}
    if target.hopper:
        for plan in plans:
            name = f"{plan.part // KIB} KiB x {plan.stages}, {plan.blocks} blocks, {plan.behind} behind"
            functions[name] = functools.partial(kernel, cores=target.cores, plan=plan)
    return {name: functools.partial(jax.jit(function), *arguments) for name, function in functions.items()}


@jax.jit
def equal(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether all values are."""
    return (a == b).all()


def measure(tokens: int, width: int, all_plans: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """The rows of the table for a number of tokens."""
    num_rows = make_capacities(tokens, CHOICES, 1, EXPERTS, None).rows
    keys = jax.random.split(jax.random.key(tokens), 3)
    _, slots = jax.lax.top_k(jax.random.uniform(keys[0], (tokens, EXPERTS)), CHOICES)
    sort = functools.partial(sort_by_slot, num_slots=EXPERTS, num_rows=num_rows)
    source, index = jax.jit(sort)(slots).moves
    x = jax.random.normal(keys[1], (tokens, width), jnp.bfloat16)
    rows = jax.random.normal(keys[2], (num_rows, width), jnp.bfloat16)
    rows = jnp.where((source < tokens)[:, None], rows, jnp.nan)  # rows of no token reach nothing
    plans = len(COPIES) + len(SUMS) if all_plans else 1
    moves = {
        "permute": (
            num_rows + tokens,
            (permute_in_xla.copy_rows_by_xla, kernels.copy_rows, COPIES[:plans], x, source, index),
        ),
        "unpermute": (
            tokens * (CHOICES + 1),
            (permute_in_xla.add_rows_by_xla, kernels.add_rows, SUMS[:plans], rows, index),
        ),
    }
    for move, (moved, operands) in moves.items():
        calls = by_plan(*operands)
        want = calls["XLA"]()
        same = [bool(equal(call(), want)) for call in calls.values()]
        times = medians_ms(list(calls.values()), repeats, inner=0.02)
        for name, alike, ms in zip(calls, same, times, strict=True):
            row = {"tokens": tokens, "rows": num_rows, "move": move, "by": name, "equal": "yes" if alike else "NO"}
            yield row | {"µs": 1e3 * ms, "TB/s": moved * width * 2 / ms / 1e9}


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", default="128,4096,16384", help="of a call")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--plans", action="store_true", help="other divisions of the kernels' work, too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    width, sizes = 256 if args.tiny else 7168, [64] if args.tiny else map(int, args.tokens.split(","))
    table = (row for tokens in sizes for row in measure(tokens, width, args.plans, args.repeats))
    Recorder.begin(args, machine()).table(table, labels=4, formats={"µs": ".0f", "TB/s": ".2f"})


if __name__ == "__main__":
    main()
