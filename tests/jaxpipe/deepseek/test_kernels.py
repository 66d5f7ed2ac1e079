"""Attention with values narrower than keys is the plain softmax, and on a GPU what it is with padded values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax.kernels.fallback import log_fallback
from jaxpipe.deepseek import kernels
from jaxpipe.deepseek.kernels import causal_attention
from tests.cases import cases


def operands(queries, keys, heads, width, narrow, dtype):
    sizes = (queries, width), (keys, width), (keys, narrow)
    rngs = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(rng, (2, length, heads, wide), dtype) for rng, (length, wide) in zip(rngs, sizes, strict=True)
    ]


@pytest.mark.parametrize("queries", [7, 3])
@pytest.mark.parametrize("narrow", [6, 4])
def test_it_is_the_softmax_over_what_came_before(x64, queries, narrow):
    query, key, value = operands(queries, 7, 3, 6, narrow, jnp.float64)
    mixed = causal_attention(query, key, value)
    for place in range(queries):
        seen = 7 - queries + place + 1
        scores = np.einsum("bhc,bshc->bhs", query[:, place], key[:, :seen]) / np.sqrt(6)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected = np.einsum("bhs,bshv->bhv", weights, value[:, :seen])
        np.testing.assert_allclose(mixed[:, place], expected, rtol=1e-5, atol=1e-6)  # its softmax is of float32


def test_wide_values_are_refused():
    query, key, value = operands(4, 4, 1, 4, 8, jnp.float32)
    with pytest.raises(ValueError, match="values of width 8 are wider than keys of 4"):
        causal_attention(query, key, value)


@cases(
    ("queries", "keys", "width", "narrow", "chosen"),
    [
        (7, 7, 64, 64, "cudnn"),
        (4, 8, 256, 256, "cudnn"),
        (8, 8, 16, 12, "cudnn"),  # padded
        (8, 8, 12, 12, "xla"),
        (8, 8, 12, 8, "xla"),
        (8, 8, 264, 264, "xla"),
        (1, 8, 64, 64, "xla"),
        (4, 7, 64, 64, "xla"),
    ],
    quick=[
        (8, 8, 16, 12, "cudnn"),
        (8, 8, 12, 12, "xla"),
        (8, 8, 12, 8, "xla"),
        (8, 8, 264, 264, "xla"),
        (4, 7, 64, 64, "xla"),
    ],
)
def test_cudnn_is_chosen_for_shapes_that_it_takes(monkeypatch, caplog, queries, keys, width, narrow, chosen):
    seen, attend = [], jax.nn.dot_product_attention

    def spy(*arrays, implementation, **options):
        seen.append(implementation)
        return attend(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    monkeypatch.setattr(kernels, "_is_hopper_or_later", lambda: True)
    log_fallback.cache_clear()
    kernels._latent_kernel.cache_clear()
    arrays = operands(queries, keys, 2, width, narrow, jnp.bfloat16)
    assert causal_attention(*arrays).shape == causal_attention(*arrays).shape == (2, queries, 2, narrow)
    assert seen == [chosen] * 2
    said = [record.message for record in caplog.records if record.name == kernels.__name__]
    assert len(said) == (chosen == "xla" or narrow < width), said


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on GPUs")
def test_narrow_values_on_a_gpu_equal_padded_ones():
    query, key, value = operands(256, 256, 4, 192, 128, jnp.bfloat16)
    padded = jnp.pad(value, ((0, 0),) * 3 + ((0, 64),))

    def with_gradients(function, *arrays):
        mixed, pull = jax.vjp(function, *arrays)
        return mixed, pull(jnp.cos(mixed))

    one = jax.jit(lambda *arrays: with_gradients(causal_attention, *arrays))(query, key, value)
    two = jax.jit(lambda *arrays: with_gradients(lambda *a: causal_attention(*a)[..., :128], *arrays))(
        query, key, padded
    )
    two = two[0], (*two[1][:2], two[1][2][..., :128])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=2e-2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on GPUs")
def test_documents_on_a_gpu_do_not_see_each_other():
    """Against each document alone, results and gradients, to one step of bfloat16."""
    query, key, value = operands(256, 256, 4, 192, 128, jnp.bfloat16)
    cuts = (0, 100, 102, 256)
    segments = jnp.repeat(jnp.arange(3, dtype=jnp.int32), np.diff(cuts), total_repeat_length=256)[None].repeat(2, 0)

    def apart(*arrays):
        parts = [causal_attention(*(array[:, a:b] for array in arrays)) for a, b in itertools.pairwise(cuts)]
        return jnp.concatenate(parts, 1)

    def with_gradients(function):
        mixed, pull = jax.vjp(function, query, key, value)
        return mixed, pull(jnp.cos(mixed))

    one = jax.jit(lambda: with_gradients(lambda *arrays: causal_attention(*arrays, segments=segments)))()
    two = jax.jit(lambda: with_gradients(apart))()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2**-7, atol=2e-2)
