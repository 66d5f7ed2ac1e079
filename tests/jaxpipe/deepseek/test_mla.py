"""Latent attention: as functions and as a module, over whole sequences, over parts of them and over a cache."""

import dataclasses
import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eplb_jax.kernels import registry
from eplb_jax.kernels.backend import HOPPER_SMS, Target
from jaxpipe.deepseek import (
    MLA,
    LayerConfig,
    Rope,
    Yarn,
    attend_cached,
    causal_attention,
    init_mla,
    rotate,
)
from jaxpipe.deepseek import attend as attend_by_operations
from jaxpipe.deepseek.generate import STEP
from jaxpipe.deepseek.stand_in import attention as stand_in
from tests.cases import cases
from tests.jaxpipe.deepseek.models import SMALL, small


@pytest.fixture(params=[8, None], ids=["low rank", "full rank"])
def layer(request, x64):
    """Sizes, parameters with scales that are not one, and 3 sequences of 8 tokens; float64."""
    config = small(query_rank=request.param)
    params = init_mla(nnx.Rngs(0), config, jnp.float64)
    names = [name for name in ("query_norm", "latent_norm") if getattr(params, name) is not None]
    scales = {name: jnp.linspace(0.5, 1.5, getattr(params, name).shape[0], dtype=jnp.float64) for name in names}
    x = jax.random.normal(jax.random.key(1), (3, 8, config.width), jnp.float64)
    return config, params._replace(**scales), x


attend = jax.jit(attend_by_operations, static_argnames=("config", "core"))
# The softmax of jax.nn's attention is of float32.
CLOSE = dict(rtol=1e-5, atol=1e-6)


def test_decoding_step_by_step_is_the_causal_pass(layer):
    """Requests of different lengths: each token through the cache, all of it wrong where nothing has been written."""
    config, params, x = layer
    y, latents = attend(params, x, config)
    first = jnp.array([0, 2, 4], jnp.int32)
    known = jnp.arange(9, dtype=jnp.int32)[None, :, None] < first[:, None, None]
    cache = jnp.where(known, jnp.pad(latents.rows(), ((0, 0), (0, 1), (0, 0))), 9.0)
    step = jax.jit(attend_cached, static_argnums=4)
    request = jnp.arange(3)
    for count in range(4):
        at = first + count
        found, cache = step(params, x[request, at], cache, at, config)
        np.testing.assert_allclose(found, y[request, at], **CLOSE)
        np.testing.assert_allclose(cache[request, at], latents.rows()[request, at], rtol=1e-12, atol=1e-12)
    assert (cache[:, 8] == 9).all()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("experts, backend, kernels", [
    ("auto", "mosaic", 1), ("auto", None, 1), ("mosaic", None, 1), ("xla", None, 0), ("auto", "xla", 0),
])  # fmt: skip
def test_who_attends_to_the_cache(monkeypatch, precision, experts, backend, kernels):
    """Our kernel on Hopper GPUs, in caches as `Server` makes them, unless XLA is asked for."""
    target = Target("gpu", "NVIDIA H200", HOPPER_SMS, True)
    monkeypatch.setattr(registry, "current_target", lambda: target)
    config = small(heads=64, latent=128, rotary=64, precision=precision)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, backend=experts))
    params = init_mla(nnx.Rngs(0), config)
    x, cache = jnp.zeros((2, config.width), jnp.bfloat16), jnp.zeros((2, STEP, 192), jnp.bfloat16)
    traced = jax.jit(attend_cached, static_argnums=4, static_argnames="backend").trace(
        params, x, cache, jnp.zeros(2, jnp.int32), config, backend=backend
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == kernels


def test_later_tokens_attend_to_those_before(layer):
    config, params, x = layer
    y, latents = attend(params, x, config)
    first, before = attend(params, x[:, :5], config)
    second, after = attend(params, x[:, 5:], config, before.rows())
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), y, **CLOSE)
    for part, later, whole in zip(before, after, latents, strict=True):
        np.testing.assert_allclose(jnp.concatenate([part, later], 1), whole, rtol=1e-12, atol=1e-12)


@cases("layer", [8, None], quick=[8], ids=["low rank", "full rank"], indirect=True)
def test_documents_kept_apart_are_sequences_of_their_own(layer):
    """Results and gradients in float64, with stretched rotations; positions count through all documents."""
    config, params, x = layer
    config = dataclasses.replace(config, rope=Rope(yarn=Yarn(factor=4.0, original=4, mscale_all_dim=0.7)))
    cuts = (0, 3, 4, 8), (0, 1, 2, 8), (0, 5, 6, 8)
    segments = jnp.stack([jnp.repeat(jnp.arange(3), np.diff(row)) for row in jnp.array(cuts)]).astype(jnp.int32)
    core = functools.partial(causal_attention, segments=segments)

    def apart(params, x):
        documents = (row[None, start:end] for row, cut in zip(x, cuts, strict=True) for start, end in pairwise(cut))
        return jnp.concatenate([attend(params, one, config)[0][0] for one in documents]).reshape(x.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, params, x, ct):
        y, back = jax.vjp(function, params, x)
        return y, back(ct)

    ct = jax.random.normal(jax.random.key(2), x.shape, jnp.float64)
    found, ours = with_gradients(lambda params, x: attend(params, x, config, core=core)[0], params, x, ct)
    wanted, theirs = with_gradients(apart, params, x, ct)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="segments with 3 queries and 8 keys"):
        causal_attention(x[:, :3, None], x[:, :, None], x[:, :, None], segments=segments[:, :3])
    # The other form, of float32, has the same mask.
    narrow = jax.random.normal(jax.random.key(3), (3, 8, 2, 6), jnp.float32)
    exact = causal_attention(*(narrow.astype(jnp.float64),) * 3, segments=segments)
    np.testing.assert_allclose(causal_attention(*(narrow,) * 3, segments=segments), exact, rtol=1e-5, atol=1e-5)


def test_it_is_attention_over_the_keys_and_values_that_it_stands_for(layer):
    """The published formulas, head by head and token by token, in numpy."""
    config, params, x = layer
    found = attend(params, x, config)[0]
    p, x = jax.device_get(params), np.asarray(x)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    def turned(x, place):
        pairs = x[: len(x) // 2] + 1j * x[len(x) // 2 :]
        pairs = pairs * np.exp(1j * place * 10_000.0 ** (-np.arange(len(pairs)) / len(pairs)))
        return np.concatenate([pairs.real, pairs.imag])

    def head(sequence, h):
        down = sequence if p.query is not None else norm(sequence @ p.query_down, p.query_norm)
        queries = down @ (p.query if p.query is not None else p.query_up)[:, h]
        both = sequence @ p.latent_down
        latent, shared = norm(both[:, : config.latent], p.latent_norm), both[:, config.latent :]
        content, values = latent @ p.key_up[:, h], latent @ p.value_up[:, h]
        rows = []
        for t in range(len(sequence)):
            query = np.concatenate([queries[t, : config.content], turned(queries[t, config.content :], t)])
            keys = [np.concatenate([content[s], turned(shared[s], s)]) for s in range(t + 1)]
            weights = np.exp(np.array(keys) @ query / np.sqrt(config.content + config.rotary))
            rows.append(weights @ values[: t + 1] / weights.sum())
        return np.array(rows) @ p.out[h]

    for sequence, y in zip(x, found, strict=True):
        np.testing.assert_allclose(y, sum(head(sequence, h) for h in range(config.heads)), **CLOSE)


def test_the_module_is_the_function_of_its_parameters():
    module = MLA(SMALL, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, SMALL.width))
    np.testing.assert_allclose(
        nnx.jit(MLA.__call__)(module, x), attend(module.params, x, SMALL)[0], rtol=1e-6, atol=1e-7
    )
    jax.tree.map(np.testing.assert_array_equal, module.params, init_mla(nnx.Rngs(0), SMALL))
    # The paths of parameters in checkpoints.
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module))}
    assert paths == {
        "query_down", "query_norm.scale", "query_up", "latent_down", "latent_norm.scale", "key_up", "value_up", "out"
    }  # fmt: skip


def test_the_stand_in_takes_and_gives_what_attention_does():
    module, other = (MLA(SMALL, nnx.Rngs(0), *core) for core in ((), (stand_in,)))
    x = jnp.ones((2, 8, SMALL.width), jnp.bfloat16)

    def shapes(module):
        out = jax.eval_shape(lambda x: jax.vjp(module, x)[0], x), jax.eval_shape(jax.grad(lambda x: module(x).sum()), x)
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), out)

    assert shapes(module) == shapes(other)


def test_rotations_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 1, 8)), (1, 9, 1, 1)), jnp.float32) for _ in range(2))
    places = jnp.arange(9)[:, None]
    scores = jnp.einsum("btnh,bsnh->ts", rotate(q, places), rotate(k, places), precision="highest")
    np.testing.assert_allclose(scores[2:, 2:], scores[:-2, :-2], rtol=1e-4, atol=1e-5)


def test_bad_sizes():
    with pytest.raises(ValueError, match="rotary is even"):
        LayerConfig(moe=SMALL.moe, heads=2, query_rank=None, latent=8, content=8, rotary=3, value=8)
