"""The norm and the feed-forward layer of the model, and how its matrices begin.

`rms_norm` and `feed_forward` are functions of arrays; the modules hold the same parameters, in float32, and call them.

Shapes: D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.fp8_linear import scaled_feed_forward
from jaxpipe.deepseek.linear import takes_fp8

GATHERED = "gathered"
"""What matrices are called, for `jax.checkpoint`, that each device has gathered from all."""


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"] | None = None, eps: float = 1e-6
) -> Float[Array, "*batch D"]:
    """Root-mean-square normalisation in float32 (float64 for float64), the result in x's dtype.

    Args:
      x: what is normalised.
      scale: of the result; None: none.
      eps: what is added to the mean square.

    Source: arXiv 1910.07467.

    >>> rms_norm(jnp.array([3.0, -3.0]), jnp.array([1.0, 2.0])).round(3).tolist()
    [1.0, -2.0]
    """
    exact = x.astype(wide(x.dtype))
    normal = exact * jax.lax.rsqrt(jnp.mean(exact * exact, -1, keepdims=True) + eps)
    if scale is not None:
        normal = normal * scale.astype(exact.dtype)
    return normal.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a scale.

    Flax's own returns float32 for bfloat16 activations and a float32 scale unless it is told the dtype, and multiplies
    by the scale before it normalises, which rounds otherwise.

    >>> RMSNorm(2)(jnp.array([[3.0, -3.0]], jnp.bfloat16)).dtype
    dtype(bfloat16)
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., D] -> [..., D]``."""
        return rms_norm(x, self.scale[...], self.eps)


def feed_forward(
    x: Float[Array, "*batch D"], w_in: Float[Array, "D twoF"], w_out: Float[Array, "F D"]
) -> Float[Array, "*batch D"]:
    """SwiGLU: ``(silu(gate) * value) @ w_out``, gate and value the halves of ``x @ w_in``; all in x's dtype.

    Source: arXiv 2002.05202.

    >>> feed_forward(jnp.ones((3, 4)), jnp.ones((4, 10)), jnp.ones((5, 4))).shape
    (3, 4)
    """
    # The experts' `swiglu` multiplies in float32, by the weight of each row, and keeps its arguments alone for its own
    # backward pass. Here everything is in x's dtype, and the pipeline decides what is kept.
    gate, value = jnp.split(x @ w_in.astype(x.dtype), 2, -1)
    return (jax.nn.silu(gate) * value) @ w_out.astype(x.dtype)


def use_whole(use: Callable[..., jax.Array], x: jax.Array, parts: Sequence[jax.Array], axis: str | None) -> jax.Array:
    """``use(x, *matrices)`` of matrices of which each device of a mesh axis keeps some rows; None: it has all.

    They are gathered in x's dtype, and again in the backward pass instead of being kept: whole, they are larger than
    what the layer keeps of its tokens. Gradients come back as parts, summed over the axis.
    """
    if axis is None:
        return use(x, *parts)

    def run(x: jax.Array, *parts: jax.Array) -> jax.Array:
        with jax.named_scope("gather"):
            whole = [jax.lax.all_gather(part.astype(x.dtype), axis, tiled=True) for part in parts]
        return use(x, *(checkpoint_name(matrix, GATHERED) for matrix in whole))

    keep = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return jax.checkpoint(run, policy=keep)(x, *parts)


class SwiGLU(nnx.Module):
    """`feed_forward` with its matrices.

    Args:
      width, hidden: sizes.
      rngs: for the parameters.
      branches: residual branches of the model, which add up: smaller steps at first keep deep models stable.
      axis: the mesh axis over which the matrices' rows are spread, or None.
      precision: "fp8": both products in FP8, where their sizes allow it.

    >>> SwiGLU(4, 6, nnx.Rngs(0))(jnp.ones((3, 4))).shape
    (3, 4)
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        rngs: nnx.Rngs,
        *,
        branches: int = 1,
        axis: str | None = None,
        precision: str = "bf16",
    ) -> None:
        self.axis, self.precision = axis, precision
        self.w_in = nnx.Param(normal(rngs, (width, 2 * hidden), width))
        self.w_out = nnx.Param(normal(rngs, (hidden, width), hidden * branches))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., D] -> [..., D]``."""
        width, hidden = x.shape[-1], self.w_in.shape[1] // 2
        if self.precision == "fp8" and takes_fp8(width, hidden) and takes_fp8(hidden, width):
            return scaled_feed_forward(x, self.w_in[...], self.w_out[...], axis=self.axis)
        return use_whole(feed_forward, x, (self.w_in[...], self.w_out[...]), self.axis)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Normal values of variance 1 / fan_in."""
    return jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5
