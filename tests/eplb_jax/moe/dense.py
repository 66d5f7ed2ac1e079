"""The mixture-of-experts layer as a loop over experts: what the sharded layer must equal."""

import jax
import jax.numpy as jnp
import numpy as np

from eplb_jax import MoEParams, Placement


def choose(logits, bias, config):
    """Experts [T, k] of each token, as plain loops over tokens."""
    scores = 1 / (1 + np.exp(-logits)) if config.scoring == "sigmoid" else np.exp(logits)
    if config.scoring == "softmax":
        scores = scores / scores.sum(-1, keepdims=True)
    chosen = []
    for score in scores:
        choice = score + bias
        size = len(choice) // config.num_groups
        best_two = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(config.num_groups)]
        groups = np.argsort(-np.array(best_two), kind="stable")[: config.top_groups]
        allowed = np.isin(np.arange(len(choice)) // size, groups)
        chosen.append(np.argsort(-np.where(allowed, choice, -np.inf), kind="stable")[: config.top_k])
    return np.array(chosen)


def swiglu(x, w_in, w_out):
    gate, value = jnp.split(x @ w_in, 2, -1)
    return (jax.nn.silu(gate) * value) @ w_out


def layer(params: MoEParams, x, config, chosen, kept=None):
    """Output of all tokens, experts chosen beforehand; kept [T, k]: which choices are not dropped."""
    router = config.router
    logits = x @ params.router
    scores = jax.nn.sigmoid(logits) if router.scoring == "sigmoid" else jax.nn.softmax(logits, -1)
    weights = jnp.take_along_axis(scores, chosen, 1)
    if router.normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    weights = weights * router.scale
    if kept is not None:
        weights = weights * kept
    y = jnp.zeros_like(x)
    for expert in range(router.num_experts):
        share = jnp.where(chosen == expert, weights, 0).sum(-1)
        y = y + share[:, None] * swiglu(x, params.experts.w_in[expert], params.experts.w_out[expert])
    if params.shared is not None:
        y = y + swiglu(x, params.shared.w_in[0], params.shared.w_out[0])
    return y


def balance_loss(params, x, config, chosen, sequences):
    """Sequence by sequence."""
    losses = []
    for part, picked in zip(jnp.split(x, sequences), jnp.split(chosen, sequences), strict=True):
        logits = part @ params.router
        scores = jax.nn.sigmoid(logits) if config.router.scoring == "sigmoid" else jax.nn.softmax(logits, -1)
        p = (scores / scores.sum(-1, keepdims=True)).mean(0)
        counts = jnp.bincount(picked.ravel(), length=config.router.num_experts)
        losses.append((counts * config.router.num_experts / picked.size * p).sum())
    return sum(losses) / sequences


def placement_of(phy2log, experts):
    return Placement.from_phy2log(np.array([phy2log]), experts).padded().of_layer(0)
