"""The layer equals a dense loop over experts: any number of devices, any placement, empty and overfull experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import eplb_jax
from eplb_jax import MoEConfig, RouterConfig, init_moe, moe_layer, param_specs, working_copies
from tests.cases import cases
from tests.eplb_jax.moe import dense
from tests.plain import assert_trees_close

EXPERTS, TOKENS, WIDTH = 16, 64, 8
ROUTER = RouterConfig(EXPERTS, top_k=4, num_groups=4, top_groups=2, scale=1.5)
CONFIG = MoEConfig(width=WIDTH, hidden=6, router=ROUTER, backend="xla")
FACTOR = 0.01


def make_mesh(ep):
    if jax.device_count() < ep:
        pytest.skip(f"{ep} devices are needed, there are {jax.device_count()}")
    return jax.make_mesh((ep,), ("ep",), (AxisType.Auto,), devices=jax.devices()[:ep])


def make_params(config=CONFIG, seed=0, bias_scale=0.1):
    params = init_moe(jax.random.key(seed), config, jnp.float64)
    bias = bias_scale * jax.random.normal(jax.random.key(seed + 1), params.bias.shape)
    return params._replace(bias=bias, router=4 * params.router)


def make_tokens(seed=2, tokens=TOKENS):
    x, target = jax.random.normal(jax.random.key(seed), (2, tokens, WIDTH))
    return x, target


def objective(y, loss, target):
    return jnp.mean(y * target) + jnp.mean(y**2) + FACTOR * loss


def sharded(config, ep, placement, sequences):
    """(params, x, target) -> ((loss, (loads, dropped, y)), grads), experts and tokens over ep devices."""
    return functools.partial(_sharded(config, ep, sequences), jax.tree.map(jnp.asarray, placement))


@functools.cache
def _sharded(config, ep, sequences):
    """Compiled once for all placements of as many replicas."""

    def body(placement, params, x, target):
        experts = params.experts
        if placement is not None:
            experts = working_copies(experts, placement.phy2log, "ep")
        y, stats = moe_layer(
            params._replace(experts=experts), x, config, placement=placement, axis="ep", sequences=sequences // ep
        )
        loss = jax.lax.pmean(objective(y, stats.balance_loss, target), "ep")
        return loss, (*jax.lax.psum((stats.loads, stats.dropped), "ep"), y)

    mapped = jax.shard_map(
        body,
        mesh=make_mesh(ep),
        in_specs=(P(), param_specs(config, "ep"), P("ep"), P("ep")),
        out_specs=(P(), (P(), P(), P("ep"))),
    )
    return jax.jit(jax.value_and_grad(mapped, argnums=(1, 2), has_aux=True))


@functools.cache
def plain(config, sequences):
    """Compiled once for all choices of experts."""

    def loss(params, x, target, chosen):
        y = dense.layer(params, x, config, chosen)
        return objective(y, dense.balance_loss(params, x, config, chosen, sequences), target), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def check(config, ep, placement, params, x, target, sequences=8):
    chosen = dense.choose(np.asarray(x @ params.router), np.asarray(params.bias), config.router)
    (loss, (loads, dropped, y)), grads = sharded(config, ep, placement, sequences)(params, x, target)
    alone = dataclasses.replace(config, replicas=CONFIG.replicas, devices_per_node=CONFIG.devices_per_node)
    (expected, y_plain), grads_plain = plain(alone, sequences)(params, x, target, chosen)
    assert loads.tolist() == np.bincount(chosen.ravel(), minlength=config.router.num_experts).tolist()
    assert int(dropped) == 0
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(y, y_plain, rtol=1e-10, atol=1e-12)
    assert_trees_close(grads, grads_plain, rtol=1e-10)


def random_placement(ep, spare, seed):
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, EXPERTS, spare)
    return dense.placement_of(rng.permutation(np.r_[np.arange(EXPERTS), extra]), EXPERTS)


@cases("ep", [1, pytest.param(2, marks=pytest.mark.slow), 4, 8], quick=[4])
@pytest.mark.parametrize("kind", ["none", "random", "eplb", "nearest"])
def test_equals_the_dense_loop(x64, ep, kind):
    params, (x, target) = make_params(), make_tokens()
    config, placement = CONFIG, None
    if kind in ("random", "nearest"):
        placement = random_placement(ep, 16, seed=ep)
        config = dataclasses.replace(config, replicas="nearest" if kind == "nearest" else "hash")
        config = dataclasses.replace(config, devices_per_node=max(ep // 2, 1))
    elif kind != "none":
        loads = np.random.default_rng(ep).lognormal(size=(1, EXPERTS))
        placement = eplb_jax.rebalance_experts(loads, 24, 4, min(ep, 2), ep).padded().of_layer(0)
    check(config, ep, placement, params, x, target)


@cases(("ep", "redundant"), [(1, True), (2, False), (4, True), (8, False), (8, True)], quick=[(8, False)])
def test_empty_experts_and_all_tokens_on_few(x64, ep, redundant):
    """A bias that leaves most experts without tokens, some devices too."""
    params, (x, target) = make_params(), make_tokens()
    params = params._replace(bias=jnp.where(jnp.arange(EXPERTS) < 4, 10.0, 0.0))
    check(CONFIG, ep, random_placement(ep, 8, 3) if redundant else None, params, x, target)


@cases(("ep", "copies"), [(1, 1), (2, 9), (4, 1), (8, 1), (8, 9)], quick=[(8, 9)])
def test_all_tokens_on_one_expert(x64, ep, copies):
    config = dataclasses.replace(CONFIG, router=RouterConfig(EXPERTS, 1, 1, 1), num_shared=0)
    params, (x, target) = make_params(config), make_tokens()
    params = params._replace(bias=jnp.where(jnp.arange(EXPERTS) == 5, 10.0, 0.0))
    slots = np.random.default_rng(0).permutation([*range(EXPERTS), *[5] * (copies - 1)])
    check(config, ep, dense.placement_of(slots, EXPERTS), params, x, target)


@cases(
    ("scoring", "normalise"),
    [("sigmoid", False), ("softmax", True), ("softmax", False)],
    quick=[("softmax", False)],
)
def test_kinds_of_routers(x64, scoring, normalise):
    router = dataclasses.replace(ROUTER, scoring=scoring, normalise=normalise)
    config = dataclasses.replace(CONFIG, router=router)
    params, (x, target) = make_params(config), make_tokens()
    check(config, 4, random_placement(4, 8, 5), params, x, target)


def test_nodes_of_the_cluster_do_not_matter_on_one_device(x64):
    params, (x, _) = make_params(), make_tokens()

    def output(params, config, placement=None):
        return jax.jit(lambda params, x: moe_layer(params, x, config, placement=placement)[0])(params, x)

    expected = output(params, CONFIG)
    clustered = dataclasses.replace(CONFIG, replicas="nearest", devices_per_node=4)
    placement = random_placement(1, 2, 0)
    np.testing.assert_array_equal(output(params, clustered), expected)
    copied = params._replace(experts=working_copies(params.experts, placement.phy2log))
    np.testing.assert_allclose(output(copied, clustered, placement), expected, rtol=1e-12, atol=1e-14)
