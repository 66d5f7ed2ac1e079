"""Causal attention whose values may be narrower than its keys, as multi-head latent attention has them.

Shapes: B sequences, T queries, S keys, H heads, L width of latents, C and V of keys and values, N of keys without
positions.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.fallback import log_fallback
from jaxpipe._jax import causal_attention_of_cudnn
from jaxpipe.deepseek.lora import Adapted, product
from jaxpipe.stage.graph import RECOMPUTE

logger = logging.getLogger(__name__)

PADDING = "attention pads its values to the width of the keys"


def causal_attention(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S H C"],
    value: Float[Array, "B S H V"],
    scale: float | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of each query to the keys up to its own place; the last query stands beside the last key.

    In bfloat16 on a GPU it is cuDNN's, elsewhere XLA's, as for shapes that cuDNN refuses, which the log then says once.
    `jax.nn.dot_product_attention` wants values as wide as keys. cuDNN itself does not, from version 9.10 on and on
    Hopper GPUs: with keys of 192 and values of 128 its backward then takes two thirds of the time. Where that cannot be
    had, values are padded, and the log says so once.

    Args:
      query, key, value: of one dtype.
      scale: of the scores; None: one over the root of C.
      segments: which document of its sequence each token is of: a query sees keys of its own alone. As many keys as
        queries then. cuDNN reads them as a mask of T x T, with values padded. None: all are one.

    Raises:
      ValueError: values wider than keys; segments where there are more keys than queries.

    >>> x = jnp.ones((1, 4, 2, 6))
    >>> causal_attention(x, x, x[..., :4]).shape
    (1, 4, 2, 4)
    """
    width, narrow = key.shape[-1], value.shape[-1]
    if narrow > width:
        raise ValueError(f"values of width {narrow} are wider than keys of {width}: pad the keys and queries")
    queries, keys = query.shape[1], key.shape[1]
    whole = queries == keys
    if segments is not None and not whole:
        raise ValueError(f"segments with {queries} queries and {keys} keys: earlier keys are of no known document")
    cudnn = jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16
    if cudnn and (refusal := _refusal(queries, keys, width)):
        log_fallback(logger, "attention is XLA's, not cuDNN's", refusal)
        cudnn = False
    if cudnn and whole and segments is None and narrow < width and (kernel := _latent_kernel(narrow)):
        try:
            return kernel(query, key, value, scale=width**-0.5 if scale is None else scale)
        except NotImplementedError as error:
            log_fallback(logger, PADDING, str(error))
    if query.dtype == jnp.float64:
        return _exact_attention(query, key, value, width**-0.5 if scale is None else scale, segments)
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, width - narrow)))
    mask = None if whole else jnp.tri(queries, keys, keys - queries, jnp.bool_)[None, None]
    if segments is not None:
        mask = _same_segment(segments)
    with jax.numpy_dtype_promotion("standard"):  # it promotes by itself
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            is_causal=whole,
            implementation="cudnn" if cudnn else "xla",
        )
    return mixed[..., :narrow]


def _same_segment(segments: jax.Array) -> jax.Array:
    """``bool[B, 1, T, T]``: whether a query and a key are of one document."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def _exact_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, segments: jax.Array | None
) -> jax.Array:
    """In float64 from end to end; `jax.nn.dot_product_attention` takes its softmax in float32."""
    queries, keys = query.shape[1], key.shape[1]
    scores = jnp.einsum("bthc,bshc->bhts", query, key) * scale
    seen = jnp.tri(queries, keys, keys - queries, jnp.bool_)
    if segments is not None:
        seen &= _same_segment(segments)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), value)


def expand_latents(
    latent: Float[Array, "B S L"],
    key_up: Float[Array, "L H N"] | Adapted,
    value_up: Float[Array, "L H V"] | Adapted,
) -> tuple[Float[Array, "B S H N"], Float[Array, "B S H V"]]:
    """Keys and values of all heads: so cheap beside their size that a pipeline computes them again.

    Source: DeepSeek-V3, arXiv 2412.19437, 3.2.3.

    >>> keys, values = expand_latents(jnp.ones((1, 5, 4)), jnp.ones((4, 2, 3)), jnp.ones((4, 2, 1)))
    >>> keys.shape, values.shape
    ((1, 5, 2, 3), (1, 5, 2, 1))
    """
    keys, values = product("btl,lhn->bthn", latent, key_up), product("btl,lhv->bthv", latent, value_up)
    return checkpoint_name(keys, RECOMPUTE), checkpoint_name(values, RECOMPUTE)


def _refusal(queries: int, keys: int, width: int) -> str | None:
    """Why cuDNN's attention does not take these shapes, forward or backward; None where it does."""
    widest = 256 if _is_hopper_or_later() else 128
    if width > widest or width % 8:
        return f"keys of width {width}; multiples of 8 up to {widest} will do"
    if queries != keys and (queries % 2 or keys % 2):
        return f"{queries} queries and {keys} keys; unless there are as many, both must be even"
    return None


def _is_hopper_or_later() -> bool:
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return capability.replace(".", "").isdigit() and float(capability) >= 9


@functools.cache
def _latent_kernel(narrow: int) -> Callable[..., Any] | None:
    """Attention of cuDNN below the public function that checks widths; None where it takes no values of this width."""
    if narrow % 8:
        log_fallback(logger, PADDING, f"values of width {narrow}; multiples of 8 will do")
        return None
    try:
        return causal_attention_of_cudnn()
    except ImportError as error:  # JAX has moved it
        log_fallback(logger, PADDING, str(error))
        return None
