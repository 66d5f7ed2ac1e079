"""Wrong input is a ValueError with the values and the remedy, while tracing: nothing is compiled or run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import (
    MoEConfig,
    MoEParams,
    Placement,
    RouterConfig,
    balance_loss,
    init_moe,
    moe_layer,
    route,
    working_copies,
)
from eplb_jax.moe.dispatch import make_capacities
from eplb_jax.moe.replica import choose_replicas
from tests.eplb_jax.moe.dense import placement_of
from tests.eplb_jax.moe.test_layer import make_mesh

ROUTER = RouterConfig(12, 2, 4, 2)
CONFIG = MoEConfig(width=8, hidden=4, router=ROUTER, num_shared=0, masters=12, backend="xla")
PARAMS = jax.eval_shape(lambda: init_moe(jax.random.key(0), CONFIG))
X = jax.ShapeDtypeStruct((16, 8), jnp.float32)
LOGITS = jax.ShapeDtypeStruct((16, 12), jnp.float32)
PLACEMENT = placement_of(np.arange(16) % 12, 12)
MANY = Placement.from_phy2log(np.arange(32).reshape(2, 16) % 12, 12)
WRONG = float("nan")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def with_experts(**changes):
    return PARAMS._replace(experts=PARAMS.experts._replace(**changes))


def layer(params=PARAMS, x=X, config=CONFIG, mask=None, **options):
    """On one device without an axis."""
    return jax.eval_shape(lambda params, x, mask: moe_layer(params, x, config, mask=mask, **options), params, x, mask)


def on_devices(ep, axis="ep", placement=None, masters=PARAMS.experts, copies=False, slots=None, **changes):
    """Within shard_map over ep devices; experts divide over them unless copies are made there."""
    config = dataclasses.replace(CONFIG, **changes)

    def body(params, x):
        if copies:
            params = params._replace(experts=working_copies(params.experts, PLACEMENT.phy2log[:slots], "ep"))
        return moe_layer(params, x, config, placement=placement, axis=axis)[0]

    specs = MoEParams(P(), P(), jax.tree.map(lambda leaf: P("ep"), masters), None)
    mapped = jax.shard_map(body, mesh=make_mesh(ep), in_specs=(specs, P("ep")), out_specs=P("ep"))
    return jax.eval_shape(mapped, PARAMS._replace(experts=masters), X)


def experts_of(count):
    return PARAMS.experts._replace(w_in=shape(count, 8, 8), w_out=shape(count, 4, 8))


def replicas(placement=PLACEMENT, **options):
    return jax.eval_shape(lambda e: choose_replicas(e, placement, **options), shape(16, 2, dtype=jnp.int32))


def loss(tokens, sequences):
    return jax.eval_shape(lambda x: balance_loss(route(x, ROUTER), ROUTER, sequences=sequences), shape(tokens, 12))


def routed(logits=LOGITS, **arrays):
    return jax.eval_shape(lambda logits, arrays: route(logits, ROUTER, **arrays), logits, arrays)


call = functools.partial
CASES = {
    # Experts, groups and choices that do not fit each other.
    "groups": (call(RouterConfig, 12, 2, 5, 2), "num_experts=12 do not divide into num_groups=5.*num_groups=1 always"),
    "no experts": (call(RouterConfig, 0, 1, 1, 1), "num_experts=0"),
    "top_groups": (call(RouterConfig, 12, 2, 4, 5), "top_groups=5: it must be between 1 and num_groups=4"),
    "k above experts": (call(RouterConfig, 12, 13, 1, 1), "top_k=13: .* the 12 experts .* so take 1 to 12"),
    "k above groups": (
        call(RouterConfig, 12, 7, 4, 2),
        "top_k=7: .* the 6 experts of 2 groups, so take 1 to 6, or more",
    ),
    "k of 0": (call(RouterConfig, 12, 0, 1, 1), "top_k=0: .* take 1 to 12"),
    "scoring": (call(RouterConfig, scoring="relu"), "scoring='relu': it must be 'sigmoid' or 'softmax'"),
    # Sizes and choices of the layer.
    "capacity": (call(MoEConfig, capacity_factor=0.99), "capacity_factor=0.99: it must be at least 1, or None"),
    "capacity nan": (call(MoEConfig, capacity_factor=WRONG), "capacity_factor=nan: it must be at least 1, or None"),
    "capacity inf": (call(make_capacities, 8, 2, 2, 4, float("inf")), "capacity_factor=inf: .* or None"),
    "capacity below 1": (
        call(make_capacities, 8, 2, 2, 4, 0.5),
        "capacity_factor=0.5: it must be at least 1, or None",
    ),
    "no devices": (
        call(make_capacities, 8, 2, 0, 4, None),
        "tokens=8, top_k=2, num_devices=0, num_slots=4: all must be at least",
    ),
    "width": (call(MoEConfig, width=0), "width=0, hidden=2048, num_shared=1: sizes below 1"),
    "num_shared": (call(MoEConfig, num_shared=-1), "num_shared=-1"),
    "replicas": (call(MoEConfig, replicas="far"), "replicas='far': it must be one of .'hash', 'nearest'"),
    "exchange": (call(MoEConfig, exchange="sparse"), "exchange='sparse': it must be one of .'dense', 'ragged'"),
    "fp8 width": (
        call(MoEConfig, width=200, fp8=True),
        "fp8 needs width to be a multiple of 128, not 200: .* precision='bf16'",
    ),
    "fp8 ragged": (
        call(MoEConfig, precision="fp8_exchange", exchange="ragged"),
        "fp8_exchange travels by the dense exchange only: choose exchange='dense'",
    ),
    "precision": (call(MoEConfig, precision="fp4"), "precision='fp4': it must be one of .'bf16', 'fp8'.*, or None"),
    "two recipes": (call(MoEConfig, fp8=True, precision="bf16"), "fp8=True and precision='bf16' .* give one of them"),
    "backend": (call(layer, config=dataclasses.replace(CONFIG, backend="fast")), "backend='fast'"),
    # The mesh.
    "axis of no mesh": (call(layer, axis="ep"), "axis='ep' is not bound: .* within jax.shard_map .* or with axis=None"),
    "wrong axis": (call(on_devices, 4, axis="experts"), "axis='experts' is not bound: .* mesh that has this axis"),
    "experts over devices": (
        call(on_devices, 8, masters=experts_of(16)),
        "12 slots do not divide over the 8 devices of axis 'ep'",
    ),
    "slots over devices": (
        call(on_devices, 4, masters=experts_of(16), placement=placement_of(np.arange(14) % 12, 12)),
        "14 slots do not divide over the 4 devices of axis 'ep'",
    ),
    "copies over devices": (
        call(on_devices, 4, copies=True, slots=14),
        "14 slots do not divide over the 4 devices of axis 'ep'",
    ),
    "nodes": (
        call(on_devices, 4, copies=True, placement=PLACEMENT, devices_per_node=3),
        "4 devices do not divide into nodes of devices_per_node=3",
    ),
    "axis of copies": (call(working_copies, jnp.ones(12), PLACEMENT.phy2log, "ep"), "axis='ep' is not bound"),
    # Experts by slot.
    "masters for copies": (
        call(on_devices, 4, placement=PLACEMENT),
        r"w_in has shape \(3, 8, 8\): 16 slots on 4 devices need \(4, 8, 8\) on each; working_copies makes slots",
    ),
    "w_out": (
        call(layer, with_experts(w_out=shape(12, 5, 8))),
        r"experts.w_out has shape \(12, 5, 8\): 12 slots on 1 devices need \(12, 4, 8\)",
    ),
    "router": (call(layer, PARAMS._replace(router=shape(8, 16))), r"router has shape \(8, 16\): it must be \(8, 12\)"),
    "bias": (call(layer, PARAMS._replace(bias=shape(8))), r"bias has shape \(8,\): it must be \(12,\)"),
    "no shared": (call(layer, config=dataclasses.replace(CONFIG, num_shared=1)), "num_shared=1"),
    "shared": (
        call(layer, PARAMS._replace(shared=experts_of(1)), config=dataclasses.replace(CONFIG, num_shared=2)),
        r"shared.w_in has shape \(1, 8, 8\).* \(1, 8, 16\)",
    ),
    "other experts": (
        call(layer, placement=placement_of(np.arange(16) % 8, 8)),
        r"phy2log of shape \(16,\) and 8 experts: give one layer of 12 experts",
    ),
    "many layers": (call(layer, placement=MANY), r"phy2log of shape \(2, 16\) and 12 experts: .* placement.of_layer"),
    "copies of many layers": (
        call(working_copies, jnp.ones(12), MANY.phy2log),
        r"shape \(2, 16\): .*placement.of_layer",
    ),
    # Tokens.
    "batch": (call(layer, x=shape(2, 8, 8)), r"x has shape \(2, 8, 8\): it must be \[tokens, 8\], sequences joined"),
    "width of x": (call(layer, x=shape(16, 9)), r"x has shape \(16, 9\): it must be \[tokens, 8\]"),
    "no tokens": (call(layer, x=shape(0, 8)), r"x has shape \(0, 8\): .* not empty"),
    "mask": (
        call(layer, mask=shape(15, dtype=bool)),
        r"mask is bool of shape \(15,\): it must be bool \(16,\)",
    ),
    "sequences": (call(layer, sequences=3), "16 tokens do not divide into sequences=3 of equal length"),
    # The parts alone.
    "logits": (call(routed, shape(16, 8)), r"logits have shape \(16, 8\): .* \[tokens, experts\] with 12 experts"),
    "bias of route": (call(routed, bias=shape(12, 1)), r"bias has shape \(12, 1\): it must be \(12,\)"),
    "mask of route": (
        call(routed, mask=shape(12, dtype=bool)),
        r"mask is bool of shape \(12,\): it must be bool \(16,\)",
    ),
    "sequences of loss": (call(loss, 10, 4), "10 tokens do not divide into sequences=4"),
    "no sequences": (call(loss, 10, 0), "sequences=0"),
    "choice": (call(replicas, choice="far"), "choice='far': it must be one of"),
    "layers of replicas": (
        call(replicas, MANY),
        r"phy2log has shape \(2, 16\): take one layer of it, placement.of_layer",
    ),
    "slots of replicas": (call(replicas, num_devices=3), "16 slots do not divide over 3 devices"),
    "nodes of replicas": (call(replicas, num_devices=4, devices_per_node=3), "4 devices .* devices_per_node=3"),
}


@pytest.mark.parametrize(("attempt", "message"), CASES.values(), ids=CASES)
def test_is_named(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_what_fits_is_traced():
    """The same calls without a mistake, so that each error above is of its own."""
    assert layer(placement=None, mask=shape(16, dtype=bool))[0].shape == (16, 8)
    assert on_devices(4).shape == on_devices(4, copies=True, placement=PLACEMENT, devices_per_node=2).shape == (16, 8)
    assert routed(bias=shape(12)).experts.shape == replicas(num_devices=4, devices_per_node=2).shape == (16, 2)
    assert loss(12, 4).shape == ()
