"""The layer in FP8 within a pipeline, its backward pass divided: the plain program's loss and gradients in FP8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import ExpertParams, MoE, MoEConfig, MoEParams, RouterConfig, moe_layer, param_specs
from jaxpipe.flax import nnx_stages
from tests.eplb_jax.moe.dense import placement_of
from tests.eplb_jax.moe.test_fp8_experts import relative
from tests.eplb_jax.moe.test_layer import make_mesh

CONFIG = MoEConfig(width=128, hidden=128, router=RouterConfig(4, 2, 1, 1), num_shared=1, masters=4, precision="fp8")
STAGES, EP, MICROBATCHES, TOKENS = 2, 2, 4, 32


@pytest.mark.parametrize("redundant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pipelined_equals_plain(redundant):
    """pp=2, ep=2: each device's experts see the same rows of the same microbatch, so the same 8 bits."""
    if jax.device_count() < STAGES * EP:
        pytest.skip(f"{STAGES * EP} devices are needed, there are {jax.device_count()}")
    schedule, mesh = jaxpipe.schedule.build("zb1p", STAGES, MICROBATCHES), jaxpipe.make_mesh(pp=STAGES, ep=EP)
    placement = placement_of(np.array([0, 1, 2, 3, 3, 0]), 4) if redundant else None

    class Stage(nnx.Module):
        def __init__(self, rngs):
            self.moe = MoE(CONFIG, rngs, axis="ep", placement=placement, dtype=jnp.float32)

        def __call__(self, x):
            y, stats = self.moe(x)
            return jaxpipe.Output(x + y / 8, 0.0 * stats.balance_loss, {"bad": stats.not_finite})

    stage, stages = nnx_stages(Stage, schedule, nnx.Rngs(0))
    sharded = {name: P("pp", "ep") if name in ("w_in", "w_out") else P("pp") for name in stages["moe"]}
    step = jaxpipe.value_and_grad(
        stage,
        schedule,
        mesh,
        head=lambda outer, y, data, ctx: jnp.mean(y**2),
        data_axes=("ep",),
        specs=jaxpipe.Params({"moe": sharded}, P()),
    )
    x = jax.random.normal(jax.random.key(5), (MICROBATCHES * EP * TOKENS, CONFIG.width))
    (loss, aux), grads = jax.jit(step)(jaxpipe.Params(stages), x)

    names = ("router", "bias", "w_in", "w_out", "shared_in", "shared_out")
    floats = {name: stages["moe"][name] for name in names}
    specs = param_specs(CONFIG, "ep")

    def plain(floats, x):
        def layer(params, x):
            return moe_layer(params, x, CONFIG, axis="ep")[0]

        for s in range(STAGES):
            router, bias, w_in, w_out, shared_in, shared_out = (floats[name][s] for name in names)
            params = MoEParams(router, bias, ExpertParams(w_in, w_out), ExpertParams(shared_in, shared_out))
            mapped = jax.shard_map(layer, mesh=make_mesh(EP), in_specs=(specs, P("ep")), out_specs=P("ep"))
            x = x + mapped(params, x) / 8
        return jnp.mean(x**2)

    value_and_grad = jax.jit(jax.value_and_grad(plain))
    found = [value_and_grad(floats, part) for part in jnp.split(x, MICROBATCHES)]
    expected, expected_grads = jax.tree.map(lambda *each: functools.reduce(jnp.add, each) / MICROBATCHES, *found)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert int(aux["bad"]) == 0
    for name in names:
        want = np.asarray(expected_grads[name])
        # Copies of an expert share its rows, which are then scaled in other blocks for the weight gradient.
        limit = 0.03 if redundant and name.startswith("w_") else 2e-3
        assert not want.any() or relative(grads.stages["moe"][name], want) < limit, name
