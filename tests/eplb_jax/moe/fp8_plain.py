"""Experts in FP8 as a loop over them, in NumPy: numbers rounded by ml_dtypes, products in float64."""

import ml_dtypes
import numpy as np

BLOCK = 128


def rounded(x, axis):
    """Numbers of e4m3 with a power of two for 128 of them along an axis, read back in float64."""
    x = np.moveaxis(np.asarray(x, np.float32), axis, -1)
    padded = np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % BLOCK)])
    blocks = padded.reshape(*padded.shape[:-1], -1, BLOCK)
    return np.moveaxis(_rounded(blocks, (-1,)).reshape(padded.shape)[..., : x.shape[-1]], -1, axis)


def rounded_weights(w):
    """The same for 128 by 128 numbers."""
    groups, high, wide = w.shape
    blocks = np.asarray(w, np.float32).reshape(groups, high // BLOCK, BLOCK, wide // BLOCK, BLOCK)
    return _rounded(blocks, (2, 4)).reshape(w.shape)


def _rounded(blocks, axes):
    largest = np.abs(blocks).max(axes, keepdims=True)
    with np.errstate(divide="ignore"):
        scale = np.where(largest > 0, 2.0 ** np.ceil(np.log2(largest.astype(np.float64) / 448)), 1)
    return (blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def bf16(x):
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def expert(rows, w_in, w_out, weight, dy, act_kept=False):
    """One expert's rows: results and all gradients, as the recipe's steps; w_in and w_out are rounded.

    The activations that the last weight gradient reads are made again of what is kept, or kept themselves.
    """
    hidden = bf16(rows @ w_in)
    gate, value = np.split(hidden, 2, -1)
    forward_act = rounded(silu(gate) * value * weight[:, None], 1)

    kept = rounded(hidden, 1)
    gate, value = np.split(kept, 2, -1)
    share = 1 / (1 + np.exp(-gate))
    act_ct = bf16(dy @ w_out.T)
    weighted = act_ct * weight[:, None]
    hidden_ct = np.concatenate([weighted * value * share * (1 + gate * (1 - share)), weighted * silu(gate)], -1)
    act = silu(gate) * value
    dx = rounded(hidden_ct, 1) @ w_in.T
    dw_in = rounded(rows, 0).T @ rounded(hidden_ct, 0)
    dw_out = rounded(forward_act if act_kept else act * weight[:, None], 0).T @ rounded(dy, 0)
    return forward_act @ w_out, dx, dw_in, dw_out, (act_ct * act).sum(-1)


def layer(experts, shared, x, slots, weights, ct):
    """Result and gradients of (w_in, w_out), of the shared ones, of x and of weights."""
    rows, dy = rounded(x, 1), rounded(ct, 1)
    y, dx, dweights = np.zeros(x.shape), np.zeros(x.shape), np.zeros(weights.shape)
    w_in, w_out = map(rounded_weights, experts)
    grads = np.zeros(w_in.shape), np.zeros(w_out.shape)
    for i in range(len(w_in)):
        token, choice = np.nonzero(np.asarray(slots) == i)
        if not len(token):
            continue
        weight = np.asarray(weights, np.float64)[token, choice]
        found = expert(rows[token], w_in[i], w_out[i], weight, dy[token])
        y[token] += found[0]
        dx[token] += found[1]
        grads[0][i], grads[1][i] = found[2:4]
        dweights[token, choice] = found[4]
    w_in, w_out = (rounded_weights(w)[0] for w in shared)
    found = expert(rows, w_in, w_out, np.ones(len(rows)), dy, act_kept=True)
    return y + found[0], grads, (found[2][None], found[3][None]), dx + found[1], dweights
