"""Weight gradients of grouped and dense products that are added to a float32 sum: by a pass of XLA's, or in place.

    python examples/benchmarks/added_gradients.py [--sweep] [--only NAME ...] [--repeats 7] [--tiny]

For the experts of moe-1b and of DeepSeek-V3, and for dense matrices in FP8, one call adds a gradient to a sum that is
given away, as a step of a pipeline does for each microbatch: "bfloat16 + add" makes it in bfloat16 and XLA adds it,
"float32 + add" likewise in float32, and with "added" the kernel reads the sum and writes over it. "apart" is the
largest difference of the first sum from "float32 + add", over its largest number. Calls take turns, figures are
medians; "/ added" is how many times as long as "added" one takes.

``--sweep`` tries divisions of the work of "added" instead; `eplb_jax.kernels.grouped_gemm.tiles` and
`eplb_jax.kernels.fp8_gemm.mosaic` hold the best.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from fp8_gemm import ScaledCase, ScaledWork, division
from record import Recorder, machine, make_parser, medians_ms

from eplb_jax.kernels import registry
from eplb_jax.kernels.accumulable import OuterProduct
from eplb_jax.kernels.fp8_gemm import mosaic as fp8_mosaic
from eplb_jax.kernels.fp8_gemm import xla as fp8_xla
from eplb_jax.kernels.fp8_gemm.slots import ScaledTile
from eplb_jax.kernels.grouped_gemm import interface, mosaic, xla
from eplb_jax.kernels.grouped_gemm.ring import Tile

CASES = (
    ScaledCase(32768, 2048, 2048, 16, "uneven"),
    ScaledCase(32768, 1024, 2048, 16, "uneven"),
    ScaledCase(32768, 7168, 4096, 8, "uneven"),
    ScaledCase(32768, 2048, 7168, 8, "uneven"),
    ScaledCase(16384, 2048, 4096, 1, "dense"),
    ScaledCase(16384, 6144, 2048, 1, "dense"),
)
TINY = (ScaledCase(512, 128, 256, 3, "uneven"), ScaledCase(256, 256, 128, 1, "dense"))
TILES: dict[str, tuple[Any, ...]] = {
    "bf16": (
        Tile(256, 128, 64, 4, "m", 2, 4),
        Tile(256, 128, 64, 4, "m", 1, 4),
        Tile(256, 128, 64, 4, "m", 2, 8),
        Tile(128, 256, 64, 4, "n", 2, 8),
        Tile(128, 128, 64, 6, "tiles", 1, 8),
        Tile(128, 128, 64, 6, "tiles", 2, 8),
        Tile(128, 128, 64, 7, "m", 1, 8),
    ),
    "fp8": (
        ScaledTile(128, 128, 128, 6, pieces=0),
        ScaledTile(128, 128, 128, 6, pieces=0, width=4),
        ScaledTile(128, 128, 128, 6, pieces=0, width=16),
        ScaledTile(256, 128, 128, 4, pieces=0),
        ScaledTile(256, 128, 128, 4, pieces=0, width=4),
    ),
}


class AddedGradients:
    """A case's products in one precision, "bf16" or "fp8", and what adds them."""

    def __init__(self, work: ScaledWork, precision: str):
        self.precision, self.work, case = precision, work, work.case
        if precision == "bf16":
            self.operands: tuple[Any, ...] = (work.x, work.dout, work.sizes)
            self.chosen = interface.choose(work.x, work.w, "auto")
            self.name, self.by_xla = "outer", xla.outer
        else:
            lhs, dout = work.quantised["dw"]
            self.operands = (*lhs, *dout, work.sizes)
            self.chosen = registry.choose("scaled_outer", "auto", lhs.numbers, dout.numbers)
            self.name, self.by_xla = "scaled_outer", fp8_xla.outer
        self.total = jax.jit(lambda: jax.random.normal(jax.random.key(1), (case.groups, case.k, case.n), jnp.float32))

    def forms(self) -> dict[str, Callable[..., jax.Array]]:
        """By name, functions of a total and the operands."""

        def product(dtype: Any) -> OuterProduct:
            # Plain operands say of which dtype their product is; kernels add it to float32 as they sum it.
            return OuterProduct(self.chosen, self.name, self.by_xla, None if self.precision == "bf16" else dtype)

        def narrow(total: jax.Array, *operands: jax.Array) -> jax.Array:
            return total + product(jnp.dtype(jnp.bfloat16))(*operands).astype(jnp.float32)

        def wide(total: jax.Array, *operands: jax.Array) -> jax.Array:
            like = jax.ShapeDtypeStruct(total.shape, total.dtype)
            return total + product(jnp.dtype(jnp.float32)).accumulate(like, None, *operands)

        def added(total: jax.Array, *operands: jax.Array) -> jax.Array:
            return product(jnp.dtype(jnp.float32)).accumulate(total, None, *operands)

        return {"bfloat16 + add": narrow, "float32 + add": wide, "added": added}

    def tiles(self) -> dict[str, Callable[..., jax.Array]]:
        """By division of the work, functions of a total and the operands; of cases that it fits."""
        function: Any = mosaic.added_outer if self.precision == "bf16" else fp8_mosaic.added_outer

        def adds(tile: Any) -> Callable[..., jax.Array]:
            return lambda total, *operands: function(*operands, total, tile=tile)

        name = str if self.precision == "bf16" else division
        return {name(tile): adds(tile) for tile in TILES[self.precision]}

    def run(self, forms: dict[str, Callable[..., jax.Array]], repeats: int) -> Iterator[dict[str, Any]]:
        """Rows of a table, one for each form."""
        wanted = jax.jit(self.forms()["float32 + add"])(self.total(), *self.operands)
        apart = jax.jit(lambda found, wanted: jnp.abs(found - wanted).max() / jnp.abs(wanted).max())
        calls, off = {}, {}
        for name, form in forms.items():
            try:
                program = jax.jit(form, donate_argnums=0).lower(wanted, *self.operands).compile()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
                continue
            state = [program(self.total(), *self.operands)]
            off[name] = float(apart(state[0], wanted))

            def call(program: Any = program, state: list[jax.Array] = state) -> jax.Array:
                state[0] = program(state[0], *self.operands)
                return state[0]

            calls[name] = call
        times = dict(zip(calls, medians_ms(list(calls.values()), repeats, inner=12e-3), strict=True))
        best = times.get("added", min(times.values()))
        for name, ms in times.items():
            yield {
                "case": self.work.case.name,
                "precision": self.precision,
                "gradient": name,
                "ms": ms,
                "TFLOP/s": self.work.flops / ms / 1e9,
                "/ added": ms / best,
                "apart": off[name],
            }


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows of the table; dense matrices in bfloat16 are cuBLAS's, which adds in place by itself."""
    for case in TINY if arguments.tiny else CASES:
        if not any(part in case.name for part in arguments.only):
            continue
        work = ScaledWork(case)
        for precision in ("bf16", "fp8") if case.groups > 1 else ("fp8",):
            gradients = AddedGradients(work, precision)
            yield from gradients.run(gradients.tiles() if arguments.sweep else gradients.forms(), arguments.repeats)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--sweep", action="store_true", help="try divisions of the work, on a Hopper GPU")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of cases to run")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small products, to try this out")
    arguments = parser.parse_args()
    report = Recorder.begin(arguments, machine(), "sums in float32")
    formats = {"ms": ".3f", "TFLOP/s": ".0f", "/ added": ".3f", "apart": ".1e"}
    report.table(rows(arguments), labels=3, title="sweep" if arguments.sweep else None, formats=formats)


if __name__ == "__main__":
    main()
