"""Attention over caches of latents equals the plain program in float64: XLA's, and the kernel in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax.kernels import registry
from eplb_jax.kernels.backend import HOPPER_SMS, Target, current_target
from eplb_jax.kernels.fallback import log_fallback
from eplb_jax.kernels.latent_attention import mosaic, xla
from eplb_jax.kernels.latent_attention.interface import attend_latents
from eplb_jax.kernels.latent_attention.mosaic import attend_in_parts, combine, splits_for, why_not
from tests.cases import cases
from tests.eplb_jax.kernels.interpreter import interpreted

needs_hopper = pytest.mark.skipif(not current_target().hopper, reason="Mosaic kernels run on Hopper GPUs")
HOPPER = Target("gpu", "NVIDIA H200", HOPPER_SMS, True)
STATIC = dict(latent=128, scale=0.1)
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}
"""Of the largest result: weights and results are rounded to the dtype."""


def plain(query, cache, lengths, latent, scale):
    """A softmax of each head over the keys of its request; in float64."""
    query, cache = np.asarray(query, np.float64), np.asarray(cache, np.float64)
    out = np.zeros((*query.shape[:2], latent))
    for b, heads in enumerate(query):
        keys = cache[b, : lengths[b]]
        for h, row in enumerate(heads):
            weights = np.exp(keys @ row * scale - (keys @ row * scale).max())
            out[b, h] = weights @ keys[:, :latent] / weights.sum()
    return out


def make(heads, lengths, keys, dtype, latent=128, rotary=64, seed=0):
    """Queries, caches with large numbers behind each request's last key, and lengths."""
    rng = np.random.default_rng(seed)
    columns = latent + rotary
    query = rng.standard_normal((len(lengths), heads, columns))
    cache = rng.standard_normal((len(lengths), keys, columns))
    cache[np.arange(keys) >= np.array(lengths)[:, None]] = 100
    return jnp.asarray(query, dtype), jnp.asarray(cache, dtype), jnp.array(lengths, jnp.int32)


def check(found, operands, latent, scale):
    """Against the plain program, of the same rounded operands."""
    dtype = operands[0].dtype
    want = plain(*operands, latent, scale)
    assert found.dtype == dtype and found.shape == want.shape
    np.testing.assert_allclose(
        np.asarray(found, np.float64), want, rtol=0, atol=TOLERANCES[dtype.name] * np.abs(want).max()
    )


def on_hopper(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_xla_equals_the_plain_program(x64, dtype):
    lengths = [1, 40, *np.random.default_rng(1).integers(1, 41, 3)]
    operands = make(3, lengths, 40, dtype, 16, 4)
    check(attend_latents(*operands, latent=16, scale=0.3), operands, 16, 0.3)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 knows no transposed operands")
@cases("heads, lengths, keys, latent, splits, dtype", [
    (16, [1, 136, 65], 136, 128, 1, "bfloat16"),
    (80, [130, 63], 136, 128, 2, "bfloat16"),
    (5, [64, 1], 72, 256, 3, "float16"),
    (64, [192], 192, 512, 1, "bfloat16"),
    (3, list(np.random.default_rng(2).integers(1, 201, 4)), 200, 128, 4, "bfloat16"),
    (2, [500, 129, 7], 128, 128, 2, "bfloat16"),
], quick=[
    (16, [1, 136, 65], 136, 128, 1, "bfloat16"), (80, [130, 63], 136, 128, 2, "bfloat16"),
    (2, [500, 129, 7], 128, 128, 2, "bfloat16"),
])  # fmt: skip
def test_kernel_in_the_interpreter(monkeypatch, heads, lengths, keys, latent, splits, dtype):
    """Simulated on the CPU: results and barriers. Its accumulators begin with zeros alone, so sums are added here."""

    def add_product(sums, weights, tile):
        def product(acc):
            mosaic.plgpu.wgmma(acc, weights, tile)
            return acc[...]

        return sums + mosaic.pl.run_scoped(product, mosaic.accumulator(*sums.shape))

    monkeypatch.setattr(mosaic, "add_product", add_product)
    operands = make(heads, lengths, keys, dtype, latent)
    with interpreted():
        found = attend_in_parts(*operands, latent=latent, scale=0.1, splits=splits)
    check(found, operands, latent, 0.1)


@needs_hopper
@pytest.mark.parametrize("dtype", mosaic.FLOATS)
@pytest.mark.parametrize("heads, requests, keys, latent", [
    (128, 5, 4096, 512), (16, 64, 1000, 512), (128, 150, 200, 512), (80, 3, 72, 128), (1, 1, 8, 256),
])  # fmt: skip
def test_kernel_equals_the_plain_program(heads, requests, keys, latent, dtype):
    lengths = np.random.default_rng(3).integers(1, keys + 1, requests)
    lengths[[0, -1]] = 1, keys
    operands = make(heads, lengths, keys, dtype, latent)
    found = attend_latents(*operands, latent=latent, scale=0.05, backend="mosaic")
    check(found, operands, latent, 0.05)


@cases("heads, requests, keys, latent, dtype", [
    (128, 64, 4096, 512, "bfloat16"),
    (16, 4, 4096, 512, "bfloat16"),
    (128, 1, 136, 512, "float16"),
    (80, 200, 40, 384, "bfloat16"),
    (16, 2, 1000, 256, "float16"),
    (1, 1, 8, 128, "bfloat16"),
], quick=[(128, 64, 4096, 512, "bfloat16"), (16, 4, 4096, 512, "bfloat16")])  # fmt: skip
def test_kernel_can_be_lowered_without_a_gpu(heads, requests, keys, latent, dtype):
    query, cache = (jax.ShapeDtypeStruct((requests, n, latent + 64), dtype) for n in (heads, keys))
    assert why_not(query, cache, latent) is None
    splits = splits_for(requests, heads, keys, HOPPER_SMS)
    kernel = jax.jit(functools.partial(attend_in_parts, latent=latent, scale=0.1, splits=splits))
    traced = kernel.trace(query, cache, jax.ShapeDtypeStruct((requests,), jnp.int32))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


def test_parts_are_combined():
    """Softmaxes over parts of the keys and logarithms of their normalisers give that over all; a part may be empty."""
    rng = np.random.default_rng(0)
    scores, values = rng.standard_normal((2, 3, 40)) * 5, rng.standard_normal((2, 40, 4))
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    sums, logs = np.zeros((4, 2, 3, 4)), np.full((4, 2, 3), -np.inf)
    for part, keys in enumerate((slice(0, 7), slice(7, 8), slice(8, 40))):
        normaliser = np.exp(scores[..., keys]).sum(-1)
        sums[part] = np.exp(scores[..., keys]) @ values[:, keys] / normaliser[..., None]
        logs[part] = np.log2(normaliser)
    found = combine(jnp.asarray(sums, jnp.float32), jnp.asarray(logs, jnp.float32))
    np.testing.assert_allclose(found, shares @ values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("requests", [1, 7, 64, 500])
@pytest.mark.parametrize("keys", [8, 1000, 16384])
def test_keys_are_divided_where_multiprocessors_would_wait(requests, heads, keys):
    splits, blocks = splits_for(requests, heads, keys, HOPPER_SMS), requests * -(-heads // 64)
    assert 1 <= splits <= -(-keys // 64)
    if blocks >= 4 * HOPPER_SMS or keys <= 64:
        assert splits == 1
    elif blocks * 4 <= HOPPER_SMS and keys >= 16384:
        assert HOPPER_SMS // 3 <= blocks * splits <= HOPPER_SMS


def large_operands(requests=4, heads=128):
    query, cache = (jax.ShapeDtypeStruct((requests, n, 192), jnp.bfloat16) for n in (heads, 128))
    return query, cache, jax.ShapeDtypeStruct((requests,), jnp.int32)


def test_lowering_decides_where_the_device_is_a_hopper_gpu(monkeypatch):
    on_hopper(monkeypatch)
    traced = jax.jit(functools.partial(attend_latents, **STATIC)).trace(*large_operands())
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1
    assert "mosaic" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("heads, backend, kernels", [(32, "auto", 0), (33, "auto", 1), (32, "mosaic", 1)])
def test_few_heads_are_left_to_xla(monkeypatch, heads, backend, kernels):
    """A block has 64; with 16 heads and 64 requests the kernel took 92 us on an H200, and XLA 55."""
    on_hopper(monkeypatch)
    attend = jax.jit(functools.partial(attend_latents, **STATIC, backend=backend))
    text = attend.trace(*large_operands(heads=heads)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == kernels


@pytest.mark.parametrize("backend", ["auto", "mosaic"])
def test_inside_shard_map(monkeypatch, backend):
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    on_hopper(monkeypatch)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    body = functools.partial(attend_latents, **STATIC, backend=backend)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"))
    text = jax.jit(mapped).trace(*large_operands(8)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1


def test_explicit_axes_are_xlas(monkeypatch):
    """Requests sharded over axes whose shardings are part of types, outside of shard_map: no kernel takes them."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    on_hopper(monkeypatch)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    operands = make(2, [3, 20, 24, 8], 24, "bfloat16")
    sharded = jax.device_put(operands, jax.NamedSharding(mesh, P("data")))
    found = jax.jit(functools.partial(attend_latents, **STATIC))(*sharded)
    assert found.sharding.spec == P("data", None, None)
    check(found, operands, **STATIC)
    with pytest.raises(ValueError, match="the operands are sharded over data, of type Explicit, outside"):
        jax.jit(functools.partial(attend_latents, **STATIC, backend="mosaic"))(*sharded)


def test_a_number_of_requests_that_is_no_number_is_xlas(monkeypatch):
    """`jax.export` with symbolic sizes."""
    on_hopper(monkeypatch)
    operands = large_operands(*jax.export.symbolic_shape("requests"))
    exported = jax.export.export(jax.jit(functools.partial(attend_latents, **STATIC)), platforms=["cpu"])(*operands)
    operands = make(128, [3, 128], 128, "bfloat16")
    check(exported.call(*operands), operands, **STATIC)


def test_gradients_are_those_of_xla(monkeypatch):
    """Also where the kernel runs, which has none of its own."""
    on_hopper(monkeypatch)
    query, cache, lengths = make(40, [5, 16], 16, "bfloat16")

    def gradients(attend):
        return jax.grad(lambda *of: attend(*of, lengths, **STATIC).astype(jnp.float32).sum(), (0, 1))(query, cache)

    for got, want in zip(gradients(attend_latents), gradients(xla.attend_latents), strict=True):
        assert got.dtype == want.dtype and np.abs(np.asarray(want, np.float32)).max() > 0
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("keys, columns, latent, dtype, message", [
    (100, 192, 128, "bfloat16", "caches of 100 keys; a multiple of 8 will do"),
    (64, 192, 128, "float32", "dtype float32 is none of bfloat16, float16"),
    (64, 192, 64, "bfloat16", "64 latent of 192 columns; multiples of 128 of 64, up to 576"),
    (64, 160, 128, "bfloat16", "128 latent of 160 columns"),
    (64, 640, 512, "bfloat16", "512 latent of 640 columns"),
    (64, 128, 128, "bfloat16", "128 latent of 128 columns"),
    (0, 192, 128, "bfloat16", "cache (2, 0, 192) leave nothing to do"),
])  # fmt: skip
def test_what_the_kernel_does_not_take(keys, columns, latent, dtype, message):
    query, cache = (jax.ShapeDtypeStruct((2, n, columns), dtype) for n in (16, keys))
    assert message in why_not(query, cache, latent)


def test_mosaic_says_what_it_cannot_do_and_auto_does_it(monkeypatch):
    on_hopper(monkeypatch)
    operands = make(40, [3, 20], 20, "bfloat16")
    with pytest.raises(ValueError, match=r"cannot attend to these latents: caches of 20 keys.*; take backend="):
        attend_latents(*operands, **STATIC, backend="mosaic")
    check(attend_latents(*operands, **STATIC), operands, **STATIC)


def test_fallback_on_a_gpu_is_said_once(monkeypatch, caplog):
    on_hopper(monkeypatch)
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA A100", 108, False))
    log_fallback.cache_clear()
    for _ in range(2):
        attend_latents(*make(40, [3], 8, "bfloat16"), **STATIC)
    assert [record.getMessage() for record in caplog.records if record.name == registry.logger.name] == [
        "attention over caches of latents runs on XLA, which reads them twice: "
        "the device is 'NVIDIA A100', no Hopper GPU"
    ]


@pytest.mark.parametrize("changes, message", [
    (dict(query=jnp.zeros((2, 192))), r"shapes \(2, 192\), \(2, 8, 192\) and \(2,\): they must be \[requests, heads"),
    (dict(lengths=jnp.ones(3, jnp.int32)), r"\(2, 8, 192\) and \(3,\): they must be"),
    (dict(cache=jnp.zeros((2, 8, 160), "bfloat16")), "queries of 192 columns, a cache of 160 and latent=128"),
    (dict(latent=193), "a cache of 192 and latent=193"),
    (dict(latent=0), "latent=0"),
    (dict(cache=jnp.zeros((2, 8, 192))), "query has dtype bfloat16 and cache float32: they must be the same"),
    (dict(lengths=jnp.ones(2)), "lengths has dtype float32"),
    (dict(scale=0.0), r"scale=0.0 of the scores: it must be positive"),
    (dict(backend="triton"), "backend='triton': it must be"),
])  # fmt: skip
def test_bad_input(changes, message):
    query, cache, lengths = make(2, [3, 8], 8, "bfloat16")
    with pytest.raises(ValueError, match=message):
        attend_latents(**dict(query=query, cache=cache, lengths=lengths, **STATIC) | changes)
