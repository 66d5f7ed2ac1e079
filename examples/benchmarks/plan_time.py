"""Time of `rebalance_experts`, from a host array to host arrays, after compilation: two Markdown tables.

The specification is the plain Python loop that the tests hold the library to. "CPU" gives NumPy loads, which are
planned on the CPU of any machine; "GPU", where there is one, gives it loads on the device and fetches the plan.
Figures are medians in milliseconds.

    python examples/benchmarks/plan_time.py [--repeats 30] [--no-specification]
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import runpy
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import eplb_jax

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


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call that has been made before."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def on_device(weight: np.ndarray, sizes: tuple[int, ...], device: Any) -> Any:
    """Loads to the device, the plan there, and back."""
    return jax.device_get(eplb_jax.rebalance_experts(jax.device_put(weight.astype(np.float32), device), *sizes))


def times(weight: np.ndarray, sizes: tuple[int, ...], gpus: list[Any], repeats: int) -> list[str]:
    """Cells of a row: CPU, and GPU where there is one."""
    cells = [f"{median_ms(lambda: eplb_jax.rebalance_experts(weight, *sizes), repeats):.2f}"]
    if gpus:
        host = eplb_jax.rebalance_experts(weight, *sizes)
        there = on_device(weight, sizes, gpus[0])
        assert np.array_equal(host.phy2log, there.phy2log) and np.array_equal(host.logcnt, there.logcnt)
        cells.append(f"{median_ms(lambda: on_device(weight, sizes, gpus[0]), repeats):.2f}")
    return cells


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-specification", action="store_true", help="leave the slow column out")
    arguments = parser.parse_args()
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    header = ["CPU ms", *(["GPU ms"] if gpus else [])]
    print(f"{platform.processor() or platform.machine()}, {', '.join(d.device_kind for d in gpus) or 'no GPU'}, "
          f"Python {platform.python_version()}, jax {jax.__version__}\n")  # fmt: skip

    specification = runpy.run_path(str(ROOT / "tests" / "eplb" / "specification.py"))["rebalance"]
    weight = np.random.default_rng(0).lognormal(size=(58, 256)) * 1000
    print("| 58 layers, 256 experts: replicas @ GPUs | nodes | " + " | ".join(header)
          + " | specification ms | specification / CPU | DeepSeek's, other machine |")  # fmt: skip
    print("|---" * (5 + len(header)) + "|")
    for sizes, reference in SIZES.items():
        cells = times(weight, sizes, gpus, arguments.repeats)
        plain = ["", ""]
        if not arguments.no_specification:
            start = time.perf_counter()
            slots = [specification(load, *sizes)[0] for load in weight.astype(np.float32)]
            taken = (time.perf_counter() - start) * 1e3
            assert np.array_equal(slots, eplb_jax.rebalance_experts(weight, *sizes).phy2log)
            plain = [f"{taken:.0f}", f"{taken / float(cells[0]):.0f}"]
        print("| " + " | ".join([f"{sizes[0]} @ {sizes[3]}", f"{sizes[2]}", *cells, *plain, str(reference)]) + " |")

    print("\n| layers | experts | replicas | GPUs | " + " | ".join(header) + " |\n" + "|---" * (4 + len(header)) + "|")
    for layers, experts, replicas, num_gpus in GROWTH:
        weight = np.random.default_rng(0).lognormal(size=(layers, experts)) * 1000
        cells = times(weight, (replicas, 1, 1, num_gpus), gpus, arguments.repeats)
        print("| " + " | ".join([str(layers), str(experts), str(replicas), str(num_gpus), *cells]) + " |")


if __name__ == "__main__":
    main()
