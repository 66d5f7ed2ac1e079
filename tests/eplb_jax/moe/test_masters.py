"""Experts that do not divide over the devices: masters with rows that nothing reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import MoEConfig, RouterConfig, init_moe, moe_layer, param_specs, working_copies
from tests.cases import cases
from tests.eplb_jax.moe import dense
from tests.eplb_jax.moe.test_layer import make_mesh
from tests.plain import assert_trees_close


def make(experts, masters=None):
    router = RouterConfig(experts, 2, 1, 1)
    config = MoEConfig(width=8, hidden=4, router=router, num_shared=0, masters=masters, backend="xla")
    return config, init_moe(jax.random.key(0), config, jnp.float64), jax.random.normal(jax.random.key(1), (48, 8))


@cases(
    ("experts", "masters", "slots", "ep"),
    [
        (12, None, 16, 8), (4, None, 8, 8), (4, None, None, 8), (3, None, None, None),
        (10, 12, 18, 6), pytest.param(12, 12, None, 4, marks=pytest.mark.slow), (5, 9, 6, 3), (10, None, 20, 4),
    ], quick=[(4, None, None, 8), (10, 12, 18, 6)],
)  # fmt: skip
def test_equals_the_dense_loop(x64, experts, masters, slots, ep):
    """Output and gradients, those of the rows behind the last expert zero; with redundant slots, and without."""
    config, params, x = make(experts, masters)
    axis, placement = "ep" if ep else None, None
    if slots is not None:
        slots = np.random.default_rng(0).permutation(np.r_[np.arange(experts), np.arange(slots - experts) % experts])
        placement = jax.tree.map(jnp.asarray, dense.placement_of(slots, experts))
    chosen = dense.choose(np.asarray(x @ params.router), np.asarray(params.bias), config.router)

    def loss(params, x):
        if placement is not None:
            params = params._replace(experts=working_copies(params.experts, placement.phy2log, axis))
        y, stats = moe_layer(params, x, config, placement=placement, axis=axis)
        total, loads = (y**2).sum(), stats.loads
        return (total, (y, loads)) if axis is None else (jax.lax.psum(total, axis), (y, jax.lax.psum(loads, axis)))

    if axis is not None:
        specs, out_specs = (param_specs(config, axis), P(axis)), (P(), (P(axis), P()))
        loss = jax.shard_map(loss, mesh=make_mesh(ep), in_specs=specs, out_specs=out_specs)
    (_, (y, loads)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
    plain = jax.jit(jax.value_and_grad(lambda params: (dense.layer(params, x, config, chosen) ** 2).sum()))
    np.testing.assert_allclose(y, dense.layer(params, x, config, chosen), rtol=1e-10, atol=1e-12)
    assert loads.tolist() == np.bincount(chosen.ravel(), minlength=experts).tolist()
    assert_trees_close(grads, plain(params)[1], rtol=1e-10)
    for leaf, gradient in zip(params.experts, grads.experts, strict=True):
        assert len(leaf) == config.num_masters and not np.any(leaf[experts:]) and not np.any(gradient[experts:])


def test_experts_do_not_depend_on_the_rows_behind_them(x64):
    (_, padded, _), (_, whole, _) = make(12), make(12, 12)
    for more, fewer in zip(padded.experts, whole.experts, strict=True):
        assert (len(more), len(fewer)) == (16, 12)
        np.testing.assert_array_equal(more[:12], fewer)


def test_what_does_not_divide_says_what_would(x64):
    config, params, x = make(10)
    assert [make(experts)[0].num_masters for experts in (2, 8, 12, 60, 64)] == [8, 8, 16, 64, 64]
    with pytest.raises(ValueError, match="masters=9: 10 experts need as many rows or more"):
        dataclasses.replace(config, masters=9)
    message = "16 masters of 10 experts do not divide over the 6 devices of axis 'ep': take .*masters=12"
    with jax.set_mesh(make_mesh(6)), pytest.raises(ValueError, match=message):
        param_specs(config, "ep")
    with jax.set_mesh(make_mesh(8)):
        assert param_specs(config, "ep") == param_specs(make(16)[0], "ep")
    placement = dense.placement_of(np.arange(16) % 10, 10)

    def layer(placement, config, params, x):
        return moe_layer(params, x, config, placement=placement, axis="ep")[0]

    for given, message in (
        (placement, "16 slots do not divide over the 3 devices of axis 'ep': plan for 15 or 18 slots"),
        (None, r"10 slots do not divide over the 3 devices of axis 'ep': take MoEConfig\(masters=12\)"),
    ):
        mapped = jax.shard_map(
            lambda params, x, given=given: layer(given, config, params, x),
            mesh=make_mesh(3), in_specs=P(), out_specs=P("ep"),
        )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(mapped, params, x)
