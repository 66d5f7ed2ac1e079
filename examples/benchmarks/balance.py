"""How even the plans are, how many slots they waste, and how much `sticky` moves: three Markdown tables.

A gap is how much heavier a layer's heaviest GPU is than the optimum. On small cases the optimum is found by trying all
plans; on real sizes the tightest lower bound stands in for it: of two-slot GPUs by a linear program ("program"),
otherwise the largest of means and fractional replica counts ("mean"). A layer within 0.01% of its bound is proven
optimal. Recorded loads are those of the router that examples/03_rebalance_experts.py trains.

    python examples/benchmarks/balance.py [--layers 58] [--loads FILE.npz]
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import runpy

import jax
import numpy as np

import eplb_jax
from eplb_jax import balanced, duplicates, gpu_loads, lower_bound, moved, no_duplicate, sticky

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERTS = 256
SIZES = [(288, 8, 1, 8), (288, 8, 4, 32), (320, 8, 8, 64), (288, 8, 18, 144), (320, 8, 20, 160)]
SMALL = [(5, 8, 2), (6, 9, 3), (5, 8, 4), (7, 12, 3), (7, 10, 5)]
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


def gap_row(name: str, kind: str, weight: np.ndarray, sizes: tuple[int, ...], best: np.ndarray, how: str) -> str:
    """A line of the first two tables, after checking what `balanced` promises."""
    gpus = sizes[3]
    theirs, ours = (heaviest(policy(weight, *sizes), weight, gpus) for policy in (eplb_jax.rebalance_experts, balanced))
    assert (ours <= theirs * (1 + 1e-6)).all()
    gaps = [(plan / best - 1) for plan in (theirs, ours)]
    cells = [name, kind, how, *(f"{gap.mean():.3%}" for gap in gaps)]
    cells += [f"{gaps[1].mean() / gaps[0].mean():.2f}" if gaps[0].mean() > 1e-9 else "-"]
    cells += [f"{np.mean(gap <= PROVEN):.0%}" for gap in gaps] + [f"{np.mean(ours < theirs * (1 - 1e-6)):.0%}"]
    return "| " + " | ".join(cells) + " |"


def print_gaps(all_loads: dict[str, np.ndarray]) -> None:
    """Gaps to the exact optimum of small cases, and to bounds at real sizes."""
    header = ("replicas @ GPUs, nodes", "loads", "optimum", "gap: deepseek", "balanced", "ratio", "proven: deepseek",
              "balanced", "layers improved")  # fmt: skip
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    best_load = runpy.run_path(str(ROOT / "tests" / "eplb" / "optimum.py"))["best_load"]
    for experts, replicas, gpus in SMALL:
        for kind in ("lognormal", "zipf"):
            weight = synthetic(kind, 12, experts)
            best = np.array([best_load(load.astype(float).tolist(), replicas, gpus) for load in weight])
            sizes = replicas, 1, 1, gpus
            print(gap_row(f"{label(sizes)} ({experts} experts)", kind, weight, sizes, best, "exact"), flush=True)
    for sizes in SIZES:
        pairs = sizes[0] == 2 * sizes[3]
        for kind, weight in all_loads.items():
            best = lower_bound(weight, *sizes, tight=pairs)
            print(gap_row(label(sizes), kind, weight, sizes, best, "program" if pairs else "mean"), flush=True)


def print_duplicates(all_loads: dict[str, np.ndarray]) -> None:
    """Slots whose expert is on the same GPU already."""
    print("\n| replicas @ GPUs, nodes | loads | redundant slots | wasted: deepseek | no-duplicate | "
          "mean / max: deepseek | no-duplicate |\n" + "|---" * 7 + "|")  # fmt: skip
    for sizes in SIZES[:3]:
        for kind, weight in all_loads.items():
            plans = [policy(weight, *sizes) for policy in (eplb_jax.rebalance_experts, no_duplicate)]
            redundant = (sizes[0] - EXPERTS) * len(weight)
            wasted = [int(duplicates(plan, sizes[3]).sum()) for plan in plans]
            even = [(weight.sum(1) / sizes[3] / heaviest(plan, weight, sizes[3])).mean() for plan in plans]
            share = f"{wasted[0]} ({wasted[0] / redundant:.1%})"
            cells = (label(sizes), kind, redundant, share, wasted[1], *(f"{value:.4f}" for value in even))
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            assert wasted[1] == 0


def print_moves(all_loads: dict[str, np.ndarray], share: float = 0.02, steps: int = 5) -> None:
    """Moves over steps in which each load drifts by a random share."""
    print(f"\n{steps} steps, each load drifts by {share:.0%} a step:\n")
    header = (
        "replicas @ GPUs, nodes",
        "loads",
        "moved: fresh plan",
        "sticky",
        "ratio",
        "heaviest, sticky / fresh: worst",
    )
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    rng = np.random.default_rng(1)
    for sizes in SIZES:
        for kind, start in all_loads.items():
            weight, gpus = start, sizes[3]
            plan, fresh_moves, moves, worst = balanced(weight, *sizes), 0, 0, 0.0
            for _ in range(steps):
                weight = (weight * np.exp(share * rng.normal(size=weight.shape))).astype(np.float32)
                fresh, now = balanced(weight, *sizes), sticky(weight, plan, *sizes[1:], tolerance=0.01)
                fresh_moves += moved(plan, fresh, gpus).sum()
                moves += moved(plan, now, gpus).sum()
                worst = max(worst, (heaviest(now, weight, gpus) / heaviest(fresh, weight, gpus)).max())
                plan = now
            cells = label(sizes), kind, fresh_moves, moves, f"{moves / fresh_moves:.3f}", f"{worst:.4f}"
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--loads", help="npz of recorded loads [layers, 256], instead of training a router")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}")
    if arguments.loads:
        recorded = eplb_jax.read_loads(arguments.loads)
    else:
        steps = runpy.run_path(str(ROOT / "examples" / "03_rebalance_experts.py"))["record_loads"](steps=192)
        windows = steps[-len(steps) // WINDOW * WINDOW :].reshape(-1, WINDOW, *steps.shape[1:]).sum(1)
        recorded = windows.reshape(-1, EXPERTS)
    print()
    all_loads = {kind: synthetic(kind, arguments.layers, EXPERTS) for kind in ("lognormal", "zipf")}
    all_loads["recorded"] = recorded[-arguments.layers :].astype(np.float32)
    print_gaps(all_loads)
    print_duplicates(all_loads)
    print_moves(all_loads)


if __name__ == "__main__":
    main()
