"""`jax.vmap` over any argument of the layer and of grouped products equals a loop, and so do gradients."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import grouped_matmul, init_moe, moe_layer, param_specs, working_copies
from eplb_jax.kernels import registry
from eplb_jax.kernels.backend import HOPPER_SMS, Target
from eplb_jax.kernels.grouped_gemm.layout import used_rows
from eplb_jax.moe.exchange import all_to_all
from tests.cases import cases
from tests.eplb_jax.moe.test_layer import CONFIG, WIDTH, make_mesh, make_params, random_placement
from tests.plain import assert_trees_close

BATCH = 3


def looped(function, axes, *arguments):
    """`jax.vmap` as a loop."""
    results = [
        function(
            *(
                jax.tree.map(lambda leaf, i=i: leaf[i], a) if axis == 0 else a
                for a, axis in zip(arguments, axes, strict=True)
            )
        )
        for i in range(BATCH)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def product(lhs, rhs, sizes, transpose_rhs):
    """The product's used rows and both gradients of their squares' sum."""

    def loss(lhs, rhs):
        out = grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)
        out = jnp.where(used_rows(sizes, len(lhs))[:, None], out, 0)
        return (out**2).sum(), out

    grads, out = jax.grad(loss, (0, 1), has_aux=True)(lhs, rhs)
    return out, grads


@pytest.mark.parametrize("axes", [axes for axes in itertools.product((0, None), repeat=3) if axes != (None,) * 3])
def test_grouped_products(x64, axes):
    keys = jax.random.split(jax.random.key(0), 2)
    lhs, rhs = jax.random.normal(keys[0], (BATCH, 32, 4)), jax.random.normal(keys[1], (BATCH, 2, 4, 5))
    sizes = jnp.array([[3, 8], [16, 9], [0, 0]])
    transpose_rhs = axes[0] is None
    rhs = rhs.swapaxes(2, 3) if transpose_rhs else rhs
    arguments = [a if axis == 0 else a[1] for a, axis in zip((lhs, rhs, sizes), axes, strict=True)]
    function = functools.partial(product, transpose_rhs=transpose_rhs)
    found = jax.jit(jax.vmap(function, axes))(*arguments)
    assert_trees_close(found, looped(function, axes, *arguments), rtol=1e-12)


def layer(params, x, placement, mask):
    """Output, loads and gradients of one layer."""

    def loss(params, x):
        params = params._replace(experts=working_copies(params.experts, placement.phy2log))
        y, stats = moe_layer(params, x, CONFIG, placement=placement, mask=mask)
        return (y**2).mean() + stats.balance_loss, (y, stats.loads)

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def batch_of_arguments():
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(make_params(seed=seed) for seed in range(BATCH)))
    x = jax.random.normal(jax.random.key(7), (BATCH, 24, WIDTH))
    placements = [jax.tree.map(jnp.asarray, random_placement(1, 8, seed)) for seed in range(BATCH)]
    mask = jnp.asarray(np.random.default_rng(0).random((BATCH, 24)) < 0.7)
    return params, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *placements), mask


@cases(
    "axes",
    [(0, None, None, None), (None, 0, None, None), (None, None, 0, 0), (0, 0, 0, 0)],
    quick=[(0, 0, 0, 0)],
)
def test_the_layer(x64, axes):
    arguments = [
        a if axis == 0 else jax.tree.map(lambda leaf: leaf[0], a)
        for a, axis in zip(batch_of_arguments(), axes, strict=True)
    ]
    found = jax.jit(jax.vmap(layer, axes))(*arguments)
    assert_trees_close(found, looped(jax.jit(layer), axes, *arguments), rtol=1e-10)


@pytest.mark.slow
def test_the_layer_over_devices(x64):
    """Stacked layers within shard_map, each with its own parameters: gradients of the whole are those of each."""
    params, x, *_ = batch_of_arguments()

    def loss(params, x):
        y, _ = jax.vmap(lambda p, x: moe_layer(p, x, CONFIG, axis="ep"))(params, x)
        return jax.lax.psum((y**2).sum(), "ep")

    specs = jax.tree.map(lambda spec: P(None, *spec), param_specs(CONFIG, "ep"), is_leaf=lambda s: isinstance(s, P))
    mapped = jax.shard_map(loss, mesh=make_mesh(2), in_specs=(specs, P(None, "ep")), out_specs=P())
    found = jax.jit(jax.value_and_grad(mapped))(params, x)
    alone = jax.jit(jax.value_and_grad(lambda p, x: (moe_layer(p, x, CONFIG)[0] ** 2).sum()))
    expected = looped(alone, (0, 0), params, x)
    assert_trees_close(found, (expected[0].sum(), expected[1]), rtol=1e-10)


def test_kernels_run_once_for_each_part_of_a_batch(monkeypatch):
    """Lowered for a GPU, the layer's kernels are in loops, as many as without a batch."""
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA H200", HOPPER_SMS, True))
    config = dataclasses.replace(CONFIG, width=256, hidden=128, backend="auto", num_shared=0)
    params = jax.eval_shape(lambda: init_moe(jax.random.key(0), config, jnp.bfloat16))
    x = jax.ShapeDtypeStruct((BATCH, 128, 256), jnp.bfloat16)

    def loss(params, x):
        return (moe_layer(params, x, config)[0] ** 2).sum()

    def kernels(function, x):
        traced = jax.jit(function).trace(params, x)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2")

    one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    assert kernels(jax.vmap(jax.grad(loss), (None, 0)), x) == kernels(jax.grad(loss), one) > 6


def test_the_exchange_in_groups_and_its_gradient(x64):
    """A batch of exchanges within two groups of two devices is the exchanges one after the other."""
    groups = ((0, 1), (2, 3))
    x = jax.random.normal(jax.random.key(0), (4 * 2, 3, 5))
    scale = jax.random.normal(jax.random.key(1), x.shape)

    def one(x, scale):
        value, pull = jax.vjp(lambda x: all_to_all(x, "ep", groups), x)
        return value, pull(scale)[0]

    run = lambda f: jax.jit(jax.shard_map(f, mesh=make_mesh(4), in_specs=P("ep"), out_specs=P("ep")))  # noqa: E731
    found = run(jax.vmap(one, in_axes=1, out_axes=1))(x, scale)
    np.testing.assert_array_equal(found[0], run(one)(x, scale)[0])
    np.testing.assert_array_equal(found[1], run(one)(x, scale)[1])
