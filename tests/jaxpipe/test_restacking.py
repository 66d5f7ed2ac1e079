"""Checkpoints of pipelined parameters, read by other schedules, other meshes and the plain model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.layers import store_layers
from jaxpipe.linen_model import from_linen
from jaxpipe.nnx_model import from_nnx
from tests.jaxpipe.test_stacking import LAYERS, Model, loss_of, make_batch, make_pipe, plain_params
from tests.plain import assert_trees_close

orbax = pytest.importorskip("orbax.checkpoint")


@pytest.fixture(autouse=True)
def optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def stacking(name, ranks, layers=None, order="storage"):
    return jaxpipe.Stacking(jaxpipe.schedule.build(name, ranks, 8), layers, order)


def rows_of(stacked, each):
    return [np.asarray(stacked)[place] for place in each.places]


STACKINGS = [
    stacking("dualpipev", 4, 13),
    stacking("dualpipev", 4, 13, "model"),
    stacking("1f1b", 2, 13),
    stacking("1f1b", 4, 13),
    stacking("dualpipev", 2, 13),
    stacking("dualpipe", 4, 13),
]


@pytest.mark.parametrize(("source", "target"), [*zip(range(6), [1, 2, 3, 4, 5, 0], strict=True), (2, 4), (5, 2)])
def test_layers_keep_their_values(source, target):
    """13 layers, padded or not, between all orders, at once and travelling; integers and keys too."""
    source, target = STACKINGS[source], STACKINGS[target]
    weights = np.random.default_rng(0).normal(size=(13, 2, 4)).astype(np.float32)
    layers = {"w": weights, "n": np.arange(13, dtype=np.int32)}
    tree = {"p": jaxpipe.Params(jax.tree.map(lambda leaf: leaf[np.asarray(source.slots)], layers), 7), "count": 3}
    found = jaxpipe.restack(tree, source, target)
    assert found["count"] == 3 and found["p"].outer == 7
    expected = jax.tree.map(lambda leaf: leaf[np.asarray(target.slots)], layers)
    assert_trees_close(found["p"].stages, expected, rtol=0)
    mesh = jaxpipe.make_mesh(pp=2)
    placed = jax.device_put(tree["p"].stages, NamedSharding(mesh, P("pp")))
    moved = jaxpipe.restack(jaxpipe.Params(placed), source, target, mesh)
    assert_trees_close(moved.stages, expected, rtol=0)
    assert all(leaf.sharding.spec[0] == "pp" for leaf in jax.tree.leaves(moved))


def test_layers_of_several_kinds_keep_their_values():
    """Dense layers, then experts; with a state that leaves some parameters out; at once and travelling."""
    rng, mesh = np.random.default_rng(0), jaxpipe.make_mesh(pp=2)
    row = [{"w": (3, 2)}] * 2 + [{"w": (3, 2), "experts": (2, 3)}] * 5
    layers = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in each.items()} for each in row]
    schedules = [jaxpipe.schedule.build(*sizes) for sizes in (("dualpipev", 2, 4), ("1f1b", 2, 4))]
    storages = [store_layers(layers, schedule) for schedule in schedules]
    source, target = (
        jaxpipe.Stacking(schedule, order="storage", storage=storage)
        for schedule, storage in zip(schedules, storages, strict=True)
    )
    stages = storages[0].stack(layers, schedules[0], "storage")
    placed = jax.device_put(stages, NamedSharding(mesh, P("pp")))
    tree = {"params": jaxpipe.Params(placed), "state": (jaxpipe.Params({**placed, "w": ()}), 3)}
    for found in (
        jaxpipe.restack(jax.tree.map(np.asarray, tree), source, target),
        jaxpipe.restack(tree, source, target, mesh),
        jaxpipe.restore(lambda like: tree, jaxpipe.restack(tree, source, target, mesh), source, target, mesh),
    ):
        assert_trees_close(storages[1].unstack(found["params"].stages, schedules[1], "storage"), layers, rtol=0)
        state, count = found["state"]
        assert state.stages["w"] == () and int(count) == 3
        np.testing.assert_array_equal(state.stages["experts"], found["params"].stages["experts"])
    back = jaxpipe.restack(found, target, source, mesh)["params"].stages
    assert_trees_close(storages[0].unstack(back, schedules[0], "storage"), layers, rtol=0)
    other = jaxpipe.Stacking(schedules[1], 7, "storage")
    with pytest.raises(ValueError, match="of 2 kinds, are to be stacked as 7 of '1f1b', of 1 kinds"):
        jaxpipe.restack(tree, source, other)


def test_one_layer_a_stage_and_keys():
    source, target, mesh = stacking("dualpipev", 2), stacking("1f1b", 2, 4, "model"), jaxpipe.make_mesh(pp=2)
    keys = jax.random.split(jax.random.key(0), 4)
    rows = {"key": keys[np.asarray(source.slots)[:, 0]], "w": jnp.asarray(source.slots, jnp.float32)[:, 0]}
    found = jaxpipe.restack(jaxpipe.Params(rows), source, target, mesh).stages
    assert found["w"].tolist() == [[0, 1], [2, 3]]
    assert (found["key"].reshape(-1) == keys).all()
    back = jax.jit(lambda tree: jaxpipe.restack(tree, target, source, mesh))(jaxpipe.Params(found)).stages
    assert back["w"].tolist() == rows["w"].tolist() and (back["key"] == rows["key"]).all()


def test_no_device_holds_more_than_its_layers():
    """The compiled program sends single layers: no gather, no sum, and no array as large as the model."""
    source, target, mesh = stacking("dualpipev", 4, 16), stacking("1f1b", 4, 16), jaxpipe.make_mesh(pp=4)
    leaf = jax.ShapeDtypeStruct((8, 2, 32, 16), jnp.float32, sharding=NamedSharding(mesh, P("pp")))
    run = jax.jit(lambda tree: jaxpipe.restack(tree, source, target, mesh))
    compiled = run.lower(jaxpipe.Params({"w": leaf})).compile()
    text = compiled.as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all", text)
    sent = re.findall(r"= (\S+) collective-permute\(", text)
    assert sent and all(shape.startswith("f32[32,16]") or shape.startswith("f32[1,32,16]") for shape in sent), sent
    assert "32,16]" in text and not re.findall(r"f32\[(16|8,2|4,4),32,16\]", text)


def decayed(mask):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1, mask=mask))


def matrices(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def train(pipe, optimizer, steps):
    step, params = jax.jit(pipe), pipe.params
    state = optimizer.init(params)
    for _ in range(steps):
        _, grads = step(params, make_batch())
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def make_optimizer(pipe):
    return decayed(pipe.stacking.weight_decay_mask)


@pytest.mark.slow
def test_orbax_from_pp4_to_pp2_and_to_the_plain_model(x64, tmp_path):
    """Saved by dualpipev on 4 ranks, read by 1f1b on 2 and on 3 and by the plain model, which train on alike."""
    model = Model(nnx.Rngs(0))
    model.layers = nnx.List([*model.layers, *Model(nnx.Rngs(1)).layers])  # 10 layers on 8 stages

    def pipeline(name, ranks):
        schedule, mesh = jaxpipe.schedule.build(name, ranks, 8), jaxpipe.make_mesh(pp=ranks)
        return from_nnx(model, schedule, mesh, blocks="layers", loss=loss_of)

    old = pipeline("dualpipev", 4)
    params, state = train(old, make_optimizer(old), 2)
    checkpointer = orbax.StandardCheckpointer()
    checkpointer.save(tmp_path / "saved", {"params": params, "state": state})
    checkpointer.wait_until_finished()
    expected = plain_params(old.merge(params))

    for name, ranks in (("1f1b", 2), ("1f1b", 3)):
        new = pipeline(name, ranks)
        like = {"params": new.params, "state": make_optimizer(new).init(new.params)}
        found = new.restore(lambda like: checkpointer.restore(tmp_path / "saved", like), like, old.stacking)
        assert_trees_close(plain_params(new.merge(found["params"])), expected, rtol=0)
        assert jax.tree.structure(found) == jax.tree.structure(like)
        assert all(leaf.sharding.spec[0] == "pp" for leaf in jax.tree.leaves(found["params"].stages))
        assert_trees_close(new.merge_state(found["state"]), old.merge_state(state), rtol=0)

    _, grads = jax.jit(new)(found["params"], make_batch())
    updates, _ = jax.jit(make_optimizer(new).update)(grads, found["state"], found["params"])
    after = plain_params(new.merge(optax.apply_updates(found["params"], updates)))
    merged = new.merge(found["params"])
    plain = nnx.Optimizer(merged, decayed(matrices), wrt=nnx.Param)
    nnx.update(plain.opt_state, nnx.state(nnx.as_pure(new.merge_state(found["state"]))))
    nnx.jit(lambda plain, merged: plain.update(merged, nnx.grad(loss_of)(merged, make_batch())))(plain, merged)
    assert_trees_close(after, plain_params(merged), rtol=1e-10)


@pytest.mark.slow
def test_a_state_with_masked_parameters_goes_to_the_plain_model(x64):
    """Muon keeps Adam's averages for some parameters alone."""
    pipe = make_pipe()
    optimizer = jaxpipe.muon(1e-2, pipe.stacking)
    params, state = train(pipe, optimizer, 2)
    merged, model = pipe.merge_state(state), pipe.merge(params)

    def numbers(tree):
        def of(path, leaf):
            return optax.contrib.MuonDimensionNumbers() if leaf.ndim == 2 and "layers" in str(path) else None

        return jax.tree_util.tree_map_with_path(of, tree)

    plain = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=numbers)
    weights = nnx.state(model, nnx.Param)
    assert jax.tree.structure(plain.init(weights)) == jax.tree.structure(merged)
    gradient = nnx.grad(loss_of)(model, make_batch())
    updates, _ = plain.update(gradient, merged, weights)
    ours, _ = optimizer.update(pipe.split(_with(model, gradient)), state, params)
    assert_trees_close(plain_params(pipe.merge(ours)), nnx.to_pure_dict(updates), rtol=1e-10)


def _with(model, state):
    copy = nnx.clone(model)
    nnx.update(copy, state)
    return copy


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Dense(8, param_dtype=jnp.float64)(x))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(16, 8, name="table", param_dtype=jnp.float64)
        x = table(tokens)
        for index in range(LAYERS):
            x = LinenBlock(name=f"layers_{index}")(x)
        return table.attend(x)


def test_orbax_of_linen(x64, tmp_path):
    model, batch = LinenModel(), make_batch()

    def loss(params, batch):
        logits = model.apply({"params": params}, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean()

    def pipeline(name, ranks):
        schedule, mesh = jaxpipe.schedule.build(name, ranks, 8), jaxpipe.make_mesh(pp=ranks)
        params = model.init(jax.random.key(0), batch)["params"]
        return from_linen(params, schedule, mesh, blocks="layers", loss=loss)

    old, new = pipeline("1f1b", 4), pipeline("dualpipev", 2)
    params, state = train(old, make_optimizer(old), 1)
    checkpointer = orbax.StandardCheckpointer()
    checkpointer.save(tmp_path / "saved", (params, state))
    checkpointer.wait_until_finished()
    like = new.params, make_optimizer(new).init(new.params)
    found, moments = new.restore(lambda like: checkpointer.restore(tmp_path / "saved", like), like, old.stacking)
    assert_trees_close(new.merge(found), old.merge(params), rtol=0)
    assert_trees_close(new.merge_state(moments), old.merge_state(state), rtol=0)
    assert jax.tree.structure(new.merge_state(moments)) == jax.tree.structure(decayed(matrices).init(new.merge(found)))


def test_other_models_are_refused():
    mesh = jaxpipe.make_mesh(pp=2)
    params = jaxpipe.Params({"w": np.zeros((4, 2))})
    with pytest.raises(
        ValueError, match="13 layers of schedule '1f1b', of 1 kinds, are to be stacked as 4 of 'dualpipev'"
    ):
        jaxpipe.restack(params, stacking("1f1b", 2, 13), stacking("dualpipev", 2))
    with pytest.raises(ValueError, match="give the schedule that the parameters are stacked for"):
        jaxpipe.restack(params, stacking("1f1b", 2, 13), stacking("dualpipev", 2, 13), mesh)
    with pytest.raises(ValueError, match="same model"):
        jaxpipe.restore(lambda like: like, params, stacking("1f1b", 2), stacking("dualpipev", 2), mesh)
