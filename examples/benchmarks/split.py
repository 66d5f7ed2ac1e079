"""Which replica a token goes to, by hash, nearest, or by load: how heavy the heaviest GPU gets, and the room it needs.

Loads drift: each microbatch's expert loads are the last ones times random factors, drawn back to where they began; the
placement is `balanced`'s for those, and stays. "skewed" loads begin as Zipf's; "adversarial" ones give the experts of
one GPU, another in each microbatch, three times as many tokens. Figures are tokens of the heaviest GPU over the mean,
of all microbatches. "least" is the optimum of a linear program over fractions, of every 20th microbatch; "even" gives
each replica of an expert equally many, as a hash does with many tokens. "nearest" is for devices that have equally many
tokens of every expert. "live" is "split" where every 10 microbatches `sticky` plans for the loads of the last 10.
"exact" is `split_exactly`: each expert on one GPU, in order, and each GPU filled with tokens of one other's experts.

    python examples/benchmarks/split.py [--microbatches 1000] [--tokens 4096] [--time-only]

The second table has what "exact" costs: experts whose weights a GPU fetches and sends for a microbatch, the mean of all
GPUs and microbatches and the most of any, "for all pairs" what an all-to-all of fixed size would bring to each GPU, the
most that one fetches from every other, and the tokens that are computed away from their expert's GPU.

The third has the room of a layer of DeepSeek-V3 (width 7,168, 4,096 tokens of 8 choices a GPU), for the worst case and
for a capacity factor from the recent microbatches of the drifting loads, `eplb_jax.capacity_from`: GiB of the rows that
are exchanged, sent and received, and of the rows of experts, in bfloat16. The last has the time of a division within a
program, on this machine's device; ``--time-only`` makes it alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from balance import EXPERTS, synthetic
from record import Recorder, command_line, machine, make_parser, medians_ms, write_records

import eplb_jax
from eplb_jax import (
    Placement,
    balanced,
    gpu_loads,
    heaviest_by_split,
    make_capacities,
    split_exactly,
    split_tokens,
    sticky,
)

SIZES = [(288, 8, 4, 32), (320, 8, 8, 64), (320, 1, 1, 64)]
TOP_K, WIDTH = 8, 7168
LIVE = 10
"""Microbatches between live plans, and of which loads they are made."""
IN_A_ROW = 100
"""Divisions of a timed program."""
KEPT = "320 @ 64, 8"
"""The sizes whose figures have names of their own: experts of DeepSeek-V3 on 64 GPUs."""


def drifting(kind: str, microbatches: int, tokens: int, plan_of: Any) -> tuple[np.ndarray, Placement]:
    """Tokens of each expert [microbatches, experts], and the placement made for where they began."""
    rng = np.random.default_rng(0)
    start = synthetic("Zipf" if kind == "skewed" else "lognormal", 1, EXPERTS)[0]
    plan = plan_of(start[None])
    logs, counts = np.zeros(EXPERTS), []
    slots = plan.phy2log[0].reshape(plan_of.keywords["num_gpus"], -1)
    for step in range(microbatches):
        logs = 0.95 * logs + 0.1 * rng.normal(size=EXPERTS)  # ends up at a spread of 0.32
        share = start * np.exp(logs)
        if kind == "adversarial":
            share[np.unique(slots[step % len(slots)])] *= 3
        counts.append(rng.multinomial(tokens, share / share.sum()))
    return np.stack(counts), plan


def with_live_plans(counts: np.ndarray, plan: Placement, sizes: tuple[int, ...]) -> np.ndarray:
    """The heaviest GPU [microbatches] of `split` where `sticky` follows the loads of the last microbatches."""
    found = []
    for first in range(0, len(counts), LIVE):
        if first:
            plan = sticky(counts[first - LIVE : first].sum(0)[None], plan, *sizes[1:])
        found.append(heaviest_by_split(counts[first : first + LIVE, None], plan, sizes[3])[:, 0])
    return np.concatenate(found)


def by_nearest(counts: np.ndarray, plan: Placement, gpus: int, per_node: int) -> np.ndarray:
    """Loads of GPUs [microbatches, gpus] when each has as many tokens of an expert, and takes the nearest replica."""
    slots = plan.phy2log[0]
    holder = np.arange(len(slots)) // (len(slots) // gpus)
    share = np.zeros((EXPERTS, gpus))
    for expert in range(EXPERTS):
        homes = holder[slots == expert]
        for device in range(gpus):
            distance = np.where(homes == device, 0, np.where(homes // per_node == device // per_node, 1, 2))
            near = homes[distance == distance.min()]
            np.add.at(share[expert], near, 1 / len(near) / gpus)
    return counts @ share


def least(counts: np.ndarray, plan: Placement, gpus: int) -> np.ndarray:
    """The optimum of the heaviest GPU of each microbatch."""
    from scipy.optimize import linprog  # noqa: PLC0415

    slots = plan.phy2log[0]
    number = np.arange(len(slots))
    below, equal = np.zeros((gpus, len(slots) + 1)), np.zeros((EXPERTS, len(slots) + 1))
    below[number // (len(slots) // gpus), number], below[:, -1], equal[slots, number] = 1, -1, 1
    aim = np.append(np.zeros(len(slots)), 1)
    return np.array([linprog(aim, below, np.zeros(gpus), equal, c, method="highs").fun for c in counts])


def exactly(counts: np.ndarray, gpus: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Loads of GPUs [microbatches, gpus] by `split_exactly`, and what that costs."""

    def one(counts: jax.Array) -> tuple[jax.Array, ...]:
        found = split_exactly(counts, gpus)
        home = jnp.arange(gpus, dtype=jnp.int32).repeat(len(counts) // gpus)[:, None]
        away = jnp.where(home == jnp.arange(gpus, dtype=jnp.int32), 0, found.wanted)
        fetched = away > 0
        return found.wanted.sum(0), fetched.sum(0), fetched.reshape(gpus, -1, gpus).sum((1, 2)), away.sum()

    loads, fetched, sent, away = map(np.asarray, jax.lax.map(one, jnp.asarray(counts, jnp.int32), batch_size=50))
    return loads, {
        "fetched: mean": fetched.mean(),
        "fetched: most": fetched.max(),
        "sent: most": sent.max(),
        "for all pairs": fetched.max() * (gpus - 1),
        "tokens moved %": 100 * away.sum(dtype=np.int64) / counts.sum(),
    }


def heaviest(microbatches: int, tokens: int, costs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line for each size and kind of loads; those of what "exact" costs are added to ``costs``."""
    for sizes in SIZES:
        gpus, per_node = sizes[3], max(sizes[3] // sizes[2], 8)
        names = dict(zip(("num_replicas", "num_groups", "num_nodes", "num_gpus"), sizes, strict=True))
        for kind in ("drifting", "skewed", "adversarial"):
            counts, plan = drifting(kind, microbatches, gpus * tokens * TOP_K, functools.partial(balanced, **names))
            mean = counts[0].sum() / gpus
            each = Placement.from_phy2log(np.repeat(plan.phy2log, len(counts), 0), EXPERTS)
            exact, cost = exactly(counts, gpus)
            found = {
                "even": gpu_loads(each, counts, gpus).max(1) / mean,
                "nearest": by_nearest(counts, plan, gpus, per_node).max(1) / mean,
                "split": heaviest_by_split(counts[:, None], plan, gpus)[:, 0],
                "live": with_live_plans(counts, plan, sizes),
                "least": least(counts[::20], plan, gpus) / mean,
            }
            row = {"replicas @ GPUs, groups": f"{sizes[0]} @ {gpus}, {sizes[1]}", "loads": kind}
            for name, values in found.items():
                if name != "least":
                    row[f"{name}: mean"] = values.mean()
                    row[f"{name}: 99%"] = np.quantile(values, 0.99)
            row["exact: worst"] = exact.max() / mean
            row["split / least: worst"] = (found["split"][::20] / found["least"]).max()
            costs.append(dict(list(row.items())[:2]) | cost)
            yield row


def recent_room(sizes: tuple[int, ...], microbatches: int, tokens: int) -> tuple[float, np.ndarray, Placement]:
    """(The capacity factor from the first half of drifting loads, the loads behind it, their placement)."""
    names = dict(zip(("num_replicas", "num_groups", "num_nodes", "num_gpus"), sizes, strict=True))
    gpus = sizes[3]
    counts, plan = drifting("drifting", microbatches, gpus * tokens * TOP_K, functools.partial(balanced, **names))
    recent = max(1, len(counts) // 2)
    factor = eplb_jax.capacity_from(counts[:recent, None], plan, gpus)
    return factor, counts[recent:] if recent < len(counts) else counts, plan


def room(microbatches: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Memory of a layer's rows."""
    for sizes in SIZES:
        replicas, _, _, gpus = sizes
        factor, counts, plan = recent_room(sizes, microbatches, tokens)
        later = heaviest_by_split(counts[:, None], plan, gpus)
        for name, chosen in (("worst case", None), ("from recent loads", factor)):
            found = make_capacities(tokens, TOP_K, gpus, replicas // gpus, chosen)
            yield {
                "replicas @ GPUs, groups": f"{replicas} @ {gpus}, {sizes[1]}",
                "room": name,
                "factor": "-" if chosen is None else chosen,
                "exchanged GiB": 2 * gpus * found.exchange * WIDTH * 2 / 2**30,
                "rows GiB": found.rows * WIDTH * 2 / 2**30,
                "later microbatches beyond %": 0.0 if chosen is None else 100 * (later > chosen).mean(),
            }


def times(repeats: int) -> Iterator[dict[str, Any]]:
    """Time of a division on this machine's device, within a program: each of a row waits for the last one's result."""
    for sizes in SIZES:
        loads = synthetic("lognormal", 1, EXPERTS)
        layer = jax.tree.map(jnp.asarray, balanced(loads, *sizes).padded().of_layer(0))
        counts = jnp.asarray(loads[0] * 1000, jnp.int32)

        @functools.partial(jax.jit, static_argnums=0)
        def repeat(divide: Any, counts: jax.Array, *layer: Placement, gpus: int = sizes[3]) -> jax.Array:
            def once(_: jax.Array, now: jax.Array) -> jax.Array:
                return counts + divide(now, *layer, gpus) % 2

            return jax.lax.fori_loop(0, IN_A_ROW, once, counts)

        calls = [functools.partial(repeat, by_load, counts, layer), functools.partial(repeat, exact_loads, counts)]
        taken = [each * 1e3 / IN_A_ROW for each in medians_ms(calls, repeats)]
        name = f"{sizes[0]} @ {sizes[3]}, {sizes[1]}"
        yield {"replicas @ GPUs, groups": name, "split us": taken[0], "exact us": taken[1]}


def by_load(counts: jax.Array, layer: Placement, gpus: int) -> jax.Array:
    """A number of each expert that depends on its division over replicas."""
    return split_tokens(counts, layer, gpus)[:, 0]


def exact_loads(counts: jax.Array, gpus: int) -> jax.Array:
    """A number of each expert that depends on its exact division, and on what is fetched."""
    found = split_exactly(counts, gpus)
    return found.wanted[:, 0] + found.fetched.max()


def main() -> None:
    """Prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--microbatches", type=int, default=1000, help="that loads drift over")
    parser.add_argument("--tokens", type=int, default=4096, help="of a GPU in a microbatch")
    parser.add_argument("--repeats", type=int, default=20, help="of which the median time counts")
    parser.add_argument("--time-only", action="store_true", help="make the last table alone")
    args = parser.parse_args()
    report = Recorder.begin(args, machine(), f"{args.microbatches} microbatches of {args.tokens} tokens a GPU")
    named: dict[str, tuple[float, str]] = {}
    if not args.time_only:
        costs: list[dict[str, Any]] = []
        rows = list(heaviest(args.microbatches, args.tokens, costs))
        report.table(rows, labels=2)
        row = next(row for row in rows if list(row.values())[:2] == [KEPT, "drifting"])
        named |= {"hash_heaviest_p99": (row["even: 99%"], ""), "split_heaviest_p99": (row["split: 99%"], "")}
        report.table(costs, labels=2, title="exact")
        report.table(room(args.microbatches, args.tokens), labels=2, title="room", formats={"factor": ".3f"})
    taken = list(times(args.repeats))
    report.table(taken, title="time", formats={"split us": ".0f", "exact us": ".0f"})
    if jax.default_backend() == "gpu":
        slowest = max(row["split us"] for row in taken if " @ 64," in row["replicas @ GPUs, groups"])
        named["split_us_256_64"] = slowest, "us"
    if report.file and named:
        write_records(report.file, named, command=command_line(), machine=report.machine)


if __name__ == "__main__":
    main()
