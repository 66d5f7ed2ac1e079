"""What a backward computes again of a layer waits for the cotangent that the layer behind it gives."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe._jax import Literal
from jaxpipe.stage import split_stage
from tests.jaxpipe.stage import zoo
from tests.plain import assert_trees_close

COUNT = 3


def layer(p, x):
    """A norm and two products."""
    return x + jnp.tanh(x / jnp.sqrt(1 + (x * x).mean(-1, keepdims=True)) @ p["in"]) @ p["out"]


def in_checkpoints(params, x):
    for p in params:
        x = jax.checkpoint(layer)(p, x)
    return x


def plain(params, x):
    for p in params:
        x = layer(p, x)
    return x


def arguments():
    """Parameters and x."""
    params = [{"in": zoo.normal(8, 16, seed=s), "out": zoo.normal(16, 8, seed=s + 9)} for s in range(COUNT)]
    return params, zoo.normal(4, 8, seed=3)


def products_reading(jaxpr, var):
    """The products that read a matrix as it is or turned."""
    same = {var}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("transpose", "convert_element_type", "optimization_barrier"):
            same |= {out for out, given in zip(eqn.outvars, eqn.invars, strict=True) if given in same}
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general" and same.intersection(eqn.invars)]


def without(jaxpr, blocked):
    """What can run although these equations never do."""
    missing, found = set(), []
    for eqn in jaxpr.eqns:
        known = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
        if eqn in blocked or missing.intersection(known):
            missing |= {*eqn.outvars}
        else:
            found.append(eqn)
    return found


@pytest.mark.parametrize(("stage", "stash"), [(in_checkpoints, None), (plain, 2 * COUNT * 4 * 8 * 8)])
def test_layer_by_layer(x64, stage, stash):
    """Without the products that give a layer's cotangent, nothing of the layers before it is computed again."""
    params, x = arguments()
    split = split_stage(stage, params, x, stash=stash)
    prepared = split.prepare(params)
    y, residuals = split.forward(prepared, x)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(residuals)) <= COUNT * x.nbytes
    for backward in (split.backward, split.backward_input):

        def run(params, residuals, ct, backward=backward):
            return backward(split.prepare(params), residuals, ct)

        jaxpr = jax.make_jaxpr(run)(params, residuals, y).jaxpr
        matrices = jaxpr.invars[: 2 * COUNT]
        products = [[products_reading(jaxpr, var) for var in matrices[2 * i : 2 * i + 2]] for i in range(COUNT)]
        for behind in range(1, COUNT):
            left = without(jaxpr, products[behind][1])
            for before in range(behind):
                assert products[before][0]
                assert not [eqn for eqn in products[before][0] if eqn in left]
    expected = jax.vjp(plain, params, x)[1](y)
    assert_trees_close(split.backward(prepared, residuals, y), expected, rtol=1e-12)


def noisy_layer(p, x):
    """A layer whose random key is made of what a product gives, as one that draws by its tokens does."""
    h = x @ p["in"]
    key = jax.random.wrap_key_data(jnp.abs(h[0, :2] * 1000).astype(jnp.uint32))
    noise = jax.random.uniform(key, x.shape, x.dtype)
    return x + jnp.tanh((noise * x) @ p["in"]) @ p["out"]


def test_keys_made_of_what_waits(x64):
    """A key holds no number that a barrier takes, but what is made of it is there no sooner than the key."""

    def stage(params, x):
        for p in params:
            x = jax.checkpoint(noisy_layer)(p, x)
        return x

    params, x = arguments()
    split = split_stage(stage, params, x)
    prepared = split.prepare(params)
    y, residuals = split.forward(prepared, x)
    assert_trees_close(split.backward(prepared, residuals, y), jax.vjp(stage, params, x)[1](y), rtol=1e-12)
