"""A layer on two devices whose experts' loads are uneven: tokens as routed, split over replicas, and exactly even.

DeepSeek-V3's widths in bfloat16, forward and backward, medians in ms of calls that take turns. Loads follow a Zipf law,
0 is even. "at home" has each expert on one device, and room for the worst case; "split" has redundant experts, placed
by `balanced` for the loads of just these tokens, their working copies not in the time; "exact" is `MoEConfig(exact=n)`,
in whose time the experts that are given travel and their gradients return, with room for an even share alone. "device"
is the heaviest's load over the mean where tokens go to their experts' home.

    JAX_PLATFORMS=cpu python examples/benchmarks/exact_balance.py --tiny
    python examples/benchmarks/exact_balance.py [--tokens 4096] [--experts 16] [--given 4,16] [--zipf 0,0.5,1]
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chunks import gib
from expert_parallel import ROWS, WHOLE, layer, measure, random_rows, sharded, zipf_bias
from jax.sharding import AxisType, NamedSharding
from record import Recorder, machine, make_parser

from eplb_jax import (
    MoEConfig,
    RouterConfig,
    balanced,
    init_moe,
    param_specs,
    route,
    router_logits,
    working_copies,
)

DEVICES = 2


def rows(args: Any, config: MoEConfig) -> list[dict[str, Any]]:
    """A line for each exponent and way."""
    mesh = jax.make_mesh((DEVICES,), ("ep",), (AxisType.Auto,), devices=jax.devices()[:DEVICES])
    specs: Any = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(config, "ep"))
    params = jax.jit(init_moe, static_argnums=(1, 2), out_shardings=specs)(jax.random.key(0), config, jnp.bfloat16)
    x, ct = (random_rows(mesh, seed, DEVICES * args.tokens, config.width) for seed in (1, 2))
    whole, experts = NamedSharding(mesh, WHOLE), config.router.num_experts
    count = jax.jit(lambda bias: route(router_logits(x, params.router), config.router, bias=bias).loads)
    gather = sharded(mesh, functools.partial(working_copies, axis="ep"), ROWS, WHOLE)
    given = {n: dataclasses.replace(config, exact=n, capacity_factor=1.0) for n in map(int, args.given.split(","))}
    split = dataclasses.replace(config, replicas="split")
    run, heaviest = {}, {}
    for zipf in map(float, args.zipf.split(",")):
        case = params._replace(bias=jax.device_put(zipf_bias(config.router, zipf), whole))
        loads = np.asarray(count(case.bias))[None]
        heaviest[zipf] = loads.reshape(DEVICES, -1).sum(1).max() / loads.sum() * DEVICES
        run[zipf, "at home"] = layer(mesh, config, True), case, None, x, ct
        placement = balanced(loads, experts + DEVICES * args.redundant, 1, 1, DEVICES).padded().of_layer(0)
        where = jax.device_put(placement, whole)
        slots = gather(params.experts, where.phy2log)
        run[zipf, "split"] = layer(mesh, split, True), case._replace(experts=slots), where, x, ct
        for n, exact in given.items():
            run[zipf, f"exact, {n} given"] = layer(mesh, exact, True), case, None, x, ct
    table = []
    for (zipf, way), (taken, call, error) in measure(run, args.repeats).items():
        memory = gib(call.func.memory_analysis().temp_size_in_bytes) if call else "-"
        dropped = int(np.sum(call()[1])) if call else "-"
        row = {"exponent": f"{zipf:g}", "tokens go": way, "device": heaviest[zipf], "forward and backward ms": taken}
        table.append(row | {"temporaries GiB": memory, "dropped": dropped, "error": error})
    return table


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of a device")
    parser.add_argument("--experts", type=int, default=16, help="of a device")
    parser.add_argument("--redundant", type=int, default=4, help="spare slots of a device, for split")
    parser.add_argument("--given", default="4,16", help="experts that a device may give")
    parser.add_argument("--zipf", default="0,0.5,1", help="exponents")
    parser.add_argument("--repeats", type=int, default=10, help="calls of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    config = MoEConfig(router=RouterConfig(args.experts * DEVICES, 8, 1, 1))
    if args.tiny:
        config = dataclasses.replace(config, width=128, hidden=16, router=RouterConfig(8, 2, 1, 1))
        args.tokens, args.redundant, args.given, args.zipf, args.repeats = 32, 2, "4", "1", 1
    size = f"{config.router.num_experts} experts, {config.width} x {config.hidden}, {args.tokens} tokens a device"
    report = Recorder.begin(args, machine(DEVICES), size)
    report.table(rows(args, config), labels=2)


if __name__ == "__main__":
    main()
