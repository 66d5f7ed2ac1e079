"""Whole models whose blocks and ends communicate by hand: they see the parts of parameters that a device has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import MoE, MoEConfig, RouterConfig
from jaxpipe.nnx_model import from_nnx
from tests.cases import cases

WIDTH, BLOCKS = 6, 3


class Gathered(nnx.Module):
    """Gathers its weight along the first dimension, unless all of it is there."""

    def __init__(self, rngs, axis):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH), jnp.float64) / WIDTH)
        self.axis = axis

    def __call__(self, x):
        kernel = self.kernel[...]
        return x + x @ (kernel if self.axis is None else jax.lax.all_gather(kernel, self.axis, axis=0, tiled=True))


class GatheredModel(nnx.Module):
    def __init__(self, rngs, axis="dp", scanned=False):
        self.start = Gathered(rngs, axis)
        make = nnx.split_rngs(splits=BLOCKS)(nnx.vmap(lambda rngs: Gathered(rngs, axis)))
        self.layers = make(rngs) if scanned else nnx.List([Gathered(rngs, axis) for _ in range(BLOCKS)])

    def __call__(self, x):
        x = self.start(x)
        if not isinstance(self.layers, nnx.List):
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        for layer in self.layers:
            x = layer(x)
        return x


def loss_of(model, batch):
    return (model(batch) ** 2).mean()


@cases("scanned", [False, True], quick=[True])
def test_parameters_gathered_by_hand(x64, scanned):
    """FSDP written into the model: shards in blocks and outside of them; the plain model's numbers."""
    model, schedule, mesh = (
        GatheredModel(nnx.Rngs(0), scanned=scanned),
        jaxpipe.schedule.build("1f1b", 2, 2),
        jaxpipe.make_mesh(pp=2, dp=2),
    )
    specs = jaxpipe.Params(P("pp", None, "dp"), P("dp"))
    pipe = from_nnx(model, schedule, mesh, blocks="layers", loss=loss_of, specs=specs, data_axes=("dp",))
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(8, WIDTH)))
    (loss, _), grads = jax.jit(pipe)(pipe.params, batch)
    assert grads.stages["kernel"].sharding.spec == P("pp", None, "dp")
    plain = GatheredModel(nnx.Rngs(0), axis=None, scanned=scanned)
    nnx.update(plain, nnx.state(pipe.merge(pipe.params), nnx.Param))
    expected, expected_grads = nnx.value_and_grad(loss_of)(plain, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    found, wanted = (
        nnx.to_pure_dict(nnx.state(tree, nnx.Param)) for tree in (pipe.merge(grads), expected_grads)
    )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, wanted)


def test_experts_of_an_axis_without_a_placement():
    """The layer checks that a device has its share of the experts, also while the model is cut."""
    config = MoEConfig(width=8, hidden=4, router=RouterConfig(8, 2, 1, 1))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([MoE(config, rngs, axis="ep") for _ in range(2)])

        def __call__(self, x):
            loads = []
            for layer in self.layers:
                x, stats = layer(x)
                loads.append(stats.loads)
            return x, jnp.stack(loads)

    def loss(model, batch):
        y, loads = model(batch)
        return (y**2).mean(), {"loads": loads}

    model, schedule, mesh = Model(nnx.Rngs(0)), jaxpipe.schedule.build("1f1b", 2, 2), jaxpipe.make_mesh(pp=2, ep=2)
    pipe = from_nnx(model, schedule, mesh, blocks="layers", loss=loss, data_axes=("ep",))
    (_, aux), grads = jax.eval_shape(pipe, pipe.params, jnp.zeros((8, 8)))
    assert aux["loads"].shape == (2, 8) and grads.stages["w_in"].shape == pipe.params.stages["w_in"].shape
