"""Gradients within shard_map, types of varying values checked and not: those of the dense program on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import ExpertParams, init_moe, moe_layer, param_specs, router_logits, working_copies
from eplb_jax.kernels.fp8 import BlocksOfE4M3
from eplb_jax.moe import exchange
from eplb_jax.moe.experts import apply_experts, swiglu
from eplb_jax.moe.permute import RowMap, permute, permute_each, unpermute
from tests.cases import cases
from tests.eplb_jax.moe import dense
from tests.eplb_jax.moe.test_layer import (
    CONFIG,
    FACTOR,
    make_mesh,
    make_params,
    make_tokens,
    objective,
    random_placement,
)
from tests.plain import assert_trees_close

EP, SEQUENCES = 4, 8


@pytest.mark.parametrize("checked", [True, False])
@cases("redundant", [True, False], quick=[True])
def test_gradients_of_the_layer_taken_on_each_device(x64, checked, redundant):
    """Checked, those of replicated parameters are summed already; unchecked, the sum is the caller's."""
    params, (x, target) = make_params(), make_tokens()
    placement = jax.tree.map(jnp.asarray, random_placement(EP, 8, 0)) if redundant else None

    def body(params, x, target):
        def loss(params, x):
            experts = params.experts if placement is None else working_copies(params.experts, placement.phy2log, "ep")
            params = params._replace(experts=experts)
            y, stats = moe_layer(params, x, CONFIG, placement=placement, axis="ep", sequences=SEQUENCES // EP)
            return objective(y, stats.balance_loss, target) / EP

        grads, dx = jax.grad(loss, (0, 1))(params, x)
        if not checked:
            grads = jax.tree.map(
                lambda leaf, spec: leaf if spec == P("ep") else jax.lax.psum(leaf, "ep"),
                grads,
                param_specs(CONFIG, "ep"),
            )
        return grads, dx

    specs = param_specs(CONFIG, "ep")
    in_specs, out_specs = (specs, P("ep"), P("ep")), (specs, P("ep"))
    mapped = jax.shard_map(body, mesh=make_mesh(EP), in_specs=in_specs, out_specs=out_specs, check_vma=checked)
    chosen = dense.choose(np.asarray(x @ params.router), np.asarray(params.bias), CONFIG.router)

    def plain(params, x):
        y = dense.layer(params, x, CONFIG, chosen)
        return objective(y, dense.balance_loss(params, x, CONFIG, chosen, SEQUENCES), target)

    expected = jax.jit(jax.grad(plain, (0, 1)))(params, x)
    assert_trees_close(jax.jit(mapped)(params, x, target), expected, rtol=1e-10)


MOVES = RowMap(jnp.array([2, 0, 3, 1, 4, 0], jnp.int32), jnp.array([[1, 5], [3, 6], [0, 6], [2, 6]], jnp.int32))
ASSIGNMENT, ROWS = jnp.array([3, 8, 0], jnp.int32), jnp.array([[2, 3], [3, 0], [3, 3], [3, 3]], jnp.int32)
SIZES, SLOTS = jnp.array([5, 3], jnp.int32), jnp.array([1, 0, 1], jnp.int32)
PARTS = {
    "router_logits": (router_logits, (4, 6), (6, 3)),
    "swiglu": (swiglu, (4, 6), (4,)),
    "swiglu without weights": (swiglu, (4, 6)),
    "permute": (lambda x: permute(x, MOVES), (4, 3)),
    "unpermute": (lambda rows: unpermute(rows, MOVES), (6, 3)),
    "permute_each": (lambda x: permute_each(x, ASSIGNMENT, ROWS), (4, 2)),
    "experts": (
        lambda w_in, w_out, rows, weight: apply_experts(ExpertParams(w_in, w_out), rows, weight, SIZES),
        (2, 4, 6), (2, 3, 4), (16, 4), (16,),
    ),
    "copies": (lambda masters: working_copies(masters, SLOTS), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_every_part_with_one_argument_of_each_device_and_the_others_of_all(x64, name):
    function, *shapes = PARTS[name]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    both = [jax.random.normal(key, (2, *shape)) for key, shape in zip(keys, shapes, strict=True)]
    for varies in range(len(shapes)):
        arguments = [a if i == varies else a[0] for i, a in enumerate(both)]

        def loss(*arguments, varies=varies):
            """The part's own rows, each with another weight; rows of no group are unspecified, and left out."""
            out = function(*(a[0] if i == varies else a for i, a in enumerate(arguments)))
            out = out[:5] if name == "experts" else out
            return (jnp.sin(out) * jnp.arange(1.0, 1 + out.size).reshape(out.shape)).sum()

        def plain(*arguments, varies=varies, loss=loss):
            parts = ([a[d : d + 1] if i == varies else a for i, a in enumerate(arguments)] for d in range(2))
            return sum(loss(*part) for part in parts)

        specs = tuple(P("ep") if i == varies else P() for i in range(len(shapes)))
        mapped = jax.shard_map(
            lambda *a, loss=loss: jax.lax.psum(loss(*a), "ep"), mesh=make_mesh(2), in_specs=specs, out_specs=P()
        )
        everything = tuple(range(len(shapes)))
        found, expected = (jax.jit(jax.value_and_grad(f, everything))(*arguments) for f in (mapped, plain))
        assert_trees_close(found, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["all_to_all_encoded", "all_to_all_encoded_back", "all_to_all_listed"])
def test_exchanges_of_what_is_the_same_on_all_devices(kind):
    """Numbers that 8 bits hold, so that nothing is rounded: as JAX's own all-to-all and its transpose."""
    x = jnp.tile(jnp.array([1.0, -0.5, 2.0, 0.25]), (2, 3, 32))

    def ours(x):
        if kind == "all_to_all_listed":
            return exchange.all_to_all_listed(jnp.zeros(x.shape, jnp.int32), x, "ep")[1]
        return getattr(exchange, kind)(x, "ep", BlocksOfE4M3())

    def gradient(function):
        def body(x):
            weight = jnp.where(jax.lax.axis_index("ep") == 0, 1.0, -2.0)
            return jax.lax.psum((function(x) * weight).sum(), "ep")

        mapped = jax.shard_map(body, mesh=make_mesh(2), in_specs=P(), out_specs=P())
        return jax.jit(jax.value_and_grad(mapped))(x)

    assert_trees_close(gradient(ours), gradient(lambda x: exchange.all_to_all(x, "ep")), rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp8", "width": 128, "hidden": 128},
        {"precision": "fp8_exchange", "width": 128},
        {"exchange": "ragged"},
        {"capacity_factor": 1.0},
        {"replicas": "nearest"},
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_gradients_of_every_kind_of_exchange_are_traced(changes):
    """XLA has the ragged one on GPUs only, and tests of drops and FP8 compare values."""
    config = dataclasses.replace(CONFIG, **changes)
    params = jax.eval_shape(lambda: init_moe(jax.random.key(0), config))
    placement = random_placement(EP, 8, 0)

    def body(params, x, mask):
        params = params._replace(experts=working_copies(params.experts, placement.phy2log, "ep"))
        y, stats = moe_layer(params, x, config, placement=placement, axis="ep", mask=mask)
        return jax.lax.pmean((y**2).mean() + FACTOR * stats.balance_loss, "ep")

    specs = (param_specs(config, "ep"), P("ep"), P("ep"))
    mapped = jax.shard_map(body, mesh=make_mesh(EP), in_specs=specs, out_specs=P())
    x, mask = jax.ShapeDtypeStruct((64, config.width), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.bool_)
    grads, dx = jax.eval_shape(jax.grad(mapped, (0, 1)), params, x, mask)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params) and dx.shape == x.shape
