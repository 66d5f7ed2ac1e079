"""Linear layers in FP8, as DeepSeek-V3 trains them: their three products read numbers of 8 bits.

    forward   y  = rows(x) . w            rows of x with a scale for 128 channels, w with one for 128 by 128
    backward  dx = rows(dy) . w'          the same numbers of w, the other side last
              dw = columns(x) . columns(dy)    scaled along the rows

Rows of x in 8 bits are what is kept of x, or of an x that something else keeps anyway, their scales; they become
columns when the weight's gradient is made. Both layouts of a matrix are made of it together and depend on nothing else,
so a pipeline makes them once a step. Each value is quantised once for each layout, and dy for both in one pass.

Sides of matrices that are no multiple of 128 are padded with zeros, and rows where they are what is summed over.

R rows, K channels in, N channels out, D width and F hidden width of a feed-forward layer.

Source: the DeepSeek-V3 report, arXiv 2412.19437, 3.3.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from eplb_jax.kernels.fp8_gemm.interface import scaled_dot, scaled_dot_outer
from eplb_jax.kernels.grouped_gemm.layout import round_up
from eplb_jax.kernels.mesh_axis import same_axes, size_and_index
from eplb_jax.kernels.quantise import columns_of, gate, gate_backward, quantise, quantise_weights
from eplb_jax.kernels.registry import Backend
from eplb_jax.kernels.scaled import BLOCK, ScaledMatrices, ScaledRows, in_whole_blocks, quantise_rows

DTYPES = ("bfloat16", "float32")
"""Of what a Linear in FP8 is given and gives."""
MOST_PADDING = 1 / 8
"""Part of a matrix that padding may add: 576 columns, as those of DeepSeek's latents, become 640."""
WIDE = 4096
"""Columns of a matrix whose product has a multiprocessor's tiles many times over, so that it gains nothing by others
beside it."""
LEAST_ROWS = 64
"""Of a product by our kernels; fewer, and numbers that are no multiple of 8, are padded to a multiple of so many."""
MATRIX = "matrix in 8 bits"
"""Name of each layout of a matrix. A pipeline makes once a step what is no more bytes than its parameters: each layout
is not, both together may be, where they are padded."""


def why_not(channels_in: int, channels_out: int) -> str | None:
    """Why a matrix of this size is not multiplied in FP8; None if it is.

    >>> why_not(7168, 576), why_not(64, 24)
    (None, 'a matrix of 64 x 24 would be padded to 128 x 128, by more than an eighth: FP8 wants multiples of 128')
    """
    wide, high = round_up(channels_in, BLOCK), round_up(channels_out, BLOCK)
    if wide * high <= (1 + MOST_PADDING) * channels_in * channels_out:
        return None
    return (
        f"a matrix of {channels_in} x {channels_out} would be padded to {wide} x {high}, by more than an eighth: FP8 "
        f"wants multiples of {BLOCK}"
    )


def scaled_linear(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"] | ScaledMatrices,
    *,
    backend: Backend = "auto",
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch N"]:
    """``x @ w`` in FP8, its gradients too.

    Args:
      x: bfloat16 or float32; quantised for each 128 channels of a row.
      w: bfloat16 or float32; or what `keep_matrix` made of it, which has no gradient.
      backend: of quantisation and products, as for `eplb_jax.grouped_matmul`.
      dtype: of the result, bfloat16 or float32; None: that of x.

    Raises:
      ValueError: shapes that do not fit, other dtypes, "mosaic" for what it cannot do, a gradient of `keep_matrix`'s.

    >>> scaled_linear(jnp.ones((2, 5, 128), jnp.bfloat16), jnp.ones((128, 200))).shape
    (2, 5, 200)
    """
    return scaled_linears(x, (w,), backend=backend, dtype=dtype)[0]


def scaled_linears(
    x: Float[Array, "*batch K"],
    weights: Sequence[Float[Array, "K _"] | ScaledMatrices],
    *,
    backend: Backend = "auto",
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "*batch _"], ...]:
    """`scaled_linear` of several matrices that read the same x, which is quantised once.

    One product makes all where any is narrower than `WIDE`, so that a chip is full. Wide ones have products of their
    own: what one product makes would be copied apart for who reads the results, and their gradients together again.

    Args:
      x, backend, dtype: see `scaled_linear`.
      weights: all matrices, or all from `keep_matrix`, whose results then have their padded widths.

    Raises:
      ValueError: see `scaled_linear`.

    >>> [y.shape for y in scaled_linears(jnp.ones((2, 128)), (jnp.ones((128, 128)), jnp.ones((128, 64))))]
    [(2, 128), (2, 64)]
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    _check(x, weights, dtype)
    rows, count = _rows_of(x)
    settings = _Settings(backend, dtype, x.dtype)
    kept = tuple(w for w in weights if isinstance(w, ScaledMatrices))
    if kept:
        made: Any = _kept_linears(rows, kept, settings)
    else:
        plain = [w for w in weights if not isinstance(w, ScaledMatrices)]
        padded = [_padded(w, 0, 1) for w in plain]
        apart = len(padded) == 1 or min(w.shape[1] for w in padded) >= WIDE
        x_rows, *matrices = same_axes(rows, *(padded if apart else [jnp.concatenate(padded, 1)]))
        ys: Any = _linears(x_rows, tuple(matrices), settings)
        if not apart:
            (both,) = ys
            ys = jnp.split(both, list(itertools.accumulate(w.shape[1] for w in padded[:-1])), 1)
        made = [y[:, : w.shape[1]] for y, w in zip(ys, plain, strict=True)]
    return tuple(y[:count].reshape(*x.shape[:-1], y.shape[1]) for y in made)


def keep_matrix(w: Float[Array, "K N"], *, backend: Backend = "auto") -> ScaledMatrices:
    """A matrix in 8 bits for `scaled_linear`, both sides padded to multiples of 128: half the bytes of bfloat16.

    >>> keep_matrix(jnp.ones((128, 576))).numbers.shape
    (1, 640, 128)
    """
    return quantise_weights(_padded(w, 0, 1)[None], backend=backend)[0]


def scaled_feed_forward(
    x: Float[Array, "*batch D"],
    w_in: Float[Array, "D_part twoF"],
    w_out: Float[Array, "F_part D"],
    *,
    backend: Backend = "auto",
    axis: str | None = None,
) -> Float[Array, "*batch D"]:
    """SwiGLU in FP8: ``(silu(gate) * value) @ w_out``, gate and value the halves of ``x @ w_in``.

    Kept are x and its hidden activations in 8 bits; what the gate makes of them is made again, quantised at once.

    Args:
      x: bfloat16 or float32; the result's dtype, too.
      w_in, w_out: bfloat16 or float32.
      backend: see `scaled_linear`.
      axis: the mesh axis over which the rows of both matrices are spread, bound by `jax.shard_map`. They are gathered
        in x's dtype, and again in the backward pass: whole, they are larger than what is kept. Gradients are summed
        over the axis and come back as parts. None: they are whole.

    Raises:
      ValueError: see `scaled_linear`.

    >>> scaled_feed_forward(jnp.ones((3, 128)), jnp.ones((128, 512)), jnp.ones((256, 128))).shape
    (3, 128)
    """
    hidden, parts = w_in.shape[1] // 2, size_and_index(axis)[0]
    if w_in.shape != (x.shape[-1] // parts, 2 * hidden) or w_out.shape != (hidden // parts, x.shape[-1]):
        raise ValueError(
            f"w_in {w_in.shape} and w_out {w_out.shape} do not fit x {x.shape}: they must be [D, 2 * F] and [F, D]"
            + (f", of each one part of {parts}" if axis else "")
        )
    for w in (w_in, w_out):
        shape = jax.ShapeDtypeStruct((1, w.shape[0]), x.dtype)
        _check(shape, (w,), x.dtype)
    rows, count = _rows_of(x)
    settings = _Settings(backend, x.dtype, x.dtype)
    if axis is None:
        y: Any = _feed_forward(*same_axes(rows, *_halves_padded(w_in, w_out)), settings)
    else:
        y = _gathered_feed_forward(*same_axes(rows, w_in, w_out), settings, axis)
    return y[:count, : x.shape[-1]].reshape(x.shape)


class _Settings(NamedTuple):
    """What is static: the backend, and the dtypes of the result and of x."""

    backend: Backend
    dtype: Any
    x_dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linears(x: jax.Array, weights: tuple[jax.Array, ...], settings: _Settings) -> tuple[jax.Array, ...]:
    return _linears_fwd(x, weights, settings)[0]


def _linears_fwd(
    x: jax.Array, weights: tuple[jax.Array, ...], settings: _Settings
) -> tuple[tuple[jax.Array, ...], Any]:
    rows = quantise_rows(x)
    layouts = [_matrix(w, settings) for w in weights]
    ys = tuple(scaled_dot(rows, w, backend=settings.backend, dtype=settings.dtype) for w, _ in layouts)
    return ys, (rows, [transposed for _, transposed in layouts], [jnp.zeros(0, w.dtype) for w in weights])


def _linears_bwd(settings: _Settings, kept: Any, cts: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rows, transposed, likes = kept
    dys = [_both_ways(ct, settings) for ct in cts]
    # What several matrices make of dx is summed in float32, as within one product.
    dtype = settings.x_dtype if len(cts) == 1 else jnp.float32
    parts = [
        scaled_dot(_first(dy, len(ct)), w, backend=settings.backend, dtype=dtype)
        for (dy, _), ct, w in zip(dys, cts, transposed, strict=True)
    ]
    columns = _columns(rows, settings)
    dws = (_outer(columns, dy, like.dtype, settings) for (_, dy), like in zip(dys, likes, strict=True))
    return functools.reduce(jnp.add, parts).astype(settings.x_dtype), tuple(dws)


_linears.defvjp(_linears_fwd, _linears_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kept_linears(x: jax.Array, weights: tuple[ScaledMatrices, ...], settings: _Settings) -> tuple[jax.Array, ...]:
    rows = quantise_rows(x)
    return tuple(scaled_dot(rows, w, backend=settings.backend, dtype=settings.dtype) for w in weights)


def _no_gradient(*_: Any) -> Any:
    raise ValueError(
        "matrices that keep_matrix made have no gradient, and none passes through them: give scaled_linear the "
        "matrices themselves where they are trained"
    )


_kept_linears.defvjp(_no_gradient, _no_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _feed_forward(x: jax.Array, w_in: jax.Array, w_out: jax.Array, settings: _Settings) -> jax.Array:
    return _feed_forward_fwd(x, w_in, w_out, settings)[0]


def _feed_forward_fwd(x: jax.Array, w_in: jax.Array, w_out: jax.Array, settings: _Settings) -> tuple[jax.Array, Any]:
    rows, backend = quantise_rows(x), settings.backend
    (into, into_transposed), (out, out_transposed) = _matrix(w_in, settings), _matrix(w_out, settings)
    hidden = scaled_dot(rows, into, backend=backend, dtype=settings.dtype)
    act, hidden = gate(hidden, jnp.ones(len(x), jnp.float32), backend=backend)
    y = scaled_dot(act, out, backend=backend, dtype=settings.dtype)
    return y, (rows, hidden, into_transposed, out_transposed, jnp.zeros(0, w_in.dtype), jnp.zeros(0, w_out.dtype))


def _feed_forward_bwd(settings: _Settings, kept: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, hidden, into_transposed, out_transposed, in_like, out_like = kept
    backend, count = settings.backend, len(ct)
    dy, dy_columns = _both_ways(ct, settings)
    act_ct = scaled_dot(dy, out_transposed, backend=backend, dtype=settings.dtype)
    weight = jnp.ones(len(dy.numbers), jnp.float32)
    gates = gate_backward(in_whole_blocks(hidden), weight, act_ct, backend=backend)
    dh, dh_columns, act_columns = _together((gates.hidden, gates.hidden_columns, gates.act_columns))
    dx = scaled_dot(_first(dh, count), into_transposed, backend=backend, dtype=settings.x_dtype)
    w_out_ct = _outer(act_columns, dy_columns, out_like.dtype, settings)
    return dx, _outer(_columns(rows, settings), dh_columns, in_like.dtype, settings), w_out_ct


_feed_forward.defvjp(_feed_forward_fwd, _feed_forward_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _gathered_feed_forward(x: jax.Array, w_in: jax.Array, w_out: jax.Array, settings: _Settings, axis: str) -> Any:
    return _gathered_fwd(x, w_in, w_out, settings, axis)[0]


def _gathered_fwd(x: jax.Array, w_in: jax.Array, w_out: jax.Array, settings: _Settings, axis: str) -> tuple[Any, Any]:
    y, (rows, hidden, *_) = _feed_forward_fwd(x, *_gathered(w_in, w_out, settings, axis), settings)
    return y, (rows, hidden, w_in, w_out)


def _gathered_bwd(settings: _Settings, axis: str, kept: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, hidden, *parts = kept
    whole, pull = jax.vjp(lambda w_in, w_out: _gathered(w_in, w_out, settings, axis), *parts)
    transposed = [_matrix(w, settings)[1] for w in whole]
    likes = [jnp.zeros(0, w.dtype) for w in whole]
    dx, *cts = _feed_forward_bwd(settings, (rows, hidden, *transposed, *likes), ct)
    return dx, *pull(tuple(cts))


_gathered_feed_forward.defvjp(_gathered_fwd, _gathered_bwd)


def _gathered(w_in: jax.Array, w_out: jax.Array, settings: _Settings, axis: str) -> tuple[jax.Array, jax.Array]:
    """Both matrices whole and padded, of the parts of all devices."""
    with jax.named_scope("gather"):
        whole = (jax.lax.all_gather(w.astype(settings.x_dtype), axis, tiled=True) for w in (w_in, w_out))
        w_in, w_out = whole
    return _halves_padded(w_in, w_out)


def _halves_padded(w_in: jax.Array, w_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both matrices with zeros up to multiples of 128; gate and value of the first are padded each by itself."""
    w_in = _padded(w_in.reshape(w_in.shape[0], 2, -1), 0, 2)
    return w_in.reshape(w_in.shape[0], -1), _padded(w_out, 0, 1)


def _matrix(w: jax.Array, settings: _Settings) -> tuple[ScaledMatrices, ScaledMatrices]:
    """Both layouts of a matrix, for the forward product and for the input gradient."""
    both = quantise_weights(w[None], backend=settings.backend)
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, MATRIX), both)


def _both_ways(ct: jax.Array, settings: _Settings) -> tuple[ScaledRows, ScaledRows]:
    """Rows and columns of a gradient, its rows padded to a multiple of 128."""
    return _together(quantise(_padded(ct, 0), backend=settings.backend))


def _together(made: Any) -> Any:
    """The same values, made at one place: otherwise a pipeline would keep their source in 16 bits for the second."""
    return jax.lax.optimization_barrier(made)


def _columns(rows: ScaledRows, settings: _Settings) -> ScaledRows:
    return columns_of(in_whole_blocks(rows), backend=settings.backend)


def _outer(x: ScaledRows, dy: ScaledRows, dtype: DTypeLike, settings: _Settings) -> jax.Array:
    return scaled_dot_outer(x, dy, backend=settings.backend, dtype=dtype)


def _rows_of(x: jax.Array) -> tuple[jax.Array, int]:
    """Rows with zeros behind them as products want them, and how many there were: see `fp8_gemm.mosaic.why_not`."""
    rows = _padded(x.reshape(-1, x.shape[-1]), 1)
    count = rows.shape[0]
    missing = -count % LEAST_ROWS if count % 8 or count < LEAST_ROWS else 0
    return (jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows), count


def _first(rows: ScaledRows, count: int) -> ScaledRows:
    """The first rows."""
    return rows if count == len(rows.numbers) else ScaledRows(rows.numbers[:count], rows.scales[:, :count])


def _padded(x: jax.Array, *axes: int) -> jax.Array:
    """Zeros up to multiples of 128 behind some axes."""
    missing = [-size % BLOCK if axis in axes else 0 for axis, size in enumerate(x.shape)]
    return jnp.pad(x, [(0, count) for count in missing]) if any(missing) else x


def _check(x: Any, weights: Sequence[Any], dtype: Any) -> None:
    """Raises ValueError for shapes that do not fit, and for dtypes that FP8 does not stand for."""
    if not weights or len({isinstance(w, ScaledMatrices) for w in weights}) != 1:
        raise ValueError(f"{len(weights)} weights: give one or more, all matrices or all from keep_matrix")
    for name, found in (("x", x.dtype), ("the result", dtype)):
        if jnp.dtype(found).name not in DTYPES:
            raise ValueError(f"{name} is {found}: a Linear in FP8 has {' or '.join(DTYPES)}; cast it, or leave FP8 out")
    for w in weights:
        if isinstance(w, ScaledMatrices):
            wanted = (1, w.numbers.shape[-2], round_up(x.shape[-1], BLOCK))
            if w.numbers.shape != wanted:
                raise ValueError(f"a kept matrix of {w.numbers.shape} does not fit x {x.shape}: it must be {wanted}")
        elif len(w.shape) != 2 or w.shape[0] != x.shape[-1]:
            raise ValueError(f"w {w.shape} does not fit x {x.shape}: it must be [{x.shape[-1]}, N]; reshape it")
        elif jnp.dtype(w.dtype).name not in DTYPES:
            raise ValueError(f"w is {w.dtype}: a Linear in FP8 has {' or '.join(DTYPES)}; cast it, or leave FP8 out")
