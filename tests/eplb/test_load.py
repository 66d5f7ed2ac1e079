"""Load statistics: exact counts within the training step, over data-parallel ranks, remembered over steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from eplb_jax.load import MovingAverage, SlidingWindow, count_tokens

EXPERTS = np.random.default_rng(0).integers(0, 6, (4, 8, 2))


def test_counts_are_those_of_bincount():
    assert count_tokens(jnp.array(EXPERTS), 6).tolist() == np.bincount(EXPERTS.ravel(), minlength=6).tolist()


def test_masked_and_absent_tokens_do_not_count():
    mask = np.arange(32).reshape(4, 8) % 3 > 0
    found = count_tokens(jnp.array(EXPERTS), 6, mask=jnp.array(mask))
    assert found.tolist() == np.bincount(EXPERTS[mask].ravel(), minlength=6).tolist()
    assert count_tokens(jnp.array([[-1, 2], [6, 2]]), 6).tolist() == [0, 0, 2, 0, 0, 0]


@pytest.mark.parametrize("devices", [2, 4])
def test_sums_over_data_parallel_ranks(devices):
    if jax.device_count() < devices:
        pytest.skip(f"{devices} devices are needed, there are {jax.device_count()}")
    mesh = jax.make_mesh((devices,), ("dp",), (AxisType.Auto,), devices=jax.devices()[:devices])
    count = functools.partial(count_tokens, num_experts=6, axis_name="dp")
    found = jax.jit(jax.shard_map(count, mesh=mesh, in_specs=PartitionSpec("dp"), out_specs=PartitionSpec()))(EXPERTS)
    assert found.tolist() == np.bincount(EXPERTS.ravel(), minlength=6).tolist()


def test_a_window_forgets_and_an_average_fades_within_a_scan():
    counts = np.random.default_rng(1).integers(0, 100, (9, 2, 3))

    def step(state, now):
        return jax.tree.map(lambda s: s.update(now), state, is_leaf=lambda x: hasattr(x, "update")), None

    start = SlidingWindow.create(4, 2, 3), MovingAverage.create(0.75, 2, 3)
    (window, average), _ = jax.lax.scan(step, start, jnp.array(counts))
    assert np.array_equal(window.loads(), counts[-4:].sum(0))
    shares = 0.75 ** np.arange(9)[::-1]
    assert np.allclose(average.loads(), np.tensordot(shares / shares.sum(), counts, 1), rtol=1e-6)
    assert int(window.steps) == int(average.steps) == 9


def test_nothing_seen_is_no_load():
    assert not SlidingWindow.create(3, 1, 2).loads().any()
    assert not MovingAverage.create(0.9, 1, 2).loads().any()


def test_long_windows_do_not_overflow():
    window = SlidingWindow.create(3, 1, 1)
    for _ in range(3):
        window = window.update(jnp.array([[2**30]]))
    assert window.loads().tolist() == [[3 * 2.0**30]]


def test_float64_changes_nothing(x64):
    window = SlidingWindow.create(2, 1, 2).update(jnp.array([[3, 4]]))
    average = MovingAverage.create(0.5, 1, 2).update(jnp.array([[3, 4]]))
    assert window.loads().tolist() == average.loads().tolist() == [[3, 4]]
    assert window.loads().dtype == average.loads().dtype == jnp.float32
    assert count_tokens(jnp.array(EXPERTS), 6).dtype == jnp.int32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count_tokens(jnp.ones((2, 2)), 3), "experts has dtype float32"),
        (lambda: count_tokens(jnp.ones((2, 2), int), 0), "num_experts=0"),
        (lambda: count_tokens(jnp.ones((2, 2), int), 3, mask=jnp.ones(3, bool)), r"mask has shape \(3,\)"),
        (lambda: SlidingWindow.create(0, 1, 1), "window=0"),
        (lambda: SlidingWindow.create(2, 1, 3).update(jnp.ones((1, 2), int)), r"shape \(1, 2\).*\(1, 3\)"),
        (lambda: MovingAverage.create(1.0, 1, 1), "decay=1.0"),
        (lambda: MovingAverage.create(0.5, 0, 1), "layers=0"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
