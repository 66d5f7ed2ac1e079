"""How even the plans are, how many slots they waste, and how much `sticky` moves: three Markdown tables.

A gap is how much heavier a layer's heaviest GPU is than the optimum. On small cases the optimum is found by trying all
plans; on real sizes the tightest lower bound stands in for it: of two-slot GPUs by a linear program ("program"),
otherwise the largest of means and fractional replica counts ("mean"). A layer within 0.01% of its bound is proven
optimal. Recorded loads are those of the router that examples/03_rebalance_experts.py trains.

    python examples/benchmarks/balance.py [--layers 58] [--loads FILE.npz]
"""

from __future__ import annotations

import pathlib
import runpy
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from record import Recorder, machine, make_parser

import eplb_jax
from eplb_jax import balanced, duplicates, gpu_loads, lower_bound, moved, no_duplicate, sticky

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERTS = 256
SIZES = [(288, 8, 1, 8), (288, 8, 4, 32), (320, 8, 8, 64), (288, 8, 18, 144), (320, 8, 20, 160)]
SMALL = [(5, 8, 2), (6, 9, 3), (5, 8, 4), (7, 12, 3), (7, 10, 5)]
SYNTHETIC = ("lognormal", "Zipf")
PROVEN = 1e-4
WINDOW = 12
"""Steps whose recorded loads make one layer of the table."""


def synthetic(kind: str, layers: int, experts: int) -> np.ndarray:
    """Loads [layers, experts]: lognormal of sigma 1, or Zipf of exponent 0.8 with 20% noise, in random order."""
    rng = np.random.default_rng(0)
    if kind == "lognormal":
        return rng.lognormal(size=(layers, experts)).astype(np.float32)
    ranks = np.arange(1, experts + 1) ** -0.8
    return np.stack([rng.permutation(ranks * rng.uniform(0.8, 1.2, experts)) for _ in range(layers)]).astype(np.float32)


def heaviest(plan: eplb_jax.Placement, weight: np.ndarray, gpus: int) -> np.ndarray:
    """Load of each layer's heaviest GPU."""
    return gpu_loads(plan, weight, gpus).max(1)


def label(sizes: tuple[int, ...]) -> str:
    """How a line names its sizes."""
    return f"{sizes[0]} @ {sizes[3]}, {sizes[2]}"


def gap_row(
    name: str, kind: str, weight: np.ndarray, sizes: tuple[int, ...], best: np.ndarray, how: str
) -> dict[str, Any]:
    """A line of the first two tables, after checking what `balanced` promises."""
    gpus = sizes[3]
    theirs, ours = (heaviest(policy(weight, *sizes), weight, gpus) for policy in (eplb_jax.rebalance_experts, balanced))
    assert (ours <= theirs * (1 + 1e-6)).all()
    gaps = [(plan / best - 1) for plan in (theirs, ours)]
    return {
        "replicas @ GPUs, nodes": name,
        "loads": kind,
        "bound": how,
        "gap %: DeepSeek's": 100 * gaps[0].mean(),
        "gap %: balanced": 100 * gaps[1].mean(),
        "ratio": gaps[1].mean() / gaps[0].mean() if gaps[0].mean() > 1e-9 else "-",
        "proven %: DeepSeek's": 100 * np.mean(gaps[0] <= PROVEN),
        "proven %: balanced": 100 * np.mean(gaps[1] <= PROVEN),
        "layers improved %": 100 * np.mean(ours < theirs * (1 - 1e-6)),
    }


def gaps(all_loads: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Gaps to the exact optimum of small cases, and to bounds at real sizes."""
    best_load = runpy.run_path(str(ROOT / "tests" / "eplb_jax" / "plan" / "optimum.py"))["best_load"]
    for experts, replicas, gpus in SMALL:
        for kind in SYNTHETIC:
            weight = synthetic(kind, 12, experts)
            best = np.array([best_load(load.astype(float).tolist(), replicas, gpus) for load in weight])
            sizes = replicas, 1, 1, gpus
            yield gap_row(f"{label(sizes)} ({experts} experts)", kind, weight, sizes, best, "exact")
    for sizes in SIZES:
        pairs = sizes[0] == 2 * sizes[3]
        for kind, weight in all_loads.items():
            best = lower_bound(weight, *sizes, tight=pairs)
            yield gap_row(label(sizes), kind, weight, sizes, best, "program" if pairs else "mean")


def wasted_slots(all_loads: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Slots whose expert is on the same GPU already."""
    for sizes in SIZES[:3]:
        for kind, weight in all_loads.items():
            plans = [policy(weight, *sizes) for policy in (eplb_jax.rebalance_experts, no_duplicate)]
            redundant = (sizes[0] - EXPERTS) * len(weight)
            wasted = [int(duplicates(plan, sizes[3]).sum()) for plan in plans]
            even = [(weight.sum(1) / sizes[3] / heaviest(plan, weight, sizes[3])).mean() for plan in plans]
            assert wasted[1] == 0
            yield {
                "replicas @ GPUs, nodes": label(sizes),
                "loads": kind,
                "redundant slots": redundant,
                "wasted %: DeepSeek's": 100 * wasted[0] / redundant,
                "wasted %: no_duplicate": 100 * wasted[1] / redundant,
                "mean / max: DeepSeek's": even[0],
                "mean / max: no_duplicate": even[1],
            }


def moves(all_loads: dict[str, np.ndarray], share: float = 0.02, steps: int = 5) -> Iterator[dict[str, Any]]:
    """Moves over steps in which each load drifts by a random share."""
    rng = np.random.default_rng(1)
    for sizes in SIZES:
        for kind, start in all_loads.items():
            weight, gpus = start, sizes[3]
            plan, fresh_moves, sticky_moves, worst = balanced(weight, *sizes), 0, 0, 0.0
            for _ in range(steps):
                weight = (weight * np.exp(share * rng.normal(size=weight.shape))).astype(np.float32)
                fresh, now = balanced(weight, *sizes), sticky(weight, plan, *sizes[1:], tolerance=0.01)
                fresh_moves += int(moved(plan, fresh, gpus).sum())
                sticky_moves += int(moved(plan, now, gpus).sum())
                worst = max(worst, (heaviest(now, weight, gpus) / heaviest(fresh, weight, gpus)).max())
                plan = now
            yield {
                "replicas @ GPUs, nodes": label(sizes),
                "loads": kind,
                "moved: fresh plan": fresh_moves,
                "moved: sticky": sticky_moves,
                "moved: ratio": sticky_moves / fresh_moves,
                "heaviest, sticky / fresh: worst": float(worst),
            }


def main() -> None:
    """Prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=58, help="of the model")
    parser.add_argument("--loads", help="npz of recorded loads [layers, 256], instead of training a router")
    arguments = parser.parse_args()
    if arguments.loads:
        recorded = eplb_jax.read_loads(arguments.loads)
    else:
        sys.path.insert(0, str(ROOT / "examples"))  # where the lesson imports from, as a script does
        steps = runpy.run_path(str(ROOT / "examples" / "03_rebalance_experts.py"))["record_loads"](steps=192)
        windows = steps[-len(steps) // WINDOW * WINDOW :].reshape(-1, WINDOW, *steps.shape[1:]).sum(1)
        recorded = windows.reshape(-1, EXPERTS)
    all_loads = {kind: synthetic(kind, arguments.layers, EXPERTS) for kind in SYNTHETIC}
    all_loads["recorded"] = recorded[-arguments.layers :].astype(np.float32)
    report = Recorder.begin(
        arguments, machine(), f"{arguments.layers} layers; 5 steps in which loads drift by 2% a step"
    )
    formats = {"ratio": ".2f", "mean / max: DeepSeek's": ".4f", "mean / max: no_duplicate": ".4f"}
    report.table(gaps(all_loads), labels=2, formats=formats)
    print()
    report.table(wasted_slots(all_loads), labels=2, formats=formats)
    print()
    report.table(moves(all_loads), labels=2, formats={"heaviest, sticky / fresh: worst": ".4f"})


if __name__ == "__main__":
    main()
