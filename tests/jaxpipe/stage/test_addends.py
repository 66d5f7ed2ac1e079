"""Which summands of a stage are products that can be added to their sums in place, and what is made of their sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import grouped_matmul
from jaxpipe.stage import split_stage
from jaxpipe.stage.addend import Addend
from tests.jaxpipe.stage import zoo
from tests.plain import assert_trees_close

SIZES = np.array([8, 16], np.int32)


def product(x, w):
    return grouped_matmul(x, w, SIZES)


def joined(p, x):
    """Two matrices multiplied as one, the second one turned."""
    both = product(x, jnp.concatenate([p["a"], p["b"].swapaxes(1, 2)], 2))
    return x + jnp.tanh(both[:, :6]) @ p["dense"] + both[:, 6:]


def reshaped(p, x):
    return x + jnp.tanh(product(x, p["a"].reshape(2, 4, 6))) @ p["dense"]


def twice(p, x):
    """The gradients of a and b are one product and a multiple of it."""
    return x + jnp.tanh(product(x, p["a"] + 2 * p["b"].swapaxes(1, 2)[:, :, [0, 1, 2, 3, 0, 1]])) @ p["dense"]


def used_twice(p, x):
    """The gradient of a is a sum of two products."""
    return x + jnp.tanh(product(jnp.tanh(product(x, p["a"]) @ p["dense"]), p["a"])) @ p["dense"]


A, B, DENSE = (2, 4, 6), (2, 4, 4), (6, 4)
STAGES = {
    "joined": (joined, A, None, [(2, 4, 10)]),
    "joined, one of them frozen": (joined, A, {"a": True, "b": False, "dense": True}, []),
    "reshaped": (reshaped, (8, 6), None, [(8, 6)]),
    "twice": (twice, A, None, []),
    "used twice": (used_twice, A, None, []),
}


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("stage, a_shape, trainable, expected", STAGES.values(), ids=STAGES)
def test_sums_of_two_microbatches(x64, stage, a_shape, trainable, expected, halves):
    """Are those of the plain program, whatever is added in place; the first sum begins with nothing."""
    params = {"a": zoo.normal(*a_shape), "b": zoo.normal(*B, seed=1), "dense": zoo.normal(*DENSE, seed=2)}
    xs = [zoo.normal(24, 4, seed=3 + i) for i in range(2)]
    split = split_stage(stage, params, xs[0], trainable=trainable)
    prepared, sums, found = split.prepare(params), None, []
    for x in xs:
        y, kept = split.forward(prepared, x)
        if halves:
            _, crossing = split.backward_input(prepared, kept, y)
            made = split.backward_weight(prepared, kept.weight, crossing, summands=True, addends=True)
        else:
            made, _ = split.backward(prepared, kept, y, summands=True, addends=True)
        found = [shape.shape for shape, one in zip(split.summands, made, strict=True) if isinstance(one, Addend)]
        sums = [
            each.add_to(jax.ShapeDtypeStruct(shape.shape, shape.dtype) if total is None else total)
            if isinstance(each, Addend)
            else each if total is None else total + each
            for shape, total, each in zip(split.summands, sums or [None] * len(made), made, strict=True)
        ]  # fmt: skip
    assert found == expected
    grads = split.gradients(prepared, sums)
    expected_grads = jax.grad(lambda p: sum((stage(p, x) ** 2).sum() / 2 for x in xs))(params)
    for name, wanted in (trainable or dict.fromkeys(params, True)).items():
        if wanted and (stage is not reshaped or name != "b"):
            assert_trees_close(grads[name], expected_grads[name], rtol=1e-10)
