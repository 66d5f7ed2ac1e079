"""Plans placements from recorded loads.

    python -m eplb_jax plan LOADS.npz --replicas 288 --groups 8 --nodes 4 --gpus 32

The command never writes to a file that it reads, LOADS or the placement of ``--previous``. Without ``--output`` it
overwrites no file at all. An error is one sentence and exit status 2.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from eplb_jax.plan.bounds import lower_bound
from eplb_jax.plan.files import read_loads, read_placement, read_sizes, save_placement
from eplb_jax.plan.metrics import balancedness, duplicates, gpu_loads, moved
from eplb_jax.plan.placement import Placement
from eplb_jax.plan.plot import draw_loads
from eplb_jax.plan.policies.elastic import elastic
from eplb_jax.plan.policies.registry import POLICIES
from eplb_jax.plan.policies.sticky import sticky


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
        "loads",
        type=pathlib.Path,
        help="npz: array 'loads' of [layers, experts] or [steps, layers, experts]; or what SGLang or vLLM recorded, "
        "as .pt, npz or JSON",
    )
    plan.add_argument("--replicas", type=int, required=True, help="slots of a layer on all GPUs")
    plan.add_argument("--gpus", type=int, required=True)
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--groups", type=int, default=1, help="groups of experts that stay on one node")
    plan.add_argument("--policy", choices=(*POLICIES, "sticky", "elastic"), default="balanced")
    plan.add_argument("--previous", type=pathlib.Path, help="npz of the placement so far, only read; sticky needs it")
    plan.add_argument("--dead", type=int, nargs="+", default=[], metavar="GPU", help="for elastic: GPUs that are dead")
    plan.add_argument(
        "--output",
        type=pathlib.Path,
        help="npz to write, in place of what is there; default: LOADS.plan.npz, or the first of LOADS.plan2.npz, ... "
        "that is not there yet",
    )
    plan.add_argument("--plot", type=pathlib.Path, help="picture to write: load per GPU, before and after")
    return parser


def _plan(args: argparse.Namespace) -> None:
    output = _choose_output(args)
    loads = read_loads(args.loads)
    previous: Placement | None = None
    gpus_before: int = args.gpus
    if args.previous is not None:
        gpus_before = read_sizes(args.previous).get("num_gpus", gpus_before)
        previous = read_placement(args.previous, num_gpus=gpus_before)
    plan = _make(args, loads, previous, gpus_before)
    plans = _before(loads.shape, args.gpus)
    if previous is not None:
        plans = {"previous" if gpus_before == args.gpus else f"previous ({gpus_before} GPUs)": (previous, gpus_before)}
    plans[args.policy] = plan, args.gpus
    bound = None
    if not args.dead:
        bound = lower_bound(loads, args.replicas, args.groups, args.nodes, args.gpus)
    print(table(loads, plans, previous, bound, args.gpus))
    save_placement(output, plan, num_gpus=args.gpus, num_nodes=args.nodes, num_groups=args.groups)
    print(f"\nwritten: {output}")
    if args.plot is not None:
        draw_loads(loads, {title: p for title, (p, gpus) in plans.items() if gpus == args.gpus}, args.gpus, args.plot)
        print(f"written: {args.plot}")


def _choose_output(args: argparse.Namespace) -> pathlib.Path:
    """Where the plan goes: never over a file that is read, and without --output never over any."""
    output = args.output
    if output is None:
        names = (args.loads.with_suffix(f".plan{number}.npz") for number in itertools.chain([""], itertools.count(2)))
        output = next(name for name in names if not os.path.lexists(name))
    read = {"LOADS": args.loads, "--previous": args.previous}
    for option, path, others in (("--output", output, read), ("--plot", args.plot, {**read, "--output": output})):
        for other, taken in others.items():
            if path is not None and taken is not None and _same_file(path, taken):
                raise ValueError(
                    f"{option} {path} is the file of {other}, {taken}, and would overwrite it: name another"
                )
    return output


def _same_file(one: pathlib.Path, two: pathlib.Path) -> bool:
    if one.exists() and two.exists():
        return one.samefile(two)
    return os.path.realpath(one) == os.path.realpath(two)


def _make(args: argparse.Namespace, loads: np.ndarray, previous: Placement | None, gpus_before: int) -> Placement:
    sizes = (args.replicas, args.groups, args.nodes, args.gpus)
    if min(sizes) < 1:
        given = f"--replicas {args.replicas}, --groups {args.groups}, --nodes {args.nodes}, --gpus {args.gpus}"
        raise ValueError(f"{given}: all are at least 1")
    if args.groups % args.nodes:
        print(f"--groups {args.groups} do not divide over --nodes {args.nodes}: nodes are ignored", file=sys.stderr)
    if args.dead and args.policy != "elastic":
        raise ValueError(f"--dead {args.dead} is for --policy elastic, not {args.policy}")
    if args.policy in ("sticky", "elastic") and gpus_before != args.gpus:
        raise ValueError(
            f"{args.previous} is a placement for {gpus_before} GPUs, --gpus is {args.gpus}: --policy {args.policy} "
            "starts from a placement for as many; --policy balanced plans anew"
        )
    if args.policy == "elastic":
        alive = np.ones(args.gpus, bool)
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
    return POLICIES[args.policy](loads, *sizes)


def _before(shape: tuple[int, ...], num_gpus: int) -> dict[str, tuple[Placement, int]]:
    """Experts in order, without redundancy, where they divide over the GPUs."""
    layers, experts = shape
    if experts % num_gpus:
        return {}
    slots = np.tile(np.arange(experts, dtype=np.int32), (layers, 1))
    return {"in order": (Placement.from_phy2log(slots, experts), num_gpus)}


def table(
    loads: np.ndarray,
    plans: dict[str, tuple[Placement, int]],
    previous: Placement | None,
    bound: np.ndarray | None,
    num_gpus: int,
) -> str:
    """A Markdown table, a line for each plan and the GPUs that it is for; figures are over the layers.

    Only plans for num_gpus are compared with the bound, and with a previous placement for as many.
    """
    lines = [
        "| plan | replicas | mean/max: mean | worst layer | over bound: mean | worst layer | duplicates | moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    comparable = previous is not None and any(p is previous and gpus == num_gpus for p, gpus in plans.values())
    for title, (plan, gpus) in plans.items():
        share = balancedness(plan, loads, gpus)
        heaviest = gpu_loads(plan, loads, gpus).max(1)
        over = ["", ""]
        if bound is not None and gpus == num_gpus:
            excess = np.where(bound > 0, heaviest / np.where(bound > 0, bound, 1) - 1, 0)
            over = [f"{excess.mean():.2%}", f"{excess.max():.2%}"]
        moves = str(moved(previous, plan, gpus).sum()) if previous is not None and comparable else ""
        cells = [title, str(plan.num_replicas), f"{share.mean():.4f}", f"{share.min():.4f}", *over]
        lines.append("| " + " | ".join([*cells, str(duplicates(plan, gpus).sum()), moves]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
