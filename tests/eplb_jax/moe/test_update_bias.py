"""`update_bias` against Python's integers: any shape, dtype and size of loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import update_bias
from tests.cases import cases


def exact_bias(bias, loads, rate):
    """Layer by layer in Python's integers."""
    rows = []
    for old, row in zip(bias.tolist(), np.asarray(loads).tolist(), strict=True):
        signs = [(sum(row) > len(row) * load) - (sum(row) < len(row) * load) for load in row]
        rows.append([b + rate * sign for b, sign in zip(old, signs, strict=True)])
    return np.array(rows)


LOADS = {
    "int32": np.array([[100, 20, 20, 20], [10, 10, 10, 9000], [7, 7, 7, 7], [0, 0, 0, 0], [1, 2, 3, 2]]),
    "large": np.array(
        [[2**31 - 1] * 4, [2**31 - 1, 2**31 - 2, 2**31 - 1, 2**31 - 1], [2**24, 2**24 + 1, 2**24, 2**24]]
    ),
    "uint32": np.array([[2**32 - 1, 2**32 - 2, 2**32 - 1, 2**32 - 1], [0, 1, 2, 1]]),
    "uint8": np.array([[250, 251, 251, 252], [255, 255, 255, 255], [0, 0, 255, 1]]),
    "int8": np.array([[120, 127, 126, 127], [0, 0, 0, 1]]),
    "float16": np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.1, 0.1, 0.1]]),
    "bfloat16": np.array([[1000.0, 1008.0, 1000.0, 1000.0], [3.0, 3.0, 3.0, 3.0]]),
}


@cases("dtype", ["float32", "bfloat16", "float16"], quick=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", LOADS)
def test_update_bias_of_stacked_layers_in_any_dtype(kind, dtype):
    loads = jnp.asarray(LOADS[kind], "int32" if kind == "large" else kind)
    bias = jnp.asarray(np.random.default_rng(0).integers(-4, 5, loads.shape) / 4, dtype)
    exact = loads if jnp.issubdtype(loads.dtype, jnp.integer) else loads.astype("float32")
    expected = exact_bias(np.asarray(bias.astype("float32")), exact, 0.25)
    for function in (update_bias, jax.jit(update_bias), jax.vmap(update_bias, (0, 0, None))):
        found = function(bias, loads, 0.25)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype("float32"), expected)


@pytest.mark.parametrize(
    "experts", [pytest.param(n, marks=[pytest.mark.slow] * (n % 30 not in (1, 16))) for n in range(2, 70)]
)
def test_an_expert_with_exactly_the_mean_load_keeps_its_bias(experts):
    loads = np.random.default_rng(experts).integers(0, 2000, experts)
    loads[-1] = 0
    loads[0] += -loads.sum() % (experts - 1)
    loads[-1] = loads.sum() // (experts - 1)  # the mean of all
    expected = np.sign(loads[-1] - loads)
    np.testing.assert_array_equal(update_bias(jnp.zeros(experts), loads.astype(np.float32), 1.0), expected)
    np.testing.assert_array_equal(jax.jit(update_bias)(jnp.zeros(experts), loads.astype(np.float32), 1.0), expected)


def test_loads_beyond_32_bits():
    for dtype in (np.int64, np.uint64):
        loads = np.array([[3 * 2**31, 1, 1], [2**32, 2**32, 2**32]], dtype)
        assert update_bias(jnp.zeros((2, 3)), loads, 1.0).tolist() == [[-1, 1, 1], [0, 0, 0]]
    assert update_bias(jnp.zeros(3), jnp.array([3.4e38, 0, 3.4e38]), 1.0).tolist() == [-1, 1, -1]


def test_a_layer_whose_loads_are_not_finite_keeps_its_bias():
    loads = jnp.array([[1.0, jnp.nan, 2.0], [jnp.inf, 1.0, 2.0], [3.0, 1.0, 2.0]])
    found = update_bias(jnp.ones((3, 3)), loads, 0.5)
    assert found.tolist() == [[1, 1, 1], [1, 1, 1], [0.5, 1.5, 1.0]]


@pytest.mark.parametrize(
    ("bias", "loads", "message"),
    [
        (jnp.zeros(4), jnp.zeros((2, 4)), r"bias has shape \(4,\), loads have \(2, 4\): both must be \[experts\]"),
        (jnp.zeros(()), jnp.zeros(()), r"shape \(\)"),
        (jnp.zeros(4, jnp.int32), jnp.zeros(4), "bias is int32"),
        (jnp.zeros(4), jnp.zeros(4, bool), "loads are bool"),
    ],
)
def test_what_update_bias_does_not_take(bias, loads, message):
    with pytest.raises(ValueError, match=message):
        update_bias(bias, loads)
