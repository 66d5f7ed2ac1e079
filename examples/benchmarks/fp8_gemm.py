"""Speed of the products in FP8 on one GPU beside bfloat16: grouped and dense, quantised before: one table.

Per shape the forward pass, the gradient of the rows (dx) and that of the matrices (dw), with equal groups and with
uneven ones: sizes drawn from a Zipf-like distribution, no multiples of 128, one group empty. Only used rows count as
work. Beside a grouped product stands our own in bfloat16, beside a dense one XLA's, which is cuBLAS's. The calls take
turns, figures are medians. Results are bfloat16, as a step with bfloat16 copies of weights has them; "dw float32" is in
float32. The error is that of a sample, by its norm, against float64 of the quantised operands; a bfloat16 result alone
is off by about 0.0017.

    python examples/benchmarks/fp8_gemm.py [--sweep] [--few] [--only NAME ...] [--repeats 7] [--seconds 60] [--tiny]

``--sweep`` tries divisions of the work instead; eplb_jax/kernels/fp8_gemm/mosaic.py holds the best. ``--few`` has the
products of a decode step of 64 tokens instead, with the contraction divided between multiprocessors; the matrices take
turns, so that none is found in a cache. With ``--record``
the least of the grouped figures of each pass are recorded, too, once all of them were measured.
"""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from record import Recorder, command_line, machine, make_parser, medians_ms, write_records

from eplb_jax.kernels.fp8_gemm import mosaic
from eplb_jax.kernels.fp8_gemm.interface import scaled_dot, scaled_matmul, scaled_outer
from eplb_jax.kernels.fp8_gemm.slots import ScaledTile
from eplb_jax.kernels.grouped_gemm import interface
from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN, group_starts, round_up, used_rows
from eplb_jax.kernels.scaled import (
    BLOCK,
    ScaledMatrices,
    ScaledRows,
    quantise_columns,
    quantise_matrices,
    quantise_rows,
)

KINDS = ("forward", "dx", "dw", "dw float32")
WIDTHS = ((7168, 4096), (2048, 7168))


class ScaledCase(NamedTuple):
    """One shape: rows of all groups, both sides of a matrix, how many of these, and how rows are shared out."""

    rows: int
    k: int
    n: int
    groups: int
    balance: str

    @property
    def name(self) -> str:
        """For --only."""
        return f"{self.groups}x {self.rows}x{self.k}->{self.n} {self.balance}"


LARGE = tuple(
    ScaledCase(32768, k, n, g, balance) for g in (8, 32) for k, n in WIDTHS for balance in ("equal", "uneven")
)
CASES = (*LARGE, ScaledCase(8192, 8192, 8192, 1, "dense"))
TINY = (ScaledCase(512, 128, 256, 3, "uneven"), ScaledCase(256, 256, 128, 1, "dense"))


def sizes_of(case: ScaledCase) -> np.ndarray:
    """Sizes that fill the rows as far as their rounding lets them."""
    if case.balance != "uneven":
        return np.full(case.groups, case.rows // case.groups)
    rng, total = np.random.default_rng(0), case.rows
    shares = rng.permutation(1 / np.arange(1, case.groups + 1) ** 0.8)
    shares[case.groups // 2] = 0
    while True:
        sizes = rng.multinomial(total, shares / shares.sum())
        if round_up(sizes, FP8_ALIGN).sum() <= case.rows:
            return sizes
        total -= 8


class ScaledWork:
    """Operands of a case, in both precisions, and its products."""

    def __init__(self, case: ScaledCase):
        self.case = case
        self.host_sizes = sizes_of(case)
        self.sizes = jnp.asarray(self.host_sizes, jnp.int32)
        self.flops = 2 * int(self.host_sizes.sum()) * case.k * case.n
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = (case.rows, case.k), (case.groups, case.k, case.n), (case.rows, case.n)
        normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
        self.x, self.w, self.dout = (normal(*each, jnp.bfloat16) for each in zip(keys, shapes, strict=True))
        used = used_rows(self.sizes, case.rows, FP8_ALIGN)[:, None]
        rows, columns, matrices = (jax.jit(f) for f in (quantise_rows, quantise_columns, quantise_matrices))
        w, w_transposed = matrices(self.w.swapaxes(1, 2)), matrices(self.w)
        self.quantised: dict[str, tuple[ScaledRows, Any]] = {
            "forward": (rows(self.x), w),
            "dx": (rows(self.dout), w_transposed),
            "dw": (columns(jnp.where(used, self.x, 0)), columns(jnp.where(used, self.dout, 0))),
        }
        self.quantised["dw float32"] = self.quantised["dw"]

    def operands(self, kind: str) -> tuple[Any, ...]:
        """What a product takes in bfloat16."""
        pair = {"forward": (self.x, self.w), "dx": (self.dout, self.w)}.get(kind, (self.x, self.dout))
        return *pair, self.sizes

    def error(self, kind: str, result: jax.Array) -> float:
        """Of 32 rows and 64 columns of the largest group's results."""
        group = int(self.host_sizes.argmax())
        start = int(np.asarray(group_starts(self.sizes, FP8_ALIGN))[group])
        lhs, rhs = self.quantised[kind]
        if kind.startswith("dw"):
            rows = slice(start, start + int(round_up(int(self.host_sizes[group]), FP8_ALIGN)))
            a, b = (_rows(each, slice(0, count), rows) for each, count in ((lhs, 32), (rhs, 64)))
            got = result[group, :32, :64]
        else:
            sample = slice(start, start + min(32, int(self.host_sizes[group])))
            a, b = _rows(lhs, sample, slice(None)), _matrix(rhs, group)
            got = result[sample, :64]
        want = a @ b.T
        return float(np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want))


def _rows(rows: ScaledRows, some: slice, deep: slice) -> np.ndarray:
    """A part of what numbers and scales stand for, in float64."""
    blocks = slice(*(None if end is None else end // BLOCK for end in (deep.start, deep.stop)))
    numbers = np.asarray(rows.numbers[some, deep]).astype(np.float64)
    return numbers * np.asarray(rows.scales[blocks, some]).astype(np.float64).T.repeat(BLOCK, 1)


def _matrix(matrices: ScaledMatrices, group: int) -> np.ndarray:
    """The first 64 rows of a matrix in float64."""
    scales = np.asarray(matrices.scales[group, 0]).astype(np.float64).repeat(BLOCK)
    return np.asarray(matrices.numbers[group, :64]).astype(np.float64) * scales


def bfloat16_product(kind: str, case: ScaledCase) -> Callable[..., jax.Array]:
    """The product that stands beside the one in FP8, of `ScaledWork.operands`."""
    if case.balance == "dense":
        contracted = {"forward": ((1,), (0,)), "dx": ((1,), (1,))}.get(kind, ((0,), (0,)))

        def dense(a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
            del sizes
            return jax.lax.dot_general(a, b[0] if b.ndim == 3 else b, (contracted, ((), ())))

        return dense
    if kind.startswith("dw"):
        return lambda a, b, sizes: interface.outer(a, b, sizes, interface.choose(a, b[None], "auto"))
    return functools.partial(interface.grouped_matmul, transpose_rhs=kind == "dx")


def scaled_product(kind: str, tile: ScaledTile | None = None) -> Callable[..., jax.Array]:
    """The product in FP8, of `ScaledWork.quantised` and the sizes."""
    if kind.startswith("dw"):
        dtype = jnp.float32 if "float32" in kind else jnp.bfloat16
        if tile is None:
            return functools.partial(scaled_outer, dtype=dtype)
        return lambda a, b, sizes: mosaic.outer(a.numbers, a.scales, b.numbers, b.scales, sizes, dtype=dtype, tile=tile)
    if tile is None:
        return scaled_matmul
    return lambda a, b, sizes: mosaic.matmul(
        a.numbers, a.scales, b.numbers, b.scales, sizes, dtype=jnp.bfloat16, tile=tile
    )


def compiled(calls: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[Any, Callable[[], Any]]:
    """The calls with their arguments, compiled several at a time."""
    lowered = {name: jax.jit(function).lower(*arguments) for name, (function, arguments) in calls.items()}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = dict(zip(lowered, pool.map(lambda each: each.compile(), lowered.values()), strict=True))
    return {name: functools.partial(program, *calls[name][1]) for name, program in programs.items()}


def measure(case: ScaledCase, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of the table: one for each pass."""
    work = ScaledWork(case)
    calls: dict[str, Any] = {}
    for kind in KINDS:
        calls[f"{kind} bf16"] = bfloat16_product(kind, case), work.operands(kind)
        calls[f"{kind} fp8"] = scaled_product(kind), (*work.quantised[kind], work.sizes)
    programs = compiled(calls)
    errors = {kind: work.error(kind, programs[f"{kind} fp8"]()) for kind in KINDS}
    times = dict(zip(programs, medians_ms(list(programs.values()), repeats, inner=12e-3), strict=True))
    for kind in KINDS:
        plain, scaled = times[f"{kind} bf16"], times[f"{kind} fp8"]
        yield {
            "groups": case.groups,
            "rows x k → n": f"{case.rows} x {case.k} → {case.n}",
            "pass": kind,
            "balance": case.balance,
            "fp8 ms": scaled,
            "fp8 TFLOP/s": work.flops / scaled / 1e9,
            "bf16 TFLOP/s": work.flops / plain / 1e9,
            "fp8 / bf16": plain / scaled,
            "error": errors[kind],
        }


_ROWS = [
    ScaledTile(BLOCK, BLOCK, 2 * BLOCK, 3),
    ScaledTile(BLOCK, BLOCK, BLOCK, 6, together=2),
    ScaledTile(BLOCK, BLOCK, BLOCK, 5, pieces=2, together=2),
    ScaledTile(BLOCK, BLOCK, BLOCK, 5, pieces=2, together=2, width=4),
    ScaledTile(BLOCK, BLOCK, BLOCK, 5, pieces=2, together=2, width=16),
    ScaledTile(BLOCK, BLOCK, BLOCK, 5, pieces=2),
]
_OUTER = [
    ScaledTile(BLOCK, BLOCK, BLOCK, 6),
    ScaledTile(BLOCK, BLOCK, BLOCK, 5, pieces=2),
    ScaledTile(2 * BLOCK, BLOCK, BLOCK, 4),
    ScaledTile(2 * BLOCK, BLOCK, BLOCK, 3, pieces=4),
    ScaledTile(2 * BLOCK, BLOCK, BLOCK, 3, width=4, pieces=4),
    ScaledTile(BLOCK, BLOCK, BLOCK, 6, pieces=0),
]
SWEEP = {
    "forward": _ROWS,
    "dx": _ROWS,
    "dw": _OUTER[:-1],
    "dw float32": _OUTER,
}


def division(tile: ScaledTile) -> str:
    """What a table calls a division of the work."""
    named = f"m={tile.m} k={tile.k} stages={tile.stages} cluster={tile.cluster} width={tile.width}"
    return f"{named} pieces={tile.pieces} together={tile.together}" + f" splits={tile.splits}" * (tile.splits > 1)


def sweep(case: ScaledCase, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of a table of tiles."""
    work = ScaledWork(case)
    calls = {
        (kind, tile): (scaled_product(kind, tile), (*work.quantised[kind], work.sizes))
        for kind, tiles in SWEEP.items()
        for tile in tiles
    }
    programs = compiled(calls)
    errors = {(kind, tile): work.error(kind, program()) for (kind, tile), program in programs.items()}
    times = medians_ms(list(programs.values()), repeats, inner=12e-3)
    for (kind, tile), ms in sorted(zip(programs, times, strict=True), key=lambda each: (each[0][0], each[1])):
        yield {
            "case": case.name,
            "pass": kind,
            "tile": division(tile),
            "fp8 TFLOP/s": work.flops / ms / 1e9,
            "error": errors[kind, tile],
        }


FEW = (
    ScaledCase(64, 7168, 1536, 1, "query down"),
    ScaledCase(64, 7168, 640, 1, "latents"),
    ScaledCase(64, 1536, 24576, 1, "query up"),
    ScaledCase(64, 16384, 7168, 1, "out"),
    ScaledCase(64, 7168, 4096, 1, "shared in"),
    ScaledCase(64, 2048, 7168, 1, "shared out"),
    ScaledCase(768, 7168, 4096, 2, "experts in"),
    ScaledCase(768, 2048, 7168, 2, "experts out"),
)
FEW_TINY = (ScaledCase(64, 512, 256, 1, "dense"), ScaledCase(512, 256, 256, 2, "experts"))


def few_rows(case: ScaledCase, repeats: int, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows of a table: one for each division of the contraction."""
    matrix_bytes = case.groups * case.k * case.n
    count = 2 if tiny else min(40, max(2, -(-(160 << 20) // matrix_bytes)))
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (case.rows, case.k), jnp.bfloat16)
    sizes = jnp.full(case.groups, case.rows * 2 // 3 // case.groups if case.groups > 1 else case.rows, jnp.int32)

    @jax.jit
    def matrices(key: jax.Array) -> tuple[jax.Array, ScaledMatrices]:
        w = jax.random.normal(key, (case.groups, case.k, case.n), jnp.bfloat16)
        return w, quantise_matrices(w.swapaxes(1, 2))

    plain, scaled = zip(*(matrices(key) for key in jax.random.split(keys[1], count)), strict=True)
    rows = jax.jit(quantise_rows)(x)

    def all_of(product: Callable[..., jax.Array]) -> Callable[..., Any]:
        return lambda lhs, several, sizes: [product(lhs, w, sizes) for w in several]

    dense = bfloat16_product("forward", case._replace(balance="dense" if case.groups == 1 else "equal"))
    calls: dict[str, Any] = {"bf16": (all_of(dense), (x, plain, sizes))}
    chosen = scaled_matmul if case.groups > 1 else lambda lhs, w, _: scaled_dot(lhs, w)
    calls["fp8 as chosen"] = all_of(chosen), (rows, scaled, sizes)
    for splits in () if tiny else (1, 2, 4, 8):
        if splits > 1 and (splits > case.k // BLOCK // 4 or splits * case.n // BLOCK > 400):
            continue
        tile = ScaledTile(BLOCK, BLOCK, 2 * BLOCK, 3, pieces=0 if splits > 1 else 1, splits=splits)
        calls[f"fp8 splits={splits}"] = all_of(scaled_product("forward", tile)), (rows, scaled, sizes)
    programs = compiled(calls)
    used = np.asarray(used_rows(sizes, case.rows, FP8_ALIGN)) if case.groups > 1 else np.ones(case.rows, bool)
    results = {name: np.asarray(program()[-1]).astype(np.float64)[used] for name, program in programs.items()}
    scale = np.abs(results["fp8 as chosen"]).max()
    times = medians_ms(list(programs.values()), repeats, inner=12e-3)
    for (name, found), ms in zip(results.items(), times, strict=True):
        yield {
            "case": case.name,
            "product": name,
            "us": ms / count * 1e3,
            "GB/s": matrix_bytes * (1 if "fp8" in name else 2) / ms * count / 1e6,
            "apart": 0.0 if name == "bf16" else np.abs(found - results["fp8 as chosen"]).max() / scale,
        }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--sweep", action="store_true", help="try divisions of the work")
    parser.add_argument("--few", action="store_true", help="products of few rows, as in decode")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of cases to run")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this long")
    parser.add_argument("--tiny", action="store_true", help="small products, to try this out")
    arguments = parser.parse_args()
    start, least = time.perf_counter(), {kind: [] for kind in KINDS}

    if arguments.few:
        wanted, kind = FEW_TINY if arguments.tiny else FEW, functools.partial(few_rows, tiny=arguments.tiny)
    else:
        wanted, kind = TINY if arguments.tiny else CASES, sweep if arguments.sweep else measure

    def rows() -> Iterator[dict[str, Any]]:
        for case in wanted:
            if not any(part in case.name for part in arguments.only):
                continue
            if time.perf_counter() - start > arguments.seconds:
                print(f"{case.name}: out of time")
                continue
            for row in kind(case, repeats=arguments.repeats):
                if case in LARGE:
                    least[row["pass"]].append(row["fp8 TFLOP/s"])
                yield row

    report = Recorder.begin(arguments, machine(), "quantised before")
    title = "sweep" if arguments.sweep else "few" if arguments.few else None
    labels = 3 if arguments.sweep else 2 if arguments.few else 4
    formats = {**dict.fromkeys(("fp8 TFLOP/s", "bf16 TFLOP/s"), ".0f"), "fp8 / bf16": ".2f", "error": ".1e"}
    formats.update({"us": ".1f", "GB/s": ".0f", "apart": ".1e"})
    report.table(rows(), labels=labels, title=title, formats=formats)
    if report.file and title is None and all(len(figures) == len(LARGE) for figures in least.values()):
        keys = {
            f"fp8_grouped_{kind}_tflops": (min(figures), "TFLOP/s")
            for kind, figures in least.items()
            if " " not in kind
        }
        write_records(report.file, keys, command=command_line(), machine=report.machine)


if __name__ == "__main__":
    main()
