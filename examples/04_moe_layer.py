"""One mixture-of-experts layer over 8 devices with a skewed router, before and after its experts are rebalanced.

    python examples/04_moe_layer.py [--plot LOADS.png]

The output does not change, the compiled program does not either; the load of the fullest device does.
"""

import argparse
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from pretraining.tables import markdown_head, markdown_row

import eplb_jax.plan.plot
from eplb_jax import (
    MoEConfig,
    RebalanceConfig,
    RouterConfig,
    decide,
    gpu_loads,
    init_moe,
    initial_placement,
    moe_layer,
    param_specs,
    working_copies,
)

DEVICES, TOKENS, EXPERTS = 8, 512, 64
CONFIG = MoEConfig(width=128, hidden=64, router=RouterConfig(EXPERTS, top_k=6, num_groups=8, top_groups=4))
REBALANCE = RebalanceConfig(num_replicas=80, num_groups=8, num_nodes=1, num_gpus=DEVICES, interval=1)


def make_layer():
    """(masters, placement, tokens) -> (output, loads of logical experts)."""
    mesh = jax.make_mesh((DEVICES,), ("ep",), (AxisType.Auto,))

    def body(params, placement, x):
        params = params._replace(experts=working_copies(params.experts, placement.phy2log, "ep"))
        y, stats = moe_layer(params, x, CONFIG, placement=placement, axis="ep")
        return y, jax.lax.psum(stats.loads, "ep")

    specs = param_specs(CONFIG, "ep")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs, P(), P("ep")), out_specs=(P("ep"), P()))
    return jax.jit(mapped)


def main() -> None:
    """Prints loads before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", help="picture to write: load of each device before and after")
    arguments = parser.parse_args()
    params = init_moe(jax.random.key(0), CONFIG)
    skew = 0.3 * jax.random.normal(jax.random.key(1), (EXPERTS,))  # some experts are liked by all tokens
    params = params._replace(bias=skew)
    x = jax.random.normal(jax.random.key(2), (DEVICES * TOKENS, CONFIG.width))
    layer = make_layer()

    start = initial_placement(1, EXPERTS, REBALANCE)
    y, loads = layer(params, jax.tree.map(jnp.asarray, start.of_layer(0)), x)
    decision = decide(1, np.asarray(loads)[None], start, REBALANCE)
    assert decision is not None
    again, same_loads = layer(params, jax.tree.map(jnp.asarray, decision.placement.of_layer(0)), x)

    print(f"{TOKENS} tokens on each of {DEVICES} devices, {CONFIG.router.top_k} of {EXPERTS} experts, "
          f"{REBALANCE.num_replicas} slots; {decision.moved} replicas moved")  # fmt: skip
    print(markdown_head(["placement", "tokens of each device", "mean / max"]))
    for name, plan, share in (("first", start, decision.before), ("rebalanced", decision.placement, decision.after)):
        counts = gpu_loads(plan, np.asarray(loads)[None], DEVICES)[0]
        print(markdown_row([name, " ".join(f"{count:.0f}" for count in counts), f"{share:.3f}"]))
    if arguments.plot:
        plans = {"first": start, "rebalanced": decision.placement}
        eplb_jax.draw_loads(np.asarray(loads)[None], plans, DEVICES, arguments.plot)

    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-5)
    assert np.array_equal(loads, same_loads)
    assert decision.after > 0.97 > decision.before
    assert layer._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    print("same output, nothing compiled again")


if __name__ == "__main__":
    main()
