"""An optimizer's first state is where the steps leave it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe


@pytest.mark.parametrize("name", ["adamw", "adafactor", "masked"])
def test_a_step_is_compiled_once(name):
    """Averages are sharded as the parameters, sums over rows by what is left of these; the values are optax's."""
    mesh = jaxpipe.make_mesh(pp=2, tp=2)
    specs = jaxpipe.Params({"w": P("pp", None, "tp"), "scale": P("pp")}, {"embed": P()})
    params = jaxpipe.Params({"w": jnp.ones((4, 6, 8)), "scale": jnp.ones((4, 6))}, {"embed": jnp.ones((3, 5))})
    params = jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    stacking = jaxpipe.Stacking(jaxpipe.schedule.build("dualpipev", 2, 4))
    optimizer = {
        "adamw": optax.adamw(1e-3),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
        "masked": optax.chain(optax.clip(1.0), jaxpipe.muon(1e-3, stacking)),
    }[name]
    state = jaxpipe.init_optimizer(optimizer, params)

    @jax.jit
    def step(params, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    jax.tree.map(np.testing.assert_array_equal, state, optimizer.init(params))
    wide = [leaf for leaf in jax.tree.leaves(state) if leaf.shape[:1] == (4,)]
    assert wide and all(leaf.sharding.spec[0] == "pp" for leaf in wide)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1 or name == "adafactor"  # whose sums the compiler shards as it likes


def test_parameters_of_no_mesh_are_refused():
    with pytest.raises(ValueError, match="not arrays on a mesh: place them first"):
        jaxpipe.init_optimizer(optax.adam(1e-3), jaxpipe.Params({"w": jnp.ones(2)}))
