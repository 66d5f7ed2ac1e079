"""The layer as Flax modules: same numbers as the function, under jit, remat and GSPMD, and inside a pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax.experts import ExpertParams
from eplb_jax.flax import LinenMoE, MoE, PlacementParam, RouterBias
from eplb_jax.moe import MoEParams
from jaxpipe.flax import nnx_stages
from tests.moe import dense
from tests.moe.test_layer import CONFIG, EXPERTS, FACTOR, WIDTH, random_placement
from tests.plain import assert_trees_close


def params_of(module):
    shared = ExpertParams(module.shared_in[...], module.shared_out[...])
    experts = ExpertParams(module.w_in[...], module.w_out[...])
    return MoEParams(module.router[...], module.bias[...], experts, shared)


def expected_output(params, x):
    flat = x.reshape(-1, WIDTH)
    chosen = dense.choose(np.asarray(flat @ params.router), np.asarray(params.bias), CONFIG.router)
    return dense.layer(params, flat, CONFIG, chosen).reshape(x.shape)


@pytest.mark.parametrize("redundant", [False, True])
def test_nnx_and_linen_are_the_function(x64, redundant):
    placement = random_placement(1, 8, 0) if redundant else None
    module = MoE(CONFIG, nnx.Rngs(0), placement=placement, dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, 16, WIDTH))
    y, stats = nnx.jit(lambda module, x: module(x))(module, x)
    np.testing.assert_allclose(y, expected_output(params_of(module), x), rtol=1e-10, atol=1e-12)

    linen = LinenMoE(CONFIG, param_dtype=jnp.float64)
    names = ("router", "bias", "w_in", "w_out", "shared_in", "shared_out")
    variables = {"params": {name: getattr(module, name)[...] for name in names}}
    again, linen_stats = jax.jit(linen.apply)(variables, x, placement)
    np.testing.assert_allclose(again, y, rtol=1e-12)
    assert linen_stats.loads.tolist() == stats.loads.tolist()
    assert jax.tree.map(jnp.shape, linen.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, variables)


def test_optimizers_leave_bias_and_placement_alone():
    module = MoE(CONFIG, nnx.Rngs(0), placement=random_placement(1, 8, 0))
    trained = nnx.All(nnx.Param, nnx.Not(RouterBias), nnx.Not(PlacementParam))
    optimizer = nnx.Optimizer(module, optax.adamw(0.1, weight_decay=0.5), wrt=trained)
    module.bias[...] = jnp.arange(EXPERTS, dtype=jnp.float32)
    before = nnx.to_pure_dict(nnx.state(module))
    grads = nnx.grad(lambda module: module(jnp.ones((4, WIDTH)))[0].sum(), argnums=nnx.DiffState(0, trained))(module)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        optimizer.update(module, grads)
    after = nnx.to_pure_dict(nnx.state(module))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert {"bias", "phy2log", "log2phy", "logcnt"} <= same
    assert not {"w_in", "w_out", "shared_in", "router"} & same


def test_remat_and_the_compilers_axes(x64):
    """Experts over "ep" by hand, the hidden width over "tp" by the compiler, the layer under jax.checkpoint."""
    if jax.device_count() < 8:
        pytest.skip(f"8 devices are needed, there are {jax.device_count()}")
    mesh = jax.make_mesh((4, 2), ("ep", "tp"), (AxisType.Auto,) * 2)
    config = dataclasses.replace(CONFIG, hidden=8)
    module = MoE(config, nnx.Rngs(0), axis="ep", placement=random_placement(4, 8, 1), dtype=jnp.float64)
    graphdef, state = nnx.split(module)
    local = nnx.to_pure_dict(state)
    manual = {name: P("ep") if name in ("w_in", "w_out") else P() for name in local}
    placed = {
        name: jax.device_put(value, NamedSharding(mesh, P("ep", "tp") if name == "w_out" else manual[name]))
        for name, value in local.items()
    }

    @jax.checkpoint
    def body(params, x):
        pure = nnx.State({name: nnx.Param(value) for name, value in params.items()})
        y, stats = nnx.merge(graphdef, pure)(x)
        return y, jax.lax.psum(stats.loads, "ep")

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(manual, P("ep")), out_specs=(P("ep"), P()), axis_names={"ep"})

    def loss(floats, rest, x):
        y, loads = mapped(floats | rest, x)
        return (y**2).mean(), loads

    x = jax.random.normal(jax.random.key(3), (8, 8, WIDTH))
    floats = {name: value for name, value in placed.items() if value.dtype == jnp.float64}
    rest = {name: value for name, value in placed.items() if name not in floats}
    (value, loads), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats, rest, x)

    def plain(floats, x):
        experts = ExpertParams(floats["w_in"], floats["w_out"])
        shared = ExpertParams(floats["shared_in"], floats["shared_out"])
        params = MoEParams(floats["router"], floats["bias"], experts, shared)
        return (dense.layer(params, x.reshape(-1, WIDTH), config, chosen) ** 2).mean()

    flat = np.asarray(x.reshape(-1, WIDTH) @ local["router"])
    chosen = dense.choose(flat, np.asarray(local["bias"]), config.router)
    expected, expected_grads = jax.value_and_grad(plain)(jax.tree.map(jnp.asarray, floats), x)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert int(loads.sum()) == chosen.size
    assert_trees_close(grads, expected_grads, rtol=1e-10)


@pytest.mark.parametrize("redundant", [False, True])
def test_inside_a_dualpipev_stage(x64, redundant):
    """pp=4, ep=2, two microbatches' routing losses included: gradients are the plain program's."""
    if jax.device_count() < 8:
        pytest.skip(f"8 devices are needed, there are {jax.device_count()}")
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 4, 8), jaxpipe.make_mesh(pp=4, ep=2)
    placements = iter([random_placement(2, 8, seed) for seed in range(schedule.num_stages)])

    class Stage(nnx.Module):
        def __init__(self, rngs):
            placement = next(placements) if redundant else None
            self.moe = MoE(CONFIG, rngs, axis="ep", placement=placement, dtype=jnp.float64)

        def __call__(self, x):
            y, stats = self.moe(x)
            metrics = {"loads": stats.loads, "dropped": stats.dropped}
            return jaxpipe.Output(x + y / 8, FACTOR * stats.balance_loss, metrics)

    stage, stages = nnx_stages(Stage, schedule, nnx.Rngs(0))
    sharded = {name: P("pp", "ep") if name in ("w_in", "w_out") else P("pp") for name in stages["moe"]}

    def head(outer, y, data, ctx):
        return jnp.mean(y**2)

    step = jaxpipe.value_and_grad(
        stage, schedule, mesh, head=head, data_axes=("ep",), specs=jaxpipe.Params({"moe": sharded}, P())
    )
    x = jax.random.normal(jax.random.key(5), (8 * 2 * 2, 4, WIDTH))
    (loss, aux), grads = jax.jit(step)(jaxpipe.Params(stages), x)

    floats = {name: leaf for name, leaf in stages["moe"].items() if leaf.dtype == jnp.float64}

    def plain(floats, choices):
        y, total = x, jnp.zeros(())
        for s in range(schedule.num_stages):
            mine = {name: leaf[s] for name, leaf in floats.items()}
            shared = ExpertParams(mine["shared_in"], mine["shared_out"])
            params = MoEParams(mine["router"], mine["bias"], ExpertParams(mine["w_in"], mine["w_out"]), shared)
            flat = y.reshape(-1, WIDTH)
            if len(choices) == s:  # the first call is not traced
                choices.append(dense.choose(np.asarray(flat @ params.router), np.asarray(params.bias), CONFIG.router))
            total += FACTOR * dense.balance_loss(params, flat, CONFIG, choices[s], len(x))
            y = y + dense.layer(params, flat, CONFIG, choices[s]).reshape(y.shape) / 8
        return jnp.mean(y**2) + total, total

    choices = []
    plain(floats, choices)
    (expected, expected_aux), expected_grads = jax.value_and_grad(plain, has_aux=True)(floats, choices)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(aux["aux_loss"], expected_aux, rtol=1e-10)
    assert int(aux["loads"].sum()) == schedule.num_stages * 4 * len(x) * CONFIG.router.top_k
    assert int(aux["dropped"]) == 0
    found = {name: grads.stages["moe"][name] for name in floats}
    assert_trees_close(found, expected_grads, rtol=1e-10)
    others = {name: leaf for name, leaf in grads.stages["moe"].items() if name not in floats}
    assert all(leaf.dtype == jax.dtypes.float0 or not leaf.any() for leaf in others.values())
