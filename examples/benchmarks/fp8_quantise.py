"""Quantisation for FP8 products by our kernels for Hopper GPUs beside XLA's fusions and a plain copy: a Markdown table.

Rows of DeepSeek-V3's width and of its experts' hidden activations, and the first matrices of 32 experts. Times are
medians of calls that take turns; GB/s count each byte of arguments and results once; the difference is the share of
the kernel's numbers and scales that are not XLA's, bit for bit.

    python examples/benchmarks/fp8_quantise.py [--rows 32768] [--only quantise,gate] [--plans] [--tiny]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from record import Recorder, machine, make_parser, medians_ms

from eplb_jax.kernels import gate_mosaic, quantise_mosaic, scaled
from eplb_jax.kernels import quantise as by_xla
from eplb_jax.kernels.backend import current_target
from eplb_jax.kernels.scaled_tiles import Plan

PLANS = [
    Plan(2, 1), Plan(2, 2), Plan(2, 2, down=True), Plan(3, 1), Plan(3, 2, down=True), Plan(4, 1), Plan(4, 1, down=True),
    Plan(6, 1), Plan(8, 1),
]  # fmt: skip


class Case(NamedTuple):
    """An operation in both forms, its usual plan and its arguments."""

    xla: Callable[..., Any]
    kernel: Callable[..., Any]
    plan: Plan
    arguments: tuple[jax.Array, ...]


def cases(rows: int, width: int, hidden: int, experts: int) -> dict[str, Callable[[], Case]]:
    """What makes each case, by name; two in three blocks of rows are whole."""
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(i: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.jit(lambda key: jax.random.normal(key, shape, dtype))(keys[i])

    def valid() -> jax.Array:
        block = jnp.arange(rows // scaled.BLOCK, dtype=jnp.int32)
        return jnp.where(block % 3 == 2, 77, scaled.BLOCK)

    def kept() -> tuple[jax.Array, ...]:
        return tuple(scaled.quantise_rows(normal(0, rows, 2 * hidden)))

    def weight() -> jax.Array:
        return jax.random.uniform(keys[3], (rows,))

    def matrices(dtype: Any) -> Case:
        w = normal(0, experts, width, 2 * hidden, dtype=dtype)
        return Case(by_xla.quantise_weights_by_xla, quantise_mosaic.quantise_weights, quantise_mosaic.MATRICES, (w,))

    return {
        "quantise_rows": lambda: Case(
            scaled.quantise_rows, quantise_mosaic.quantise_rows, quantise_mosaic.ROWS, (normal(0, rows, width),)
        ),
        "quantise": lambda: Case(
            by_xla.quantise_by_xla, quantise_mosaic.quantise, quantise_mosaic.BOTH, (normal(0, rows, width), valid())
        ),
        "columns_of": lambda: Case(
            by_xla.columns_of_by_xla, quantise_mosaic.columns_of, quantise_mosaic.COLUMNS,
            (*scaled.quantise_rows(normal(0, rows, width)), valid()),
        ),
        "gate": lambda: Case(
            by_xla.gate_by_xla, gate_mosaic.gate, gate_mosaic.FORWARD, (normal(0, rows, 2 * hidden), weight())
        ),
        "gate_backward": lambda: Case(
            by_xla.gate_backward_by_xla, gate_mosaic.gate_backward, gate_mosaic.BACKWARD,
            (*kept(), weight(), normal(1, rows, hidden), valid()),
        ),
        "quantise_weights": lambda: matrices(jnp.bfloat16),
        "quantise_weights float32": lambda: matrices(jnp.float32),
    }  # fmt: skip


@jax.jit
def difference(got: Any, want: Any) -> jax.Array:
    """The share of numbers that are not the same; NaN is like NaN."""

    def count(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return ((a != b) & ~(jnp.isnan(a) & jnp.isnan(b))).sum(dtype=jnp.float32)

    total = jnp.stack(jax.tree.leaves(jax.tree.map(count, got, want))).sum()
    return total / sum(leaf.size for leaf in jax.tree.leaves(want))


def measure(name: str, case: Case, plans: list[Plan], repeats: int) -> Iterator[dict[str, Any]]:
    """The lines of the table for an operation."""
    xla = jax.jit(functools.partial(case.xla, power_of_two=True))
    want = jax.block_until_ready(xla(*case.arguments))
    calls, differences = {"XLA": functools.partial(xla, *case.arguments)}, {"XLA": 0.0}
    target = current_target()
    for plan in [case.plan, *(plan for plan in plans if plan != case.plan)] if target.hopper else []:
        title = "kernel" if plan == case.plan else f"{plan.stages} slots, {plan.pairs} pairs" + ", down" * plan.down
        options = dict(cores=target.cores, power_of_two=True, plan=plan)
        call = functools.partial(jax.jit(functools.partial(case.kernel, **options)), *case.arguments)
        try:
            differences[title] = float(difference(call(), want))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            if plan == case.plan:
                raise
            print(f"{name}, {title}: {str(error).splitlines()[0]}", flush=True)  # too much shared memory
            continue
        calls[title] = call
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((case.arguments, want)))
    largest = max(case.arguments, key=lambda array: array.nbytes)
    calls["copy"], differences["copy"] = functools.partial(jax.jit(jnp.negative), largest), 0.0
    for title, ms in zip(calls, medians_ms(list(calls.values()), repeats, inner=0.01), strict=True):
        count = 2 * largest.nbytes if title == "copy" else moved
        yield {"operation": name, "by": title, "difference": differences[title], "ms": ms, "GB/s": count / ms / 1e6}


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=32768, help="of the activations")
    parser.add_argument("--only", help="operations, with commas between")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--plans", action="store_true", help="other divisions of the kernels' work, too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    made = cases(256, 512, 256, 2) if args.tiny else cases(args.rows, 7168, 2048, 32)
    names = args.only.split(",") if args.only else list(made)
    plans = PLANS if args.plans else []
    table = (line for name in names for line in measure(name, made[name](), plans, args.repeats))
    Recorder.begin(args, machine()).table(table, labels=2, formats={"difference": ".1e", "GB/s": ".0f"})


if __name__ == "__main__":
    main()
