"""Memory and time of a layer of experts by the room that it has for tokens: planned for H800s, nothing runs.

Layers of DeepSeek-V3's sizes in bfloat16, 4,096 tokens of 8 choices on each GPU, nodes of eight: for the worst case, in
which nothing is ever dropped, and for the factor that `eplb_jax.capacity_from` finds from the first half of
split.py's drifting loads. "memory" is what a forward and a backward of the layer need at once, without parameters and
their gradients. "kernels" and "exchanges" are both passes; products are those of the rows that hold tokens, which the
kernels look up, everything else is of all rows.

    JAX_PLATFORMS=cpu python examples/benchmarks/layer_room.py [--microbatches 1000] [--tiny]
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from record import Recorder, make_parser
from split import SIZES, TOP_K, WIDTH, recent_room

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining.plan import KERNELS, abstract_mesh

import jaxpipe
from eplb_jax import MoEConfig, RouterConfig, init_moe, make_capacities, moe_layer, param_specs
from jaxpipe.planning.chips import chip

HIDDEN = 2048
GIGA = 1e9


class LayerPlan(NamedTuple):
    """What a layer is planned to take.

    Attributes:
      memory: GB at work.
      kernels, exchanges: ms of a forward and a backward.
    """

    memory: float
    kernels: float
    exchanges: float


def planned(slots: int, gpus: int, tokens: int, factor: float | None, width: int, hidden: int) -> LayerPlan:
    """The plan of a layer with an expert in each slot, and tokens that are even over GPUs."""
    router = RouterConfig(slots, TOP_K, 1, 1)
    config = MoEConfig(router=router, width=width, hidden=hidden, capacity_factor=factor)

    def stage(params: Any, x: jax.Array, ctx: Any) -> jax.Array:
        return x + moe_layer(params, x, config, axis="ep")[0]

    def head(outer: Any, y: jax.Array, data: Any, ctx: Any) -> jax.Array:
        return y.astype(jnp.float32).mean()

    specs = jax.tree.map(lambda spec: P("pp", *spec), param_specs(config, "ep"))
    mesh = abstract_mesh({"pp": 1, "ep": gpus}, chip("H800"))
    one = jaxpipe.schedule.build("1f1b", 1, 1)
    step = jaxpipe.value_and_grad(stage, one, mesh, head=head, data_axes=("ep",), specs=jaxpipe.Params(specs, P()))
    shapes = jax.eval_shape(lambda: init_moe(jax.random.key(0), config, jnp.bfloat16))
    params = jaxpipe.Params(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), shapes))
    batch = jax.ShapeDtypeStruct((gpus * tokens, width), jnp.bfloat16)
    plan = jaxpipe.plan(step, params, batch, chip("H800"), kernels=KERNELS, devices_per_node=8)

    rows = make_capacities(tokens, TOP_K, gpus, slots // gpus, factor).rows
    held = tokens * TOP_K / rows
    kernels = exchanges = 0.0
    for letter in "FB":
        work = plan.work.of(letter, 0)
        clock = work.clock(plan.chip, plan.achieved)
        for kernel in work.kernels:
            share = held if kernel.name in ("grouped_rows", "grouped_outer") else 1.0
            one_run = kernel._replace(flops=kernel.flops * share, nbytes=kernel.nbytes * share)
            kernels += kernel.times * one_run.seconds(plan.chip, plan.achieved, clock)
        exchanges += work.communicate(plan.network)
    memory = plan.memory.stash + plan.memory.transient
    return LayerPlan(memory / GIGA, 1e3 * kernels, 1e3 * exchanges)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The table's."""
    for sizes in SIZES[:1] if args.tiny else SIZES:
        replicas, groups, _, gpus = sizes
        recent, *_ = recent_room(sizes, args.microbatches, args.tokens)
        width, hidden = (256, 128) if args.tiny else (WIDTH, HIDDEN)
        for room, factor in (("worst case", None), ("from recent loads", recent)):
            found = planned(replicas, gpus, args.tokens, factor, width, hidden)
            yield {
                "replicas @ GPUs, groups": f"{replicas} @ {gpus}, {groups}",
                "room": room,
                "factor": "-" if factor is None else factor,
                "memory GB": found.memory,
                "kernels ms": found.kernels,
                "exchanges ms": found.exchanges,
            }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--microbatches", type=int, default=1000, help="that loads drift over")
    parser.add_argument("--tokens", type=int, default=4096, help="of a GPU in a microbatch")
    parser.add_argument("--tiny", action="store_true", help="one placement and narrow experts, to see that it runs")
    args = parser.parse_args()
    report = Recorder.begin(args, "planned for H800s", f"{args.tokens} tokens of {TOP_K} choices a GPU")
    formats = {"factor": ".3f", "memory GB": ".2f", "kernels ms": ".1f", "exchanges ms": ".1f"}
    report.table(rows(args), labels=2, formats=formats)


if __name__ == "__main__":
    main()
