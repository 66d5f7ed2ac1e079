"""The sharded mixture-of-experts layer on the GPUs of one host: its exchanges, and what placing experts by load gains.

    python examples/benchmarks/expert_parallel.py [--mesh ep=4] [--tokens 4096,8192] [--zipf 0.5,1] [--tiny]

DeepSeek-V3's widths in bfloat16, 16 experts a device, 8 a token, one shared. Times are medians in ms of calls that take
turns; "both" is forward and backward, each device's gradients of router and shared expert left its own.

1. An exchange, one of eight in a row, and what a device sends to the others; FP8's is rounded and read back within.
2. The layer, with capacity for the worst case or a factor of what even loads need: tokens to each device, and rows.
   "difference" is the largest from the dense exchange's output with that capacity, over the largest value.
3. Loads by a Zipf law, 0 is even; then redundant experts, placed by the loads just counted. "expert" and "device" are
   the heaviest's load over the mean, "products" the layer's six grouped ones alone, of as many rows. Not in the layer's
   time: "copies", gathered and gradients summed once a step (in order none is needed); "plan", a layer's, on the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chunks import gib
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_layer import products, with_gradient
from record import Recorder, machine, make_parser, medians_ms
from scipy import optimize, special

from eplb_jax import (
    MoEConfig,
    MoEParams,
    Placement,
    RouterConfig,
    balanced,
    balancedness,
    init_moe,
    moe_layer,
    param_specs,
    rebalance_experts,
    route,
    router_logits,
    working_copies,
)
from eplb_jax.kernels.fp8 import BLOCK, BlocksOfE4M3
from eplb_jax.moe import dispatch, exchange
from jaxpipe.planning.chips import chip_of

CHAIN = 8  # exchanges in a row, so that starting a program weighs little
ROWS, WHOLE = P("ep"), P()
Table = list[dict[str, Any]]


def random_rows(mesh: Mesh, seed: int, *shape: int) -> jax.Array:
    """Normal values in bfloat16, the first dimension divided over the devices."""
    make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16), out_shardings=NamedSharding(mesh, ROWS))
    return make(jax.random.key(seed))


def sharded(mesh: Mesh, body: Callable[..., Any], *specs: Any) -> Any:
    """A function of one device's part, for all; results are put side by side."""
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=ROWS))


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives, or the first line of its error."""
    try:
        return call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:100]}"


def measure(calls: dict[Any, tuple[Any, ...]], repeats: int) -> dict[Any, tuple[float, Any, str]]:
    """Median ms of functions with arguments, the compiled call, and an error; all compile before any is timed."""
    keys = {name: (call[0], str(jax.tree.map(jnp.shape, call[1:]))) for name, call in calls.items()}
    with ThreadPoolExecutor(8) as pool:
        lowered = {key: call[0].lower(*call[1:]) for key, call in {keys[n]: call for n, call in calls.items()}.items()}
        compiling = {key: pool.submit(attempt, program.compile) for key, program in lowered.items()}
    found, good = {}, {}
    for name, call in calls.items():
        program: Any = compiling[keys[name]].result()
        run: Any = None if isinstance(program, str) else functools.partial(program, *call[1:])
        error = attempt(lambda run=run: (jax.block_until_ready(run()), "")[1]) if run else program
        found[name] = math.nan, None, error
        good |= {} if error else {name: run}
    turns = medians_ms(list(good.values()), repeats)
    return found | {name: (ms, call, "") for (name, call), ms in zip(good.items(), turns, strict=True)}


def zipf_bias(router: RouterConfig, exponent: float, most: float = 0.95) -> np.ndarray:
    """Selection biases that make experts' loads follow a Zipf law: score plus bias is above zero for so many tokens."""
    law = np.arange(1.0, router.num_experts + 1) ** -exponent
    scale: Any = optimize.brentq(lambda factor: np.minimum(factor * law, most).sum() - router.top_k, 0, 1e9)
    quantile: Any = special.ndtri(1 - np.minimum(scale * law, most))  # logits are standard normal
    return np.random.default_rng(0).permutation(-special.expit(quantile)).astype(np.float32)


def layer(mesh: Mesh, config: MoEConfig, backward: bool) -> Any:
    """(params, placement, x, ct) -> output, dropped, and with backward the gradients."""

    def body(params: MoEParams, placement: Any, x: jax.Array, ct: jax.Array) -> Any:
        def forward(params: MoEParams, x: jax.Array) -> Any:
            y, stats = moe_layer(params, x, config, placement=placement, axis="ep")
            return y, stats.dropped[None]

        y, pull, dropped = jax.vjp(forward, params, x, has_aux=True)
        return (y, dropped, pull(ct)) if backward else (y, dropped)

    return sharded(mesh, body, param_specs(config, "ep"), WHOLE, ROWS, ROWS)


def exchange_table(args: Any, mesh: Mesh, config: MoEConfig, params: MoEParams, x: jax.Array, ct: jax.Array) -> Table:
    """Exchanges of the layer's own size; ragged ones of what even loads send to each device."""
    ep, tokens, width, router = mesh.size, len(x) // mesh.size, config.width, config.router
    passing = math.comb(router.num_experts - router.num_experts // ep, router.top_k)  # of all choices
    sent = round(tokens * (1 - passing / math.comb(router.num_experts, router.top_k)))
    kinds: dict[str, tuple[Any, int]] = {
        "dense": (lambda x: exchange.all_to_all(x, "ep"), tokens * 2 * width),
        "ragged": (lambda x: exchange.all_to_all_ragged(x, jnp.full(ep, sent), "ep"), sent * 2 * width),
        "fp8": (lambda x: exchange.all_to_all_encoded(x, "ep", BlocksOfE4M3()), tokens * (width + 4 * width // BLOCK)),
    }

    def chain(kind: Any, x: jax.Array) -> jax.Array:
        return functools.reduce(lambda x, _: jax.lax.optimization_barrier(kind(x)), range(CHAIN), x)

    rows = random_rows(mesh, 4, ep * ep, tokens, width)
    run = {name: (sharded(mesh, functools.partial(chain, kind), ROWS), rows) for name, (kind, _) in kinds.items()}
    chip = chip_of(jax.devices()[0].device_kind)
    link = chip.interconnect if chip else math.nan
    table = []
    for name, (total, _, error) in measure(run, args.repeats).items():
        size, ms = (ep - 1) * kinds[name][1], total / CHAIN
        row = {
            "tokens": tokens,
            "exchange": name,
            "capacity MB": rows.nbytes / ep / 1e6,
            "sent MB": size / 1e6,
            "ms": ms,
        }
        table.append(row | {"GB/s": size / ms / 1e6, "of the link %": 1e5 * size / ms / link, "error": error})
    return table


def layer_table(args: Any, mesh: Mesh, config: MoEConfig, params: MoEParams, x: jax.Array, ct: jax.Array) -> Table:
    """The layer with each kind of exchange, worst-case and limited capacity."""
    ep, router = mesh.size, config.router
    kinds: dict[str, Any] = {"dense": {}, "ragged": {"exchange": "ragged"}, "fp8": {"precision": "fp8_exchange"}}
    cases = [(kind, factor) for factor in (None, args.capacity) for kind in kinds]
    configs = {(k, f): dataclasses.replace(config, capacity_factor=f, **kinds[k]) for k, f in cases}
    run = {(*c, both): (layer(mesh, configs[c], both), params, None, x, ct) for c in cases for both in (False, True)}
    found, table, dense = measure(run, args.repeats), [], {}
    for kind, factor in cases:
        (forward, call, error), (both, program, other) = (found[kind, factor, backward] for backward in (False, True))
        capacities = dispatch.make_capacities(len(x) // ep, router.top_k, ep, router.num_experts // ep, factor)
        row = {
            "tokens": len(x) // ep,
            "exchange": kind,
            "capacity": factor or "worst case",
            "to each": capacities.exchange,
            "rows": capacities.rows,
        }
        temp = gib(program.func.memory_analysis().temp_size_in_bytes) if program else "-"
        row |= {
            "forward ms": forward,
            "forward and backward ms": both,
            "temporaries GiB": temp,
            "dropped": "-",
            "difference": "-",
        }
        if call:
            y, dropped = call()
            dense |= {factor: y.astype(jnp.float32)} if kind == "dense" else {}
            row["dropped"] = int(dropped.sum())
            if factor in dense:
                row["difference"] = float(jnp.abs(y - dense[factor]).max() / jnp.abs(dense[factor]).max())
        table.append(row | {"error": error or other})
    return table


def placement_table(args: Any, mesh: Mesh, config: MoEConfig, params: MoEParams, x: jax.Array, ct: jax.Array) -> Table:
    """Even and skewed routing, without and with redundant experts."""
    ep, experts, whole = mesh.size, config.router.num_experts, NamedSharding(mesh, WHOLE)
    replicas = experts + ep * args.redundant
    fetch = functools.partial(working_copies, axis="ep")
    count = jax.jit(lambda bias: route(router_logits(x, params.router), config.router, bias=bias).loads)
    step, gather = layer(mesh, config, True), sharded(mesh, fetch, ROWS, WHOLE)
    back = sharded(mesh, lambda ct, m, where: with_gradient(lambda m: fetch(m, where))(ct, m), ROWS, ROWS, WHOLE)
    alone = sharded(mesh, functools.partial(products, backend=config.backend), *(ROWS,) * 6)
    most = ep * dispatch.make_capacities(len(x) // ep, config.router.top_k, ep, replicas // ep, None).rows
    rows, hidden, double = (random_rows(mesh, n, most, n) for n in (config.width, config.hidden, 2 * config.hidden))
    run, table = {}, []
    for zipf in (0.0, *map(float, args.zipf.split(","))):
        case = params._replace(bias=jax.device_put(zipf_bias(config.router, zipf), whole))
        loads = np.asarray(count(case.bias))[None]
        plans: dict[str, Any] = {"in order": lambda: Placement.from_phy2log(np.arange(experts)[None], experts)}
        for policy in (rebalance_experts, balanced) if zipf and args.redundant else ():
            plans[policy.__name__] = functools.partial(policy, loads, replicas, 1, 1, ep)
        for name, plan in plans.items():
            placement = plan().padded()
            where = jax.device_put(placement.of_layer(0), whole)
            slots = params.experts if name == "in order" else gather(params.experts, where.phy2log)
            sizes = (loads / placement.logcnt)[0, placement.phy2log[0]].astype(np.int32)
            sizes = jax.device_put(sizes, NamedSharding(mesh, ROWS))
            run[zipf, name, "both"] = step, case._replace(experts=slots), where, x, ct
            run[zipf, name, "products"] = alone, slots, rows, hidden, rows, double, sizes
            run[zipf, name, "copies"] = back, slots, params.experts, where.phy2log
            row = {
                "tokens": len(x) // ep,
                "exponent": f"{zipf:g}",
                "placement": name,
                "slots": len(sizes),
                "expert": loads.max() / loads.mean(),
            }
            device = 1 / balancedness(placement, loads, ep).item()
            table.append(row | {"device": device, "plan ms": medians_ms([plan], 3)[0]})
    found = measure(run, args.repeats)
    for row in table:
        both, six, copies = (
            found[float(row["exponent"]), row["placement"], part] for part in ("both", "products", "copies")
        )
        row |= {
            "copies ms": copies[0],
            "forward and backward ms": both[0],
            "of even": both[0] / found[0.0, "in order", "both"][0],
        }
        row |= {
            "products ms": six[0],
            "products / both": six[0] / both[0],
            "dropped": int(both[1]()[1].sum()) if both[1] else "-",
        }
        row["error"] = both[2] or six[2] or copies[2]
    return table


def main() -> None:
    """Prints the tables."""
    start = time.perf_counter()
    parser = make_parser(__doc__)
    parser.add_argument("--mesh", default=f"ep={jax.device_count()}", help="devices of the expert group")
    parser.add_argument("--tokens", default="4096", help="of a device")
    parser.add_argument("--experts", type=int, default=16, help="of a device")
    parser.add_argument("--redundant", type=int, default=4, help="experts of a device")
    parser.add_argument("--capacity", type=float, default=1.25, help="factor of the limited capacity")
    parser.add_argument("--zipf", default="0.5,1", help="exponents")
    parser.add_argument("--repeats", type=int, default=10, help="runs of which the median counts")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further table after this long")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    ep = int(args.mesh.removeprefix("ep="))
    mesh = jax.make_mesh((ep,), ("ep",), (AxisType.Auto,), devices=jax.devices()[:ep])
    config = MoEConfig(router=RouterConfig(args.experts * ep, 8, 1, 1))
    if args.tiny:
        config = dataclasses.replace(config, width=128, hidden=16, router=RouterConfig(max(8, 2 * ep), 2, 1, 1))
        args.tokens, args.redundant, args.repeats, args.zipf = "32", 2, 1, "1"
        jax.config.update("jax_disable_most_optimizations", True)
    size = f"{config.router.num_experts} experts, {config.width} x {config.hidden}"
    report = Recorder.begin(args, machine(ep), f"ep={ep}", size)
    specs: Any = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(config, "ep"))
    params = jax.jit(init_moe, static_argnums=(1, 2), out_shardings=specs)(jax.random.key(0), config, jnp.bfloat16)
    for tokens in map(int, args.tokens.split(",")):
        x, ct = (random_rows(mesh, seed, ep * tokens, config.width) for seed in (1, 2))
        for make in (exchange_table, layer_table, placement_table):
            if time.perf_counter() - start < args.seconds:
                table: Any = attempt(make, args, mesh, config, params, x, ct)
                table = [{"error": table}] if isinstance(table, str) else table
                title = make.__name__.removesuffix("_table")
                report.table(table, labels=3 if len(table[0]) > 1 and title != "exchange" else 2, title=title)
                off = [row["difference"] for row in table if row.get("exchange") == "ragged" and "difference" in row]
                assert all(difference == "-" or difference < 0.01 for difference in off), off


if __name__ == "__main__":
    main()
