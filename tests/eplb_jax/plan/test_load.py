"""Load statistics: exact counts within the training step, over data-parallel ranks, remembered over steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from eplb_jax import MovingAverage, SlidingWindow, count_tokens
from tests.cases import cases

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


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@cases(
    "dtype",
    ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"],
    quick=["uint8", "int16", "uint64"],
)
def test_ids_of_any_width_are_counted_as_they_are(dtype, kind, wide):
    """Also with more experts than the dtype has numbers, masked, and out of range: also by multiples of 2**32."""
    limits = np.iinfo(dtype)
    numbers = [0, 1, 127, limits.max, limits.max - 1, limits.min, 255, 287, 299, 300, 2**31, 2**32, 2**32 + 1, 2**63]
    ids = np.array([[n, 5] for n in numbers if limits.min <= n <= limits.max], dtype)
    mask = np.arange(len(ids)) % 2 == 0
    with jax.enable_x64(wide):
        if kind is jnp.asarray and ids.dtype.itemsize == 8 and not wide:
            pytest.skip("JAX has no such arrays without x64")
        for experts, kept in itertools.product((2, 200, 300), (None, mask, mask.astype(np.uint8))):
            chosen = (ids if kept is None else ids[mask]).ravel().astype(object)
            right = np.bincount([n for n in chosen if 0 <= n < experts], minlength=experts)
            count = functools.partial(count_tokens, num_experts=experts)
            for run in (count, jax.jit(count)) if kind is jnp.asarray else (count,):
                found = run(kind(ids), mask=None if kept is None else kind(kept))
                assert found.tolist() == right.tolist()


def test_counts_of_none_and_of_many_at_once():
    assert count_tokens(jnp.zeros((0, 2), jnp.int8), 3).tolist() == [0, 0, 0]
    each = jax.vmap(lambda ids: count_tokens(ids, 6))(jnp.array(EXPERTS, jnp.uint8))
    assert each.tolist() == [np.bincount(ids.ravel(), minlength=6).tolist() for ids in EXPERTS]


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize(
    "counts",
    [
        np.array([[3_000_000_000, 1]]),
        np.array([[2**63, 7]], np.uint64),
        np.array([[3_000_000_000, 1]], np.uint32),
        np.array([[3e9, 1e20]], np.float32),
        np.array([[0.75, 1e-9]]),
        np.array([[200, 255]], np.uint8),
        np.array([[1000, 0.5]], np.float16),
        np.array([[1024, 0.5]], jnp.bfloat16),
        np.array([[np.nan, 1]], np.float32),
    ],
    ids=lambda counts: f"{counts.dtype}-{counts[0, 0]}",
)
def test_counts_of_any_kind_are_remembered_as_they_are(counts, wide):
    with jax.enable_x64(wide):
        for empty in (SlidingWindow.create(3, 1, 2), MovingAverage.create(0.5, 1, 2)):
            for given in (counts, jnp.asarray(counts)) if wide or counts.dtype.itemsize < 8 else (counts,):
                found = empty.update(given).loads()
                assert found.dtype == jnp.float32
                np.testing.assert_allclose(found, counts.astype(np.float64), rtol=1e-6)
    window = SlidingWindow.create(2, 1, 2).update(counts)
    assert np.isfinite(window.update(np.ones((1, 2))).update(np.ones((1, 2))).loads()).all()


def test_sums_of_long_windows_grow_beyond_what_float32_counts():
    """Added one after the other, 1001 and 2**24 would make 2**24 + 1000."""
    counts = np.full((20_000, 1, 1), 1001.0, np.float32)
    assert SlidingWindow(jnp.array(counts), jnp.int32(20_000)).loads() == pytest.approx(20_020_000, rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.9999999, np.float32(0.9999999), 1 - 1e-12])
def test_averages_that_forget_slowly(decay):
    counts = np.random.default_rng(3).integers(500, 1500, (3000, 1, 4))
    counts[:1000] *= 3
    average, _ = jax.lax.scan(lambda s, x: (s.update(x), None), MovingAverage.create(decay, 1, 4), jnp.array(counts))
    shares = float(decay) ** np.arange(3000.0)[::-1]
    np.testing.assert_allclose(average.loads(), np.tensordot(shares / shares.sum(), counts, 1), rtol=1e-5)
    steady = MovingAverage(jnp.full((1, 1), 7.0), jnp.int32(2**30), float(decay))
    assert steady.update(np.array([[7]])).loads().tolist() == [[7]]
    if decay < 1 - 1e-9:
        higher = steady.update(np.array([[7 + 2**20]])).loads().item()
        assert higher == pytest.approx(7 + 2**20 * (1 - float(decay)), rel=1e-5)


def test_an_average_in_low_precision_goes_on_in_float32():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, MovingAverage.create(0.999, 1, 1))
    for _ in range(100):
        low = low.update(np.array([[1000]]))
    assert low.average.dtype == jnp.float32 and low.loads().tolist() == [[1000]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count_tokens(jnp.ones((2, 2)), 3), "experts has dtype float32"),
        (lambda: count_tokens(jnp.ones((2, 2), int), 0), "num_experts=0"),
        (lambda: count_tokens(jnp.ones((2, 2), int), 3, mask=jnp.ones(3, bool)), r"mask has shape \(3,\)"),
        (lambda: count_tokens(jnp.ones((2, 2), int), 3, mask=jnp.ones(2)), "mask has dtype float32: it must be bool"),
        (lambda: SlidingWindow.create(0, 1, 1), "window=0"),
        (lambda: SlidingWindow.create(2, 1, 1).update(np.array([["3"]])), "counts have dtype <U1"),
        (lambda: MovingAverage.create(0.5, 1, 1).update(jnp.ones((1, 1), bool)), "counts have dtype bool"),
        (lambda: jax.jit(lambda decay: MovingAverage.create(decay, 1, 1))(0.5), "decay=.* is traced"),
        (lambda: MovingAverage.create(float("nan"), 1, 1), "decay=nan"),
        (lambda: SlidingWindow.create(2, 1, 3).update(jnp.ones((1, 2), int)), r"shape \(1, 2\).*\(1, 3\)"),
        (lambda: MovingAverage.create(1.0, 1, 1), "decay=1.0"),
        (lambda: MovingAverage.create(0.5, 0, 1), "layers=0"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
