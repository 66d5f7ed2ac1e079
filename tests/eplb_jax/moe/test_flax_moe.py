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
from eplb_jax import ExpertParams, LinenMoE, MoE, MoEParams, Placement, PlacementParam, RouterBias
from jaxpipe.flax import nnx_stages
from tests.cases import cases
from tests.eplb_jax.moe import dense
from tests.eplb_jax.moe.dense import placement_of
from tests.eplb_jax.moe.test_layer import CONFIG, EXPERTS, FACTOR, WIDTH, make_mesh, random_placement
from tests.plain import assert_trees_close


def params_of(module):
    shared = ExpertParams(module.shared_in[...], module.shared_out[...])
    experts = ExpertParams(module.w_in[...], module.w_out[...])
    return MoEParams(module.router[...], module.bias[...], experts, shared)


def expected_output(params, x):
    flat = x.reshape(-1, WIDTH)
    chosen = dense.choose(np.asarray(flat @ params.router), np.asarray(params.bias), CONFIG.router)
    return dense.layer(params, flat, CONFIG, chosen).reshape(x.shape)


@pytest.mark.parametrize("redundant", [pytest.param(False, marks=pytest.mark.slow), True])
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


DOCUMENTED = nnx.All(nnx.Param, nnx.Not(RouterBias), nnx.Not(PlacementParam))


@cases("trained", [nnx.Param, DOCUMENTED], quick=[DOCUMENTED], ids=["Param", "without"])
def test_the_usual_loop_trains_with_a_placement(trained):
    """As `nnx.value_and_grad` and AdamW are used everywhere: losses without a placement, which stays, as biases do."""
    x = jax.random.normal(jax.random.key(1), (16, WIDTH))
    losses = []
    for placement in (None, random_placement(1, 8, 0)):
        module = MoE(CONFIG, nnx.Rngs(0), placement=placement)
        optimizer = nnx.Optimizer(module, optax.adamw(0.03, weight_decay=0.5), wrt=trained)
        module.bias[...] = jnp.arange(EXPERTS, dtype=jnp.float32) / 100
        before = nnx.to_pure_dict(nnx.state(module))

        @nnx.jit
        def step(module, optimizer):
            loss, grads = nnx.value_and_grad(lambda module: (module(x)[0] ** 2).mean())(module)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
                optimizer.update(module, grads)
            return loss

        losses.append([float(step(module, optimizer)) for _ in range(3)])
        after = nnx.to_pure_dict(nnx.state(module))
        same = {name for name in before if np.array_equal(before[name], after[name])}
        assert same == {"bias", *(() if placement is None else ("phy2log", "log2phy", "logcnt"))}
    assert losses[0][0] > losses[0][1] > losses[0][2]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_a_placement_for_a_module_made_without_one(x64):
    x = jax.random.normal(jax.random.key(1), (16, WIDTH))
    module = MoE(CONFIG, nnx.Rngs(0), dtype=jnp.float64)
    expected = module(x)[0]
    placement = random_placement(1, 8, 0)
    module.set_placement(placement)
    np.testing.assert_allclose(module(x)[0], expected, rtol=1e-10, atol=1e-12)
    assert np.array_equal(module.phy2log[...], placement.phy2log)
    first = int(placement.phy2log[0])  # another expert in the first slot, which the layer then computes with
    module.set_placement(placement)
    module.phy2log[...] = module.phy2log[...].at[0].set((first + 1) % EXPERTS)
    assert float(jnp.abs(module(x)[0] - expected).max()) > 1e-3


@pytest.mark.parametrize("start", [None, random_placement(1, 8, 0)], ids=["without", "with"])
def test_nonsensical_placements_are_refused(start):
    """Of other sizes by the call, of values that contradict each other at once."""
    x = jnp.ones((4, WIDTH))
    good = random_placement(1, 8, 1)
    module = MoE(CONFIG, nnx.Rngs(0), placement=start)
    module.set_placement(Placement(np.zeros(5, np.int32), np.zeros((3, 1), np.int32), np.ones(3, np.int32)))
    with pytest.raises(ValueError, match=r"phy2log of shape \(5,\) and 3 experts: give one layer of 16 experts"):
        module(x)
    nonsense = {
        "does not list the slots": dataclasses.replace(good, phy2log=good.phy2log[::-1]),
        "as many slots as logcnt": dataclasses.replace(good, logcnt=good.logcnt + 1),
        "lists slot 99": dataclasses.replace(good, log2phy=np.where(good.log2phy == 0, 99, good.log2phy)),
    }
    for message, placement in nonsense.items():
        with pytest.raises(ValueError, match=message):
            module.set_placement(placement)
        with pytest.raises(ValueError, match=message):
            MoE(CONFIG, nnx.Rngs(0), placement=jax.tree.map(jnp.asarray, placement))


@pytest.mark.parametrize(("experts", "redundant"), [pytest.param(16, False, marks=pytest.mark.slow), (12, True)])
def test_linen_with_masters_sharded_over_devices(x64, experts, redundant):
    """Initialised outside of shard_map or inside, the same masters; applied to parts of them, one device's output."""
    router = dataclasses.replace(CONFIG.router, num_experts=experts)
    config, ep = dataclasses.replace(CONFIG, router=router), 4
    slots = np.random.default_rng(0).permutation(np.r_[np.arange(experts), np.arange(24 - experts)])
    placement = placement_of(slots, experts) if redundant else None
    x = jax.random.normal(jax.random.key(1), (32, WIDTH))
    alone, sharded = (LinenMoE(config, axis=axis, param_dtype=jnp.float64) for axis in (None, "ep"))
    variables, key = alone.init(jax.random.key(0), x), jax.random.key(0)
    specs = {"params": {name: P("ep") if name in ("w_in", "w_out") else P() for name in variables["params"]}}

    def mapped(function, in_specs, out_specs):
        return jax.jit(jax.shard_map(function, mesh=make_mesh(ep), in_specs=in_specs, out_specs=out_specs))

    inside = mapped(lambda key, x: sharded.init(key, x, placement), (P(), P("ep")), specs)(key, x)
    for made in (sharded.init(key, x, placement), inside):
        assert_trees_close(made, variables, rtol=1e-14)

    def loss(variables, x):
        y, stats = sharded.apply(variables, x, placement)
        return jax.lax.psum((y**2).sum(), "ep"), (y, jax.lax.psum(stats.loads, "ep"))

    both = mapped(loss, (specs, P("ep")), (P(), (P("ep"), P())))
    (value, (y, loads)), grads = jax.value_and_grad(both, has_aux=True)(variables, x)
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda v: (alone.apply(v, x)[0] ** 2).sum()))(variables)
    np.testing.assert_allclose(y, alone.apply(variables, x)[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert int(loads.sum()) == 32 * config.router.top_k
    assert_trees_close(grads, expected_grads, rtol=1e-10)


@pytest.mark.slow
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


@pytest.mark.slow
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
