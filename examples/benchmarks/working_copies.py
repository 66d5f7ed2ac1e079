"""Working copies of a layer's experts by gathering all and by exchanging those that a placement needs: bytes and time.

Placements are planned for lognormal loads: "start" is `eplb_jax.initial_placement`, "sticky" follows from it, "fresh"
is `balanced`'s. "experts" is `eplb_jax.most_fetched`, how many one device gets from another, "needed" how many the
device that needs most really needs from all others. MiB are those that reach a device, read off the compiled program,
there and back: the transpose sends gradients of as many. Times are of both, on this machine's devices.

    python examples/benchmarks/working_copies.py [--devices 2,4,8] [--experts 64] [--width 1024] [--hidden 512]
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

from eplb_jax import ExpertParams, Placement, RebalanceConfig, balanced, initial_placement, most_fetched, sticky
from eplb_jax.kernels.mesh_axis import size_and_index
from eplb_jax.moe.fetch import fetch, gather, plan_fetches

BYTES = {"f32": 4, "bf16": 2, "f64": 8, "u8": 1}


def received(text: str, devices: int) -> float:
    """Bytes that a program's all-gathers, reduce-scatters and all-to-alls bring to each device.

    An all-to-all or all-gather result holds a part of the device's own; a reduce-scatter passes on as much as it takes.
    """
    total = 0.0
    for line in text.splitlines():
        found = re.search(r"= (.*?) (all-gather|reduce-scatter|all-to-all|all-reduce)(-start)?\(", line)
        if found is None:
            continue
        shapes = re.findall(r"(f32|bf16|f64|u8)\[([\d,]*)\]", found[1])
        if found[3]:  # of operands and results
            shapes = shapes[len(shapes) // 2 :]
        size = sum(BYTES[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in shapes)
        factor = devices if found[2] == "reduce-scatter" else 2 if found[2] == "all-reduce" else 1
        total += size * factor * (devices - 1) / devices
    return total


def both(function: Any, mesh: Mesh) -> Any:
    """The copies and the gradients of masters, as a jitted function of masters, slots and cotangents."""

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P(), P("ep")), out_specs=P("ep"))
    def run(masters: Any, phy2log: jax.Array, ct: Any) -> Any:
        copies, pull = jax.vjp(lambda masters: jax.tree.map(lambda leaf: function(leaf, phy2log), masters), masters)
        return copies, pull(ct)[0]

    return run


def by_gathering(owned: jax.Array, phy2log: jax.Array) -> jax.Array:
    """All masters to all devices."""
    devices, here = size_and_index("ep")
    mine = jax.lax.dynamic_index_in_dim(phy2log.reshape(devices, -1), here, keepdims=False)
    return gather(owned, mine, devices, "ep")


def by_exchange(most: int, owned: jax.Array, phy2log: jax.Array) -> jax.Array:
    """So many masters from each device to each other."""
    devices, here = size_and_index("ep")
    return fetch(owned, plan_fetches(phy2log, here, devices, owned.shape[0], most), "ep")


def needed(placement: Placement, devices: int, masters: int) -> int:
    """Experts that the device with most of them needs from all others."""
    held = [set(slots.tolist()) for slots in placement.phy2log[0].reshape(devices, -1)]
    return max(len([expert for expert in own if expert // masters != device]) for device, own in enumerate(held))


def rows(args: Any, dtype: Any) -> Iterator[dict[str, Any]]:
    """A line for each number of devices and placement."""
    for devices in map(int, args.devices.split(",")):
        mesh = jax.make_mesh((devices,), ("ep",), (AxisType.Auto,), devices=jax.devices()[:devices])
        slots = args.experts + devices * args.redundant
        config = RebalanceConfig(slots, 1, 1, devices)
        loads = np.random.default_rng(0).lognormal(size=(1, args.experts))
        start = initial_placement(1, args.experts, config)
        plans = {"start": start, "sticky": sticky(loads, start, 1, 1, devices),
                 "fresh": balanced(loads, slots, 1, 1, devices)}  # fmt: skip
        shapes = (args.width, 2 * args.hidden), (args.hidden, args.width)
        sharding = NamedSharding(mesh, P("ep"))
        masters, ct = (
            ExpertParams(*(jax.device_put(jnp.ones((n, *shape), dtype), sharding) for shape in shapes))
            for n in (args.experts, slots)
        )
        for name, plan in plans.items():
            most = most_fetched(plan.phy2log, args.experts, devices)
            where = jax.device_put(jnp.asarray(plan.phy2log[0]), NamedSharding(mesh, P()))
            calls, traffic = [], []
            for function in (by_gathering, functools.partial(by_exchange, most)):
                program = both(function, mesh).lower(masters, where, ct).compile()
                traffic.append(received(program.as_text(), devices) / 2**20)
                calls.append(functools.partial(program, masters, where, ct))
            taken = medians_ms(calls, args.repeats)
            yield {
                "devices": devices,
                "placement": name,
                "experts": most,
                "needed": needed(plan, devices, args.experts // devices),
                "gathered MiB": traffic[0],
                "exchanged MiB": traffic[1],
                "gathered ms": taken[0],
                "exchanged ms": taken[1],
            }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--devices", default="2,4,8", help="sizes of the experts' axis")
    parser.add_argument("--experts", type=int, default=64, help="of the layer")
    parser.add_argument("--redundant", type=int, default=2, help="spare slots of each device")
    parser.add_argument("--width", type=int, default=1024, help="of the activations")
    parser.add_argument("--hidden", type=int, default=512, help="of an expert")
    parser.add_argument("--repeats", type=int, default=10, help="calls of which the median counts")
    args = parser.parse_args()
    most = max(map(int, args.devices.split(",")))
    jax.config.update("jax_num_cpu_devices", most)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16  # which a CPU widens
    size = f"{args.experts} experts of {args.width} x {args.hidden}, {jnp.dtype(dtype).name}"
    report = Recorder.begin(args, machine(most), size)
    report.table(rows(args, dtype), labels=2)


if __name__ == "__main__":
    main()
