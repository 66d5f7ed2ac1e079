"""Speed of the grouped GEMM on one GPU beside torch._grouped_mm, a plain product and XLA's ragged dot: one table.

Per shape the forward pass, the gradient of the rows (dx) and that of the matrices (dw), with equal groups and with
uneven ones: sizes drawn from a Zipf-like distribution, no multiples of 8, one group empty. Ours and PyTorch's calls
take turns, figures are medians. Operands are far larger than the L2 cache, and only used rows count as work; PyTorch
computes the same rows, rounded up to 8 per group. "plain" is one dense product of as many rows. The error is the
largest one, over the largest value, of a sample of rows (columns for dw) against float32. Decoding takes little longer
than starting a program, so there the calls are four products in one program, or in one CUDA graph, each.

    python examples/benchmarks/grouped_gemm.py [--sweep] [--only NAME ...] [--repeats 7] [--no-ragged-dot]

``--sweep`` tries divisions of the work instead and prints the best ones;
eplb_jax/kernels/grouped_gemm/tiles.py holds them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too

import jax
import jax.numpy as jnp
import numpy as np
from record import Recorder, machine, make_parser, medians_ms

from eplb_jax.kernels.grouped_gemm import mosaic, xla
from eplb_jax.kernels.grouped_gemm.layout import ALIGN, group_starts
from eplb_jax.kernels.grouped_gemm.ring import Tile

try:
    torch: Any = importlib.import_module("torch")
except ImportError:
    torch = None

WIDTHS = [(7168, 4096), (2048, 7168)]
KINDS = ("forward", "dx", "dw")


class Case(NamedTuple):
    """One row of the table."""

    rows: int
    k: int
    n: int
    groups: int
    kind: str
    balance: str

    @property
    def name(self) -> str:
        """For --only and for the reader."""
        return f"{self.groups}x {self.rows}x{self.k}->{self.n} {self.kind} {self.balance}"

    @property
    def decoding(self) -> bool:
        """Whether reading the matrices takes longer than multiplying."""
        return self.rows <= 1024

    @property
    def products(self) -> int:
        """How many products one call makes."""
        return 4 if self.decoding else 1

    @property
    def capacity(self) -> int:
        """Rows of the arrays: few rows need space for the rounding of each group."""
        return self.rows + ALIGN * self.groups if self.decoding else self.rows


def cases(ragged: bool = True) -> list[Case]:
    """All rows of the table: training first, then decoding."""
    balances = ("equal", "uneven") if ragged else ("equal",)
    train = [Case(32768, k, n, g, kind, b) for g in (8, 32) for k, n in WIDTHS for kind in KINDS for b in balances]
    decode = [
        Case(rows, k, n, g, "forward", b)
        for g in (8, 32) for k, n in WIDTHS for rows in (128, 256, 512, 1024) for b in balances
    ]  # fmt: skip
    return train + decode


def group_sizes(case: Case) -> np.ndarray:
    """Sizes that fill the rows as far as their rounding lets them."""
    if case.balance == "equal":
        return np.full(case.groups, case.rows // case.groups)
    rng = np.random.default_rng(0)
    shares = rng.permutation(1 / np.arange(1, case.groups + 1) ** 0.8)
    shares[case.groups // 2] = 0
    total = case.rows
    while True:
        sizes = rng.multinomial(total, shares / shares.sum())
        if (-(-sizes // ALIGN) * ALIGN).sum() <= case.capacity:
            return sizes
        total -= ALIGN


@functools.cache
def program(case: Case, function: Callable[..., Any], options: tuple[tuple[str, Any], ...] = ()) -> Any:
    """A case's products, compiled: (lhs, rhs, a copy of the group sizes for each) -> results."""
    shapes = {"forward": ("x", "w"), "dx": ("dout", "w"), "dw": ("x", "dout")}[case.kind]
    every = dict(x=(case.capacity, case.k), w=(case.groups, case.k, case.n), dout=(case.capacity, case.n))
    pair = (jax.ShapeDtypeStruct(every[name], jnp.bfloat16) for name in shapes)
    sizes = [jax.ShapeDtypeStruct((case.groups,), jnp.int32)] * case.products
    transposed = {"transpose_rhs": True} if case.kind == "dx" else {}
    one = jax.jit(functools.partial(function, **dict(options), **transposed))
    return jax.jit(lambda lhs, rhs, sizes: [one(lhs, rhs, own) for own in sizes]).lower(*pair, sizes).compile()


def compile_all(chosen: list[Case]) -> None:
    """Compiles our products of all cases, several at a time; what is wrong with one shows when it is measured."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = [pool.submit(GroupedProduct.program, case) for case in {_same_program(case) for case in chosen}]
        concurrent.futures.wait(made)


def _same_program(case: Case) -> Case:
    """The case of the same shapes that stands for all of them."""
    return case._replace(balance="")


class GroupedProduct:
    """Operands of a case, and what can be done with them."""

    def __init__(self, case: Case):
        self.case = case
        self.sizes = group_sizes(case)
        keys = jax.random.split(jax.random.key(0), 3)

        @functools.partial(jax.jit, static_argnums=1)
        def normal(key, shape):
            return jax.random.normal(key, shape, jnp.bfloat16)

        self.x, self.dout = normal(keys[0], (case.capacity, case.k)), normal(keys[1], (case.capacity, case.n))
        self.w = normal(keys[2], (case.groups, case.k, case.n))
        self.device_sizes = jnp.asarray(self.sizes, jnp.int32)
        self.flops = 2 * int(self.sizes.sum()) * case.k * case.n
        busy = int((self.sizes > 0).sum())
        self.bytes = 2 * (int(self.sizes.sum()) * (case.k + case.n) + busy * case.k * case.n)

    def operands(self) -> tuple[jax.Array, ...]:
        """What the product of the case's kind takes."""
        pair = {"forward": (self.x, self.w), "dx": (self.dout, self.w), "dw": (self.x, self.dout)}[self.case.kind]
        return *pair, self.device_sizes

    @staticmethod
    def program(case: Case, module: Any = mosaic, **options: Any) -> Any:
        """Our products."""
        function = module.outer if case.kind == "dw" else module.matmul
        return program(_same_program(case), function, tuple(options.items()))

    def ours(self, module: Any = mosaic, **options: Any) -> Callable[[], Any]:
        """The case's products by one of our backends, compiled; gives the last one's result."""
        call, (lhs, rhs, sizes) = self.program(self.case, module, **options), self.operands()
        copies = [jnp.copy(sizes) for _ in range(self.case.products)]
        return lambda: call(lhs, rhs, copies)[-1]

    def plain(self) -> Callable[[], Any]:
        """One dense product of as many rows, by cuBLAS: through PyTorch where it is there."""
        used = int(self.sizes.sum()) // ALIGN * ALIGN
        arrays = self.x[:used], self.dout[:used], self.w[0]
        x, dout, w = (torch.from_dlpack(array) for array in arrays) if torch else arrays
        matmul: Any = torch.matmul if torch else jax.jit(jnp.matmul)
        pair = {"forward": lambda: (x, w), "dx": lambda: (dout, w.T), "dw": lambda: (x.T, dout)}[self.case.kind]()
        return lambda: matmul(*pair)

    def torch_calls(self) -> dict[str, Callable[[], Any]]:
        """PyTorch's grouped product, with the matrices in either order where there are matrices: those that run."""
        if torch is None:
            return {}
        ends = torch.from_dlpack(jnp.cumsum(-(-self.device_sizes // ALIGN) * ALIGN, dtype=jnp.int32))
        x, dout, w = (torch.from_dlpack(array) for array in (self.x, self.dout, self.w))
        if self.case.kind == "dw":
            calls = {"torch": lambda: torch._grouped_mm(x.t(), dout, offs=ends)}
        else:
            orders = {"torch by rows": w, "torch by columns": w.transpose(1, 2).contiguous().transpose(1, 2)}
            if self.case.kind == "forward":
                calls = {name: lambda w=w: torch._grouped_mm(x, w, offs=ends) for name, w in orders.items()}
            else:
                calls = {
                    name: lambda w=w: torch._grouped_mm(dout, w.transpose(1, 2), offs=ends)
                    for name, w in orders.items()
                }
        working = {name: call for name, call in calls.items() if attempt(lambda call=call: wait(call()) or True, name)}
        return {name: self._in_one_graph(call) for name, call in working.items()} if self.case.decoding else working

    def _in_one_graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """As many calls as one of ours makes products, without the time that starting them takes."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for _ in range(self.case.products)]

        def replay(kept: Any = call) -> Any:
            """The graph knows its operands by address alone: ``kept`` holds them."""
            graph.replay()
            return results[-1]

        return replay

    def error(self, result: jax.Array) -> float:
        """Largest difference from float32 over the largest value, of a sample."""
        starts, sizes = np.asarray(group_starts(self.device_sizes)), self.sizes
        sample = functools.partial(_sample, kind=self.case.kind)
        worst = largest = 0.0
        for g in range(self.case.groups):
            if sizes[g] == 0:
                if self.case.kind == "dw":
                    worst = max(worst, float(jnp.abs(result[g]).max()))
                continue
            near = np.minimum(np.arange(64), sizes[g] - 1)
            rows = np.concatenate([starts[g] + near, starts[g] + sizes[g] - 1 - near])
            difference, value = sample(*self.operands()[:2], result, g, rows, starts[g], sizes[g])
            worst, largest = max(worst, float(difference)), max(largest, float(value))
        return worst / largest if worst == worst else float("nan")


@functools.partial(jax.jit, static_argnames="kind")
def _sample(lhs: Any, rhs: Any, result: Any, group: Any, rows: Any, start: Any, size: Any, kind: str) -> Any:
    """Largest difference and value: 128 rows of one group, or 64 columns of lhs for dw."""
    dot = functools.partial(jnp.matmul, precision="highest")
    if kind == "dw":
        row = jnp.arange(lhs.shape[0])[:, None]
        columns = (jnp.arange(64) * 37) % lhs.shape[1]
        inside = (row >= start) & (row < start + size)
        want = dot(jnp.where(inside, lhs[:, columns].astype(jnp.float32), 0).T, rhs.astype(jnp.float32))
        got = result[group][columns]
    else:
        matrix = rhs[group].astype(jnp.float32)
        want = dot(lhs[rows].astype(jnp.float32), matrix.T if kind == "dx" else matrix)
        got = result[rows]
    difference = jnp.abs(got.astype(jnp.float32) - want)
    return jnp.where(jnp.isnan(difference), jnp.inf, difference).max(), jnp.abs(want).max()


def wait(value: Any) -> None:
    """Until the device is done."""
    if torch is not None and isinstance(value, torch.Tensor):
        torch.cuda.synchronize()
    else:
        jax.block_until_ready(value)


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, products: int = 1) -> dict[str, float]:
    """Median seconds of each product; the calls take turns, some of them without a pause at a time."""
    times = medians_ms(list(calls.values()), repeats, inner=12e-3, wait=wait)
    return {name: ms / 1e3 / products for name, ms in zip(calls, times, strict=True)}


def attempt(make: Callable[[], Any], what: str) -> Any:
    """The result, or None with a line that says why there is none."""
    try:
        return make()
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        return None


def measure(case: Case, repeats: int, ragged_dot: bool) -> dict[str, Any]:
    """A row of the table."""
    work = GroupedProduct(case)
    calls = {"ours": work.ours()}
    if not case.decoding:
        calls["plain"] = work.plain()
    error = work.error(calls["ours"]())
    calls |= work.torch_calls()
    seconds = interleaved(calls, repeats, case.products)
    if ragged_dot and not case.decoding and (slow := attempt(lambda: work.ours(xla), "ragged dot")):
        seconds |= attempt(lambda: interleaved({"ragged": slow}, 1), "ragged dot") or {}
    ours = seconds["ours"]
    best_torch = min((value for name, value in seconds.items() if name.startswith("torch")), default=None)

    def rate(value: float | None) -> float | str:
        return "-" if value is None else work.flops / value / 1e12

    return {
        "experts": case.groups,
        "rows x k → n": f"{case.rows} x {case.k} → {case.n}",
        "pass": case.kind,
        "groups": case.balance,
        "ours µs": ours * 1e6,
        "ours TFLOP/s": rate(ours),
        "torch TFLOP/s": rate(best_torch),
        "ours / torch": "-" if best_torch is None else best_torch / ours,
        "plain TFLOP/s": rate(seconds.get("plain")),
        "ragged dot TFLOP/s": rate(seconds.get("ragged")),
        "GB/s": work.bytes / ours / 1e9,
        "error": error,
    }


def candidates(case: Case) -> list[Tile]:
    """Divisions of the work that may be the best."""
    if not case.decoding:
        large = [(128, 256, "m", 1, 8), (128, 256, "m", 2, 8), (128, 256, "n", 1, 8), (128, 256, "n", 2, 8),
                 (256, 128, "m", 1, 4), (256, 128, "m", 2, 4), (256, 128, "m", 2, 8)]  # fmt: skip
        turns = [Tile(128, 128, 64, 6, "tiles", c, w) for c, w in ((1, 8), (2, 8), (2, 16))]
        cut = 2 if case.kind != "dw" else 0
        return [*(Tile(m, n, 64, 4, split, c, w, cut) for m, n, split, c, w in large), *turns]
    small = [(64, 128, 64, 8, "n"), (64, 128, 128, 4, "n"), (64, 256, 64, 4, "n"), (128, 64, 64, 8, "m"),
             (128, 128, 64, 6, "m"), (128, 256, 64, 4, "n"), (256, 128, 64, 4, "m"), (128, 128, 64, 6, "tiles"),
             (64, 128, 64, 8, "tiles"), (64, 64, 64, 12, "tiles")]  # fmt: skip
    return [Tile(*sides, cluster=1, width=8) for sides in small]


def _short(tile: Tile) -> str:
    """The values of a tile, as `Tile` takes them."""
    return str(tuple(dataclasses.astuple(tile)))


def sweep(case: Case, repeats: int, clusters: list[int]) -> list[dict[str, Any]]:
    """Rows of a table of tiles and of PyTorch's products, the fastest first."""
    work = GroupedProduct(case)
    tiles = [tile for tile in candidates(case) if tile.cluster in clusters]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda tile: attempt(lambda: work.ours(tile=tile), _short(tile)), tiles))
    calls = {_short(tile): call for tile, call in zip(tiles, made, strict=True) if call}
    errors = {name: work.error(call()) for name, call in calls.items()}
    calls |= work.torch_calls()
    if not case.decoding and torch is not None:
        calls["plain"] = work.plain()
    seconds = interleaved(calls, repeats, case.products)
    return [
        {
            "case": case.name,
            "tile": name,
            "µs": seconds[name] * 1e6,
            "TFLOP/s": work.flops / seconds[name] / 1e12,
            "GB/s": work.bytes / seconds[name] / 1e9,
            "error": errors.get(name, "-"),
        }
        for name in sorted(seconds, key=lambda name: seconds[name])
    ]


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--sweep", action="store_true", help="try divisions of the work")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of cases to run")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--clusters", type=int, nargs="*", default=[1, 2], help="sizes that --sweep tries")
    parser.add_argument("--no-ragged-dot", action="store_true", help="leave XLA's ragged dot out: it is slow")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this long")
    arguments = parser.parse_args()
    start = time.perf_counter()
    chosen = [case for case in cases(ragged=not arguments.sweep) if any(part in case.name for part in arguments.only)]

    def rows() -> Iterator[dict[str, Any]]:
        for case in chosen:
            if time.perf_counter() - start > arguments.seconds:
                print(f"{case.name}: out of time")
                continue
            if arguments.sweep:
                yield from (
                    attempt(lambda case=case: sweep(case, arguments.repeats, arguments.clusters), case.name) or []
                )
            elif row := attempt(
                lambda case=case: measure(case, arguments.repeats, not arguments.no_ragged_dot), case.name
            ):
                yield row

    if not arguments.sweep:
        compile_all(chosen)
    report = Recorder.begin(arguments, f"{machine()}, torch {torch.__version__ if torch else '-'}", "bfloat16")
    columns = (
        "µs",
        "ours µs",
        "TFLOP/s",
        "ours TFLOP/s",
        "torch TFLOP/s",
        "plain TFLOP/s",
        "ragged dot TFLOP/s",
        "GB/s",
    )
    formats = {**dict.fromkeys(columns, ".0f"), "ours / torch": ".2f", "error": ".1e"}
    report.table(
        rows(), labels=2 if arguments.sweep else 4, title="sweep" if arguments.sweep else None, formats=formats
    )


if __name__ == "__main__":
    main()
