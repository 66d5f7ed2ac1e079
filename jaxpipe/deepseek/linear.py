"""Linear layers in the precision that a model has: in FP8 where their sizes allow it, said once where they do not.

Everything else of the model is bfloat16 or float32 in either precision, as DeepSeek-V3 has it: embedding and head,
norms, routers, attention's scores and values, and multi-token prediction's projection.
"""

from __future__ import annotations

import logging
import math

import jax
from jaxtyping import Array, Float

from eplb_jax.kernels import fp8_linear
from eplb_jax.kernels.fallback import log_fallback
from eplb_jax.kernels.fp8_linear import keep_matrix, scaled_linears
from eplb_jax.kernels.registry import Backend
from eplb_jax.kernels.scaled import ScaledMatrices

logger = logging.getLogger(__name__)

PRECISIONS = ("bf16", "fp8")
"""Of a model: "bf16" computes in the dtype of the activations, "fp8" multiplies as DeepSeek-V3's training does."""


def linears(
    x: Float[Array, "*batch K"],
    *weights: Float[Array, "K _"] | ScaledMatrices,
    backend: Backend = "auto",
) -> tuple[Float[Array, "*batch _"], ...]:
    """``x @ w`` of each matrix, in FP8 where `takes_fp8` says so, otherwise in x's dtype.

    Args:
      x: quantised once for all of them.
      weights: matrices, or what `keep` made of them.
      backend: see `eplb_jax.kernels.fp8_linear.scaled_linear`.
    """
    made: dict[int, jax.Array] = {}
    plain = [i for i, w in enumerate(weights) if not isinstance(w, ScaledMatrices) and not takes_fp8(*w.shape)]
    kept = [i for i, w in enumerate(weights) if isinstance(w, ScaledMatrices)]
    scaled = [i for i in range(len(weights)) if i not in plain and i not in kept]
    for places in filter(None, (kept, scaled)):
        ys = scaled_linears(x, [weights[i] for i in places], backend=backend)
        made.update(zip(places, ys, strict=True))
    for place in plain:
        w = weights[place]
        assert not isinstance(w, ScaledMatrices)
        made[place] = x @ w.astype(x.dtype)
    return tuple(made[place] for place in range(len(weights)))


def takes_fp8(channels_in: int, channels_out: int) -> bool:
    """Whether a matrix of this size is multiplied in FP8; where it is not, the log says once why.

    Sides that are no multiple of 128 are padded with zeros, unless that makes the matrix larger by more than an eighth.

    >>> takes_fp8(7168, 576), takes_fp8(64, 96)
    (True, False)
    """
    reason = fp8_linear.why_not(channels_in, channels_out)
    if reason is not None:
        log_fallback(logger, "a Linear of a model in FP8 stays in the dtype of its activations", reason)
    return reason is None


def keep(w: jax.Array, inputs: int = 1, *, backend: Backend = "auto") -> jax.Array | ScaledMatrices:
    """A matrix in 8 bits, as inference keeps it, where `takes_fp8`; otherwise as it is.

    Args:
      w: of two axes or more, whose first ones are summed over.
      inputs: how many these are.
      backend: of quantisation.

    >>> keep(jax.numpy.ones((128, 2, 64))).numbers.shape
    (1, 128, 128)
    """
    flat = flatten(w, inputs)
    assert not isinstance(flat, ScaledMatrices)
    return keep_matrix(flat, backend=backend) if takes_fp8(*flat.shape) else w


def flatten(w: jax.Array | ScaledMatrices, inputs: int = 1) -> jax.Array | ScaledMatrices:
    """A matrix of two axes of one whose first ``inputs`` axes are summed over; what is kept in 8 bits is one."""
    if isinstance(w, ScaledMatrices):
        return w
    return w.reshape(math.prod(w.shape[:inputs]), -1)
