"""Plans placements from recorded loads: ``python -m eplb_jax plan LOADS.npz --replicas 288 --nodes 4 --gpus 32``."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from eplb_jax.bounds import lower_bound
from eplb_jax.files import read_loads, read_placement, save_placement
from eplb_jax.metrics import balancedness, duplicates, gpu_loads, moved
from eplb_jax.placement import Placement
from eplb_jax.plot import draw_loads
from eplb_jax.policies import balanced, elastic, no_duplicate, sticky
from eplb_jax.rebalance import rebalance_experts

POLICIES = ("deepseek", "balanced", "no-duplicate", "sticky", "elastic")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        _plan(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"eplb_jax: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eplb_jax", description="Expert-parallel load balancing.")
    plan = parser.add_subparsers(required=True).add_parser("plan", help="plan a placement from loads")
    plan.add_argument(
        "loads", type=pathlib.Path, help="npz: array 'loads' of [layers, experts] or [steps, layers, experts]"
    )
    plan.add_argument("--replicas", type=int, required=True, help="slots of a layer on all GPUs")
    plan.add_argument("--gpus", type=int, required=True)
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--groups", type=int, default=1, help="groups of experts that stay on one node")
    plan.add_argument("--policy", choices=POLICIES, default="balanced")
    plan.add_argument("--previous", type=pathlib.Path, help="npz of the placement so far; sticky needs it")
    plan.add_argument("--dead", type=int, nargs="+", default=[], metavar="GPU", help="for elastic: GPUs that are dead")
    plan.add_argument("--output", type=pathlib.Path, help="npz to write; default: LOADS.plan.npz")
    plan.add_argument("--plot", type=pathlib.Path, help="picture to write: load per GPU, before and after")
    return parser


def _plan(args: argparse.Namespace) -> None:
    loads = read_loads(args.loads)
    previous = None if args.previous is None else read_placement(args.previous)
    plan = _make(args, loads, previous)
    plans = {"previous": previous} if previous is not None else _before(loads.shape, args.gpus)
    plans[args.policy] = plan
    bound = None
    if not args.dead:
        bound = lower_bound(loads, args.replicas, args.groups, args.nodes, args.gpus)
    print(table(loads, plans, previous, bound, args.gpus))
    output = args.output or args.loads.with_suffix(".plan.npz")
    save_placement(output, plan)
    print(f"\nwritten: {output}")
    if args.plot is not None:
        draw_loads(loads, plans, args.gpus, args.plot)
        print(f"written: {args.plot}")


def _make(args: argparse.Namespace, loads: np.ndarray, previous: Placement | None) -> Placement:
    sizes = (args.replicas, args.groups, args.nodes, args.gpus)
    if args.dead and args.policy != "elastic":
        raise ValueError(f"--dead {args.dead} is for --policy elastic, not {args.policy}")
    if args.policy == "elastic":
        alive = np.ones(max(args.gpus, 1), bool)
        if not all(0 <= gpu < args.gpus for gpu in args.dead):
            raise ValueError(f"--dead {args.dead}: GPUs are numbered from 0 to {args.gpus - 1}")
        alive[args.dead] = False
        return elastic(loads, alive, args.replicas, args.groups, args.nodes, previous=previous)
    if args.policy == "sticky":
        if previous is None:
            raise ValueError("--policy sticky needs --previous PLAN.npz: the placement to stay close to")
        if previous.num_replicas != args.replicas:
            raise ValueError(f"{args.previous} has {previous.num_replicas} replicas, --replicas is {args.replicas}")
        return sticky(loads, previous, *sizes[1:])
    policies = {"deepseek": rebalance_experts, "balanced": balanced, "no-duplicate": no_duplicate}
    return policies[args.policy](loads, *sizes)


def _before(shape: tuple[int, ...], num_gpus: int) -> dict[str, Placement]:
    """Experts in order, without redundancy, where they divide over the GPUs."""
    layers, experts = shape
    if experts % num_gpus:
        return {}
    return {"in order": Placement.from_phy2log(np.tile(np.arange(experts, dtype=np.int32), (layers, 1)), experts)}


def table(
    loads: np.ndarray,
    plans: dict[str, Placement],
    previous: Placement | None,
    bound: np.ndarray | None,
    num_gpus: int,
) -> str:
    """A Markdown table, a line for each plan; figures are over the layers."""
    lines = [
        "| plan | replicas | mean/max: mean | worst layer | over bound: mean | worst layer | duplicates | moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, plan in plans.items():
        share = balancedness(plan, loads, num_gpus)
        heaviest = gpu_loads(plan, loads, num_gpus).max(1)
        over = ["", ""]
        if bound is not None:
            excess = np.where(bound > 0, heaviest / np.where(bound > 0, bound, 1) - 1, 0)
            over = [f"{excess.mean():.2%}", f"{excess.max():.2%}"]
        moves = "" if previous is None else str(moved(previous, plan, num_gpus).sum())
        cells = [title, str(plan.num_replicas), f"{share.mean():.4f}", f"{share.min():.4f}", *over]
        lines.append("| " + " | ".join([*cells, str(duplicates(plan, num_gpus).sum()), moves]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
