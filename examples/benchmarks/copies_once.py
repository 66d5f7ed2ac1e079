"""Working copies of redundant experts in a pipeline: gathered for each microbatch, or once a step.

Each stage is a layer of experts. "copies" is when they are gathered: "each microbatch" is `max_growth=1`, "once a step"
the default. "F", "B" and "once MiB" are what a device gets in gathers and sends back in their transposes, by
`jaxpipe.plan`: of one forward, of one backward, and of what is done once a step; "step MiB" is their sum over a step.
"working" and "sums MiB" are what it keeps. "step ms" is measured on this machine's devices.

    python examples/benchmarks/copies_once.py [--ranks 1] [--devices 2] [--schedule 1f1b] [--experts 64] [--tiny]
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

import jaxpipe
from eplb_jax import MoEConfig, Placement, RouterConfig, init_moe, moe_layer, param_specs, working_copies

GATHERS = ("all-gather", "reduce-scatter")


def stage(config: MoEConfig, params: Any, x: jax.Array, ctx: jaxpipe.Context) -> jax.Array:
    """``x`` and what its experts make of it."""
    placement = ctx.step_inputs
    copies = params._replace(experts=working_copies(params.experts, placement.phy2log, "ep"))
    y, _ = moe_layer(copies, x, config, placement=placement, axis="ep")
    return x + y


def mean_square(outer: Any, y: jax.Array, data: Any, ctx: jaxpipe.Context) -> jax.Array:
    """A loss."""
    del outer, data, ctx
    return jnp.square(y.astype(jnp.float32)).mean()


def gathered(messages: Any, devices: int) -> float:
    """MiB that a device gets in gathers and sends back in their transposes, of which a part is its own."""
    mine = [message for message in messages if message.kind in GATHERS]
    return sum(message.nbytes * message.times for message in mine) * (devices - 1) / devices / 2**20


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=1, help="of the pipeline")
    parser.add_argument("--devices", type=int, default=2, help="of each rank, over which experts are spread")
    parser.add_argument("--schedule", default="1f1b", help="of the pipeline")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step")
    parser.add_argument("--tokens", type=int, default=4096, help="of a microbatch on each device")
    parser.add_argument("--experts", type=int, default=64, help="of a layer")
    parser.add_argument("--redundant", type=int, default=8, help="spare slots of all devices")
    parser.add_argument("--width", type=int, default=2048, help="of the activations")
    parser.add_argument("--hidden", type=int, default=1408, help="of an expert")
    parser.add_argument("--repeats", type=int, default=9, help="steps of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    if args.tiny:
        args.experts, args.width, args.hidden, args.tokens = 16, 64, 64, 64
    count = args.ranks * args.devices
    jax.config.update("jax_num_cpu_devices", count)
    config = MoEConfig(width=args.width, hidden=args.hidden, router=RouterConfig(args.experts, 6, 1, 1, balanced=True))
    slots = np.arange(args.experts + args.redundant)[None] % args.experts
    placement = Placement.from_phy2log(slots, args.experts).padded(args.redundant + 1).of_layer(0)
    placement = jax.tree.map(jnp.asarray, placement)
    schedule = jaxpipe.schedule.build(args.schedule, args.ranks, args.microbatches)
    mesh = jaxpipe.make_mesh(pp=args.ranks, ep=args.devices)
    one = param_specs(config, "ep")
    specs = jaxpipe.Params(
        jax.tree.map(lambda spec: P("pp", *spec), one, is_leaf=lambda leaf: isinstance(leaf, P)), P()
    )

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, schedule.num_stages)
        return jax.vmap(lambda key: init_moe(key, config))(keys)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))
    params = jaxpipe.Params(jax.jit(init, out_shardings=shardings.stages)(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (args.microbatches * args.devices * args.tokens, args.width), jnp.bfloat16)
    x = jax.device_put(x, NamedSharding(mesh, P("ep")))
    plans, programs = [], []
    for growth in (1.0, 2.0):
        pipeline = jaxpipe.value_and_grad(
            functools.partial(stage, config), schedule, mesh, head=mean_square, data_axes=("ep",), specs=specs,
            compute_dtype=jnp.bfloat16, order="storage", max_growth=growth,
        )  # fmt: skip
        plans.append(jaxpipe.plan(pipeline, params, x, "H200", step_inputs=placement))
        programs.append(jax.jit(pipeline).lower(params, x, None, placement).compile())
    losses = [float(program(params, x, None, placement)[0][0]) for program in programs]
    assert abs(losses[0] - losses[1]) <= 1e-3 * abs(losses[0]), losses
    times = medians_ms([functools.partial(program, params, x, None, placement) for program in programs], args.repeats)
    size = f"{args.experts} experts of {args.width} x {args.hidden}, {args.redundant} redundant, {args.schedule}"
    report = Recorder.begin(args, machine(count), size)
    runs = args.microbatches * schedule.num_stages / args.ranks

    def row(name: str, plan: Any, ms: float) -> dict[str, Any]:
        actions = plan.work.kinds[0]
        forward = gathered(actions["F"].messages, args.devices)
        backward = sum(gathered(work.messages, args.devices) for letter, work in actions.items() if letter in "IW")
        backward = backward or gathered(actions["B"].messages, args.devices)
        once = gathered(plan.work.once.messages, args.devices)
        return {
            "copies": name,
            "F MiB": forward,
            "B MiB": backward,
            "once MiB": once,
            "step MiB": runs * (forward + backward) + once,
            "working MiB": plan.memory.working / 2**20,
            "sums MiB": plan.memory.gradients / 2**20,
            "step ms": ms,
        }

    names = "each microbatch", "once a step"
    report.table(row(*each) for each in zip(names, plans, times, strict=True))


if __name__ == "__main__":
    main()
