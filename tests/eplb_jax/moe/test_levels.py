"""Tokens that travel by nodes: the same results and gradients as of the exchange of all devices, with fewer copies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import MoEConfig, RouterConfig, moe_layer, param_specs
from eplb_jax.moe.dispatch import make_capacities
from eplb_jax.moe.levels import make_levels, visited_nodes
from tests.eplb_jax.moe import test_fp8_layer as fp8
from tests.eplb_jax.moe import test_layer as layers
from tests.jaxprs import equations

NODES = dataclasses.replace(layers.CONFIG, exchange="nodes", devices_per_node=4)


@pytest.mark.parametrize("kind", ["none", pytest.param("random", marks=pytest.mark.slow)])
def test_two_nodes_of_four_equal_the_dense_loop(x64, kind):
    """Values, loads and all gradients in float64, with and without copies of experts; nothing is dropped."""
    placement = None if kind == "none" else layers.random_placement(8, 16, seed=3)
    layers.check(NODES, 8, placement, layers.make_params(), *layers.make_tokens())


@pytest.mark.slow
def test_four_nodes_of_two_equal_the_dense_loop(x64):
    config = dataclasses.replace(NODES, devices_per_node=2)
    layers.check(config, 8, None, layers.make_params(), *layers.make_tokens())


def test_limited_room_drops_and_counts_the_same_choices_where_it_suffices(x64):
    """With room for all that are there, a factor drops nothing; with too little, what is dropped is counted."""
    params, (x, target) = layers.make_params(), layers.make_tokens()
    layers.check(dataclasses.replace(NODES, capacity_factor=6.0), 8, None, params, x, target)
    tight = dataclasses.replace(NODES, capacity_factor=1.0)
    skewed = params._replace(bias=params.bias.at[0].set(50.0))  # all tokens want one expert
    (_, (loads, dropped, y)), _ = layers.sharded(tight, 8, None, 8)(skewed, x, target)
    assert int(loads[0]) == layers.TOKENS and 0 < int(dropped) < layers.TOKENS * layers.ROUTER.top_k
    assert np.isfinite(np.asarray(y)).all()


@pytest.mark.slow
def test_numbers_of_eight_bits_travel_by_nodes():
    """Gradients come back in 8 bits through both levels, quantised once, as on one device."""
    params, x, ct = fp8.make("float32")
    config = dataclasses.replace(fp8.CONFIG, exchange="nodes", devices_per_node=2)
    (y, stats), grads = fp8.run(config, 4, params, x, ct)
    (expected, stats_of_one), grads_of_one = fp8.on_one_device()
    assert stats.loads.tolist() == stats_of_one.loads.tolist()
    assert fp8.relative(y, expected) < 2e-3
    for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(grads_of_one), strict=True):
        assert not np.asarray(b).any() or fp8.relative(a, b) < 2e-3, jax.tree_util.keystr(path)


def test_a_token_crosses_the_network_once_for_each_node():
    """Of the traced exchanges, those between nodes carry fewer rows than the one of all devices."""
    router = RouterConfig(64, 8, 8, 4)
    config = MoEConfig(width=8, hidden=4, router=router, capacity_factor=1.0, backend="xla")

    def rows(**changes):
        changed = dataclasses.replace(config, **changes)
        params = jax.eval_shape(lambda: layers.init_moe(jax.random.key(0), changed, jnp.float32))
        mapped = jax.shard_map(
            lambda params, x: moe_layer(params, x, changed, axis="ep")[0],
            mesh=layers.make_mesh(8), in_specs=(param_specs(changed, "ep"), P("ep")), out_specs=P("ep"),
        )  # fmt: skip
        traced = jax.make_jaxpr(mapped)(params, jax.ShapeDtypeStruct((8 * 512, 8), jnp.float32))
        found = [eqn for eqn, _ in equations(traced.jaxpr) if eqn.primitive.name == "all_to_all"]
        wide = [eqn for eqn in found if eqn.invars[0].aval.shape[-1] == 8 and eqn.invars[0].aval.dtype == jnp.float32]
        return [(eqn.params["axis_index_groups"], eqn.invars[0].aval.shape[:2]) for eqn in wide]

    ((groups, all_devices), *_), by_node = rows(), rows(exchange="nodes", devices_per_node=2)
    assert groups is None and len(by_node) == 4  # there and back, on two levels
    (across, first), (within, second), *_ = by_node
    assert [tuple(map(int, group)) for group in across] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert [tuple(map(int, group)) for group in within] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert first[0] == 4 and second[0] == 2
    # To another node: 512 tokens times the share of nodes that each visits, of groups of which a node has two.
    expected = 512 * visited_nodes(router, 4) / 4
    assert expected <= first[1] < expected + 8
    assert 3 * first[1] < 6 * all_devices[1] and np.prod(second) <= 4 * np.prod(all_devices)


@pytest.mark.parametrize(
    ("router", "nodes"),
    [(RouterConfig(64, 8, 8, 4), 8), (RouterConfig(64, 4, 1, 1), 4), (RouterConfig(64, 8, 4, 2), 8)],
)
def test_nodes_that_a_token_visits(router, nodes):
    """The mean of choices drawn evenly among the experts of the allowed groups, each group on its own nodes."""
    rng, size = np.random.default_rng(0), router.num_experts // router.num_groups
    draws = []
    for _ in range(4000):
        groups = rng.choice(router.num_groups, router.top_groups, replace=False)
        experts = (groups[:, None] * size + np.arange(size)).ravel()
        draws.append(len(set(rng.choice(experts, router.top_k, replace=False) * nodes // router.num_experts)))
    assert visited_nodes(router, nodes) == pytest.approx(np.mean(draws), rel=0.02)


def test_who_chooses_all_experts_visits_all_nodes():
    assert visited_nodes(RouterConfig(8, 8, 1, 1), 4) == 4 and visited_nodes(RouterConfig(8, 2, 1, 1), 8) == 2


def test_one_node_is_the_plain_exchange():
    given = layers.ROUTER, 1.25, 64, 8, 2
    (flat,), capacities = make_levels("dense", *given, None)
    for per_node in (None, 8, 1):
        (level,), found = make_levels("nodes", *given, per_node)
        assert level == flat and found == capacities == make_capacities(64, 4, 8, 2, 1.25)
    with pytest.raises(ValueError, match="8 devices do not divide into nodes of devices_per_node=3"):
        make_levels("nodes", *given, 3)
