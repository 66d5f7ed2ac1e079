"""Times of plans, from a host array to host arrays, after compilation: three Markdown tables.

The first has the policies that search, on the CPU, the least of the calls: for lognormal and Zipf loads, the slower of
both. `sticky` follows loads that drifted by 2%; `elastic` plans after a GPU died. The gap is how much heavier than
`lower_bound` the heaviest GPU of `balanced`'s plan is, mean of the layers and the worst.

The others are of `rebalance_experts`. The plain Python loop is the specification that the tests hold the library to.
"CPU" gives NumPy loads, which are planned on the CPU of any machine; "GPU", where there is one, gives it loads on the
device and fetches the plan. Their figures are medians in milliseconds.

    python examples/benchmarks/plan_time.py [--repeats 30] [--no-specification] [--no-growth] [--search-only]
"""

from __future__ import annotations

import functools
import pathlib
import runpy
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from balance import synthetic
from record import Recorder, command_line, machine, make_parser, medians_ms, processor, write_records

import eplb_jax
from eplb_jax import balanced, elastic, gpu_loads, lower_bound, no_duplicate, sticky

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {
    # What DeepSeek's own code takes, in ms, measured once on two cores of a Xeon with PyTorch 2.13.
    (288, 8, 1, 8): 392,
    (288, 8, 4, 32): 417,
    (320, 8, 8, 64): 397,
    (288, 8, 18, 144): 2011,
    (320, 8, 20, 160): 2743,
}
GROWTH = [
    # layers, experts, replicas, GPUs
    *[(layers, 256, 288, 32) for layers in (1, 8, 58, 116, 232)],
    *[(58, experts, experts * 9 // 8, experts // 8) for experts in (64, 128, 256, 512, 1024)],
    *[(58, 256, replicas, 32) for replicas in (256, 288, 320, 384, 512, 1024)],
]


def on_device(weight: np.ndarray, sizes: tuple[int, ...], device: Any) -> Any:
    """Loads to the device, the plan there, and back."""
    return jax.device_get(eplb_jax.rebalance_experts(jax.device_put(weight.astype(np.float32), device), *sizes))


def times(weight: np.ndarray, sizes: tuple[int, ...], gpus: list[Any], repeats: int) -> dict[str, float]:
    """Cells of a row: CPU, and GPU where there is one."""
    cells = {"CPU ms": medians_ms([lambda: eplb_jax.rebalance_experts(weight, *sizes)], repeats)[0]}
    if gpus:
        host = eplb_jax.rebalance_experts(weight, *sizes)
        there = on_device(weight, sizes, gpus[0])
        assert np.array_equal(host.phy2log, there.phy2log) and np.array_equal(host.logcnt, there.logcnt)
        cells["GPU ms"] = medians_ms([lambda: on_device(weight, sizes, gpus[0])], repeats)[0]
    return cells


def deepseek_sizes(gpus: list[Any], repeats: int, specified: bool) -> Iterator[dict[str, Any]]:
    """DeepSeek's sizes, beside the specification."""
    specification = runpy.run_path(str(ROOT / "tests" / "eplb_jax" / "plan" / "specification.py"))["rebalance"]
    weight = np.random.default_rng(0).lognormal(size=(58, 256)) * 1000
    for sizes, reference in SIZES.items():
        cells = times(weight, sizes, gpus, repeats)
        row = {"replicas @ GPUs": f"{sizes[0]} @ {sizes[3]}", "nodes": sizes[2], **cells}
        if specified:
            start = time.perf_counter()
            slots = [specification(load, *sizes)[0] for load in weight.astype(np.float32)]
            taken = (time.perf_counter() - start) * 1e3
            assert np.array_equal(slots, eplb_jax.rebalance_experts(weight, *sizes).phy2log)
            row |= {"plain Python loop ms": taken, "loop / CPU": taken / cells["CPU ms"]}
        yield row | {"DeepSeek's, other machine": f"{reference} ms"}


def growth(gpus: list[Any], repeats: int) -> Iterator[dict[str, Any]]:
    """Other numbers of layers, experts and replicas."""
    for layers, experts, replicas, num_gpus in GROWTH:
        weight = np.random.default_rng(0).lognormal(size=(layers, experts)) * 1000
        cells = times(weight, (replicas, 1, 1, num_gpus), gpus, repeats)
        yield {"layers": layers, "experts": experts, "replicas": replicas, "GPUs": num_gpus, **cells}


SEARCHED = [
    # experts, replicas, groups, nodes, GPUs
    (256, 288, 8, 4, 32),
    (256, 288, 1, 1, 32),
    (256, 320, 8, 8, 64),
    (256, 320, 1, 1, 64),
    (1024, 1152, 16, 16, 128),
    (1024, 1152, 1, 1, 128),
]


def least_ms(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """The least milliseconds of calls that take turns: what they take when nothing else keeps the machine busy."""
    return [min(taken) for taken in zip(*(medians_ms(calls, 1, warm=0) for _ in range(repeats)), strict=True)]


def searches(repeats: int) -> Iterator[dict[str, Any]]:
    """The policies that search, and how good `balanced` is."""
    for experts, *sizes in SEARCHED:
        replicas, groups, nodes, gpus = sizes
        times, gaps = [], []
        for kind in ("lognormal", "Zipf"):
            start = synthetic(kind, 58, experts)
            plan = balanced(start, *sizes)
            weight = start * np.exp(0.02 * np.random.default_rng(1).normal(size=start.shape)).astype(np.float32)
            alive = np.arange(gpus) != gpus // 2
            calls = [
                functools.partial(balanced, weight, *sizes),
                functools.partial(no_duplicate, weight, *sizes),
                functools.partial(sticky, weight, plan, *sizes[1:]),
                functools.partial(elastic, weight, alive, replicas, groups, nodes, previous=plan),
            ]
            times.append(least_ms(calls, repeats))
            gaps.append(gpu_loads(plan, start, gpus).max(1) / lower_bound(start, *sizes) - 1)
        names = "balanced ms", "no_duplicate ms", "sticky ms", "elastic ms"
        yield {
            "experts": experts,
            "replicas @ GPUs": f"{replicas} @ {gpus}",
            "nodes": nodes,
            **dict(zip(names, np.max(times, axis=0).tolist(), strict=True)),
            "gap: mean %": 100 * np.mean(gaps),
            "gap: worst layer %": 100 * np.max(gaps),
        }


def main() -> None:
    """Prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="calls of which the median or the least counts")
    parser.add_argument("--no-specification", action="store_true", help="leave the slow column out")
    parser.add_argument("--no-growth", action="store_true", help="leave the second table out")
    parser.add_argument("--search-only", action="store_true", help="make the first table alone")
    args = parser.parse_args()
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    report = Recorder.begin(args, f"{processor()}, {machine()}" if gpus else machine(), "58 layers of 256 experts")
    formats = {"CPU ms": ".2f", "GPU ms": ".2f", "plain Python loop ms": ".0f", "loop / CPU": ".0f"}
    columns = "balanced ms", "no_duplicate ms", "sticky ms", "elastic ms"
    rows = list(searches(args.repeats))
    report.table(rows, labels=3, title="search", formats=dict.fromkeys(columns, ".0f"))
    if report.file:
        named = {
            f"plan_{policy}_ms_{size}": (
                max(row[f"{policy} ms"] for row in rows if row["replicas @ GPUs"] == size.replace("_", " @ ")),
                "ms",
            )
            for policy in ("balanced", "sticky")
            for size in ("288_32", "320_64")
        }
        write_records(report.file, named, command=command_line(), machine=report.machine)
    if args.search_only:
        return
    print()
    report.table(deepseek_sizes(gpus, args.repeats, not args.no_specification), labels=2, formats=formats)
    if not args.no_growth:
        report.table(growth(gpus, args.repeats), labels=4, title="growth", formats=formats)


if __name__ == "__main__":
    main()
