"""Live balancing of experts in a user's own model: a dozen lines, the same training, one compilation."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import MoE, MoEConfig, RebalanceConfig, RouterConfig, balancedness, initial_placement
from jaxpipe.live_experts import LiveExperts
from jaxpipe.nnx_model import from_nnx

WIDTH, VOCABULARY, EXPERTS, BLOCKS, STEPS = 8, 16, 8, 3, 6
DOUBLE = {"param_dtype": jnp.float64}
MOE = MoEConfig(width=WIDTH, hidden=4, router=RouterConfig(EXPERTS, 2, 1, 1))


def script():
    """The training script of a user; lines that live balancing takes are marked."""
    rebalance = RebalanceConfig(num_replicas=12, num_groups=1, num_nodes=1, num_gpus=2, interval=2)  # live
    start = initial_placement(1, EXPERTS, rebalance).of_layer(0)  # live

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, **DOUBLE)
            self.moe = MoE(MOE, rngs, axis="ep", dtype=jnp.float64, placement=start)  # live

        def __call__(self, x):
            y, stats = self.moe(jnp.tanh(self.linear(x)))
            return x + y, stats.loads  # live

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, **DOUBLE)
            self.layers = nnx.List([Block(rngs) for _ in range(BLOCKS)])

        def __call__(self, tokens):
            x, loads = self.embed(tokens), []
            for layer in self.layers:
                x, counts = layer(x)
                loads.append(counts)  # live
            return self.embed.attend(x), jnp.stack(loads)  # live

    def loss(model, batch):
        logits, loads = model(batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch)
        return losses.mean(), {"loads": loads}  # live

    model, schedule, mesh = Model(nnx.Rngs(0)), jaxpipe.schedule.build("1f1b", 2, 2), jaxpipe.make_mesh(pp=2, ep=2)
    pipe = from_nnx(model, schedule, mesh, blocks="layers", loss=loss, data_axes=("ep",))
    mask = pipe.stacking.weight_decay_mask
    optimizer = jaxpipe.floating_only(optax.adamw(1e-2, weight_decay=0.1, mask=mask))  # live
    params, state = pipe.params, jaxpipe.init_optimizer(optimizer, pipe.params)
    live = LiveExperts(pipe, rebalance)  # live

    @jax.jit
    def step(params, state, batch):
        (value, aux), grads = pipe(params, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        return value, aux, optax.apply_updates(params, updates), state

    # few kinds of tokens: some experts get most
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 4, (8, 3)))
    for _ in range(STEPS):
        value, aux, params, state = step(params, state, batch)
        params = live(params, aux["loads"])  # live
        yield locals()


def test_it_takes_a_dozen_lines_at_most():
    assert 10 <= inspect.getsource(script).count("# live\n") <= 12


@pytest.mark.slow
def test_rebalancing_changes_arrays_alone(x64):
    """The losses of the run that never rebalances, by one compiled step; biases move as in that run."""
    turns = [dict(turn) for turn in script()]
    pipe, step, batch = (turns[0][name] for name in ("pipe", "step", "batch"))
    params, state = pipe.params, jaxpipe.init_optimizer(turns[0]["optimizer"], pipe.params)
    live = LiveExperts(pipe, dataclasses.replace(turns[0]["rebalance"], interval=1000))
    for turn in turns:
        value, aux, params, state = step(params, state, batch)
        params = live(params, aux["loads"])
        np.testing.assert_allclose(turn["value"], value, rtol=1e-10)
        np.testing.assert_array_equal(turn["aux"]["loads"], aux["loads"])
    assert step._cache_size() == 1
    assert aux["loads"].shape == (BLOCKS, EXPERTS) and int(aux["loads"].sum()) == BLOCKS * batch.size * 2
    assert live.last is None

    first, last = live.placement(params), turns[-1]["live"].placement(turns[-1]["params"])
    last.check(2)
    assert not np.array_equal(first.phy2log, last.phy2log)
    used = turns[3]["live"].placement(turns[3]["params"])  # planned for after two steps, and used by the last two
    assert not np.array_equal(first.phy2log, used.phy2log)
    assert (
        balancedness(last, np.asarray(aux["loads"]), 2).mean() > balancedness(first, np.asarray(aux["loads"]), 2).mean()
    )

    plain = pipe.merge(params)
    for layer, other in zip(pipe.merge(turns[-1]["params"]).layers, plain.layers, strict=True):
        for name in ("w_in", "w_out", "router", "shared_in"):
            np.testing.assert_allclose(getattr(layer.moe, name)[...], getattr(other.moe, name)[...], rtol=1e-9)
        np.testing.assert_array_equal(layer.moe.bias[...], other.moe.bias[...])
        moves = np.asarray(layer.moe.bias[...], np.float64) / 1e-3
        np.testing.assert_allclose(moves, np.round(moves), atol=1e-2)
        assert np.abs(moves).max() >= 1, "the bias moves by its rate alone, and the optimizer leaves it as it is"
    # one device, no pipeline: all experts at hand, without copies
    for layer in plain.layers:
        layer.moe.axis, layer.moe.redundant = None, False
    expected = nnx.jit(turns[0]["loss"])(plain, batch)[0]
    np.testing.assert_allclose(step(params, state, batch)[0], expected, rtol=1e-10)


def make_pipe(placement, count=1, replicas=12):
    rebalance = RebalanceConfig(replicas, 1, 1, 2)

    class Block(nnx.Module):
        def __init__(self, rngs):
            start = initial_placement(1, EXPERTS, rebalance).of_layer(0) if placement else None
            self.layers = nnx.List([MoE(MOE, rngs, placement=start) for _ in range(count)])

        def __call__(self, x):
            return x + sum(layer(x)[0] for layer in self.layers)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)
    model = Model(nnx.Rngs(0))
    return model, from_nnx(model, schedule, mesh, blocks="blocks", loss=lambda model, x: model(x).mean())


@pytest.mark.slow
def test_a_dense_block_before_the_experts():
    """Loads are of the blocks that have experts, and each block gets the placement and bias of its own."""
    rebalance = RebalanceConfig(12, 1, 1, 2, interval=1)
    start = initial_placement(1, EXPERTS, rebalance).of_layer(0)

    class Dense(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    class Sparse(Dense):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.moe = MoE(MOE, rngs, axis="ep", placement=start)

        def __call__(self, x):
            return x + self.moe(super().__call__(x))[0]

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Dense(rngs), Dense(rngs), Sparse(rngs), Sparse(rngs), Sparse(rngs)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, mesh = Model(nnx.Rngs(0)), jaxpipe.make_mesh(pp=2, ep=2)
    schedule, options = jaxpipe.schedule.build("1f1b", 2, 2), {"data_axes": ("ep",)}
    pipe = from_nnx(model, schedule, mesh, blocks="layers", loss=lambda model, x: model(x).mean(), **options)
    assert pipe.params.stages["moe"]["w_in"].sharding.spec == P("pp", None, "ep")
    live, loads = LiveExperts(pipe, rebalance, lag=0), np.ones((3, EXPERTS), np.int32)
    loads[np.arange(3), [2, 3, 6]] = 1000  # which have one copy at the start
    params = live(pipe.params, jnp.asarray(loads))
    found = pipe.merge(params)
    for layer, load, replicas in zip(found.layers[2:], loads, live.placement(params).logcnt, strict=True):
        assert layer.moe.logcnt[...].tolist() == replicas.tolist() and replicas[load.argmax()] > 1
        expected = np.where(load == 1000, -1e-3, 1e-3).astype(np.float32)
        np.testing.assert_array_equal(layer.moe.bias[...], expected)
    assert live.last.changed == 3
    jax.tree.map(lambda a, b: a is b or pytest.fail("moved"), params.stages["linear"], pipe.params.stages["linear"])


def test_a_run_that_goes_on_uses_the_plan_that_was_begun_before():
    pipe = make_pipe(placement=True)[1]
    config = RebalanceConfig(12, 1, 1, 2, interval=3, min_gain=0.0)
    loads = np.random.default_rng(0).integers(1, 1000, (8, 2, EXPERTS)).astype(np.int32)
    ends = []
    for pauses in (False, True):
        params, live, used = pipe.params, LiveExperts(pipe, config), []
        for step, counts in enumerate(loads, 1):
            if pauses and step in (4, 5):  # after the plan is begun, and again before it is used
                kept, live = live.state_dict(), LiveExperts(pipe, config)
                assert kept["planned_step"] == 3
                live.load_state_dict(kept)
            params = live(params, jnp.asarray(counts))
            used += [step] if live.last is not None else []
        assert used == [5, 8] and live.steps == 8
        ends.append((live.placement(params), live.state_dict()))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    with pytest.raises(ValueError, match=r"average has shape \(1, 4\)"):
        LiveExperts(pipe, config).load_state_dict({"average": np.zeros((1, 4))})


def test_what_cannot_be_balanced_is_refused():
    _, pipe = make_pipe(placement=False)
    config = RebalanceConfig(12, 1, 1, 2)
    with pytest.raises(ValueError, match="have no placement to change"):
        LiveExperts(pipe, config)
    with pytest.raises(ValueError, match=r"have 2 eplb_jax\.MoE layers each"):
        LiveExperts(make_pipe(placement=True, count=2)[1], config)
    with pytest.raises(ValueError, match="placements have 10 slots, and num_replicas is 12"):
        LiveExperts(make_pipe(placement=True, replicas=10)[1], config)
    pipe = make_pipe(placement=True)[1]
    with pytest.raises(ValueError, match=r"loads have shape \(8,\): they must be \[blocks, experts\] = \(2, 8\)"):
        LiveExperts(pipe, config)(pipe.params, jnp.zeros(8, jnp.int32))
