"""Values of 16 or 32 bits in, numbers of 8 bits with scales out, in one pass over memory: for FP8 products and gates.

A product reads rows that are scaled along themselves; its weight gradient reads the same rows transposed and scaled
along the rows. Both are written together where both are needed. XLA's form of each function, ``…_by_xla``, is what
runs where no kernel does, and what the kernels equal.

R rows in blocks of 128, each of one group, whose rows are a prefix of the block: ``valid`` says how many. The others
may hold anything. They count as zeros in what is scaled along the rows, and give unspecified rows elsewhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eplb_jax.kernels import registry, scaled
from eplb_jax.kernels.gated import GateGradients, gated, gradients
from eplb_jax.kernels.registry import Backend
from eplb_jax.kernels.scaled import (
    BLOCK,
    ScaledMatrices,
    ScaledRows,
    dequantise_rows,
    quantise_columns,
    quantise_matrices,
)

DTYPES = ("bfloat16", "float16", "float32")
"""What can be quantised: float32 holds all of these."""


def quantise_rows(x: Float[Array, "R K"], *, power_of_two: bool = True, backend: Backend = "auto") -> ScaledRows:
    """`eplb_jax.kernels.scaled.quantise_rows`, by our own kernel where it can.

    Args:
      x: bfloat16, float16 or float32; K is a multiple of 128.
      power_of_two, backend: see `quantise`.

    Raises:
      ValueError: K that is no multiple of 128; another dtype; "mosaic" for what it cannot do.

    >>> quantise_rows(jnp.ones((3, 256), jnp.bfloat16)).scales.shape
    (2, 3)
    """
    if x.ndim != 2 or x.shape[1] % BLOCK:
        raise ValueError(f"x has shape {x.shape}: it must be [rows, width], width a multiple of {BLOCK} in FP8")
    _check_dtype("x", x, DTYPES)
    chosen = registry.choose("quantise", backend, x)
    return registry.dispatch(chosen, "quantise_rows", scaled.quantise_rows, x, power_of_two=power_of_two)


def quantise(
    x: Float[Array, "R K"],
    valid: Int[Array, " blocks"] | None = None,
    *,
    power_of_two: bool = True,
    backend: Backend = "auto",
) -> tuple[ScaledRows, ScaledRows]:
    """Rows scaled along themselves, and the same values transposed and scaled along the rows.

    Args:
      x: bfloat16, float16 or float32; both sides are multiples of 128.
      valid: int32, how many rows of each 128 belong to their group; None: all.
      power_of_two: see `eplb_jax.kernels.scaled.scale_of`.
      backend: "auto" takes our own kernel for Hopper GPUs where it can, and else "xla"; "mosaic" insists on the kernel.

    Returns:
      `ScaledRows` with numbers [R, K], and with numbers [K, R].

    Raises:
      ValueError: sides that are no multiples of 128; another dtype; ``valid`` of another shape; "mosaic" for what it
        cannot do.

    >>> rows, columns = quantise(jnp.ones((256, 128), jnp.bfloat16), jnp.array([128, 3]))
    >>> rows.numbers.shape, columns.numbers.shape, columns.scales.shape, float(columns.numbers[0, 131])
    ((256, 128), (128, 256), (2, 128), 0.0)
    """
    _check("x", x, valid)
    chosen = registry.choose("quantise", backend, x)
    operands = (x,) if valid is None else (x, valid)
    return registry.dispatch(chosen, "quantise", quantise_by_xla, *operands, power_of_two=power_of_two)


def quantise_by_xla(x: jax.Array, valid: Any = None, *, power_of_two: bool) -> tuple[ScaledRows, ScaledRows]:
    """`quantise` for every platform."""
    columns = quantise_columns(_without_invalid(x, valid), power_of_two=power_of_two)
    return scaled.quantise_rows(x, power_of_two=power_of_two), columns


def columns_of(
    rows: ScaledRows,
    valid: Int[Array, " blocks"] | None = None,
    *,
    power_of_two: bool = True,
    backend: Backend = "auto",
) -> ScaledRows:
    """The values of rows that are quantised, transposed and scaled along the rows.

    With scales that are powers of two, here and in ``rows``, only what becomes subnormal is rounded.

    Args:
      rows: numbers [R, K], both multiples of 128.
      valid, power_of_two, backend: see `quantise`.

    Returns:
      `ScaledRows` with numbers [K, R].

    Raises:
      ValueError: see `quantise`.

    >>> rows, columns = quantise(jnp.linspace(-1, 1, 2**15).reshape(256, 128))
    >>> again = columns_of(rows)
    >>> bool((again.scales == columns.scales).all()), again.numbers.shape
    (True, (128, 256))
    """
    _check("rows", rows.numbers, valid, ("float8_e4m3fn",))
    chosen = registry.choose("quantise", backend, rows.numbers)
    operands = rows if valid is None else (*rows, valid)
    return registry.dispatch(chosen, "columns_of", columns_of_by_xla, *operands, power_of_two=power_of_two)


def columns_of_by_xla(numbers: jax.Array, scales: jax.Array, valid: Any = None, *, power_of_two: bool) -> ScaledRows:
    """`columns_of` for every platform."""
    x = dequantise_rows(ScaledRows(numbers, scales))
    return quantise_columns(_without_invalid(x, valid), power_of_two=power_of_two)


def quantise_weights(
    w: Float[Array, "G K N"], *, power_of_two: bool = True, backend: Backend = "auto"
) -> tuple[ScaledMatrices, ScaledMatrices]:
    """Matrices for a product with rows of K numbers, and for its input gradient with rows of N; the same numbers.

    Args:
      w: bfloat16, float16 or float32; K and N are multiples of 128.
      power_of_two, backend: see `quantise`.

    Returns:
      `ScaledMatrices` with numbers [G, N, K], and with numbers [G, K, N].

    Raises:
      ValueError: sides that are no multiples of 128; another dtype; "mosaic" for what it cannot do.

    >>> forward, backward = quantise_weights(jnp.ones((2, 128, 256)))
    >>> forward.numbers.shape, forward.scales.shape, backward.numbers.shape
    ((2, 256, 128), (2, 2, 1), (2, 128, 256))
    """
    if w.ndim != 3:
        raise ValueError(f"w has shape {w.shape}: it must be [groups, K, N]; take w[None] for a single matrix")
    if w.shape[1] % BLOCK or w.shape[2] % BLOCK:
        raise ValueError(f"w has shape {w.shape}: K and N must be multiples of {BLOCK} in FP8")
    _check_dtype("w", w, DTYPES)
    chosen = registry.choose("quantise", backend, w)
    return registry.dispatch(chosen, "quantise_weights", quantise_weights_by_xla, w, power_of_two=power_of_two)


def quantise_weights_by_xla(w: jax.Array, *, power_of_two: bool) -> tuple[ScaledMatrices, ScaledMatrices]:
    """`quantise_weights` for every platform."""
    backward = quantise_matrices(w, power_of_two=power_of_two)
    return backward.transposed(), backward


def gate(
    hidden: Float[Array, "R FF"],
    weight: Float[Array, " R"],
    *,
    power_of_two: bool = True,
    backend: Backend = "auto",
) -> tuple[ScaledRows, ScaledRows]:
    """`eplb_jax.moe.experts.swiglu` of rows, quantised, and the rows themselves, quantised for the backward pass.

    Args:
      hidden: gate and value side by side, bfloat16, float16 or float32; each half a multiple of 128 wide.
      weight: of each row, float32.
      power_of_two, backend: see `quantise`.

    Returns:
      ``silu(gate) * value * weight``, made of ``hidden`` as it is and never rounded to 16 bits: `ScaledRows` with
      numbers [R, F]; and those of ``hidden``, [R, FF].

    Raises:
      ValueError: halves that are no multiples of 128; another dtype; weights of another shape or dtype; "mosaic" for
        what it cannot do.

    >>> act, kept = gate(jnp.ones((3, 256), jnp.bfloat16), jnp.ones(3))
    >>> act.numbers.shape, act.scales.shape, kept.numbers.shape
    ((3, 128), (1, 3), (3, 256))
    """
    _check_halves(hidden, DTYPES)
    _check_weight(weight, hidden.shape[0])
    chosen = registry.choose("scaled_gate", backend, hidden)
    return registry.dispatch(chosen, "gate", gate_by_xla, hidden, weight, power_of_two=power_of_two)


def gate_by_xla(hidden: jax.Array, weight: jax.Array, *, power_of_two: bool) -> tuple[ScaledRows, ScaledRows]:
    """`gate` for every platform."""
    gates, values = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    act = gated(gates, values, jnp.broadcast_to(weight[:, None], gates.shape))
    return scaled.quantise_rows(act, power_of_two=power_of_two), scaled.quantise_rows(hidden, power_of_two=power_of_two)


def gate_backward(
    hidden: ScaledRows,
    weight: Float[Array, " R"],
    ct: Float[Array, "R F"],
    valid: Int[Array, " blocks"] | None = None,
    *,
    power_of_two: bool = True,
    backend: Backend = "auto",
) -> GateGradients:
    """The gradients of `gate`'s arguments, and its result again, from what it kept.

    Args:
      hidden: what `gate` kept of its argument; R and half of its width are multiples of 128.
      weight: of each row, float32.
      ct: the gradient of the result, bfloat16, float16 or float32.
      valid, power_of_two, backend: see `quantise`.

    Raises:
      ValueError: see `quantise` and `gate`; ``ct`` of another shape.

    >>> _, kept = gate(jnp.ones((128, 256), jnp.bfloat16), jnp.ones(128))
    >>> found = gate_backward(kept, jnp.ones(128), jnp.ones((128, 128), jnp.bfloat16))
    >>> found.hidden.numbers.shape, found.hidden_columns.numbers.shape, found.act_columns.numbers.shape
    ((128, 256), (256, 128), (128, 128))
    """
    _check("hidden", hidden.numbers, valid, ("float8_e4m3fn",))
    _check_halves(hidden.numbers, ("float8_e4m3fn",))
    rows, width = hidden.numbers.shape
    if ct.shape != (rows, width // 2):
        raise ValueError(f"ct has shape {ct.shape}: it must be {(rows, width // 2)}, half as wide as hidden")
    _check_dtype("ct", ct, DTYPES)
    _check_weight(weight, rows)
    chosen = registry.choose("scaled_gate", backend, hidden.numbers)
    operands = (*hidden, weight, ct) if valid is None else (*hidden, weight, ct, valid)
    return registry.dispatch(chosen, "gate_backward", gate_backward_by_xla, *operands, power_of_two=power_of_two)


def gate_backward_by_xla(
    numbers: jax.Array, scales: jax.Array, weight: jax.Array, ct: jax.Array, valid: Any = None, *, power_of_two: bool
) -> GateGradients:
    """`gate_backward` for every platform."""
    gate, value = jnp.split(dequantise_rows(ScaledRows(numbers, scales)), 2, axis=-1)
    found = gradients(gate, value, jnp.broadcast_to(weight[:, None], ct.shape), ct.astype(jnp.float32))
    hidden_ct = jnp.concatenate([found.gate, found.value], -1)
    rows, columns = quantise_by_xla(hidden_ct, valid, power_of_two=power_of_two)
    act = quantise_columns(_without_invalid(found.act, valid), power_of_two=power_of_two)
    return GateGradients(rows, columns, act, found.weight.sum(-1))


def _without_invalid(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Zeros in place of rows that belong to no group."""
    if valid is None:
        return x
    used = jnp.arange(BLOCK, dtype=jnp.int32) < valid[:, None]
    return jnp.where(used.reshape(-1, 1), x, jnp.zeros((), x.dtype))


def _check(name: str, x: Any, valid: Any, dtypes: tuple[str, ...] = DTYPES) -> None:
    """Raises ValueError for what cannot be scaled along rows."""
    if x.ndim != 2 or x.shape[0] % BLOCK or x.shape[1] % BLOCK:
        raise ValueError(f"{name} has shape {x.shape}: it must be [rows, width], both multiples of {BLOCK} in FP8")
    _check_dtype(name, x, dtypes)
    blocks = x.shape[0] // BLOCK
    if valid is not None and (valid.shape != (blocks,) or valid.dtype != jnp.int32):
        raise ValueError(
            f"valid is {valid.dtype}{list(valid.shape)}: it must be int32[{blocks}], how many of each {BLOCK} of the "
            f"{x.shape[0]} rows belong to their group"
        )


def _check_halves(hidden: Any, dtypes: tuple[str, ...]) -> None:
    """Raises ValueError for what is no gate beside a value."""
    if hidden.ndim != 2 or hidden.shape[1] % (2 * BLOCK):
        raise ValueError(
            f"hidden has shape {hidden.shape}: it must be [rows, 2 * F], F a multiple of {BLOCK} in FP8: gate and value"
        )
    _check_dtype("hidden", hidden, dtypes)


def _check_weight(weight: Any, rows: int) -> None:
    if weight.shape != (rows,) or weight.dtype != jnp.float32:
        raise ValueError(f"weight is {weight.dtype}{list(weight.shape)}: it must be float32[{rows}], one for each row")


def _check_dtype(name: str, x: Any, dtypes: tuple[str, ...]) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}: it must be {' or '.join(dtypes)}; cast it, or train in bfloat16")
