"""What is kept is enough, and no other choice takes fewer bytes; a stage keeps what is small and makes the rest."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.stage import split_stage
from jaxpipe.stage.divide import closure
from jaxpipe.stage.graph import Node, Value
from jaxpipe.stage.keep import LIGHT, fewest_bytes
from tests.stage import zoo


def random_graph(seed, size=9):
    """Nodes over one input, light and heavy, of one or two inputs and results of all sizes; what is needed, given."""
    rng = random.Random(seed)

    def value():
        return Value(jax.ShapeDtypeStruct((rng.randint(1, 6),), np.int8))

    values, nodes = [value()], []
    for _ in range(size):
        outs = tuple(value() for _ in range(rng.choice([1, 1, 2])))
        ins = tuple(rng.sample(values, min(len(values), rng.choice([1, 1, 2]))))
        nodes.append(Node(rng.choice(["add", "add", "dot_general"]), ins, outs, run=lambda *_: ()))
        values += outs
    return nodes, values, rng.sample(values, 4), set(rng.sample(values, 2))


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_takes_fewer_bytes(seed):
    nodes, values, needed, given = random_graph(seed)
    chosen = fewest_bytes(needed, nodes, given)

    def enough(kept):
        return closure([value for value in needed if value not in kept], nodes, given | kept) is not None

    def cost(kept):
        return sum(value.nbytes + 1 for value in kept)

    candidates = [value for value in values if value not in given]
    others = (set(kept) for count in range(5) for kept in itertools.combinations(candidates, count))
    assert enough(chosen)
    assert cost(chosen) == min(cost(kept) for kept in others if enough(kept))


def test_light_work_is_known_to_jax():
    """Names of primitives that this JAX has; those of other versions match nothing."""
    jaxpr = jax.make_jaxpr(lambda x: jnp.pad(jnp.tanh(x).reshape(2, 2).T.sum(0) > 0, 1))(jnp.ones(4))
    names = {eqn.primitive.name for eqn in jaxpr.eqns} - {"jit", "pjit"}
    assert {"tanh", "reshape", "transpose", "reduce_sum", "gt"} <= names & LIGHT


def test_a_gated_layer_keeps_what_its_products_made(x64):
    """Input and the first product's result; norm, gate and their product are made again, and no cotangent of them is
    handed over beside those of the products."""

    def stage(p, x):
        normal = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        gate, up = jnp.split(normal @ p["in"], 2, -1)
        return x + (jax.nn.silu(gate) * up) @ p["out"]

    params, x = {"in": zoo.normal(4, 12), "out": zoo.normal(6, 4)}, zoo.normal(5, 4)
    split = split_stage(stage, params, x)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(split.residuals)) == [(5, 4), (5, 12)]
    # The cotangents of both products' results.
    assert sorted(leaf.shape for leaf in split.crossing) == [(5, 4), (5, 6)]


def test_what_collectives_and_sorts_made_is_kept(x64):
    split = split_stage(lambda w, x: jnp.sort(x, 0) * w, zoo.normal(4), zoo.normal(3, 4))
    kept = [leaf.shape for leaf in jax.tree.leaves(split.residuals) if leaf.dtype == jnp.float64]
    assert kept == [(3, 4)]
    assert not LIGHT & {"sort", "all_to_all", "psum", "all_gather", "dot_general", "pallas_call", "custom_call", "scan"}
