"""The layer's backward pass divides: tokens travel with the input gradient, weight gradients wait for nobody."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from eplb_jax import init_moe, moe_layer, param_specs, working_copies
from jaxpipe.stage import split_stage
from tests.eplb_jax.moe.test_layer import CONFIG, make_mesh, random_placement

COUNTED = ("all_to_all", "all_gather", "reduce_scatter", "ragged_dot_general")


def test_what_each_half_does():
    placement = jax.tree.map(jnp.asarray, random_placement(2, 8, 0))
    counts = {}

    def stage(params, x):
        experts = working_copies(params.experts, placement.phy2log, "ep")
        return moe_layer(params._replace(experts=experts), x, CONFIG, placement=placement, axis="ep")[0]

    def count(name, function, *arguments):
        text = str(jax.make_jaxpr(function)(*arguments))
        counts[name] = [text.count(f" {primitive}[") for primitive in COUNTED]
        return function(*arguments)

    def body(params, x):
        split = split_stage(stage, params, x)
        assert split.opaque == ()
        prepared = count("prepare", split.prepare, params)
        y, residuals = count("forward", split.forward, prepared, x)
        x_ct, crossing = count("input", split.backward_input, prepared, residuals, y)
        count("weight", split.backward_weight, prepared, residuals.weight, crossing)
        return x_ct

    specs = param_specs(CONFIG, "ep")
    # Unchecked, as the pipeline's own shard_map is, for which stages are divided.
    mapped = jax.shard_map(body, mesh=make_mesh(2), in_specs=(specs, P("ep")), out_specs=P("ep"), check_vma=False)
    jax.eval_shape(mapped, init_moe(jax.random.key(0), CONFIG), jnp.ones((32, CONFIG.width)))
    gathers = counts["prepare"][1]
    assert gathers >= 2
    assert counts == {
        "prepare": [0, gathers, 0, 0],
        "forward": [3, 0, 0, 2],
        "input": [3, 0, 0, 2],
        "weight": [0, 0, gathers, 2],
    }


def test_nothing_wide_is_kept_between_forward_and_backward():
    """In bfloat16, what waits for the backward pass is bfloat16, except numbers of a token or an expert."""
    config = dataclasses.replace(CONFIG, width=24, hidden=40)
    params = init_moe(jax.random.key(0), config, jnp.bfloat16)
    x = jnp.ones((32, config.width), jnp.bfloat16)
    split = split_stage(lambda params, x: moe_layer(params, x, config)[0], params, x)
    kept = [*split.residuals.input, *split.residuals.weight]
    large = [leaf for leaf in kept if leaf.ndim == 2 and leaf.shape[-1] in (24, 40, 80)]
    # Tokens, the routed and the shared experts' hidden activations before the gate; rows are copied a second time, and
    # what is behind the gate is computed a second time.
    assert sorted(leaf.shape[-1] for leaf in large) == [24, 80, 80]
    assert {leaf.dtype for leaf in large} == {jnp.dtype("bfloat16")}
