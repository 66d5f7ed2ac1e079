"""What all balancers make of their loads, and where they run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from eplb_jax._jax import Tracer

P = ParamSpec("P")
T = TypeVar("T")


def check_loads(weight: Any, name: str = "weight") -> Any:
    """The loads as an array of JAX or NumPy, lists and what else NumPy reads included.

    Raises ValueError unless they are [layers, items], finite and at least zero (values: where known).
    """
    if not isinstance(weight, jax.Array | np.ndarray):
        try:
            weight = np.asarray(weight)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is no array of loads: {error}") from error
    dtype = weight.dtype
    if dtype != np.bool_ and not jnp.issubdtype(dtype, np.integer) and not jnp.issubdtype(dtype, np.floating):
        raise ValueError(
            f"{name} has dtype {dtype}: loads are integers or floats, so convert them, as by astype(float)"
        )
    shape = np.shape(weight)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{name} has shape {shape}: it must be [layers, experts], neither empty; add or select an axis"
        )
    if isinstance(weight, Tracer):
        return weight
    host = np.asarray(weight)
    bad = ~np.isfinite(host) | (host < 0)
    if bad.any():
        layer, expert = np.argwhere(bad)[0].tolist()
        raise ValueError(
            f"{name} has {bad.sum()} values that are negative or not finite, the first is {host[layer, expert]} at "
            f"[layer, expert] [{layer}, {expert}]: loads are counts of tokens"
        )
    return weight


def to_float32(weight: Any) -> Any:
    """Loads as float32, NumPy's or JAX's; layers of extreme loads times a power of two, which no plan depends on.

    Sums of a layer's loads would be infinite, or loads zero, where the largest is beyond 2**100 or below 2**-100.
    Within `jax.jit`, where nothing can be refused, what is negative or NaN counts as no load, and infinity as the
    largest number: a plan always has all experts.
    """
    if isinstance(weight, Tracer):
        weight = jnp.maximum(weight, jnp.zeros((), weight.dtype)) if weight.dtype != jnp.bool_ else weight
        weight = jnp.nan_to_num(weight, nan=0.0) if jnp.issubdtype(weight.dtype, jnp.floating) else weight
    xp = jnp if isinstance(weight, jax.Array) else np
    weight = xp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, np.float32) and not jnp.issubdtype(weight.dtype, np.float64):
        weight = weight.astype(np.float32)
    most = weight.max(1, keepdims=True)
    exponent = xp.frexp(most)[1]
    extreme = (most > 0) & (abs(exponent) > 100)
    if isinstance(extreme, np.ndarray) and not extreme.any():
        return weight.astype(np.float32)
    return xp.ldexp(weight, xp.where(extreme, -exponent, 0)).astype(np.float32)


def in_callers_width(function: Callable[P, T]) -> Callable[P, T]:
    """The function with `jax.enable_x64` as it is here, for a thread, which does not inherit it."""
    wide = jnp.result_type(float) == jnp.float64

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.enable_x64(wide):
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Arrays made within are on the CPU, where there is one: plans for the host are made there."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        yield
    else:
        with jax.default_device(device):
            yield
