"""Compiled ahead of time for 8 GPUs: communication is asynchronous, and the shared expert computes meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eplb_jax import MoEConfig, init_moe, moe_layer, param_specs
from jaxpipe.planning.chips import chip
from profiling.hlo.hiding import overlap
from profiling.hlo.topologies import has_cuda, topology


@pytest.mark.skipif(not has_cuda(), reason="XLA's compiler for GPUs is needed: pip install 'jax[cuda13]'; a GPU is not")
def test_exchanges_are_asynchronous_and_the_shared_expert_hides_the_dispatch():
    mesh = Mesh(np.array(topology("H200").devices), ("ep",), axis_types=(AxisType.Auto,))
    config = MoEConfig(capacity_factor=1.25)  # DeepSeek-V3's sizes
    specs = param_specs(config, "ep")
    body = jax.shard_map(
        lambda params, x: moe_layer(params, x, config, axis="ep")[0],
        mesh=mesh,
        in_specs=(specs, P("ep")),
        out_specs=P("ep"),
    )

    def forward_and_backward(params, x, ct):
        y, pull = jax.vjp(body, params, x)
        return y, pull(ct * y)  # as of a loss: the backward pass waits for the forward

    def at(shape, spec):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(lambda key: init_moe(key, config, jnp.bfloat16), jax.random.key(0))
    params = jax.tree.map(at, shapes, specs)
    x = at(jax.ShapeDtypeStruct((8 * 4096, config.width), jnp.bfloat16), P("ep"))
    hlo = jax.jit(forward_and_backward).lower(params, x, x).compile().as_text()
    found = overlap(hlo, chip("H200")).select(kind="all-to-all")
    assert found.synchronous == ()
    assert len(found.collectives) >= 4  # dispatch and combine, forward and backward, besides slots and weights
    dispatched = found.select(label="dispatch").collectives
    forward = [one for one in dispatched if "transpose" not in one.label]
    assert any("shared_expert" in label for one in forward for label in one.products)
