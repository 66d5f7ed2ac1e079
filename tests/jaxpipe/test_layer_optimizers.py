"""Optimizers that take a leaf for one parameter, on stacked layers: the plain model's numbers, and nothing travels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import jaxpipe
from jaxpipe.layers import store_layers, unstack_layers
from tests.cases import cases
from tests.plain import assert_trees_close

LAYERS, EXPERTS = 5, 4
SHAPES = {"kernel": (6, 4), "wide": (4, 6), "scale": (4,), "router": (4, 3), "w_in": (EXPERTS, 4, 6)}
DIMENSIONS = {"w_in": (1, 2), "router": None}
COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


@pytest.fixture(autouse=True)
def optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def plain_tree(seed):
    rng = np.random.default_rng(seed)
    layers = [{name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    return {"layers": layers, "embed": jnp.asarray(rng.normal(size=(9, 4)))}


def stacked(tree, schedule, mesh=None):
    rows = store_layers(tree["layers"], schedule).stack(tree["layers"], schedule, "storage")
    params = jaxpipe.Params(rows, {"embed": tree["embed"]})
    if mesh is None:
        return params
    experts = "ep" if "ep" in mesh.shape else None
    specs = jaxpipe.Params({name: P("pp") for name in SHAPES} | {"w_in": P("pp", None, experts)}, {"embed": P()})
    return jax.device_put(params, jax.tree.map(functools.partial(NamedSharding, mesh), specs))


def unstacked(params, schedule):
    return {"layers": unstack_layers(params.stages, LAYERS, schedule, "storage"), "embed": params.outer["embed"]}


def plain_muon(**options):
    """On the tree of the plain model."""

    def numbers(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("w_in"):
            return MuonDimensionNumbers(1, 2)
        return MuonDimensionNumbers(0, 1) if leaf.ndim == 2 and not name.endswith(("router", "embed")) else None

    return optax.contrib.muon(
        muon_weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(numbers, tree), **options
    )


def run(optimizer, params, grads):
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for gradient in grads:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


OPTIMIZERS = {
    "muon": (
        lambda stacking: jaxpipe.muon(1e-2, stacking, dimensions=DIMENSIONS, weight_decay=0.1),
        lambda: plain_muon(learning_rate=1e-2, weight_decay=0.1),
    ),
    "muon with dual norms": (
        lambda stacking: jaxpipe.muon(1e-2, stacking, dimensions=DIMENSIONS, adaptive=True, consistent_rms=0.2),
        lambda: plain_muon(learning_rate=1e-2, adaptive=True, consistent_rms=0.2),
    ),
    "lamb": (
        lambda stacking: jaxpipe.per_layer(optax.lamb(1e-2, weight_decay=0.1), stacking),
        lambda: optax.lamb(1e-2, weight_decay=0.1),
    ),
    "adafactor": (
        lambda stacking: jaxpipe.per_layer(optax.adafactor(1e-2, min_dim_size_to_factor=2), stacking),
        lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    ),
}


@cases("name", OPTIMIZERS, quick=["muon with dual norms"])
def test_layers_are_updated_as_in_the_plain_model(x64, name):
    """5 layers on 4 stages with padding, sharded over pp and ep, under jit; three steps."""
    schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    mesh = jax.make_mesh((2, 2), ("pp", "ep"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    ours, theirs = OPTIMIZERS[name]
    optimizer = ours(jaxpipe.Stacking(schedule, LAYERS, "storage"))
    grads = [plain_tree(seed) for seed in (1, 2, 3)]
    found, state = run(optimizer, stacked(plain_tree(0), schedule, mesh), [stacked(g, schedule, mesh) for g in grads])
    expected, _ = run(theirs(), plain_tree(0), grads)
    assert_trees_close(unstacked(found, schedule), expected, rtol=1e-10)
    assert all(leaf.shape == () or leaf.shape[:2] == (4, 2) or "outer" in jax.tree_util.keystr(path)
               for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.shape != (3,))  # fmt: skip


MIXED = [{"kernel": (6, 4), "scale": (4,)}, *[{"kernel": (6, 4), "router": (4, 3), "w_in": (EXPERTS, 4, 6)}] * 4]
"""A dense layer, then experts."""


def mixed_tree(seed):
    rng = np.random.default_rng(seed)
    layers = [{name: jnp.asarray(rng.normal(size=shape)) for name, shape in each.items()} for each in MIXED]
    return {"layers": layers, "embed": jnp.asarray(rng.normal(size=(9, 4)))}


@cases("name", ["muon", "lamb"], quick=["muon"])
def test_layers_of_several_kinds_are_updated_as_in_the_plain_model(x64, name):
    """Leaves that some layers have in fewer slots than others; sharded, under jit, and without a collective."""
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)
    storage = store_layers(mixed_tree(0)["layers"], schedule)
    stacking = jaxpipe.Stacking(schedule, order="storage", storage=storage)

    def stack(tree):
        params = jaxpipe.Params(storage.stack(tree["layers"], schedule, "storage"), {"embed": tree["embed"]})
        specs = jaxpipe.Params(jax.tree.map(lambda _: P("pp"), params.stages), {"embed": P()})
        return jax.device_put(params, jax.tree.map(functools.partial(NamedSharding, mesh), specs))

    ours, theirs = OPTIMIZERS[name]
    optimizer, grads = ours(stacking), [mixed_tree(seed) for seed in (1, 2)]
    params = stack(mixed_tree(0))
    found, state = run(optimizer, params, [stack(gradient) for gradient in grads])
    expected, _ = run(theirs(), mixed_tree(0), grads)
    assert_trees_close(storage.unstack(found.stages, schedule, "storage"), expected["layers"], rtol=1e-10)
    assert_trees_close(found.outer["embed"], expected["embed"], rtol=1e-10)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, optimizer.init(params))
    text = jax.jit(optimizer.update).lower(params, state, params).compile().as_text()
    assert not COLLECTIVES.findall(text)


def test_one_layer_a_stage_and_float32():
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    rng = np.random.default_rng(0)
    params, grads = (jaxpipe.Params({"w": jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)}) for _ in range(2))
    optimizer = jaxpipe.muon(1e-2, jaxpipe.Stacking(schedule))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for row in range(2):
        of_row = optax.contrib.muon(1e-2)
        plain, gradient = params.stages["w"][row], grads.stages["w"][row]
        expected, _ = of_row.update(gradient, of_row.init(plain), plain)
        np.testing.assert_allclose(updates.stages["w"][row], expected, rtol=2e-5, atol=1e-7)


def test_no_weight_travels():
    """The compiled update has no collective at all; optax's own reshaping of stacked experts does gather them."""
    schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    mesh = jax.make_mesh((2, 2), ("pp", "ep"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), plain_tree(0))
    params = stacked(params, schedule, mesh)
    optimizer = jaxpipe.muon(1e-2, jaxpipe.Stacking(schedule, LAYERS, "storage"), dimensions=DIMENSIONS)
    state = optimizer.init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 2]
    assert moments and all(leaf.sharding.spec[0] == "pp" for leaf in moments)

    def step(optimizer, params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    text = jax.jit(functools.partial(step, optimizer)).lower(params, state).compile().as_text()
    assert " dot(" in text or "custom-call" in text
    assert not COLLECTIVES.findall(text)

    numbers = jax.tree.map(lambda leaf: None, params)
    numbers.stages["w_in"] = MuonDimensionNumbers(3, 4)
    stock = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=lambda _: numbers)
    text = jax.jit(functools.partial(step, stock)).lower(params, stock.init(params)).compile().as_text()
    assert COLLECTIVES.findall(text), "optax alone needs none either: then per_layer is for exactness alone"


def test_what_couples_layers_and_unknown_names_are_refused():
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    stacking = jaxpipe.Stacking(schedule)
    params = jaxpipe.Params({"w": jnp.ones((2, 3, 3)), "experts": jnp.ones((2, 4, 3, 3))}, {"embed": jnp.ones((3, 3))})
    coupled = jaxpipe.per_layer(optax.clip_by_global_norm(1.0), stacking)
    with pytest.raises(ValueError, match="couples layers"):
        coupled.update(params, coupled.init(params))
    with pytest.raises(ValueError, match=r"stages\.experts has shape \(4, 3, 3\) in a layer: say in dimensions"):
        jaxpipe.muon(1e-2, stacking).init(params)
    with pytest.raises(ValueError, match=r"dimensions names \['w_in'\]"):
        jaxpipe.muon(1e-2, stacking, dimensions={"w_in": (1, 2), "experts": (1, 2)}).init(params)
    with pytest.raises(ValueError, match="7 layers of schedule"):
        jaxpipe.per_layer(optax.lamb(1e-2), jaxpipe.Stacking(schedule, 7)).init(params)
