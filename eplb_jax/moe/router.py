"""Which experts a token goes to: scores, selection, weights, and what keeps the choice balanced.

DeepSeek-V3's router is the default of `RouterConfig`; all of it is float32 (float64 for float64 logits).

Shapes: T tokens, E logical experts, k experts of each token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.mesh_axis import same_axes
from eplb_jax.plan.load import count_tokens


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts; the defaults are DeepSeek-V3's.

    Attributes:
      num_experts: logical experts.
      top_k: experts of each token.
      num_groups: equal groups of experts, in order; 1 is no grouping.
      top_groups: groups that a token's experts may be of, those whose best experts have the highest sum.
      group_best: how many of a group's experts that sum is of; DeepSeek-V2's groups count by their best one.
      scoring: "sigmoid", or "softmax" over all experts.
      normalise: whether a token's weights are divided by their sum.
      scale: what weights are multiplied by.
      balanced: whether tokens go to experts in turn, whatever their scores, which then only weigh them. For measuring
        speed, as in DeepSeek's published profiles; nothing is learnt so.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    num_experts: int = 256
    top_k: int = 8
    num_groups: int = 8
    top_groups: int = 4
    scoring: str = "sigmoid"
    normalise: bool = True
    scale: float = 2.5
    balanced: bool = False
    group_best: int = 2

    def __post_init__(self) -> None:
        """Checks the sizes."""
        if self.num_experts < 1 or self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts={self.num_experts} do not divide into num_groups={self.num_groups} equal groups; "
                "num_groups=1 always fits"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups={self.top_groups}: it must be between 1 and num_groups={self.num_groups}")
        allowed = self.num_experts // self.num_groups * self.top_groups
        if not 1 <= self.top_k <= allowed:
            raise ValueError(
                f"top_k={self.top_k}: a token chooses among the {allowed} experts of {self.top_groups} groups, "
                f"so take 1 to {allowed}, or more groups"
            )
        if self.group_best < 1:
            raise ValueError(f"group_best={self.group_best}: a group counts by at least one of its experts")
        if self.scoring not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring={self.scoring!r}: it must be 'sigmoid' or 'softmax'")


class Routing(NamedTuple):
    """What the router decides.

    Attributes:
      experts: the logical experts of each token, best first; int32.
      weights: their weights; float32 or float64, differentiable.
      scores: of all experts, without bias; float32 or float64.
      loads: tokens that chose each expert; int32, for `eplb_jax.plan.load` and `update_bias`.
    """

    experts: Int[Array, "tokens k"]
    weights: Float[Array, "tokens k"]
    scores: Float[Array, "tokens experts"]
    loads: Int[Array, " experts"]


def route(
    logits: Float[Array, "tokens experts"],
    config: RouterConfig,
    *,
    bias: Float[Array, " experts"] | None = None,
    mask: Bool[Array, " tokens"] | None = None,
) -> Routing:
    """Chooses each token's experts.

    Experts are selected by score plus bias, first by group, and weighted by score alone. Of equal ones the first is
    taken.

    Args:
      logits: float32 or float64; see `router_logits`.
      config: sizes and kind.
      bias: for selection only, not differentiated; None is none.
      mask: which tokens are real. The others choose expert -1 with weight 0, have scores of 0, and count nowhere,
        whatever their logits hold.

    Raises:
      ValueError: shapes that do not fit the configuration.

    Source: the DeepSeek-V3 report, arXiv 2412.19437, equations 12 to 16.

    >>> config = RouterConfig(num_experts=4, top_k=2, num_groups=2, top_groups=1, scale=1.0)
    >>> routing = route(jnp.array([[2.0, 0.0, 1.0, 1.5]]), config)
    >>> routing.experts.tolist(), routing.loads.tolist()
    ([[3, 2]], [0, 0, 1, 1])
    """
    experts = config.num_experts
    if logits.ndim != 2 or logits.shape[1] != experts:
        raise ValueError(f"logits have shape {logits.shape}: they must be [tokens, experts] with {experts} experts")
    if logits.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"logits are {logits.dtype}: take float32 or float64, or `router_logits`, which makes them so")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias has shape {bias.shape}: it must be ({experts},)")
    logits = of_real_tokens(logits, mask)
    scores = jax.nn.sigmoid(logits) if config.scoring == "sigmoid" else jax.nn.softmax(logits, -1)
    chosen = _in_turn(logits.shape[0], config) if config.balanced else _best(scores, bias, config)
    # A product with one-hot rows instead of a gather, whose transpose would be a scatter.
    hot = chosen[..., None] == jnp.arange(experts, dtype=jnp.int32)
    weights = jnp.where(hot, scores[:, None], 0).sum(-1)
    if config.normalise:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    weights = weights * config.scale
    if mask is not None:
        chosen = jnp.where(mask[:, None], chosen, -1)
        weights, scores = of_real_tokens(weights, mask), of_real_tokens(scores, mask)
    return Routing(chosen, weights, scores, count_tokens(chosen, experts))


def of_real_tokens(rows: Float[Array, "tokens n"], mask: Bool[Array, " tokens"] | None) -> Float[Array, "tokens n"]:
    """Sets the rows of tokens that are not real to zero, whatever they hold: zero times NaN would be NaN.

    Raises:
      ValueError: a mask that is not bool, or not of these tokens.

    >>> of_real_tokens(jnp.array([[1.0], [jnp.nan]]), jnp.array([True, False])).tolist()
    [[1.0], [0.0]]
    """
    if mask is None:
        return rows
    if mask.shape != rows.shape[:1] or mask.dtype != jnp.bool_:
        raise ValueError(f"mask is {mask.dtype} of shape {mask.shape}: it must be bool {rows.shape[:1]}")
    return jnp.where(mask[:, None], rows, 0)


def _best(scores: jax.Array, bias: jax.Array | None, config: RouterConfig) -> jax.Array:
    """Each token's experts by score plus bias."""
    choice = jax.lax.stop_gradient(scores)
    if bias is not None:
        choice = choice + jax.lax.stop_gradient(bias).astype(choice.dtype)
    if config.top_groups < config.num_groups:
        choice = _keep_best_groups(choice, config)
    return jax.lax.top_k(choice, config.top_k)[1].astype(jnp.int32)


def _in_turn(tokens: int, config: RouterConfig) -> jax.Array:
    """Each token's experts in turn, out of as many groups as the router would choose from."""
    size = config.num_experts // config.num_groups
    each = -(-config.top_k // config.top_groups)
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    place = jnp.arange(config.top_k, dtype=jnp.int32)
    group = (token + place % config.top_groups * (config.num_groups // config.top_groups)) % config.num_groups
    return group * size + (token // config.num_groups * each + place // config.top_groups) % size


def router_logits(
    x: Float[Array, "tokens width"], kernel: Float[Array, "width experts"]
) -> Float[Array, "tokens experts"]:
    """Logits in float32 whatever the activations' dtype (float64 for float64), at full precision.

    A float32 product is slow on a GPU, but bfloat16 activations are exact in bfloat16, and a float32 kernel is the sum
    of three bfloat16 ones: the products are three, on the units that are fast. The backward pass keeps x as it is.
    """
    return _router_logits(*same_axes(x, kernel))


@jax.custom_vjp
def _router_logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if x.dtype == jnp.bfloat16:
        return _sum_of_parts(jnp.matmul(x, _parts(kernel, 3), preferred_element_type=jnp.float32), 3)
    dtype = wide(x.dtype)
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), precision=jax.lax.Precision.HIGHEST)


def _router_logits_bwd(residuals: tuple[jax.Array, jax.Array], ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    if x.dtype == jnp.bfloat16:
        parts = _parts(ct, 3)
        kernel_ct = _sum_of_parts(jnp.matmul(x.T, parts, preferred_element_type=jnp.float32), 3)
        # The result has bfloat16's 8 bits, so that two parts, 16 bits, of either factor are enough.
        first, second, _ = jnp.split(parts, 3, -1)
        large, small = jnp.split(_parts(kernel, 2), 2, -1)
        left, right = jnp.concatenate([first, first, second], -1), jnp.concatenate([large, small, large], -1)
        x_ct = jnp.matmul(left, right.T, preferred_element_type=jnp.float32)
    else:
        x_ct = jnp.matmul(ct, kernel.T.astype(ct.dtype), precision=jax.lax.Precision.HIGHEST)
        kernel_ct = jnp.matmul(x.T.astype(ct.dtype), ct, precision=jax.lax.Precision.HIGHEST)
    return x_ct.astype(x.dtype), kernel_ct.astype(kernel.dtype)


_router_logits.defvjp(lambda x, kernel: (_router_logits(x, kernel), (x, kernel)), _router_logits_bwd)


def _parts(array: jax.Array, count: int) -> jax.Array:
    """bfloat16 arrays, side by side, that add up to a float32 one: 8 bits of it each."""
    rest, parts = array.astype(jnp.float32), []
    for _ in range(count):
        part = jax.lax.reduce_precision(rest, 8, 7)  # bfloat16; XLA may leave out a cast there and back
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.concatenate(parts, -1)


def _sum_of_parts(array: jax.Array, count: int) -> jax.Array:
    """The sum of arrays side by side, the small ones first."""
    return functools.reduce(jnp.add, reversed(jnp.split(array, count, -1)))


def balance_loss(
    routing: Routing,
    config: RouterConfig,
    *,
    sequences: int = 1,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
) -> Float[Array, ""]:
    """The sequence-wise balance loss, without its factor: 1 if experts are equally likely, more if not.

    Mean over real tokens of their sequence's ``sum(f * p)``, f an expert's share of the chosen experts times their
    number and p its mean share of a token's scores. Only p is differentiated. Without a mask that is the mean over
    sequences. It does not depend on how sequences are divided over devices and microbatches if devices are named here,
    or weighed by their real tokens, and microbatches are weighed by theirs, as `jaxpipe.value_and_grad` does it with
    the number of real tokens as ``weight``.

    Args:
      routing: of tokens that are whole sequences, one after the other.
      config: what they were routed by.
      sequences: how many sequences of equal length.
      axis_name: mesh axes, as in `jax.lax.psum`, whose devices' tokens the mean is over, too.

    Raises:
      ValueError: tokens that do not divide into sequences.

    Source: the DeepSeek-V3 report, arXiv 2412.19437, equations 17 to 20; f counts the experts that are chosen, bias
    included.
    """
    tokens, experts = routing.scores.shape
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"{tokens} tokens do not divide into sequences={sequences} of equal length")
    dtype = routing.scores.dtype
    real = (routing.experts >= 0).any(-1).astype(dtype)  # sequences count by their real tokens
    hot = (routing.experts[..., None] == jnp.arange(experts, dtype=jnp.int32)).sum(1).astype(dtype)
    shares = routing.scores / (routing.scores.sum(-1, keepdims=True) + 1e-20) * real[:, None]
    length = real.reshape(sequences, -1).sum(1)
    safe = jnp.maximum(length, 1)[:, None]
    f = hot.reshape(sequences, -1, experts).sum(1) * (experts / config.top_k) / safe
    p = shares.reshape(sequences, -1, experts).sum(1) / safe
    total, count = ((f * p).sum(1) * length).sum(), length.sum()
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def update_bias(
    bias: Float[Array | np.ndarray, "*layers experts"],
    loads: Num[Array | np.ndarray, "*layers experts"],
    rate: float | Float[Array, ""] = 1e-3,
) -> Float[Array, "*layers experts"]:
    """The selection bias after a step: more for experts with less than their layer's mean load, less for the others.

    An expert with exactly the mean load keeps its bias; integer counts are compared exactly, however large. So does a
    layer with loads that are not finite, as nothing can be told from them.

    Args:
      bias: before the step; better float32, as bfloat16 has no place for a small rate beside a large bias.
      loads: tokens of the step that chose each expert, summed over all data-parallel ranks; any integers or floats.
      rate: how much a bias changes.

    Returns:
      The new bias, in its dtype.

    Raises:
      ValueError: shapes that are not the same, a bias that is not floating, loads that are no numbers.

    Source: auxiliary-loss-free balancing, arXiv 2408.15664; the DeepSeek-V3 report, arXiv 2412.19437, 2.1.2.

    >>> update_bias(jnp.zeros((2, 3)), jnp.array([[4, 1, 1], [1, 2, 3]]), rate=0.5).tolist()
    [[-0.5, 0.5, 0.5], [0.5, 0.0, -0.5]]
    """
    bias = jnp.asarray(bias)
    found: Any = loads if isinstance(loads, jax.Array) else np.asarray(loads)  # JAX would wrap 64 bits into 32
    if bias.shape != found.shape or not bias.ndim:
        raise ValueError(
            f"bias has shape {bias.shape}, loads have {found.shape}: both must be [experts], or [layers, experts]"
        )
    counted = jnp.issubdtype(found.dtype, jnp.integer)
    if not jnp.issubdtype(bias.dtype, jnp.floating) or not (counted or jnp.issubdtype(found.dtype, jnp.floating)):
        raise ValueError(
            f"bias is {bias.dtype} and loads are {found.dtype}: a bias is floating, loads are integers or floating"
        )
    dtype = wide(bias.dtype)
    sign = jnp.asarray((_compare_counts if counted else _compare_shares)(found), dtype)
    return (bias.astype(dtype) + jnp.asarray(rate, dtype) * sign).astype(bias.dtype)


def _compare_counts(loads: Any) -> Any:
    """The sign of mean minus load, exactly: the mean is a whole number of tokens and a rest, which no sum overflows."""
    xp: Any = jnp if isinstance(loads, jax.Array) else np
    experts = loads.shape[-1]
    loads = loads if loads.dtype.itemsize >= 4 else loads.astype(np.int32)
    whole, rest = (part.sum(-1, keepdims=True, dtype=loads.dtype) for part in xp.divmod(loads, experts))
    whole, rest = whole + rest // experts, rest % experts
    return xp.where(loads == whole, xp.sign(rest).astype(np.int32), xp.where(loads < whole, 1, -1))


def _compare_shares(loads: Any) -> jax.Array:
    """The sign of mean minus load, exact where sums of loads are. Zeros where not all are finite."""
    loads = jnp.asarray(loads, jax.dtypes.canonicalize_dtype(wide(loads.dtype)))
    more = loads - loads.min(-1, keepdims=True)
    # Times a power of two, so that no sum overflows; a quotient would round.
    more = jnp.ldexp(more, -jnp.frexp(more.max(-1, keepdims=True))[1])
    sign = jnp.sign(more.sum(-1, keepdims=True) - more.shape[-1] * more)
    return jnp.where(jnp.isfinite(loads).all(-1, keepdims=True), sign, 0)


def _keep_best_groups(choice: jax.Array, config: RouterConfig) -> jax.Array:
    """Scores [T, E], -inf outside each token's best groups."""
    tokens, experts = choice.shape
    groups = choice.reshape(tokens, config.num_groups, -1)
    best = jax.lax.top_k(groups, min(config.group_best, groups.shape[-1]))[0].sum(-1)
    chosen = jax.lax.top_k(best, config.top_groups)[1]
    kept = (chosen[..., None] == jnp.arange(config.num_groups, dtype=chosen.dtype)).any(1)
    return jnp.where(kept[..., None], groups, -jnp.inf).reshape(tokens, experts)
